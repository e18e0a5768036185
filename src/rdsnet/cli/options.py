"""How the signature of a command becomes its options, and the types that options share.

Parameters before `*` may be given without their names, in order; those after it by name only. What may be None need not
be given. The docstring has a help for each parameter under "Args:", but for those whose type brings one. `**settings`
stands for every setting of a run, by its dotted name.

Nothing here imports torch: what these types refuse is answered at once.
"""

from __future__ import annotations

import inspect
import re
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from rdsnet.config import SETTINGS, read_config
from rdsnet.files import forbid_folder, require_file, require_folder
from rdsnet.presets import PRESETS
from rdsnet.settings import Range, Setting, nearest
from rdsnet.weights.bundled import WEIGHTS, find_weights

Command = Callable[..., None]


class Name(NamedTuple):
    """The option's name, where Python cannot spell it."""

    name: str


class Help(NamedTuple):
    """What is said of every option of a type."""

    text: str


class Check(NamedTuple):
    """What an option takes, in words, and a function that raises where something else came."""

    takes: str
    require: Callable[[Any], object]


def require_source(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")


def require_images(path: Path) -> None:
    if not path.is_dir():
        raise FileNotFoundError(f"no such folder: {path}")


def require_preset(name: str) -> None:
    if name not in PRESETS:
        known = nearest(name, PRESETS) or f"; the presets are {', '.join(PRESETS)}"
        raise ValueError(f"unknown preset {name!r}{known}")


File = Annotated[Path, Check("file", require_file)]
Source = Annotated[Path, Check("file or folder", require_source)]
Folder = Annotated[Path, Check("folder", require_images)]
RunFolder = Annotated[Path, Check("folder", read_config)]
NewFile = Annotated[Path, Check("file", forbid_folder)]
NewFolder = Annotated[Path, Check("folder", require_folder)]
Weights = Annotated[
    str, Check(f"{', '.join(WEIGHTS)}, a run folder or a .safetensors file", find_weights), Help("of the model")
]
Preset = Annotated[str, Check(f"one of {', '.join(PRESETS)}", require_preset)]
Count = Annotated[int, Range(1)]
Share = Annotated[float, Range(0, 1)]
Device = Annotated[Literal["auto", "cpu", "cuda"], Help("auto: a GPU where there is one")]
Precision = Annotated[
    Literal["auto", "32", "bf16", "bf16-forced"],
    Help("of the network; auto: bf16 where the processor or GPU has instructions for it; bf16-forced: anywhere"),
]
PictureKind = Literal["overlay", "uncertainty", "comparison", "refinement", "representations", "all"]
Compile = Annotated[bool, Help("compile the network, which takes a minute at first")]


class Option(NamedTuple):
    """An option of a command.

    Attributes:
        name: as it is typed, without dashes.
        parameter: of the function.
        help: what it is for.
        kind: what each of its words is.
        words: how many it takes; None: one or more.
        default: `REQUIRED` where there is none.
        check: what else each word must be.
        nullable: "null" may be given, for None.
        unnamed: may be given without its name.
    """

    name: str
    parameter: str
    help: str
    kind: Any
    words: int | None
    default: Any
    check: Check | None = None
    nullable: bool = False
    unnamed: bool = False

    @property
    def required(self) -> bool:
        return self.default is REQUIRED

    @property
    def takes(self) -> str:
        """In words: "whole number, 1 or more"."""
        takes = self.check.takes if self.check else Setting(self.name, self.kind).takes.removeprefix("a ")
        return "" if self.words == 0 else takes if self.words == 1 else f"{self.words or 'one or more'}, each {takes}"

    def read(self, words: list[str]) -> Any:
        """The argument of the function. Raises ValueError or FileNotFoundError for what the option does not take."""
        if not words:
            return True
        if self.nullable and words == ["null"]:
            return None
        values = tuple(self._read(word) for word in words)
        return values if self.words is None or self.words > 1 else values[0]

    def _read(self, word: str) -> Any:
        if self.check is None:
            return Setting(f"--{self.name}", self.kind).read_text(word)
        value = self.kind(word)
        self.check.require(value)
        return value


REQUIRED = inspect.Parameter.empty


def options_of(command: Command) -> list[Option]:
    types = get_type_hints(command, include_extras=True)
    _, helps = docstring(command)
    options = []
    for name, parameter in inspect.signature(command).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            options += [Option(setting, name, "", own.kind, 1, None) for setting, own in SETTINGS.items()]
        else:
            options.append(_option(parameter, types[name], helps.get(name)))
    return options


def _option(parameter: inspect.Parameter, kind: Any, help: str | None) -> Option:
    kind, notes = _unfold(kind)
    nullable = None in notes
    name = next((note.name for note in notes if isinstance(note, Name)), parameter.name)
    words: int | None = 0 if kind is bool else 1
    if get_origin(kind) is tuple:
        item, *others = get_args(kind)
        words = None if others == [...] else 1 + len(others)
        kind, own = _unfold(item)
        notes = [*notes, *own]
    limits = [note for note in notes if isinstance(note, Range)]
    return Option(
        name=name,
        parameter=parameter.name,
        help=help or next((note.text for note in notes if isinstance(note, Help)), ""),
        kind=Annotated[(kind, *limits)] if limits else kind,
        words=words,
        default=None if nullable and parameter.default is REQUIRED else parameter.default,
        check=next((note for note in notes if isinstance(note, Check)), None),
        nullable=nullable,
        unnamed=parameter.kind is parameter.POSITIONAL_OR_KEYWORD,
    )


def docstring(command: Command) -> tuple[str, dict[str, str]]:
    """What a command does, and what each parameter is for, by its name."""
    summary, _, arguments = (inspect.getdoc(command) or "").partition("\n\nArgs:\n")
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", arguments, re.MULTILINE)
    return summary, {name: " ".join(text.split()) for name, text in entries}


def _unfold(kind: Any) -> tuple[Any, list[Any]]:
    """A type without what `Annotated` adds and without None, and these."""
    parts = get_args(kind)
    if get_origin(kind) is Annotated:
        inner, notes = _unfold(parts[0])
        return inner, [*notes, *parts[1:]]
    if NoneType in parts:
        inner, notes = _unfold(next(part for part in parts if part is not NoneType))
        return inner, [*notes, None]
    return kind, []


def parse(command: Command, words: Sequence[str]) -> dict[str, Any]:
    """The arguments of a command that was typed.

    Raises:
        ValueError, FileNotFoundError: an option is unknown, missing, or takes something else; names it.
    """
    options = {option.name: option for option in options_of(command)}
    given = _by_name(options, words)
    missing = [f"--{option.name}" for option in options.values() if option.required and option.name not in given]
    if missing:
        raise ValueError(f"{title(command)} needs {', '.join(missing)}; see {title(command)} --help")
    arguments = {option.parameter: option.default for option in options.values() if option.unnamed}
    for name in sorted(given, key=lambda name: options[name].check is not None):  # files are looked for last
        parameter = options[name].parameter
        arguments[name if parameter == "settings" else parameter] = options[name].read(given[name])
    return arguments


def _by_name(options: dict[str, Option], words: Sequence[str]) -> dict[str, list[str]]:
    """The words of each option, in the order of the options."""
    given: dict[str, list[str]] = {}
    unnamed: deque[str] = deque()
    rest = deque(words)
    while rest:
        word = rest.popleft()
        if not is_option(word):
            unnamed.append(word)
            continue
        name, equals, value = word.lstrip("-").partition("=")
        name = name.replace("-", "_")
        option = options.get(name)
        if option is None or not word.startswith("--"):
            meant = next((own for own in HABITS.get(name.rpartition(".")[2], ()) if own in options), name)
            advice = nearest(meant, options, "--") or "; --help lists the options"
            raise ValueError(f"unknown option {word.partition('=')[0]}{advice}")
        own = [value] if equals else []
        most = len(rest) if option.words is None else option.words
        while not equals and rest and len(own) < most and not rest[0].startswith("--"):
            own.append(rest.popleft())
        if len(own) < (1 if option.words is None else option.words):
            raise ValueError(f"--{option.name} needs a value: {option.takes}")
        # of an option given twice the last counts, but files of settings go one over the other
        given[option.name] = given.get(option.name, []) + own if option.words is None else own
    free = [option for option in options.values() if option.unnamed and option.name not in given]
    spare = len(unnamed) - sum(option.required for option in free)
    for option in free:
        if unnamed and (option.required or spare > 0):
            spare -= not option.required
            given[option.name] = [unnamed.popleft()]
    if unnamed:
        raise ValueError(f"unexpected {unnamed[0]!r}: there is no option left that it could belong to")
    return {name: given[name] for name in options if name in given}


def is_option(word: str) -> bool:
    return word.startswith("-") and not word[1:2].isdigit() and word != "-"


def title(command: Command) -> str:
    """As it is typed: `rdsnet fit-refiner`."""
    return f"rdsnet {command.__name__.replace('_', '-')}"


HABITS = {
    "batch": ("train.batch_size", "batch_size", "batch_sizes"),
    "conf": ("threshold",),
    "data": ("data.train", "data.val", "truth"),
    "imgsz": ("data.short_side", "size"),
    "iou": ("detect.nms_iou",),
    "model": ("weights", "preset"),
    "name": ("output",),
    "o": ("output",),
    "out": ("output",),
    "pretrained": ("init",),
    "project": ("output",),
    "val": ("data.val",),
}
"""Options of other tools, and those of ours that are meant: of a command, the first that it has."""
