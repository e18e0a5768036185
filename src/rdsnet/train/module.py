"""One step of training: losses, optimizer and learning rate (4.1), as a LightningModule."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from rdsnet.config import Config, TrainConfig
from rdsnet.device import mean_over_ranks
from rdsnet.model.rdsnet import RDSNet
from rdsnet.structures import Targets

Batch = tuple[Tensor, list[Targets]]

LR_BATCH = 8  # images a step that `TrainConfig.lr` is meant for


def learning_rate(step: int, *, total_steps: int, images_per_step: int, recipe: TrainConfig) -> float:
    """The learning rate of optimizer step `step` (0-based): a function of the step alone, so that a resume is exact.

    Linear in the images a step; it rises from a third over the warm-up, at most a tenth of the training.
    """
    peak = recipe.lr * images_per_step / LR_BATCH
    warmup = min(recipe.warmup_steps, total_steps // 10)
    rise = 1 / 3 + 2 / 3 * step / warmup if step < warmup else 1.0
    if recipe.schedule == "cosine":
        return peak * rise * (1 + math.cos(math.pi * step / total_steps)) / 2
    # less a millionth of a step: 0.55 * 100 is 55.00000000000001
    drops = sum(step >= share * total_steps - 1e-6 for share in recipe.milestones)
    return peak * rise * 0.1**drops


def build_optimizer(model: nn.Module, recipe: TrainConfig) -> torch.optim.Optimizer:
    """SGD as in the paper, or AdamW, which does not decay norms and biases."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(trained, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr)


class LitRDSNet(LightningModule):
    """The training step and its optimizer.

    Args:
        model: trained in place.
        config: the whole configuration.
        images_per_step: images of an optimizer step, over all devices.
        total_steps: optimizer steps of the training.
    """

    def __init__(self, model: RDSNet, config: Config, *, images_per_step: int, total_steps: int) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.images_per_step = images_per_step
        self.total_steps = total_steps
        self._average: ModelEmaV3 | None = None
        if config.train.ema:
            # a first average of few steps is mostly the last of them: the decay rises as 1 - step^(-2/3)
            self._average = ModelEmaV3(model, decay=config.train.ema, use_warmup=True).requires_grad_(False)
        self.step_metrics: dict[str, float] = {}
        """losses (averaged over the accumulated batches), gradient norm and learning rate of the last step"""
        self._losses: list[dict[str, Tensor]] = []

    @property
    def result(self) -> RDSNet:
        """The weights that the training is for: their moving average where there is one."""
        return self.model if self._average is None else self._average.module

    def on_train_start(self) -> None:
        self.model.train()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Everything random in a step depends on the step alone, as if nothing had run before it.
        place = [self.config.seed, self.trainer.current_epoch, batch_idx, self.global_rank]
        self._seed = int(np.random.SeedSequence(place).generate_state(1)[0])
        torch.manual_seed(self._seed)
        self._lr = learning_rate(
            self.global_step,
            total_steps=self.total_steps,
            images_per_step=self.images_per_step,
            recipe=self.config.train,
        )
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self._lr

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, targets = batch
        losses = self.model.losses(images, targets, torch.Generator().manual_seed(self._seed))
        self._losses.append({name: loss.detach() for name, loss in losses.items()})
        return torch.stack(list(losses.values())).sum()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self._average is not None:
            self._average.update(self.model, self.global_step)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradient, and stop before a step that would spoil the weights."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        norm = nn.utils.clip_grad_norm_(trained, self.config.train.clip_norm)
        means = {name: torch.stack([losses[name] for losses in self._losses]).mean() for name in self._losses[0]}
        self._losses.clear()
        # one transfer from the device for everything that a step reports
        *losses, norm_value = mean_over_ranks(torch.stack([*means.values(), norm])).tolist()
        metrics = {f"loss/{name}": value for name, value in zip(means, losses, strict=True)}
        # float16 has gradients beyond its range now and then: the scaler skips those steps and lowers its scale
        spoilt = losses if self.config.train.precision == "16" else [*losses, norm_value]
        if not all(math.isfinite(value) for value in spoilt):
            values = ", ".join(f"{name} {value:g}" for name, value in metrics.items())
            raise FloatingPointError(
                f"the training diverged in step {self.global_step + 1} (epoch {self.trainer.current_epoch + 1}, batch "
                f"{self.trainer.fit_loop.batch_idx + 1}): {values}, gradient norm {norm_value:g}; "
                "last.ckpt is from before it; lower train.lr or check the data"
            )
        self.step_metrics = {**metrics, "loss/total": sum(losses), "gradient_norm": norm_value, "lr": self._lr}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self.model, self.config.train)
