"""The log of a run: one row of numbers a step, to files in the run folder or to a tracker, and how long steps took."""

from __future__ import annotations

import csv
import importlib.util
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from torch.utils.tensorboard import SummaryWriter

from rdsnet.files import replace_file, write_text

PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}
"""what must be installed for a log that is no file of the run folder, by the module that it brings"""


class Log(Protocol):
    """Where the numbers of a run go. Steps never go down; a step may be written to more than once."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def require_logs(names: Sequence[str]) -> None:
    """Raise a ValueError where a log needs a package that is not installed."""
    for name in names:
        if name in PACKAGES and importlib.util.find_spec(name) is None:
            raise ValueError(f"train.logger {name} needs a package: pip install {PACKAGES[name]}")


def open_logs(names: Sequence[str], folder: Path, step: int) -> list[Log]:
    """The logs of a run that continues from an optimizer step.

    Args:
        names: "csv", "tensorboard", "wandb" (online, or as WANDB_MODE says) or "mlflow" (at MLFLOW_TRACKING_URI; by
            default files in the run folder).
        folder: of the run, whose name is also that of the run at a tracker.
    """
    return [LOGS[name](folder, step) for name in names]


class MetricsLog:
    """metrics.csv: one row a step, continued by a resumed run.

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

    def write(self, step: int, values: Mapping[str, float]) -> None:
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

    def close(self) -> None:
        """Nothing is held open."""

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


class EventsLog:
    """The events of TensorBoard in the run folder; those after `step` are dropped."""

    def __init__(self, folder: Path, step: int) -> None:
        self._events = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        self._events.close()


class TrackerLog:
    """A run at a tracker, by Lightning's logger of it. A resumed run goes on there under the id that `file` keeps."""

    def __init__(self, logger: WandbLogger | MLFlowLogger, file: Path) -> None:
        self._logger = logger
        logger.experiment  # noqa: B018  (begins the run)
        write_text(file, str(logger.version if isinstance(logger, WandbLogger) else logger.run_id))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._logger.log_metrics(dict(values), step)

    def close(self) -> None:
        self._logger.finalize("success")
        if isinstance(self._logger, WandbLogger):
            self._logger.experiment.finish()  # or a later run of this process would go on with it


def _wandb(folder: Path, step: int) -> Log:
    file = folder / "wandb.id"
    project = os.environ.get("WANDB_PROJECT", "rdsnet")
    return TrackerLog(WandbLogger(folder.resolve().name, folder, project=project, version=_stored(file)), file)


def _mlflow(folder: Path, step: int) -> Log:
    file = folder / "mlflow.id"
    place = os.environ.get("MLFLOW_TRACKING_URI")
    if not place:
        place = (folder.resolve() / "mlruns").as_uri()
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # newer versions would rather have a database
    return TrackerLog(MLFlowLogger("rdsnet", folder.resolve().name, tracking_uri=place, run_id=_stored(file)), file)


def _stored(file: Path) -> str | None:
    return file.read_text(encoding="utf-8").strip() if file.exists() else None


LOGS: dict[str, Callable[[Path, int], Log]] = {
    "csv": MetricsLog,
    "tensorboard": EventsLog,
    "wandb": _wandb,
    "mlflow": _mlflow,
}


class StepClock:
    """Wall-clock seconds of optimizer steps, and how long they waited for their batches (loading and transfer).

    Validations and checkpoints lie between `batch_done` and `wait` and count as neither.
    """

    def __init__(self) -> None:
        self.waited = self.total = 0.0  # of all steps
        self._step_waited = self._step_total = 0.0
        self._mark = time.perf_counter()

    def wait(self) -> None:
        """The next batch is asked for."""
        self._mark = time.perf_counter()

    def batch_came(self) -> None:
        self._step_waited += self._lap()

    def batch_done(self) -> None:
        self._lap()

    def step_done(self) -> dict[str, float]:
        """What the log says of the step that the last batch ended: seconds of it, those of waiting among them."""
        seconds = {"seconds/data": self._step_waited, "seconds/step": self._step_total}
        self.waited += self._step_waited
        self.total += self._step_total
        self._step_waited = self._step_total = 0.0
        return seconds

    def share(self) -> str:
        """Of the time of all steps, how much was waiting: "3%"."""
        return f"{self.waited / self.total:.0%}" if self.total else "0%"

    def _lap(self) -> float:
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        self._step_total += seconds
        return seconds
