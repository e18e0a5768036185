"""The folder of a training run: its configuration, its log, and what a resume reads back.

config.yaml        every setting, resolved
last.ckpt          the full state of training
best.safetensors   the best weights so far
metrics.csv        one row a step; beside it the events of TensorBoard (`train.logger`)
metrics.json       the final metrics: a run that has it is finished
predictions/       pictures of validation images
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from rdsnet.config import Config, config_to_dict, flatten, read_config
from rdsnet.files import require_folder, write_text

# Settings that a resumed run may change: they say where and how long it runs, not what it computes.
RESUMABLE = {
    "data.train",
    "data.val",
    "data.train_images",
    "data.val_images",
    "data.workers",
    "train.epochs",
    "train.max_steps",
    "train.checkpoint_activations",
    "train.devices",
    "train.nodes",
    "train.val_epochs",
    "train.checkpoint_steps",
    "train.logger",
}

LAST = "last.ckpt"


def create(output: Path, config: Config, class_names: list[str]) -> None:
    """Make a run folder, or bring the configuration of an existing one up to date."""
    output.mkdir(parents=True, exist_ok=True)
    # The classes belong to the data, so they are a comment: the file can be given to --config again.
    names = json.dumps(class_names, ensure_ascii=False)
    write_text(
        output / "config.yaml", f"# classes: {names}\n" + yaml.safe_dump(config_to_dict(config), sort_keys=False)
    )


def require_empty(output: Path) -> None:
    """Raise ValueError where a new run would overwrite something."""
    require_folder(output)
    if output.exists() and any(output.iterdir()):
        raise ValueError(
            f"{output} is not empty: choose another output, or continue that run with `rdsnet train --resume {output}`"
        )


def resumed_config(output: Path, asked: Config | None) -> Config:
    """The configuration that a resumed run continues with: the stored one, with the `RESUMABLE` settings of `asked`.

    Raises:
        FileNotFoundError: `output` holds no run.
        ValueError: `asked` differs in a setting that would change the result (all such are named).
    """
    stored = read_config(output)
    if asked is None:
        return stored
    old, new = flatten(config_to_dict(stored)), flatten(config_to_dict(asked))
    both = old | new  # streams that differ have other settings
    changed = [k for k in both if old.get(k) != new.get(k) and k not in RESUMABLE]
    if changed:
        told = ", ".join(f"{k} (stored: {old.get(k)}, asked: {new.get(k)})" for k in changed)
        raise ValueError(f"a resumed run keeps its settings, but these differ from {output}: {told}")
    return asked


@dataclass
class Progress:
    """Where a run stands: what `last.ckpt` says of it."""

    step: int
    """optimizer steps done"""
    epoch: int
    """that it goes on in"""
    batches: int
    """done of that epoch on each device"""
    world_size: int
    class_names: list[str]

    @property
    def mid_epoch(self) -> bool:
        return self.batches > 0


def read_progress(output: Path) -> Progress:
    """Read where a run stands from its `last.ckpt`.

    Raises:
        FileNotFoundError: the run was stopped before its first checkpoint.
    """
    path = output / LAST
    if not path.is_file():
        raise FileNotFoundError(
            f"{output} cannot be resumed: {LAST} is missing (it was stopped before its first checkpoint); "
            "delete the folder and start again"
        )
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # Lightning's own account of where it is: checkpoints of any version of this package have it
    loop = state["loops"]["fit_loop"]
    epochs, batches = loop["epoch_progress"]["current"], loop["epoch_loop.batch_progress"]["current"]
    mid_epoch = epochs["processed"] < epochs["started"]
    return Progress(
        step=state["global_step"],
        epoch=epochs["processed"],
        batches=batches["processed"] if mid_epoch else 0,
        world_size=state["rdsnet"]["world_size"],
        class_names=state["rdsnet"]["class_names"],
    )
