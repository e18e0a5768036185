"""What `--help` prints, made from the signatures and docstrings of the commands and from the settings."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

from rdsnet.cli.options import REQUIRED, Command, Option, docstring, options_of, title
from rdsnet.config import SETTINGS, Config, flat_settings, sections
from rdsnet.settings import helps

USUAL = {
    "data": ("train", "val", "train_images", "val_images", "short_side"),
    "train": ("epochs", "batch_size", "precision"),
}
"""settings that `--help` shows beside a command's own options; `--help_all` shows all"""


def overview(commands: Mapping[str, Command]) -> str:
    lines = ["usage: rdsnet COMMAND [options]", "", "RDSNet: objects as tight boxes and full-resolution masks.", ""]
    for name, command in commands.items():
        lines += _row(name, docstring(command)[0].partition("\n")[0], column=14)
    return "\n".join([*lines, "", "rdsnet COMMAND --help explains a command; rdsnet --version says which this is."])


def explain(command: Command, base: Callable[[], Config], *, everything: bool = False) -> str:
    """The help of a command.

    Args:
        base: gives the settings whose values are shown as defaults, where the command takes settings.
        everything: all settings, in groups, and not the usual ones only.
    """
    options = options_of(command)
    own = [option for option in options if option.parameter != "settings"]
    lines = [*_wrapped(_usage(command, own), later=7), "", *docstring(command)[0].splitlines(), ""]
    for option in own:
        name = f"{option.name.upper()}, --{option.name}" if option.unnamed else f"--{option.name}"
        lines += _row(name, option.help + _notes(option.help, option.takes, option.default))
    if len(own) < len(options):
        lines += _settings(base(), everything)
        more = "A list is typed as '[3, 4, 5]'." if everything else f"{title(command)} --help_all shows all settings."
        lines += ["", *_wrapped(f"{more} Their defaults are those of the preset that is named.")]
    return "\n".join(lines)


def _usage(command: Command, options: list[Option]) -> str:
    parts = [f"usage: {title(command)}"]
    for option in options:
        if option.unnamed:
            parts.append(option.name.upper() if option.required else f"[{option.name.upper()}]")
        elif option.required:
            parts.append(f"--{option.name} {option.takes.upper()}")
    return " ".join([*parts, "[options]"])


def _settings(config: Config, everything: bool) -> list[str]:
    values = flat_settings(config)
    lines = []
    for section, kind in {**sections(), "": Config}.items():
        if everything:
            lines += ["", f"{section}: {(kind.__doc__ or '').splitlines()[0]}" if section else "all:"]
        texts = helps(kind)
        for name, setting in SETTINGS.items():
            group, _, field = name.rpartition(".")
            if group == section and (everything or field in USUAL.get(section, ())):
                text, value = texts.get(field, ""), values[name]
                value = list(value) if isinstance(value, tuple) else value
                lines += _row(f"--{name}", text + _notes(text, setting.takes.removeprefix("a "), value))
    return lines


def _notes(text: str, takes: str, default: Any) -> str:
    """What an option takes, and its default where there is one that the text does not say."""
    if not takes:  # a flag
        return ""
    if default is None or default is REQUIRED or default == () or "default:" in text:
        return f" [{takes}]"
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    return f" [{takes}; default: {shown.lower() if isinstance(default, bool) else shown}]"


def _row(name: str, text: str, column: int = 28) -> list[str]:
    """A name, and beside or below it, from a column on, its explanation."""
    lines = _wrapped(text.strip(), first=column, later=column)
    left = f"  {name}".ljust(column)
    return [left + lines[0][column:], *lines[1:]] if len(left) == column else [left, *lines]


def _wrapped(text: str, first: int = 0, later: int = 0) -> list[str]:
    width = min(shutil.get_terminal_size().columns, 120) - 1
    wrapper = textwrap.TextWrapper(width, " " * first, " " * later, break_on_hyphens=False)
    return wrapper.wrap(text) or [""]
