"""Weights in a file: safetensors, with everything in its metadata that is needed to use them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rdsnet.config import Config, config_from_dict, config_to_dict
from rdsnet.files import replace_file
from rdsnet.model.build import build_model
from rdsnet.model.rdsnet import RDSNet
from rdsnet.weights.bundled import BEST as BEST
from rdsnet.weights.bundled import find_weights

FORMAT = "rdsnet/1"


@dataclass(frozen=True)
class Checkpoint:
    """What is stored with the weights: the resolved settings, and names and category ids in order of label."""

    config: Config
    class_names: list[str]
    category_ids: list[int]


def save(
    path: Path,
    model: RDSNet,
    config: Config,
    class_names: Sequence[str],
    category_ids: Sequence[int],
    *,
    half: bool = False,
) -> None:
    """Write a model's weights; the file is replaced whole or not at all.

    Args:
        half: kernels as float16, in half the space; norms, biases and MBRM stay as they are.
    """
    metadata = {
        "format": FORMAT,
        "config": json.dumps(config_to_dict(config)),
        "class_names": json.dumps(list(class_names)),
        "category_ids": json.dumps(list(category_ids)),
    }
    weights = {name: t.detach().contiguous().cpu() for name, t in model.state_dict().items()}
    if half:
        weights = {name: t.half() if t.ndim > 1 else t for name, t in weights.items()}
    replace_file(path, lambda partial: partial.write_bytes(safetensors.torch.save(weights, metadata)))


def read(source: str | Path) -> tuple[dict[str, Tensor], Checkpoint]:
    """Weights and what is stored with them.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the file is not one that `save` wrote; says why.
    """
    path = find_weights(source)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: expected weights of format {FORMAT!r}, got {metadata.get('format')!r}")
    try:
        return weights, Checkpoint(
            config=config_from_dict(json.loads(metadata["config"])),
            class_names=json.loads(metadata["class_names"]),
            category_ids=json.loads(metadata["category_ids"]),
        )
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: what is stored with the weights cannot be read: {error}") from error


def load(source: str | Path, config: Config | None = None) -> tuple[RDSNet, Checkpoint]:
    """The model of a run folder or weights file, in evaluation mode.

    Args:
        config: settings in place of those that are stored, such as others of inference.

    Raises:
        FileNotFoundError, ValueError: as `read`, and where a weight is missing, left over or of another shape (named).
    """
    weights, checkpoint = read(source)
    checkpoint = replace(checkpoint, config=config or checkpoint.config)
    model = build_model(checkpoint.config, num_classes=len(checkpoint.class_names), pretrained=False)
    check_weights(weights, model.state_dict(), str(source))
    model.load_state_dict(weights)
    return model.eval(), checkpoint


def check_weights(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    """Compare names and shapes; a ValueError names everything that does not fit."""
    problems = [f"missing {name}" for name in expected if name not in weights]
    problems += [f"left over {name}" for name in weights if name not in expected]
    problems += [
        f"{name} is {tuple(weights[name].shape)}, expected {tuple(t.shape)}"
        for name, t in expected.items()
        if name in weights and weights[name].shape != t.shape
    ]
    if problems:
        raise ValueError(f"{source} does not fit the model: {'; '.join(problems)}")


def initialise(model: RDSNet, source: str | Path, class_names: Sequence[str]) -> list[str]:
    """Start a model from the weights of another run, which may know other classes.

    Rows of the classifier are matched by class name; everything else must fit.

    Args:
        model: changed in place.
        source: run folder or weights file.
        class_names: of the model, in order of label.

    Returns:
        Messages that say what was not taken.

    Raises:
        FileNotFoundError, ValueError: as `load`.
    """
    weights, stored = read(source)
    fresh = model.state_dict()
    known = [i for i, name in enumerate(class_names) if name in stored.class_names]
    rows = [stored.class_names.index(class_names[i]) for i in known]
    for name, first in model.class_rows().items():
        values = fresh[name]
        if name not in weights or len(weights[name]) % (first + len(stored.class_names)):
            continue
        # (A * C, ...) -> (A, C, ...): rows are anchor-major, those of the background before those of the classes
        old = weights[name].unflatten(0, (-1, first + len(stored.class_names)))
        new = values.clone().unflatten(0, (-1, first + len(class_names)))
        if old.shape[0] == new.shape[0] and old.shape[2:] == new.shape[2:]:
            new[:, :first] = old[:, :first].to(new)
            new[:, [first + i for i in known]] = old[:, [first + i for i in rows]].to(new)
            weights[name] = new.flatten(0, 1)
    check_weights(weights, fresh, str(source))
    model.load_state_dict(weights)
    new_names = [name for name in class_names if name not in stored.class_names]
    return [f"classes that {source} does not know start fresh: {', '.join(new_names)}"] if new_names else []
