"""Training: the recipe of section 4.1 as a thin LightningModule, and the run that surrounds it."""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Trainer, seed_everything

from rdsnet.config import Config, validate
from rdsnet.data.coco import CocoFolder, check_dataset
from rdsnet.data.loading import train_loader
from rdsnet.data.records import ImageRecord
from rdsnet.files import write_text
from rdsnet.model.build import build_model
from rdsnet.model.mbrm_fit import FitReport, NothingToFit, Pairs, fit
from rdsnet.model.rdsnet import RDSNet
from rdsnet.predict.predictor import Predictor
from rdsnet.results.matching import match_boxes
from rdsnet.structures import Objects
from rdsnet.train import run_folder
from rdsnet.train.keeper import Interrupted, Pictures, RunKeeper, StopRequest
from rdsnet.train.module import LitRDSNet
from rdsnet.train.run_folder import Progress
from rdsnet.weights import checkpoint

Device = Literal["cpu", "cuda", "auto"]

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
    model, stored = checkpoint.load(output)
    predictor = Predictor(model.to(device), replace(stored, config=config))
    metrics: dict[str, Any] = {}
    if config.model.masks and config.detect.refine != "off":
        try:
            metrics["refiner"] = asdict(fit_mbrm(predictor, folder))
            keeper.save_weights(model)
        except NothingToFit as error:
            print(f"{error}; it keeps the numbers that its authors published")
    if val is not None:
        pictures = Pictures(output / "predictions", val.class_names)
        evaluator = predictor.evaluate(val, batch_size=config.train.batch_size, each=pictures)
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
    model = build_model(config, num_classes=len(folder.class_names), pretrained=not resumed and init is None)
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


MAX_IMAGES = 2000


def fit_mbrm(predictor: Predictor, folder: CocoFolder, *, gammas: Sequence[float] = ()) -> FitReport:
    """Fit a model's MBRM to its own detections of a data set, at the size of the original images.

    Args:
        predictor: the MBRM of its model is changed in place.
        folder: usually the training set; a sample of a large one is enough for ten numbers.
        gammas: see `fit`; a chosen gamma is also written to the settings' `detect.gamma`.
    """
    report = fit(predictor.model.mbrm, matched_pairs(predictor, folder), gammas=gammas)
    predictor.config.detect.gamma = report.gamma
    return report


def matched_pairs(predictor: Predictor, folder: CocoFolder) -> list[Pairs]:
    """What a model's MBRM is fitted to: the detections of each image of a data set that find an object.

    Args:
        folder: of a large one a sample is taken (by the settings' `seed`).
    """
    draw = np.random.default_rng(predictor.config.seed).permutation(len(folder.images))[:MAX_IMAGES]
    sample = folder.subset([folder.images[i] for i in sorted(draw)])
    return [_pairs(objects, record) for record, objects in predictor.detect_folder(sample)]


def _pairs(objects: Objects, record: ImageRecord) -> Pairs:
    assert objects.profiles is not None
    boxes, labels = record.truth(masks=True)
    found, known = match_boxes(objects.regressed_boxes, objects.labels, boxes, labels)
    columns, rows = objects.profiles
    return Pairs(objects.regressed_boxes[found], boxes[known], (columns[found], rows[found]))
