"""`rdsnet train` and `rdsnet evaluate`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from jsonargparse import ArgumentParser, Namespace

from rdsnet.cli.options import add_device, add_speed
from rdsnet.config import (
    SETTINGS,
    Config,
    config_from_dict,
    config_from_file,
    config_to_dict,
    flat_settings,
    get_config,
)
from rdsnet.files import make_folder, write_text
from rdsnet.presets import PRESETS
from rdsnet.settings import Setting, helps, unknown
from rdsnet.terminal import show_messages


def define_train(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--preset", default="rdsnet_r50")
    first.add_argument("--resume")
    first.add_argument("--config", type=Path, action="append", default=[])
    named, _ = first.parse_known_args([a for a in arguments if a not in ("-h", "--help")])
    parser.add_argument("--preset", default="rdsnet_r50", help=f"settings to start from: {', '.join(PRESETS)}")
    parser.add_argument("--config", action="append", help="YAML file of settings over the preset; later ones win")
    printed = "print the settings that result, and stop"
    parser.add_argument("--print_config", type=str, nargs="?", const="", default=None, help=printed)
    parser.add_argument("--output", type=Path | None, default=None, help="folder of the run; must be new or empty")
    parser.add_argument("--resume", type=Path | None, default=None, help="folder of a run to continue where it stopped")
    parser.add_argument("--init", type=Path | None, default=None, help="weights to start from (.safetensors or a run)")
    add_device(parser)
    for argument in arguments:
        name = argument.removeprefix("--").split("=")[0]
        if argument.startswith("--") and "." in name and name not in SETTINGS:
            raise ValueError(unknown(name, list(SETTINGS)))
    config = _base_config(named.preset, named.resume)
    for path in named.config:
        config = config_from_file(path, config)
    _add_settings(parser, config)


def _add_settings(parser: ArgumentParser, config: Config) -> None:
    sections = {name: kind for name, kind in get_type_hints(Config).items() if is_dataclass(kind)}
    texts = {name: helps(kind) for name, kind in {"": Config, **sections}.items()}
    groups = {name: parser.add_argument_group(name) for name in texts if name} | {"": parser}
    for name, value in flat_settings(config).items():
        section, _, field = name.rpartition(".")
        text = texts[section].get(field, "").replace("%", "%%")
        groups[section].add_argument(f"--{name}", type=_Reader(SETTINGS[name]), default=value, help=text)


@dataclass(frozen=True)
class _Reader:
    """The type of an option that is a setting; the help shows it in words."""

    setting: Setting

    def __call__(self, text: Any) -> Any:
        try:
            return self.setting.read_text(text)
        except ValueError as error:  # whose text argparse would drop
            raise argparse.ArgumentTypeError(str(error)) from None

    def __repr__(self) -> str:
        return self.setting.takes


def _base_config(preset: str, resume: str | None) -> Config:
    if resume is None:
        return get_config(preset)
    from rdsnet.train.run_folder import read_config

    return read_config(Path(resume))


def run_train(options: Namespace) -> None:
    """Train on a COCO-format data set, validate every epoch, fit the boundary refinement at the end."""
    import yaml
    from rich.console import Console

    from rdsnet.cli.tables import format_table
    from rdsnet.train.run import train

    show_messages()
    values = options.as_dict()
    config = config_from_dict({field.name: values[field.name] for field in fields(Config)})
    if options.print_config is not None:
        print(yaml.safe_dump(config_to_dict(config), sort_keys=False), end="")
        return
    if options.resume is not None:
        output = train(config, options.resume, resume=True, device=options.device)
    else:
        if options.output is None:
            raise ValueError("train needs --output, the folder of the run")
        output = train(config, options.output, init=options.init, device=options.device)
    metrics = json.loads((output / "metrics.json").read_text())
    if "box" in metrics:  # there was a validation set
        Console().print(format_table(metrics, [row["class"] for row in metrics["per_class"]]))
    print(f"run folder: {output} (weights: {output / 'best.safetensors'}, metrics: {output / 'metrics.json'})")


def define_evaluate(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    parser.add_argument("weights", type=str, help="nuclei, a run folder or a .safetensors file")
    parser.add_argument("--data.val", type=Path, required=True, help="COCO JSON")
    parser.add_argument("--data.val_images", type=Path | None, default=None, help="folder; default: beside the JSON")
    parser.add_argument("--max_detections", type=int | None, default=None, help="objects an image; default: the run's")
    parser.add_argument("--batch_size", type=int, default=1, help="images at once")
    help = "also apart, by this entry of the JSON's images (such as modality)"
    parser.add_argument("--by", type=str | None, default=None, help=help)
    parser.add_argument("--output", type=Path | None, default=None, help="folder for metrics.json and results.json")
    add_speed(parser)


def run_evaluate(options: Namespace) -> None:
    """Measure box and mask AP: boxes as regressed, as the mask's rectangle (direct) and refined."""
    from rich.console import Console

    from rdsnet.cli.tables import format_parts, format_table
    from rdsnet.data.coco import CocoFolder
    from rdsnet.predict.predictor import load
    from rdsnet.results.metrics import CocoEvaluator

    predictor = load(options.weights, device=options.device, precision=options.precision, compile=options.compile)
    if options.max_detections is not None:
        predictor.set_max_detections(options.max_detections)
    if options.output is not None:
        make_folder(options.output)  # before the long part, in case it cannot be
    config = predictor.config
    folder = CocoFolder(options.data.val, options.data.val_images)
    predictor.require_classes(folder)
    if options.by is not None:
        CocoEvaluator(folder, 1).by(options.by)  # an entry that is missing is said before the long part
    evaluator = predictor.evaluate(folder, batch_size=options.batch_size)
    metrics = evaluator.summarize(boundary=config.model.masks)
    Console().print(format_table(metrics, folder.class_names))
    if options.by is not None:
        parts = evaluator.by(options.by)
        metrics["by"] = {name: part.summarize(boundary=config.model.masks) for name, part in parts.items()}
        Console().print(format_parts(metrics["by"], options.by))
    if options.output is not None:
        write_text(options.output / "metrics.json", json.dumps(metrics, indent=1))
        write_text(options.output / "results.json", json.dumps(evaluator.results()))
        print(f"metrics.json and results.json: {options.output}")
