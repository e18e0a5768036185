"""The folder of a training run: its configuration, its log, and what a resume reads back.

config.yaml        every setting, resolved
last.ckpt          the full state of training
best.safetensors   the best weights so far
metrics.csv        one row a step; beside it the events of TensorBoard
metrics.json       the final metrics: a run that has it is finished
predictions/       pictures of validation images
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch.utils.tensorboard import SummaryWriter

from rdsnet.config import Config, config_from_file, config_to_dict, flatten
from rdsnet.files import replace_file, require_folder, write_text

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
}


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


def read_config(output: Path) -> Config:
    """The configuration stored with a run.

    Raises:
        FileNotFoundError: `output` holds no run.
        ValueError: a setting in it is unknown or wrong (named).
    """
    path = output / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{output} holds no run to resume: {path.name} is missing")
    return config_from_file(path)


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
    changed = [f"{k} (stored: {old.get(k)}, asked: {new.get(k)})" for k in both if old.get(k) != new.get(k)]
    refused = [text for text in changed if text.split(" ")[0] not in RESUMABLE]
    if refused:
        raise ValueError(f"a resumed run keeps its settings, but these differ from {output}: {', '.join(refused)}")
    return asked


@dataclass
class Progress:
    """Where a run stands: what `last.ckpt` says of it."""

    step: int
    """optimizer steps done"""
    mid_epoch: bool
    world_size: int
    class_names: list[str]


def read_progress(output: Path) -> Progress:
    """Read where a run stands from its `last.ckpt`.

    Raises:
        FileNotFoundError: the run was stopped before its first checkpoint.
    """
    path = output / "last.ckpt"
    if not path.is_file():
        raise FileNotFoundError(
            f"{output} cannot be resumed: last.ckpt is missing (it was stopped before its first checkpoint); "
            "delete the folder and start again"
        )
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    done = state["loops"]["fit_loop"]["epoch_progress"]["current"]
    return Progress(
        step=state["global_step"],
        mid_epoch=done["processed"] < done["started"],
        world_size=state["rdsnet"]["world_size"],
        class_names=state["rdsnet"]["class_names"],
    )


class MetricsLog:
    """metrics.csv and the TensorBoard events of a run: one row a step, continued by a resumed run.

    Columns may appear later; values written for a step that has its row already join that row.

    Args:
        folder: the run folder.
        step: the optimizer step that the run continues from; rows after it are dropped.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / "metrics.csv"
        rows = self._read()
        self._columns = list(rows[0]) if rows else ["step"]
        self._last_step = -1
        self._rewrite([row for row in rows if int(row["step"]) <= step])
        self._events = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log `values` (by column name) at an optimizer step; steps never go down."""
        row = {"step": str(step)} | {name: f"{value:.6g}" for name, value in values.items()}
        new_columns = [name for name in row if name not in self._columns]
        if new_columns or step == self._last_step:
            self._columns += new_columns
            rows = self._read()
            if step == self._last_step:
                row = rows.pop() | row
            self._rewrite([*rows, row])
        else:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, self._columns, lineterminator="\n").writerow(row)
        self._last_step = step
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        self._events.close()

    def _read(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8")
        # a row without its line end was cut off when the run was killed
        return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        def write(path: Path) -> None:
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, self._columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)

        replace_file(self.path, write)
        if rows:
            self._last_step = int(rows[-1]["step"])
