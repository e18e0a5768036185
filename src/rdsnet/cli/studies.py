"""`rdsnet benchmark` and `rdsnet reproduce`."""

from __future__ import annotations

import json
from typing import Literal

from rdsnet.cli.options import Compile, Device, File, NewFile, NewFolder, Precision, Preset, Weights
from rdsnet.files import make_folder, write_text
from rdsnet.settings import read_yaml


def benchmark(
    weights: Weights | None = None,
    *,
    preset: Preset | None = None,
    classes: int | None = None,
    image: File | None = None,
    size: tuple[int, int] | None = None,
    objects: int | None = None,
    batch_sizes: tuple[int, ...] = (1, 2, 4),
    rounds: int = 7,
    threads: int | None = None,
    output: NewFile | None = None,
    device: Device = "auto",
    precision: Precision = "32",
    compile: Compile = False,
) -> None:
    """Measure a model's speed and memory, stage by stage.

    And how much of the machine's own convolution rate the network reaches.

    Args:
        preset: random weights; default, without weights: rdsnet_r50
        classes: of the preset; default: 80
        image: default: one is made
        size: H W of the image that is made, pixels; settings say what the network gets of it; default: 480 640
        objects: boxes drawn in place of what is found; default: 100, but none for weights with an image
        batch_sizes: images at once
        rounds: everything is timed so often, in turn
        threads: of the CPU; default: torch's choice
        output: JSON to write
    """
    if weights is not None and (preset is not None or classes is not None):
        raise ValueError("expected weights or a preset, got both (--classes is of a preset)")
    if image is not None and size is not None:
        raise ValueError("expected --image or --size, the size of an image that is made, got both")
    if threads is not None and threads < 1:
        raise ValueError(f"expected at least 1 thread, got {threads}")
    if output is not None:  # before the long part, in case it cannot be made
        make_folder(output.parent)
    import torch
    from rich.console import Console

    from rdsnet.benchmark.run import CANDIDATES, OBJECTS, PHOTO_SIZE, speed_table
    from rdsnet.benchmark.run import benchmark as measure
    from rdsnet.predict.predictor import load, untrained

    if threads is not None:
        torch.set_num_threads(threads)
    if weights is not None:
        predictor = load(weights, device=device, precision=precision, compile=compile)
    else:
        preset, classes = preset or "rdsnet_r50", 80 if classes is None else classes
        predictor = untrained(preset, num_classes=classes, device=device, precision=precision, compile=compile)
    if objects is None and (weights is None or image is None):  # what is found would mean nothing
        objects = OBJECTS
    result = measure(
        predictor,
        image,
        size=size or PHOTO_SIZE,
        objects=objects,
        candidates=CANDIDATES if weights is None else None,
        batch_sizes=batch_sizes,
        rounds=rounds,
    )
    result = {"source": weights or preset, **result}
    Console().print(speed_table(result))
    if output is not None:
        write_text(output, json.dumps(result, indent=1))
        print(f"numbers: {output}")


def reproduce(
    what: Literal["table1", "table2", "table3", "table4", "figure3", "figure4", "figure5"],
    *,
    output: NewFolder,
    data: str = "shapes",
    budget: Literal["tiny", "small", "full"] = "small",
    seeds: int = 3,
    preset_family: Literal["tiny", "full"] | None = None,
    config: File | None = None,
    device: Device = "auto",
) -> None:
    """Measure a table or figure of the paper.

    Trains what it needs, and prints its rows beside the paper's.

    Args:
        what: table1: instance segmentation; table2: detection; table3: correlation and cropping (4 trainings a seed);
            table4: boundary refinement; figure3: representations; figure4: pictures; figure5: MBRM's gamma and s
        output: gets WHAT.csv, .md and .png; repeated, it goes on where it stopped
        data: shapes (made, cluttered), or a folder with train.json and val.json, or COCO's
        budget: tiny: a trial in seconds; small: minutes a training on two CPU cores; full: the presets' own schedules
        seeds: so many trainings of each kind: seeds 0, 1, ...
        preset_family: full: the paper's models; tiny: small ones from scratch; default: full for COCO, else tiny
        config: YAML of settings over every preset
    """
    settings = None
    if config is not None:
        try:
            settings = read_yaml(config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{config}: {error}") from None
    from rich.console import Console

    from rdsnet.reproduce.run import reproduce
    from rdsnet.reproduce.tables import terminal

    result = reproduce(
        what,
        output,
        data=data,
        budget=budget,
        seeds=seeds,
        family=preset_family,
        settings=settings,
        device=device,
    )
    print(result.title)
    Console().print(*terminal(result))
    if result.note:
        print(f"in brackets, the paper's figures: {result.note}")
    print(f"{what}.csv, .md and .png: {output}")
