"""What `--help` prints, made from the signatures and docstrings of the commands."""

from __future__ import annotations

import inspect
import shutil
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from rdsnet.cli.options import REQUIRED, Command, Option, docstring, options_of, title
from rdsnet.config import Config, flat_settings
from rdsnet.settings import helps

COLUMN = 28  # where the explanations begin

USUAL = {
    "data": ("train", "val", "train_images", "val_images", "short_side"),
    "train": ("epochs", "batch_size", "precision"),
}
"""settings that `--help` shows beside a command's own options; `--help_all` shows all"""


def overview(commands: Mapping[str, Command]) -> str:
    lines = ["usage: rdsnet COMMAND [options]", "", "RDSNet: objects as tight boxes and full-resolution masks.", ""]
    lines += [
        line for name, command in commands.items() for line in _row(name, docstring(command)[0].partition("\n")[0], 14)
    ]
    return "\n".join([*lines, "", "rdsnet COMMAND --help explains a command; rdsnet --version says which this is."])


def explain(command: Command, base: Callable[[], Config], *, everything: bool = False) -> str:
    """The help of a command.

    Args:
        base: gives the settings whose values are shown as defaults, where the command takes settings.
        everything: all settings, in groups, and not the usual ones only.
    """
    summary, _ = docstring(command)
    options = [option for option in options_of(command) if option.parameter != "settings"]
    lines = [*_wrapped(_usage(command, options), "       "), "", *summary.splitlines(), ""]
    for option in options:
        lines += _row(_names(option), _explained(option.help, option.takes, option.default))
    settings = [option for option in options_of(command) if option.parameter == "settings"]
    if not settings:
        return "\n".join(lines)
    values, explanations = flat_settings(base()), _setting_texts()
    shown = settings if everything else [option for option in settings if _is_usual(option.name)]
    section = "settings"
    for option in shown:
        group = option.name.rpartition(".")[0]
        if everything and group != section:
            section = group
            lines += ["", *_wrapped(f"{group}: {_summary(get_type_hints(Config)[group])}" if group else "all")]
        lines += _row(_names(option), _explained(explanations.get(option.name, ""), option.takes, values[option.name]))
    more = "Lists are written '[3, 4, 5]'." if everything else f"{title(command)} --help_all shows all settings."
    return "\n".join([*lines, "", *_wrapped(f"{more} The defaults are those of the preset that is named.")])


def _usage(command: Command, options: list[Option]) -> str:
    parts = [f"usage: {title(command)}"]
    for option in options:
        if option.unnamed:
            parts.append(option.name.upper() if option.required else f"[{option.name.upper()}]")
        elif option.required:
            parts.append(f"--{option.name} {option.takes.upper()}")
    return " ".join([*parts, "[options]"])


def _is_usual(name: str) -> bool:
    section, _, field = name.rpartition(".")
    return field in USUAL.get(section, ())


def _names(option: Option) -> str:
    return f"{option.name.upper()}, --{option.name}" if option.unnamed else f"--{option.name}"


def _explained(text: str, takes: str, default: Any) -> str:
    """With what the option takes, and its default where there is one that the text does not say."""
    if not takes:
        return text
    if default is None or default is REQUIRED or default == () or "default:" in text:
        return f"{text} [{takes}]".strip()
    shown = str(default).lower() if isinstance(default, bool) else default
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else shown
    return f"{text} [{takes}; default: {shown}]".strip()


def _setting_texts() -> dict[str, str]:
    """What stands below each setting, by its dotted name."""
    sections = {
        name: kind for name, kind in get_type_hints(Config).items() if inspect.isclass(kind) and kind is not int
    }
    texts = {name: text for name, text in helps(Config).items() if name not in sections}
    return texts | {f"{name}.{field}": text for name, kind in sections.items() for field, text in helps(kind).items()}


def _summary(section: type) -> str:
    return (inspect.getdoc(section) or "").partition("\n")[0]


def _row(name: str, text: str, column: int = COLUMN) -> list[str]:
    lines = _wrapped(text, " " * column, " " * column)
    left = f"  {name}".ljust(column)
    return [left + lines[0][column:], *lines[1:]] if len(left) == column else [left, *lines]


def _wrapped(text: str, later: str = "", first: str = "") -> list[str]:
    width = min(shutil.get_terminal_size().columns, 120) - 1
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=later, break_on_hyphens=False) or [""]
