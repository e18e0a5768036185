"""`rdsnet check`, `rdsnet shapes` and `rdsnet convert`."""

from __future__ import annotations

from typing import Literal

from rdsnet.cli.options import File, Folder, NewFile, NewFolder


def check(json: File, *, images: Folder | None = None) -> None:
    """List every problem of a COCO data set.

    And what training does about each.

    Args:
        json: COCO JSON
        images: of the images; default: images/ beside the JSON, else its own folder
    """
    from rdsnet.data.coco import CocoFolder, check_dataset

    problems = check_dataset(json, images)
    for problem in problems:
        print(f"{problem.severity}: {problem.where}: {problem.what} -> {problem.action}")
    errors = sum(problem.severity == "error" for problem in problems)
    if errors:
        raise ValueError(f"{json}: training refuses it (errors: {errors}, warnings: {len(problems) - errors})")
    folder = CocoFolder(json, images)
    objects = sum(len(record.annotations) for record in folder.images)
    print(
        f"{json}: {len(folder)} images, {objects} objects, {len(folder.class_names)} classes, "
        f"{len(problems)} warnings; ready for training"
    )


def shapes(
    folder: NewFolder,
    *,
    images: int = 200,
    val_images: int = 50,
    size: int = 256,
    style: Literal["plain", "cluttered"] = "plain",
    seed: int = 0,
) -> None:
    """Write a synthetic data set in COCO format.

    It shows overlapping textured shapes, with exact masks.

    Args:
        folder: written: train.json, val.json, images/
        images: for training
        val_images: for validation
        size: pixels of a side
        style: cluttered: thin structures, strong occlusion, low contrast, and marks of no class
        seed: of everything random
    """
    from rdsnet.data.shapes import make_shapes

    make_shapes(folder, images=images, val_images=val_images, size=size, style=style, seed=seed)
    print(f"data set: {folder} (train.json, val.json, images/)")


def convert(
    source: Literal["release", "torchvision", "yolact"],
    file: File,
    *,
    output: NewFile,
    preset: Literal["yolact_r50", "yolact_base", "yolact_im700", "yolact_im400"] | None = None,
) -> None:
    """Turn a checkpoint of another project into weights of ours.

    Of the authors' release, of torchvision's RetinaNet, or of YOLACT.

    Args:
        source: project that wrote FILE: the authors' RDSNet, or another
        file: checkpoint (.pth) of RDSNet, torchvision's RetinaNet, or YOLACT
        output: .safetensors to write
        preset: of yolact only; default: by the beginning of FILE's name (yolact_im700, yolact_im400), else by its trunk
    """
    from rdsnet.weights.convert import convert

    checkpoint = convert(source, file, output, preset)
    note = " (masks are untrained: train with --init)" if source == "torchvision" else ""
    if source == "yolact":  # its presets differ by what the weights do not show
        note = f" ({checkpoint.config.data.square} pixels, {checkpoint.config.model.trunk.split('.')[0]})"
    print(f"weights{note}: {output}")
