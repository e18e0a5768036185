"""`rdsnet check`, `rdsnet shapes` and `rdsnet convert`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace


def define_check(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    parser.add_argument("json", type=Path, help="COCO JSON")
    parser.add_argument("--images", type=Path | None, default=None, help="folder; default: beside the JSON")


def run_check(options: Namespace) -> None:
    """List every problem of a COCO data set, and what training will do about it."""
    from rdsnet.data.coco import CocoFolder, check_dataset

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
    from rdsnet.data.shapes import make_shapes

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
    from rdsnet.weights.convert import convert

    checkpoint = convert(options.source, options.file, options.output, options.preset)
    note = " (masks are untrained: train with --init)" if options.source == "torchvision" else ""
    if options.source == "yolact":  # its presets differ by what the weights do not show
        note = f" ({checkpoint.config.data.square} pixels, {checkpoint.config.model.trunk.split('.')[0]})"
    print(f"weights{note}: {options.output}")
