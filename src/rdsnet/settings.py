"""What a setting may be: its type and range stand at the field, and are checked in one way from every entrance.

Also `Rules`, the settings that are handed whole to the network. Free of torch, for a command line that answers at once.
"""

from __future__ import annotations

import ast
import inspect
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, is_dataclass, replace
from difflib import get_close_matches
from functools import cache
from itertools import pairwise
from numbers import Integral, Real
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """What a number may be: from `low` to `high`, `above` one number and `below` another."""

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high and self.above < value < self.below

    def __str__(self) -> str:
        if math.isfinite(self.low) and math.isfinite(self.high):
            return f"{self.low} to {self.high}"
        ends = {f"{self.low} or more": self.low, f"above {self.above}": self.above, f"below {self.below}": self.below}
        return " and ".join(text for text, end in ends.items() if math.isfinite(end))


@dataclass(frozen=True)
class Listed:
    """What a list may be: `filled`, and `rising`, where equal neighbours are allowed."""

    filled: bool = False
    rising: bool = False

    def holds(self, values: tuple[float, ...]) -> bool:
        return len(values) >= self.filled and not (self.rising and any(b < a for a, b in pairwise(values)))

    def __str__(self) -> str:
        return ", ".join(["not empty"] * self.filled + ["the smaller first"] * self.rising)


@dataclass(frozen=True)
class Rules:
    """Where the authors' release, torchvision or YOLACT do otherwise than the paper, whose way is the default."""

    inclusive: bool = False
    """boxes end with their last pixel where that matters: in clipping, in resizing, in sigma (the release)"""
    anchor_rounding: bool = False
    """corners of anchors are rounded to whole pixels, halves to even (the release and torchvision)"""
    anchor_grid: Literal["cells", "torchvision"] = "cells"
    """anchors centred on their cells, or whole-sided ones centred at multiples of floor(input / cells)"""
    square_priors: bool = False
    """height is set to the width, whatever the ratio: an old slip that YOLACT's weights were trained with"""
    align_corners: bool = False
    """corners aligned in the pixel stream's upsampling (the release)"""
    spread_masks: bool = True
    """every object gets its first mask instance before any gets its second; false: drawn at random (the release)"""
    min_mask_area: Annotated[float, Range(0)] = 0.0
    """objects whose mask is not larger (pixels) make no mask loss (the release: 100)"""
    crop_rule: Literal["centre", "truncate"] = "centre"
    """pixels of a fractional crop: those whose centre lies inside, or corners truncated (the release)"""
    two_steps: bool = False
    """logits reach the image through the network's size, corners aligned in the second step (the release)"""
    one_scale: bool = False
    """boxes reach the image by the one factor that its size was multiplied by, whatever rounding did (the release)"""
    pre_nms_pairs: bool = False
    """of the anchors before NMS go on as many (anchor, class) pairs only (torchvision)"""
    keep_empty: bool = False
    """boxes stay that have no width or height in the image, as anchors in the padding may give (torchvision)"""
    whole_boxes: bool = False
    """boxes are clipped after NMS and masks only, and end as whole pixels, truncated (YOLACT)"""
    prior_cut: Annotated[float, Range(0, below=1)] | None = None
    """values of MBRM's prior up to this share of its peak become 0 (the release: 0.0044); null: none"""
    keep_without_evidence: bool = True
    """an edge that the mask says nothing of keeps its regressed value; false: the prior decides (the release)"""


class Setting(NamedTuple):
    """A setting by its dotted name, with the type of its field."""

    name: str
    kind: Any

    @property
    def takes(self) -> str:
        return _describe(self.kind)

    def read(self, value: Any) -> Any:
        """The value as the field holds it: a tuple for a list, a float for a whole number.

        Raises:
            ValueError: it is of another type or out of range; names the setting, what it takes, and what was meant.
        """
        try:
            return _read(value, self.kind)
        except (ValueError, OverflowError):
            meant = nearest(value, _choices(self.kind)) if isinstance(value, str) else ""
            raise ValueError(f"{self.name} is {value!r}, expected {self.takes}{meant}") from None

    def read_text(self, text: str) -> Any:
        """The value of what the command line says: YAML, except where text is wanted."""
        parts = get_args(self.kind)
        nullable = NoneType in parts
        if any(map(_is_text, parts if nullable else [self.kind])) and not (nullable and text == "null"):
            return self.read(text)
        try:
            value = read_yaml(text)
        except ValueError:
            value = text  # which the check refuses
        return self.read(value)


def kinds_of(section: type) -> dict[str, Any]:
    """The types of a dataclass' fields; a dict holds sections of its own and is no setting."""
    hints = get_type_hints(section, include_extras=True)
    return {name: kind for name, kind in hints.items() if get_origin(kind) is not dict}


@cache
def settings(section: type, path: str = "") -> dict[str, Setting]:
    """The settings in a dataclass and in those that it holds, by dotted name."""
    found: dict[str, Setting] = {}
    for field, kind in kinds_of(section).items():
        name = path + field
        found |= (
            settings(kind, f"{name}.") if isinstance(kind, type) and is_dataclass(kind) else {name: Setting(name, kind)}
        )
    return found


def helps(section: Any) -> dict[str, str]:
    """What stands below the fields of a dataclass, by their names."""
    (definition,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(definition, ast.ClassDef)
    texts = {}
    for field, text in pairwise(definition.body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            texts[ast.unparse(field.target)] = " ".join(ast.literal_eval(text.value).split())
    return texts


def over(node: T, changes: Any, path: str = "") -> T:
    """A copy of a dataclass of settings with changes over it, as nested mappings.

    Raises:
        ValueError: names every setting that is unknown or has a wrong value.
    """
    if not isinstance(changes, Mapping):
        raise ValueError(f"{path.rstrip('.') or 'the whole'} is {changes!r}, expected settings by name")
    kinds = kinds_of(type(node))
    values, wrong = {}, []
    for key, value in changes.items():
        name = f"{path}{key}"
        try:
            if key not in kinds:
                valid = [path + field for field in kinds]
                advice = nearest(name, valid) or f"; there are {', '.join(valid)}"
                raise ValueError(f"unknown setting {name!r}{advice}")
            if is_dataclass(kinds[key]):
                values[key] = over(getattr(node, key), value, f"{name}.")
            else:
                values[key] = Setting(name, kinds[key]).read(value)
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError("; ".join(wrong))
    return replace(node, **values)  # type: ignore[type-var]


def nearest(name: str, known: Iterable[str], dashes: str = "") -> str:
    """A question to end an error with, or nothing: the known name with the same last part, or else one much alike."""
    known = list(known)
    leaf = name.rpartition(".")[2]
    leaves = {other.rpartition(".")[2]: other for other in reversed(known)}
    near = [leaves[leaf]] if leaf in leaves else get_close_matches(name, known, n=1, cutoff=0.75)
    near += [leaves[other] for other in get_close_matches(leaf, leaves, n=1)]
    return f"; did you mean {dashes}{near[0]}?" if near else ""


def read_yaml(text: str) -> Any:
    """The content of a YAML text, where numbers may be written 1e-3.

    Raises:
        ValueError: it is no YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from None


class _Loader(yaml.SafeLoader):
    """Without this, YAML 1.1 takes 1e-3 for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _is_text(kind: Any) -> bool:
    return kind is str or get_origin(kind) is Literal


def _choices(kind: Any) -> list[str]:
    """The words that a type names."""
    parts = get_args(kind)
    return list(parts) if get_origin(kind) is Literal else [word for part in parts for word in _choices(part)]


def _read(value: Any, kind: Any) -> Any:
    """The value as a field of this type holds it; a ValueError, OverflowError where it cannot."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        value = _read(value, parts[0])
        _require(all(limit.holds(value) for limit in parts[1:]))
        return value
    if NoneType in parts:
        return None if value is None else _read(value, next(part for part in parts if part is not NoneType))
    if origin is Literal:
        _require(isinstance(value, str) and value in parts)
        return value
    if origin is tuple:
        if isinstance(value, str) and _is_text(parts[0]):
            value = [value]
        _require(isinstance(value, list | tuple))
        kinds = parts[:1] * len(value) if parts[-1] is ... else parts
        return tuple(_read(item, own) for item, own in zip(value, kinds, strict=True))
    if kind is float:
        _require(isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value))
        return float(value)
    if kind is int:
        _require(isinstance(value, Integral) and not isinstance(value, bool))
        return int(value)
    _require(isinstance(value, kind))
    return value


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError


def _describe(kind: Any) -> str:
    """What a field of this type takes, in words."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return ", ".join([_describe(parts[0]), *map(str, parts[1:])])
    if NoneType in parts:
        return ", or ".join(_describe(part) for part in parts)
    if origin is Literal:
        return f"one of {', '.join(parts)}"
    if origin is tuple:
        if _is_text(parts[0]):
            return f"{_describe(parts[0])}, or a list of them"
        count = "a list" if parts[-1] is ... else f"a list of {len(parts)}"
        return f"{count} (each {_describe(parts[0])})"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}[kind]
