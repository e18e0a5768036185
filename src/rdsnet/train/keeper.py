"""What happens around the steps of a training run, as a callback of Lightning: log, validations and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import TorchCheckpointIO
from tqdm import tqdm

from rdsnet.files import replace_file
from rdsnet.terminal import progress_bar
from rdsnet.train.log import Log, StepClock, open_logs
from rdsnet.train.module import LitRDSNet
from rdsnet.train.run_folder import LAST
from rdsnet.train.stop import RankWatch
from rdsnet.train.validation import Validation


class WholeFiles(TorchCheckpointIO):
    """Checkpoints that are written whole or not at all."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        def write(partial: Path) -> None:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)

        replace_file(Path(path), write)


class RunKeeper(Callback):
    """The log, validations and checkpoints of a run. Its state in a checkpoint goes by the name of this class.

    Args:
        validation: with the run folder, the settings and the request for an early end.
        ranks: watches the other processes.
        step: that the run continues from.
    """

    def __init__(self, validation: Validation, ranks: RankWatch, *, step: int) -> None:
        self.output, self.recipe, self.stop = validation.output, validation.config.train, validation.stop
        self.validation = validation
        self.ranks = ranks
        self.clock = StepClock()
        self._validation_due = False
        self._step = step
        # of the first process
        self._logs: list[Log] = []
        self._bar: tqdm[Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.validation.best, "validation_due": self._validation_due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validation.best, self._validation_due = state_dict["best"], state_dict["validation_due"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        names = self.validation.train.class_names
        checkpoint["rdsnet"] = {"class_names": names, "world_size": trainer.world_size}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size > 1:
            self.ranks.begin(getattr(trainer.strategy.launcher, "procs", ()), trainer.global_rank)
        if trainer.is_global_zero:
            self._logs = open_logs(self.recipe.logger, self.output, self._step)
            total = cast(LitRDSNet, pl_module).total_steps
            self._bar = progress_bar("training", total=total, initial=self._step)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt):
            self.ranks.end()  # Lightning ends the other processes now

    def close(self) -> None:
        self.ranks.end()
        if self._bar is not None:
            self._bar.close()
        for log in self._logs:
            log.close()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validate_if_due(trainer, cast(LitRDSNet, pl_module))  # the run was stopped in a validation
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
            self._after_step(trainer, cast(LitRDSNet, pl_module))
        self.clock.wait()

    def _after_step(self, trainer: Trainer, module: LitRDSNet) -> None:
        epoch = trainer.current_epoch + 1
        self._log({"epoch": epoch, **module.step_metrics, **self.clock.step_done()})
        if self._bar is not None:
            losses = {name[5:]: f"{x:.3f}" for name, x in module.step_metrics.items() if name.startswith("loss/")}
            self._bar.set_postfix({"epoch": epoch, **losses, "data": self.clock.share()}, refresh=False)
            self._bar.update()
        trainer.should_stop = self._step >= module.total_steps
        if trainer.is_last_batch or trainer.should_stop:
            return  # saved at the end of the epoch
        stop = self._stop_agreed(trainer)
        if stop or self._step % self.recipe.checkpoint_steps == 0:
            trainer.save_checkpoint(self.output / LAST)
        if stop:
            raise KeyboardInterrupt

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        regular = (trainer.current_epoch + 1) % self.recipe.val_epochs == 0
        self._validation_due = self.validation.val is not None and (regular or trainer.should_stop)
        # Saved before a validation and after it: stopping in the validation costs no training.
        trainer.save_checkpoint(self.output / LAST)
        if self._stop_agreed(trainer):
            raise KeyboardInterrupt
        if self._validation_due:
            self.validate_if_due(trainer, cast(LitRDSNet, pl_module))
            trainer.save_checkpoint(self.output / LAST)

    def validate_if_due(self, trainer: Trainer, module: LitRDSNet) -> None:
        if self._validation_due:
            metrics = self.validation.run(module.result.to(trainer.strategy.root_device), trainer)
            self._validation_due = False
            self._log(metrics)

    def _log(self, values: dict[str, float]) -> None:
        for log in self._logs:
            log.write(self._step, values)

    def _stop_agreed(self, trainer: Trainer) -> bool:
        """Whether Ctrl-C reached any of the processes; they must stop at the same step."""
        if trainer.world_size == 1:
            return self.stop.asked
        return trainer.strategy.reduce_boolean_decision(self.stop.asked, all=False)
