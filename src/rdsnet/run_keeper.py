"""What happens around the steps of a training run: log, validations, checkpoints, Ctrl-C."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from PIL import Image
from tqdm import tqdm

from rdsnet import checkpoint
from rdsnet.config import Config
from rdsnet.data import CocoFolder, ImageRecord
from rdsnet.distributed import gather_objects
from rdsnet.evaluation import CocoEvaluator
from rdsnet.model import RDSNet
from rdsnet.predict import detect_folder
from rdsnet.run_folder import MetricsLog
from rdsnet.structures import Objects
from rdsnet.visualize import comparison

if TYPE_CHECKING:
    from rdsnet.training import LitRDSNet

PICTURES = 4  # validation images drawn into predictions/


class Interrupted(BaseException):
    """Ctrl-C, in a form that Lightning does not turn into an exit of the process."""


class StopRequest:
    """While entered, the first Ctrl-C sets `asked`, the second raises `Interrupted`."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> StopRequest:
        # Python allows signal handlers in the main thread only
        self._previous: Any = None
        if threading.current_thread() is threading.main_thread():
            self._process = os.getpid()
            self._previous = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        # loader processes inherit this handler, and Ctrl-C reaches them too: they go on until the step is done
        if os.getpid() != self._process:
            return
        if self.asked:
            raise Interrupted
        self.asked = True
        print("\nstopping after this step; press Ctrl-C again to stop at once", file=sys.stderr)


def progress_bar(what: str, items: Iterable[Any] | None = None, **options: Any) -> tqdm[Any]:
    """A bar of steps, drawn often on a terminal and now and then into a file."""
    pause = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(items, desc=what, mininterval=pause, dynamic_ncols=True, **options)


class RunKeeper(Checkpoint):
    """What happens around the steps: the log, validations and checkpoints.

    Args:
        output: the run folder.
        train: training images, which name the classes.
        val: validation images, or None.
        stop: asks for an early end.
    """

    def __init__(
        self, output: Path, config: Config, *, train: CocoFolder, val: CocoFolder | None, stop: StopRequest
    ) -> None:
        self.output = output
        self.config = config
        self.train = train
        self.val = val
        self.stop = stop
        self._best = -math.inf
        self._validation_due = False
        self._step = 0
        # of the first process
        self._metrics_log: MetricsLog | None = None
        self._bar: tqdm[Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "validation_due": self._validation_due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best, self._validation_due = state_dict["best"], state_dict["validation_due"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["rdsnet"] = {"class_names": self.train.class_names, "world_size": trainer.world_size}

    def open(self, step: int, total_steps: int) -> None:
        """In the first process, before the training goes on from `step`."""
        self._step = step
        self._metrics_log = MetricsLog(self.output, step)
        self._bar = progress_bar("training", total=total_steps, initial=step)

    def close(self) -> None:
        if self._metrics_log is not None:
            self._metrics_log.close()
        if self._bar is not None:
            self._bar.close()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        self.validate_if_due(trainer)  # the run was stopped in a validation

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        module = cast("LitRDSNet", pl_module)
        step = trainer.global_step
        if step == self._step:
            return  # gradients are still being accumulated
        self._step = step
        self._log({"epoch": trainer.current_epoch + 1, **module.step_metrics})
        if self._bar is not None:
            losses = {
                name[5:]: f"{value:.3f}" for name, value in module.step_metrics.items() if name.startswith("loss/")
            }
            self._bar.set_postfix({"epoch": trainer.current_epoch + 1, **losses}, refresh=False)
            self._bar.update()
        trainer.should_stop = step >= module.total_steps
        if trainer.is_last_batch or trainer.should_stop:
            return  # saved at the end of the epoch
        stop = self._stop_agreed(trainer)
        if stop or step % self.config.train.checkpoint_steps == 0:
            self._save(trainer)
        if stop:
            raise Interrupted

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        regular = (trainer.current_epoch + 1) % self.config.train.val_epochs == 0
        self._validation_due = self.val is not None and (regular or trainer.should_stop)
        # Saved before a validation and after it: stopping in the validation costs no training.
        self._save(trainer)
        if self._stop_agreed(trainer):
            raise Interrupted
        if self._validation_due:
            self.validate_if_due(trainer)
            self._save(trainer)

    def validate_if_due(self, trainer: Trainer) -> None:
        """Evaluate on the validation images, log the metrics and keep the weights where they are the best so far."""
        if self.val is None or not self._validation_due:
            return
        model = cast("LitRDSNet", trainer.lightning_module).model.to(trainer.strategy.root_device)
        summary = evaluate(
            model,
            self.val,
            self.config,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            pictures=self.output / "predictions",
            stop=self.stop,
        )
        model.train()
        self._validation_due = False
        if trainer.is_global_zero:
            self._judge(model, summary)

    def _judge(self, model: RDSNet, summary: dict[str, Any]) -> None:
        box, mask = summary["box"], summary.get("mask")
        metrics = {
            "val/box_AP": box.get("refined", box["regressed"])["AP"],
            "val/box_AP_regressed": box["regressed"]["AP"],
        }
        if self.config.model.masks and mask is not None:
            metrics["val/mask_AP"] = mask["AP"]
        known = {name: value for name, value in metrics.items() if value is not None}
        self._log(known)
        score = known.get("val/mask_AP", known.get("val/box_AP", 0.0))
        if score > self._best:
            self._best = score
            self.save_weights(model)

    def save_weights(self, model: RDSNet) -> None:
        checkpoint.save(
            self.output / checkpoint.BEST, model, self.config, self.train.class_names, self.train.category_ids
        )

    def _log(self, values: dict[str, float]) -> None:
        if self._metrics_log is not None:
            self._metrics_log.write(self._step, values)

    def _save(self, trainer: Trainer) -> None:
        temporary = self.output / ".last.ckpt.tmp"
        trainer.save_checkpoint(temporary)  # on all processes: it waits for them
        if trainer.is_global_zero:
            os.replace(temporary, self.output / "last.ckpt")

    def _stop_agreed(self, trainer: Trainer) -> bool:
        """Whether Ctrl-C reached any of the processes; they must stop at the same step."""
        if trainer.world_size == 1:
            return self.stop.asked
        return trainer.strategy.reduce_boolean_decision(self.stop.asked, all=False)


def evaluate(
    model: RDSNet,
    folder: CocoFolder,
    config: Config,
    *,
    rank: int = 0,
    world_size: int = 1,
    boundary: bool = False,
    pictures: Path | None = None,
    stop: StopRequest | None = None,
) -> dict[str, Any]:
    """The metrics of a model on the images of a folder. Leaves the model in evaluation mode.

    Args:
        rank, world_size: this process detects on its share; the first one has the metrics of all, the others of none.
        boundary: also measure boundary AP.
        pictures: folder that gets pictures of the first images.
        stop: raises `Interrupted` when asked to.
    """
    model.eval()
    evaluator = CocoEvaluator(folder.json_path, folder.category_ids, config.detect.max_detections)
    to_draw = PICTURES if pictures is not None and rank == 0 else 0
    found = detect_folder(model, folder, config, batch_size=config.train.batch_size, rank=rank, world_size=world_size)
    images = len(folder) // world_size
    for record, objects in progress_bar("validation", found, total=images, leave=False, disable=rank > 0):
        # Of several processes none may leave before they have exchanged their results
        if stop is not None and stop.asked and world_size == 1:
            raise Interrupted
        evaluator.add(record.id, objects)
        if to_draw > 0 and pictures is not None:
            _draw(pictures, objects, record, folder.class_names)
            to_draw -= 1
    if world_size > 1:
        evaluator.merge(gather_objects(evaluator.state()))
    return evaluator.summarize(boundary=boundary) if rank == 0 else {}


def _draw(folder: Path, objects: Objects, record: ImageRecord, class_names: list[str]) -> None:
    folder.mkdir(exist_ok=True)
    picture = comparison(record.read(), objects, record, class_names)
    Image.fromarray(picture).save(folder / f"{record.path.stem}.jpg")
