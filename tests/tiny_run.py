"""A training run small enough for a test: six images of shapes, and a network of a few thousand weights."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch

from rdsnet.config import Config, get_config
from rdsnet.data.shapes import make_shapes


def make_data(folder: Path) -> Path:
    """6 training and 2 validation images of 64 x 64 pixels."""
    return make_shapes(folder, images=6, val_images=2, size=64, objects=(1, 3), object_size=(0.3, 0.6))


def tiny_config(data: Path, **train: Any) -> Config:
    """Three steps an epoch, two epochs, a checkpoint every second step; `train` changes that section."""
    return get_config(
        "rdsnet_tiny",
        {
            "model": {"channels": 32, "representation": 4},
            "retinanet": {"tower_depth": 1, "anchor_scales": 1},
            "loss": {"max_masks": 2},  # so few that they are drawn at random
            "detect": {"max_detections": 5},
            "data": {
                "train": str(data / "train.json"),
                "val": str(data / "val.json"),
                "short_side": 64,
                "long_side": 64,
                "workers": 0,
            },
            "train": {"batch_size": 2, "epochs": 2, "checkpoint_steps": 2, **train},
        },
    )


def final_state(run: Path) -> dict[str, Any]:
    """Weights and optimizer state at the end of a run, from its last.ckpt, by name."""
    state = torch.load(run / "last.ckpt", weights_only=True)
    moments = {
        f"{key}.{name}": value
        for key, entry in state["optimizer_states"][0]["state"].items()
        for name, value in entry.items()
        if isinstance(value, torch.Tensor)
    }
    return {**state["state_dict"], **moments, "step": torch.tensor(state["global_step"])}


def differing(first: Path, second: Path) -> list[str]:
    """Names of what is not bitwise equal at the end of two runs."""
    a, b = final_state(first), final_state(second)
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def read_log(run: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without what differs from run to run: the seconds."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: value for name, value in row.items() if not name.startswith("seconds/")} for row in rows]
