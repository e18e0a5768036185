"""What happens around the steps of a training run: log, validations, checkpoints, Ctrl-C."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from PIL import Image
from tqdm import tqdm

from rdsnet.config import Config
from rdsnet.data.coco import CocoFolder
from rdsnet.data.records import ImageRecord
from rdsnet.model.rdsnet import RDSNet
from rdsnet.predict.predictor import Predictor
from rdsnet.structures import Objects
from rdsnet.terminal import progress_bar
from rdsnet.train.run_folder import MetricsLog
from rdsnet.visualize.errors import comparison
from rdsnet.weights import checkpoint

if TYPE_CHECKING:
    from rdsnet.train.module import LitRDSNet

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
        self.clock = StepClock()
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
        self.clock.wait()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clock.wait()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        self.clock.batch_came()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        self.clock.batch_done()
        if trainer.global_step != self._step:  # otherwise gradients are still being accumulated
            self._step = trainer.global_step
            self._after_step(trainer, cast("LitRDSNet", pl_module))
        self.clock.wait()

    def _after_step(self, trainer: Trainer, module: LitRDSNet) -> None:
        step = self._step
        self._log({"epoch": trainer.current_epoch + 1, **module.step_metrics, **self.clock.step_done()})
        if self._bar is not None:
            losses = {
                name[5:]: f"{value:.3f}" for name, value in module.step_metrics.items() if name.startswith("loss/")
            }
            self._bar.set_postfix(
                {"epoch": trainer.current_epoch + 1, **losses, "data": self.clock.share()}, refresh=False
            )
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
        model = cast("LitRDSNet", trainer.lightning_module).result.to(trainer.strategy.root_device)
        # Of several processes none may leave before they have exchanged their results
        stop = self.stop if trainer.world_size == 1 else None
        pictures = Pictures(self.output / "predictions", self.train.class_names, stop)
        stored = checkpoint.Checkpoint(self.config, self.train.class_names, self.train.category_ids)
        evaluator = Predictor(model, stored).evaluate(
            self.val,
            batch_size=self.config.train.batch_size,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            each=pictures if trainer.is_global_zero else None,
        )
        model.train()
        self._validation_due = False
        if trainer.is_global_zero:
            self._judge(model, evaluator.summarize(boundary=False))

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


class Pictures:
    """Draws the first images of an evaluation, truth and prediction side by side, into a folder.

    Args:
        stop: raises `Interrupted` between two images when asked to.
    """

    def __init__(self, folder: Path, class_names: list[str], stop: StopRequest | None = None) -> None:
        self.folder, self.class_names, self.stop = folder, class_names, stop
        self.left = PICTURES

    def __call__(self, record: ImageRecord, objects: Objects) -> None:
        if self.stop is not None and self.stop.asked:
            raise Interrupted
        if self.left > 0:
            self.left -= 1
            self.folder.mkdir(exist_ok=True)
            picture = comparison(record.read(), objects, record, self.class_names)
            Image.fromarray(picture).save(self.folder / f"{record.path.stem}.jpg")
