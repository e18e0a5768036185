"""What `rdsnet benchmark` does with its options."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rdsnet.benchmark import CANDIDATES, OBJECTS, PHOTO_SIZE, benchmark, untrained
from rdsnet.files import make_folder, write_text
from rdsnet.predict import Device, Precision, load


def run(
    *,
    weights: str | None,
    preset: str | None,
    classes: int | None,
    image: Path | None,
    size: Sequence[int] | None,
    objects: int | None,
    batch_sizes: Sequence[int],
    rounds: int,
    threads: int | None,
    precision: Precision,
    compile: bool,
    output: Path | None,
    device: Device,
) -> dict[str, Any]:
    """Measure weights or a preset, and write the numbers to `output`. Arguments are the options of the command.

    Returns:
        As `benchmark`, with the name of weights or preset as "source".

    Raises:
        FileNotFoundError, ValueError: options that contradict each other, and as `benchmark`.
    """
    if weights is not None and (preset is not None or classes is not None):
        raise ValueError("expected weights or a preset, got both (--classes is of a preset)")
    if image is not None and size is not None:
        raise ValueError("expected --image or --size, the size of an image that is made, got both")
    if threads is not None and threads < 1:
        raise ValueError(f"expected at least 1 thread, got {threads}")
    if output is not None:  # before the long part, in case it cannot be
        if output.is_dir():
            raise ValueError(f"expected a file for the output, but {output} is a folder")
        make_folder(output.parent)
    if threads is not None:
        torch.set_num_threads(threads)
    own = weights is not None and image is not None  # detections that mean something
    if objects is None and not own:
        objects = OBJECTS
    if weights is not None:
        predictor = load(weights, device=device, precision=precision, compile=compile)
    else:
        preset = preset or "rdsnet_r50"
        classes = 80 if classes is None else classes
        predictor = untrained(preset, num_classes=classes, device=device, precision=precision, compile=compile)
    result = benchmark(
        predictor,
        image,
        size=PHOTO_SIZE if size is None else (size[0], size[1]),
        objects=objects,
        candidates=CANDIDATES if weights is None else None,
        batch_sizes=batch_sizes,
        rounds=rounds,
    )
    result = {"source": weights or preset, **result}
    if output is not None:
        write_text(output, json.dumps(result, indent=1))
    return result
