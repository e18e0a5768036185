"""Training: the recipe of section 4.1 as a thin LightningModule, and the run that surrounds it."""

from __future__ import annotations

import copy
import json
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import LightningModule, Trainer, seed_everything
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from rdsnet import checkpoint, run_folder
from rdsnet.config import Config, TrainConfig, validate
from rdsnet.data import CocoFolder, check_dataset, train_loader
from rdsnet.distributed import mean_over_ranks
from rdsnet.files import write_text
from rdsnet.inference import evaluate
from rdsnet.model import RDSNet, build_model
from rdsnet.refinement import NothingToFit, fit_refiner
from rdsnet.run_folder import Progress
from rdsnet.run_keeper import Interrupted, Pictures, RunKeeper, StopRequest
from rdsnet.structures import Targets

Device = Literal["cpu", "cuda", "auto"]
Batch = tuple[Tensor, list[Targets]]

# as Lightning calls them
PRECISION: dict[str, Literal["32-true", "bf16-mixed", "16-mixed"]] = {
    "32": "32-true",
    "bf16": "bf16-mixed",
    "16": "16-mixed",
}
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

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
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


def train(
    config: Config | None,
    output: str | Path,
    *,
    resume: bool = False,
    init: str | Path | None = None,
    device: Device = "auto",
) -> Path:
    """Train, validate, and fit the boundary refinement to the best weights.

    Args:
        config: the run's settings; on resume those stored with the run (None) or a changed copy of them
            (`rdsnet.run_folder.RESUMABLE` lists what may change).
        output: the run folder; `rdsnet.run_folder` says what it will hold. It must be empty, but for a resume.
        resume: continue exactly where the run stopped.
        init: weights to start from (.safetensors); rows of the classifier are matched by class name.
        device: "auto" is a GPU where there is one.

    Returns:
        The run folder.

    Raises:
        ValueError: data sets with errors (nothing is written then), an output that is in use, or a resume that
            changes what may not change.
        FileNotFoundError: nothing to resume.
        FloatingPointError: the training diverged; names the step.
        KeyboardInterrupt: stopped by Ctrl-C, with last.ckpt written; its text says how to go on.
    """
    output = Path(output)
    progress = None
    if resume:
        config = run_folder.resumed_config(output, config)
        progress = run_folder.read_progress(output)
    elif _first_process():  # it has filled the folder when the others start
        run_folder.require_empty(output)
    if config is None:
        raise ValueError("a new run needs a configuration")
    validate(config)
    folder, val = _open_data(config, progress)
    try:
        with _quiet():
            _run(config, output, folder, val, progress, init=init, accelerator=_accelerator(config, device))
    except (Interrupted, KeyboardInterrupt):
        saved = (output / "last.ckpt").exists()
        advice = f"continue with `rdsnet train --resume {output}`" if saved else "nothing was kept yet"
        raise KeyboardInterrupt(f"stopped; {advice}") from None
    return output


def _run(
    config: Config,
    output: Path,
    folder: CocoFolder,
    val: CocoFolder | None,
    progress: Progress | None,
    *,
    init: str | Path | None,
    accelerator: str,
) -> None:
    recipe = config.train
    stop = StopRequest()
    keeper = RunKeeper(output, config, train=folder, val=val, stop=stop)
    trainer = _trainer(config, output, keeper, accelerator)
    loader = train_loader(config, folder, trainer.global_rank, trainer.world_size)
    steps_per_epoch = math.ceil(len(loader) / recipe.accumulate)
    total_steps = recipe.max_steps or recipe.epochs * steps_per_epoch
    if progress is not None:
        _check_progress(progress, trainer.world_size, total_steps)
        if progress.step == total_steps and (output / "metrics.json").exists():
            print(f"{output} is finished: {total_steps} steps are done")
            return
    trainer.fit_loop.max_epochs = math.ceil(total_steps / steps_per_epoch)

    seed_everything(config.seed, verbose=False)
    model = _build(config, folder, init if progress is None else None, resumed=progress is not None)
    module = LitRDSNet(
        model,
        config,
        images_per_step=recipe.batch_size * recipe.accumulate * trainer.world_size,
        total_steps=total_steps,
    )
    if trainer.is_global_zero:
        run_folder.create(output, config, folder.class_names)
        (output / "metrics.json").unlink(missing_ok=True)  # of a run that now goes on
        keeper.open(0 if progress is None else progress.step, total_steps)
    try:
        with stop:
            trainer.fit(module, loader, ckpt_path=None if progress is None else output / "last.ckpt")
            keeper.validate_if_due(trainer)  # it had been stopped in the last validation
    finally:
        keeper.close()
    if trainer.is_global_zero:
        if keeper.clock.total:
            print(f"waited for data {keeper.clock.share()} of the time")
        _finish(config, output, folder, val, keeper, module.result, trainer.strategy.root_device)


def _finish(
    config: Config,
    output: Path,
    folder: CocoFolder,
    val: CocoFolder | None,
    keeper: RunKeeper,
    trained: RDSNet,
    device: torch.device,
) -> None:
    """Fit MBRM to the best weights (the last ones without validation), evaluate them, and write metrics.json."""
    if val is None:
        keeper.save_weights(trained)
    model, _ = checkpoint.load(output)
    model.to(device)
    metrics: dict[str, Any] = {}
    if config.model.masks and config.detect.refine != "off":
        try:
            metrics["refiner"] = asdict(fit_refiner(model, folder, config))
            keeper.save_weights(model)
        except NothingToFit as error:
            print(f"{error}; it keeps the numbers that its authors published")
    if val is not None:
        pictures = Pictures(output / "predictions", val.class_names)
        evaluator = evaluate(model, val, config, batch_size=config.train.batch_size, each=pictures)
        metrics |= evaluator.summarize(boundary=config.model.masks)
    write_text(output / "metrics.json", json.dumps(metrics, indent=2) + "\n")


def _first_process() -> bool:
    """Known from the environment, before the processes have met."""
    return getattr(rank_zero_only, "rank", 0) == 0


def _open_data(config: Config, progress: Progress | None) -> tuple[CocoFolder, CocoFolder | None]:
    """The training and validation sets, checked; the first process checks for all."""
    data = config.data
    if data.train is None:
        raise ValueError("data.train is not set: training needs a COCO JSON")
    if _first_process():
        sources = [(data.train, data.train_images), (data.val, data.val_images)]
        found = [problem for json_path, images in sources if json_path for problem in check_dataset(json_path, images)]
        errors = [f"{problem.where}: {problem.what}" for problem in found if problem.severity == "error"]
        if errors:
            shown = "; ".join(errors[:5])
            raise ValueError(f"training refuses the data (errors: {len(errors)}; `rdsnet check` lists all): {shown}")
    folder = CocoFolder(data.train, data.train_images)
    val = CocoFolder(data.val, data.val_images) if data.val else None
    for names, where in ((val and val.class_names, data.val), (progress and progress.class_names, "the stored run")):
        if names and names != folder.class_names:
            raise ValueError(f"{data.train} has the classes {folder.class_names}, but {where} has {names}")
    return folder, val


def _check_progress(progress: Progress, world_size: int, total_steps: int) -> None:
    if progress.step > total_steps:
        raise ValueError(f"{progress.step} steps are done already, more than the {total_steps} asked for")
    if progress.mid_epoch and progress.world_size != world_size:
        raise ValueError(
            f"the run was stopped within an epoch on {progress.world_size} devices and continues on as many, "
            f"got {world_size}"
        )


def _build(config: Config, folder: CocoFolder, init: str | Path | None, *, resumed: bool) -> RDSNet:
    if resumed or init is not None:  # all weights come from a file: fetch nothing
        config = copy.deepcopy(config)
        config.model.pretrained = "none"
    model = build_model(config, num_classes=len(folder.class_names))
    if init is not None:
        for message in checkpoint.initialise(model, init, folder.class_names):
            print(message)
    return model


def _accelerator(config: Config, device: Device) -> str:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and torch.cuda.device_count() < config.train.devices:
        raise ValueError(f"train.devices is {config.train.devices}, but there are {torch.cuda.device_count()} GPUs")
    if device == "cpu" and config.train.precision == "16":
        raise ValueError("precision 16 needs a GPU; bf16 and 32 work on the CPU")
    return device


def _trainer(config: Config, output: Path, keeper: RunKeeper, accelerator: str) -> Trainer:
    recipe = config.train
    return Trainer(
        accelerator=accelerator,
        devices=recipe.devices,
        num_nodes=recipe.nodes,
        strategy="ddp" if recipe.devices * recipe.nodes > 1 else "auto",
        precision=PRECISION[recipe.precision],
        accumulate_grad_batches=recipe.accumulate,
        callbacks=[keeper],
        logger=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=output,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Only what concerns the user: no tips of Lightning, and no warnings about choices made here on purpose."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)
        warnings.filterwarnings("ignore", message=r".*treespec", module=r"lightning\.")
        try:
            yield
        finally:
            logger.setLevel(level)
