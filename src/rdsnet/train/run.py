"""Training: the recipe of section 4.1 as a thin LightningModule, and the run that surrounds it."""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Trainer, seed_everything

from rdsnet.config import Config, DataConfig, validate
from rdsnet.data.coco import CocoFolder, check_dataset
from rdsnet.data.loading import EpochOrder, train_loader
from rdsnet.device import Device, choose_device, choose_precision
from rdsnet.files import write_text
from rdsnet.model.build import build_model
from rdsnet.model.mbrm_fit import NothingToFit, Pairs, fit
from rdsnet.model.rdsnet import RDSNet
from rdsnet.predict.predictor import Predictor
from rdsnet.results.matching import match_boxes
from rdsnet.train import run_folder
from rdsnet.train.keeper import RunKeeper, WholeFiles
from rdsnet.train.log import require_logs
from rdsnet.train.module import LitRDSNet
from rdsnet.train.run_folder import LAST, Progress
from rdsnet.train.stop import RankWatch, StopRequest, advice, explain
from rdsnet.train.validation import Pictures, Validation
from rdsnet.weights import checkpoint

logger = logging.getLogger(__name__)

# as Lightning calls them
PRECISION: dict[str, Literal["32-true", "bf16-mixed", "16-mixed"]] = {
    "32": "32-true",
    "bf16": "bf16-mixed",
    "16": "16-mixed",
}


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
            (`rdsnet.train.run_folder.RESUMABLE` lists what may change).
        output: the run folder; `rdsnet.train.run_folder` says what it will hold. It must be empty, but for a resume.
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
        ChildProcessError: a process that loads images or another process of the training is gone.
        KeyboardInterrupt: stopped by Ctrl-C, with last.ckpt written; its text says how to go on.
    """
    output = Path(output)
    progress = None
    if resume:
        config = run_folder.resumed_config(output, config)
        progress = run_folder.read_progress(output)
    else:
        rank_zero_only(run_folder.require_empty)(output)  # the first process has filled it when the others start
    if config is None:
        raise ValueError("a new run needs a configuration")
    config = validate(config)
    require_logs(config.train.logger)
    place = choose_device(device)
    precision = choose_precision(config.train.precision, place, stored=resume)
    folder, val = _open_data(config, progress)
    run = _Run(config, output, folder, val, progress)
    try:
        with _quiet():
            run.train(init, place, precision)
    except (KeyboardInterrupt, SystemExit):  # Lightning ends the process on Ctrl-C
        raise KeyboardInterrupt(f"stopped; {advice(output)}") from None
    except Exception as error:
        told = explain(error, output, run.ranks)
        if told is error:
            raise
        raise told from error
    return output


class _Run:
    """One training, from its settings and data to metrics.json; arguments as of `train`.

    Args:
        folder, val: training and validation images.
        progress: where a resumed run goes on.
    """

    def __init__(
        self, config: Config, output: Path, folder: CocoFolder, val: CocoFolder | None, progress: Progress | None
    ) -> None:
        self.config, self.output, self.folder, self.val, self.progress = config, output, folder, val, progress
        recipe = config.train
        self.world_size = recipe.devices * recipe.nodes
        batches = EpochOrder(len(folder), recipe.batch_size, config.seed, world_size=self.world_size).batches
        self.steps_per_epoch = math.ceil(batches / recipe.accumulate)
        self.total_steps = recipe.max_steps or recipe.epochs * self.steps_per_epoch
        self.stop = StopRequest()
        self.ranks = RankWatch(output)
        self.validation = Validation(output, config, train=folder, val=val, stop=self.stop)

    def train(self, init: str | Path | None, device: torch.device, precision: Literal["32", "bf16", "16"]) -> None:
        step, epoch, start = 0, 0, 0
        if self.progress is not None:
            step, epoch, start = self.progress.step, self.progress.epoch, self.progress.batches
            _check_progress(self.progress, self.world_size, self.total_steps)
            if step == self.total_steps and (self.output / "metrics.json").exists():
                logger.info("%s is finished: %s steps are done", self.output, step)
                return
        keeper = RunKeeper(self.validation, self.ranks, step=step)
        trainer = self._trainer(keeper, device, precision)
        seed_everything(self.config.seed, verbose=False)
        module = LitRDSNet(
            _build(self.config, self.folder, None if self.progress else init, resumed=self.progress is not None),
            self.config,
            images_per_step=self.config.train.batch_size * self.config.train.accumulate * self.world_size,
            total_steps=self.total_steps,
        )
        loader = train_loader(self.config, self.folder, trainer.global_rank, self.world_size, epoch=epoch, start=start)
        if trainer.is_global_zero:
            run_folder.create(self.output, self.config, self.folder.class_names)
            (self.output / "metrics.json").unlink(missing_ok=True)  # of a run that now goes on
        try:
            with self.stop:
                trainer.fit(module, loader, ckpt_path=self.output / LAST if self.progress else None)
                keeper.validate_if_due(trainer, module)  # it had been stopped in the last validation
        finally:
            keeper.close()
        if trainer.is_global_zero:
            if keeper.clock.total:
                logger.info("waited for data %s of the time", keeper.clock.share())
            self._finish(module.result, trainer.strategy.root_device)

    def _trainer(self, keeper: RunKeeper, device: torch.device, precision: Literal["32", "bf16", "16"]) -> Trainer:
        recipe = self.config.train
        if device.type == "cuda" and torch.cuda.device_count() < recipe.devices:
            raise ValueError(f"train.devices is {recipe.devices}, but there are {torch.cuda.device_count()} GPUs")
        return Trainer(
            accelerator=device.type,
            devices=recipe.devices,
            num_nodes=recipe.nodes,
            strategy="ddp" if self.world_size > 1 else "auto",
            precision=PRECISION[precision],
            max_epochs=math.ceil(self.total_steps / self.steps_per_epoch),
            accumulate_grad_batches=recipe.accumulate,
            callbacks=[keeper],
            plugins=[WholeFiles()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            use_distributed_sampler=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            default_root_dir=self.output,
        )

    def _finish(self, trained: RDSNet, device: torch.device) -> None:
        """Fit MBRM to the best weights (the last ones without validation), evaluate them, and write metrics.json."""
        config, output, val = self.config, self.output, self.val
        if val is None:
            self.validation.save_weights(trained)
        model, stored = checkpoint.load(output)
        predictor = Predictor(model.to(device), replace(stored, config=config))
        metrics: dict[str, Any] = {}
        if config.model.masks and config.detect.refine != "off":
            try:
                metrics["refiner"] = asdict(fit(model.mbrm, matched_pairs(predictor, self.folder)))
                self.validation.save_weights(model)
            except NothingToFit as error:
                logger.warning("%s; it keeps the numbers that its authors published", error)
        if val is not None:
            pictures = Pictures(output / "predictions", val.class_names)
            evaluator = predictor.evaluate(val, batch_size=config.train.batch_size, each=pictures)
            metrics |= evaluator.summarize(boundary=config.model.masks)
        write_text(output / "metrics.json", json.dumps(metrics, indent=2) + "\n")


def _open_data(config: Config, progress: Progress | None) -> tuple[CocoFolder, CocoFolder | None]:
    """The training and validation sets, checked; the first process checks for all."""
    data = config.data
    if data.train is None:
        raise ValueError("data.train is not set: training needs a COCO JSON")
    _refuse_errors(data)
    folder = CocoFolder(data.train, data.train_images)
    val = CocoFolder(data.val, data.val_images) if data.val else None
    for names, where in ((val and val.class_names, data.val), (progress and progress.class_names, "the stored run")):
        if names and names != folder.class_names:
            raise ValueError(f"{data.train} has the classes {folder.class_names}, but {where} has {names}")
    return folder, val


@rank_zero_only
def _refuse_errors(data: DataConfig) -> None:
    sources = [(data.train, data.train_images), (data.val, data.val_images)]
    found = [problem for json_path, images in sources if json_path for problem in check_dataset(json_path, images)]
    errors = [f"{problem.where}: {problem.what}" for problem in found if problem.severity == "error"]
    if errors:
        shown = "; ".join(errors[:5])
        raise ValueError(f"training refuses the data (errors: {len(errors)}; `rdsnet check` lists all): {shown}")


def _check_progress(progress: Progress, world_size: int, total_steps: int) -> None:
    if progress.step > total_steps:
        raise ValueError(f"{progress.step} steps are done already, more than the {total_steps} asked for")
    if progress.mid_epoch and progress.world_size != world_size:
        raise ValueError(
            f"the run was stopped within an epoch on {progress.world_size} devices and continues on as many, "
            f"got {world_size}"
        )


def _build(config: Config, folder: CocoFolder, init: str | Path | None, *, resumed: bool) -> RDSNet:
    model = build_model(config, num_classes=len(folder.class_names), pretrained=not resumed and init is None)
    if init is not None:
        for message in checkpoint.initialise(model, init, folder.class_names):
            logger.info(message)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Only what concerns the user: no tips of Lightning, and no warnings about choices made here on purpose."""
    lightning = logging.getLogger("lightning.pytorch")
    level = lightning.level
    lightning.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)
        warnings.filterwarnings("ignore", message=r".*treespec", module=r"lightning\.")
        try:
            yield
        finally:
            lightning.setLevel(level)


MAX_IMAGES = 2000


def matched_pairs(predictor: Predictor, folder: CocoFolder) -> list[Pairs]:
    """What a model's MBRM is fitted to: the detections of each image of a data set that find an object.

    Args:
        folder: of a large one a sample is taken (by the settings' `seed`).
    """
    draw = np.random.default_rng(predictor.config.seed).permutation(len(folder.images))[:MAX_IMAGES]
    sample = folder.subset([folder.images[i] for i in sorted(draw)])
    pairs = []
    for record, objects in predictor.detect_folder(sample):
        assert objects.profiles is not None
        boxes, labels = record.truth(masks=True)
        found, known = match_boxes(objects.regressed_boxes, objects.labels, boxes, labels)
        columns, rows = objects.profiles
        pairs.append(Pairs(objects.regressed_boxes[found], boxes[known], (columns[found], rows[found])))
    return pairs
