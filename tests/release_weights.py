"""Weights of the release and of YOLACT, drawn by the rule beside the recorded vectors.

Name, shape and seed decide every number.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


@lru_cache(maxsize=1)  # cases come sorted by architecture and seed, and a state holds 0.2 GB
def release_state(folder: Path, arch: str, seed: int) -> dict[str, Tensor]:
    """A state dict of the source's names; checksums are compared where the folder has them for this seed."""
    rule = json.loads((folder / "weights_rule.json").read_text())
    shapes = json.loads((folder / f"state_dict_keys_{arch}.json").read_text())
    arrays = {name: _draw(rule, name, tuple(shape), seed) for name, shape in shapes.items()}
    _check(json.loads((folder / f"weights_check_{arch}.json").read_text()), arrays, seed)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _check(checks: dict[str, Any], arrays: dict[str, np.ndarray], seed: int) -> None:
    one_seed = "crc32" in next(iter(checks.values()))  # YOLACT's, which do not say whose: all of it fits, or nothing
    if not one_seed:
        checks = checks.get(str(seed), {})
    wrong = [name for name, check in checks.items() if zlib.crc32(arrays[name].tobytes()) != check["crc32"]]
    if one_seed and len(wrong) == sum(array.any() for array in arrays.values()):
        return
    assert not wrong, f"not drawn as recorded: {', '.join(wrong)}"


def loss_overrides(folder: Path) -> dict[str, float]:
    """Tensors that are constant in the vectors of losses."""
    overrides: dict[str, float] = json.loads((folder / "weights_rule.json").read_text())["loss_vectors_override"]
    return overrides


def _generator(seed: int, name: str) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(f"{seed}:{name}".encode()) & 0xFFFFFFFF)


def _draw(rule: dict[str, Any], name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    kind = next(r for r in rule["rules_first_match_wins"] if re.fullmatch(r["pattern"], name))
    rs = _generator(seed, name)
    if kind["kind"] == "keep_published":
        values = np.asarray(rule["published_values"][name], dtype=np.float64).reshape(shape)
    elif kind["kind"] == "zero":
        return np.zeros(shape, dtype=np.int64)
    elif kind["kind"] == "const":
        values = np.full(shape, kind["value"], dtype=np.float64)
    elif kind["kind"] == "normal":
        values = rs.standard_normal(shape) * kind["std"]
    elif kind["kind"] == "uniform":
        values = (kind["low"] + (kind["high"] - kind["low"]) * rs.random_sample(shape)) * kind.get("scale", 1.0)
    elif kind["kind"] == "class_bias":
        values = rs.standard_normal(shape) * kind["std"]
        values[:: kind["period"]] = kind["background"]
    else:
        assert kind["kind"] == "conv", kind
        values = _draw_conv(kind, rs, name, shape, seed)
    return values.astype(np.float32)


def _draw_conv(
    kind: dict[str, Any], rs: np.random.RandomState, name: str, shape: tuple[int, ...], seed: int
) -> np.ndarray:
    values = rs.standard_normal(shape)
    if "shared" in kind:
        groups, shared = kind["groups"], kind["shared"]
        base = _generator(seed, f"{name}/shared").standard_normal((shape[0] // groups, *shape[1:]))
        values = shared * np.concatenate([base] * groups) + math.sqrt(1 - shared**2) * values
    if kind["center"]:
        values = values - values.mean(axis=(1, 2, 3), keepdims=True)
    return values * kind["gain"] * math.sqrt(2 / (shape[1] * shape[2] * shape[3]))
