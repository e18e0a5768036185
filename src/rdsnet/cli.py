"""The command line: `rdsnet COMMAND`.

Each command is a function that defines its options and one that runs it; what they need is imported when they run, so
that `rdsnet --help` does not wait for torch.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from rdsnet.config import (
    PRESETS,
    SETTINGS,
    Config,
    config_from_dict,
    config_from_file,
    config_to_dict,
    flat_settings,
    get_config,
)
from rdsnet.demo import define_demo, run_demo
from rdsnet.files import make_folder, write_text
from rdsnet.options import add_device, add_speed
from rdsnet.refine_command import define_fit_refiner, run_fit_refiner
from rdsnet.reproduce_command import define_reproduce, run_reproduce
from rdsnet.settings import Setting, helps, unknown
from rdsnet.visualize_command import define_visualize, run_visualize


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status: 0, 2 for bad input, 130 for Ctrl-C."""
    # Large tensors in large pages; read by torch when it allocates the first. Prediction on a CPU is 15% faster.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        parser = build_parser(arguments)
        options = parser.parse_args(arguments)
        run: Callable[[Namespace], None] = COMMANDS[options.command][1]
        run(options[options.command])
        return 0
    except BrokenPipeError:  # `rdsnet check ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ArgumentError, ValueError, OSError, FloatingPointError) as error:
        # what a loader process raised comes back as a whole traceback, with the message as its last line
        message = str(error).strip().splitlines()[-1] if "Traceback" in str(error) else str(error)
        print(f"rdsnet: error: {' '.join(message.split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(f"\nrdsnet: {str(stopped) or 'stopped'}", file=sys.stderr)
        return 130


def build_parser(arguments: Sequence[str]) -> ArgumentParser:
    """The parser; defaults of `train` are those of the preset, or of the run to resume, that `arguments` name."""
    description = "RDSNet: objects as tight boxes and full-resolution masks."
    parser = ArgumentParser(prog="rdsnet", description=description, exit_on_error=False, allow_abbrev=False)
    commands = parser.add_subcommands(dest="command", required=True)
    for name, (define, run) in COMMANDS.items():
        description = " ".join((run.__doc__ or "").split())
        command = ArgumentParser(
            prog=f"rdsnet {name}", description=description, exit_on_error=False, allow_abbrev=False
        )
        define(command, arguments if arguments[:1] == [name] else [])
        commands.add_subcommand(name, command, help=description)
    return parser


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
    from rdsnet.run_folder import read_config

    return read_config(Path(resume))


def run_train(options: Namespace) -> None:
    """Train on a COCO-format data set, validate every epoch, fit the boundary refinement at the end."""
    import yaml
    from rich.console import Console

    from rdsnet.tables import format_table
    from rdsnet.training import train

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

    from rdsnet.data import CocoFolder
    from rdsnet.evaluation import CocoEvaluator
    from rdsnet.inference import evaluate
    from rdsnet.predict import load
    from rdsnet.tables import format_parts, format_table

    predictor = load(options.weights, device=options.device, precision=options.precision, compile=options.compile)
    if options.max_detections is not None:
        predictor.set_max_detections(options.max_detections)
    if options.output is not None:
        make_folder(options.output)  # before the long part, in case it cannot be
    config = predictor.config
    folder = CocoFolder(options.data.val, options.data.val_images)
    predictor.require_classes(folder)
    if options.by is not None:
        CocoEvaluator(folder.json_path, [], 1).by(options.by)  # an entry that is missing is said before the long part
    evaluator = evaluate(predictor.model, folder, config, batch_size=options.batch_size)
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


def define_predict(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    parser.add_argument("source", type=Path, help="image, folder of images, or video")
    parser.add_argument("--weights", type=str, required=True, help="nuclei, a run folder or a .safetensors file")
    parser.add_argument("--output", type=Path, required=True, help="folder for pictures and predictions.json")
    parser.add_argument("--threshold", type=float, default=0.5, help="smallest score, 0..1")
    parser.add_argument("--save", type=Literal["pictures", "json", "both"], default="both", help="what to write")
    parser.add_argument("--max_detections", type=int | None, default=None, help="objects an image; default: the run's")
    add_speed(parser)


def run_predict(options: Namespace) -> None:
    """Find the objects of images or of a video: overlays, and for images a COCO JSON of what was found."""
    from rdsnet.predict import VIDEO_SUFFIXES, list_images, load, require_threshold, save_predictions, save_video

    require_threshold(options.threshold)
    is_video = options.source.suffix.lower() in VIDEO_SUFFIXES
    files = [] if is_video else list_images(options.source)
    predictor = load(options.weights, device=options.device, precision=options.precision, compile=options.compile)
    if options.max_detections is not None:
        predictor.set_max_detections(options.max_detections)
    if is_video:
        print(f"video: {save_video(predictor, options.source, options.output, threshold=options.threshold)}")
        return
    count = save_predictions(
        predictor,
        files,
        options.output,
        threshold=options.threshold,
        pictures=options.save != "json",
        results=options.save != "pictures",
    )
    print(f"{count} objects with a score of {options.threshold:g} or more in {len(files)} images: {options.output}")


def define_check(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    parser.add_argument("json", type=Path, help="COCO JSON")
    parser.add_argument("--images", type=Path | None, default=None, help="folder; default: beside the JSON")


def run_check(options: Namespace) -> None:
    """List every problem of a COCO data set, and what training will do about it."""
    from rdsnet.data import CocoFolder, check_dataset

    problems = check_dataset(options.json, options.images)
    for problem in problems:
        print(f"{problem.severity}: {problem.where}: {problem.what} -> {problem.action}")
    errors = sum(problem.severity == "error" for problem in problems)
    if errors:
        raise ValueError(f"{options.json}: training refuses it (errors: {errors}, warnings: {len(problems) - errors})")
    folder = CocoFolder(options.json, options.images)
    objects = sum(len(record.annotations) for record in folder.images)
    print(
        f"{options.json}: {len(folder)} images, {objects} objects, {len(folder.class_names)} classes, "
        f"{len(problems)} warnings; ready for training"
    )


def define_shapes(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    parser.add_argument("folder", type=Path, help="written: train.json, val.json, images/")
    parser.add_argument("--images", type=int, default=200, help="training images")
    parser.add_argument("--val_images", type=int, default=50, help="validation images")
    parser.add_argument("--size", type=int, default=256, help="pixels of a side")
    parser.add_argument(
        "--style",
        type=Literal["plain", "cluttered"],
        default="plain",
        help="cluttered: thin structures, strong occlusion, low contrast, and marks of no class",
    )
    parser.add_argument("--seed", type=int, default=0)


def run_shapes(options: Namespace) -> None:
    """Write a synthetic data set: overlapping textured shapes with exact masks, in COCO format."""
    from rdsnet.data import make_shapes

    make_shapes(
        options.folder,
        images=options.images,
        val_images=options.val_images,
        size=options.size,
        style=options.style,
        seed=options.seed,
    )
    print(f"data set: {options.folder} (train.json, val.json, images/)")


def define_convert(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    sources = Literal["release", "torchvision", "yolact"]
    parser.add_argument("source", type=sources, help="project that wrote FILE: the authors' RDSNet, or another")
    parser.add_argument("file", type=Path, help="checkpoint (.pth) of RDSNet, torchvision's RetinaNet, or YOLACT")
    parser.add_argument("--output", type=Path, required=True, help=".safetensors file to write")
    parser.add_argument(
        "--preset",
        type=Literal["yolact_r50", "yolact_base", "yolact_im700", "yolact_im400"] | None,
        default=None,
        help="of yolact only; default: by the beginning of FILE's name (yolact_im700, yolact_im400), else by its trunk",
    )


def run_convert(options: Namespace) -> None:
    """Turn a checkpoint of the authors' release, of torchvision's RetinaNet or of YOLACT into weights of ours."""
    from rdsnet.convert import convert

    checkpoint = convert(options.source, options.file, options.output, options.preset)
    note = " (masks are untrained: train with --init)" if options.source == "torchvision" else ""
    if options.source == "yolact":  # its presets differ by what the weights do not show
        note = f" ({checkpoint.config.data.square} pixels, {checkpoint.config.model.trunk.split('.')[0]})"
    print(f"weights{note}: {options.output}")


def define_benchmark(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    parser.add_argument(
        "weights", type=str | None, nargs="?", default=None, help="nuclei, a run folder or a .safetensors file"
    )
    parser.add_argument(
        "--preset", type=str | None, default=None, help="random weights; default, without weights: rdsnet_r50"
    )
    parser.add_argument("--classes", type=int | None, default=None, help="of the preset; default: 80")
    parser.add_argument("--image", type=Path | None, default=None, help="default: one is made")
    size = "of the image that is made, pixels; settings say what the network gets of it; default: 480 640"
    parser.add_argument("--size", type=int, nargs=2, default=None, metavar=("H", "W"), help=size)
    objects = "boxes drawn in place of what is found; default: 100, but none for weights with an image"
    parser.add_argument("--objects", type=int | None, default=None, help=objects)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 2, 4], help="images at once")
    parser.add_argument("--rounds", type=int, default=7, help="everything is timed so often, in turn")
    parser.add_argument("--threads", type=int | None, default=None, help="of the CPU; default: torch's choice")
    parser.add_argument("--output", type=Path | None, default=None, help="JSON file to write")
    add_speed(parser)


def run_benchmark(options: Namespace) -> None:
    """Measure speed and memory by stage, and how much of the machine's own convolution rate the network reaches."""
    from rich.console import Console

    from rdsnet.benchmark.command import run
    from rdsnet.benchmark.report import format_table

    Console().print(format_table(run(**options.as_dict())))
    if options.output is not None:
        print(f"numbers: {options.output}")


COMMANDS: dict[str, tuple[Callable[[ArgumentParser, Sequence[str]], None], Callable[[Namespace], None]]] = {
    "train": (define_train, run_train),
    "evaluate": (define_evaluate, run_evaluate),
    "predict": (define_predict, run_predict),
    "check": (define_check, run_check),
    "shapes": (define_shapes, run_shapes),
    "convert": (define_convert, run_convert),
    "benchmark": (define_benchmark, run_benchmark),
    "reproduce": (define_reproduce, run_reproduce),
    "visualize": (define_visualize, run_visualize),
    "fit-refiner": (define_fit_refiner, run_fit_refiner),
    "demo": (define_demo, run_demo),
}
