"""`rdsnet train` and `rdsnet evaluate`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml

from rdsnet.cli.options import (
    Compile,
    Count,
    Device,
    File,
    Folder,
    Name,
    NewFolder,
    Precision,
    Preset,
    RunFolder,
    Weights,
    parse,
)
from rdsnet.config import SETTINGS, Config, changed, config_from_file, config_to_dict, get_config, read_config
from rdsnet.files import make_folder, require_file, write_text


def train(
    *,
    preset: Preset = "rdsnet_r50",
    config: tuple[File, ...] = (),
    output: NewFolder | None = None,
    resume: RunFolder | None = None,
    init: Weights | None = None,
    device: Device = "auto",
    print_config: bool = False,
    **settings: Any,
) -> None:
    """Train on a COCO data set.

    Validates every epoch, and fits the boundary refinement at the end:
    rdsnet train --preset rdsnet_r50 --data.train train.json --data.val val.json --output runs/mine

    Args:
        preset: settings to start from
        config: YAML of settings over the preset; a later file goes over an earlier one, and options over files
        output: folder of the run; must be new or empty
        resume: run to continue where it stopped
        init: to start from
        print_config: print the settings that result, as YAML, and stop
    """
    resolved = _resolved(preset, config, resume, settings)
    if print_config:
        print(yaml.safe_dump(config_to_dict(resolved), sort_keys=False), end="")
        return
    folder = output if resume is None else resume
    if folder is None:
        raise ValueError("train needs --output, the folder of the run")
    data = resolved.data
    if data.train is None:
        raise ValueError("data.train is not set: train needs --data.train, a COCO JSON")
    for json_file in filter(None, (data.train, data.val)):
        require_file(Path(json_file))
    from rich.console import Console

    from rdsnet.cli.tables import format_table
    from rdsnet.train.run import train as run

    run(resolved, folder, resume=resume is not None, init=init, device=device)
    metrics = json.loads((folder / "metrics.json").read_text())
    if "box" in metrics:  # there was a validation set
        Console().print(format_table(metrics, [row["class"] for row in metrics["per_class"]]))
    print(f"run folder: {folder} (weights: {folder / 'best.safetensors'}, metrics: {folder / 'metrics.json'})")


def _resolved(preset: str, files: Sequence[Path], resume: Path | None, settings: Mapping[str, Any]) -> Config:
    """The settings of the preset, or of the run to resume, with those of files and options over them."""
    config = get_config(preset) if resume is None else read_config(resume)
    for path in files:
        config = config_from_file(path, config)
    changes: dict[str, Any] = {}
    for name, value in settings.items():
        section, _, field = name.rpartition(".")
        (changes.setdefault(section, {}) if section else changes)[field] = value
    return changed(config, changes)


def typed_settings(words: Sequence[str]) -> Config:
    """The settings that `rdsnet train` would have with these words, for its help; the defaults if they are wrong."""
    try:
        given = parse(train, words)
        settings = {name: value for name, value in given.items() if name in SETTINGS}
        return _resolved(given.get("preset", "rdsnet_r50"), given.get("config", ()), given.get("resume"), settings)
    except (ValueError, OSError):
        return Config()


def evaluate(
    weights: Weights,
    *,
    val: Annotated[File, Name("data.val")],
    val_images: Annotated[Folder | None, Name("data.val_images")] = None,
    max_detections: Count | None = None,
    batch_size: Count = 1,
    by: str | None = None,
    output: NewFolder | None = None,
    device: Device = "auto",
    precision: Precision = "32",
    compile: Compile = False,
) -> None:
    """Measure the AP of boxes, masks and boundaries on a COCO data set.

    Boxes as regressed, as the mask's rectangle (direct) and refined.

    Args:
        val: COCO JSON
        val_images: of the images; default: images/ beside the JSON, else its own folder
        max_detections: objects an image; default: the run's
        batch_size: images at once
        by: measure also apart, by this entry of the JSON's images (such as modality)
        output: for metrics.json and results.json
    """
    from rich.console import Console

    from rdsnet.cli.tables import format_parts, format_table
    from rdsnet.data.coco import CocoFolder
    from rdsnet.predict.predictor import load
    from rdsnet.results.metrics import CocoEvaluator

    predictor = load(weights, device=device, precision=precision, compile=compile)
    if max_detections is not None:
        predictor.set_max_detections(max_detections)
    if output is not None:
        make_folder(output)  # before the long part, in case it cannot be
    config = predictor.config
    folder = CocoFolder(val, val_images)
    predictor.require_classes(folder)
    if by is not None:
        CocoEvaluator(folder, 1).by(by)  # an entry that is missing is said before the long part
    evaluator = predictor.evaluate(folder, batch_size=batch_size)
    metrics = evaluator.summarize(boundary=config.model.masks)
    Console().print(format_table(metrics, folder.class_names))
    if by is not None:
        parts = evaluator.by(by)
        metrics["by"] = {name: part.summarize(boundary=config.model.masks) for name, part in parts.items()}
        Console().print(format_parts(metrics["by"], by))
    if output is not None:
        write_text(output / "metrics.json", json.dumps(metrics, indent=1))
        write_text(output / "results.json", json.dumps(evaluator.results()))
        print(f"metrics.json and results.json: {output}")
