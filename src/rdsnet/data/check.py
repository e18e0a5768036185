"""Every problem of a data set, before training meets the first."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rdsnet.data.parsing import ImageRecord, Problem, parse

__all__ = ["Problem", "check_dataset"]


def check_dataset(json_path: str | Path, images: str | Path | None = None) -> list[Problem]:
    """Reads a COCO JSON and decodes every image.

    Args:
        json_path: the file.
        images: folder of the images; default as in `CocoFolder`.

    Returns:
        All problems, those of the JSON first; empty for a data set without any. Training refuses a data set with an
        "error" and mends a "warning" as its `action` says.
    """
    parsed = parse(json_path, images)
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # decoding releases the interpreter lock
        return parsed.problems + [found for found in threads.map(_check_image, parsed.images) if found is not None]


def _check_image(record: ImageRecord) -> Problem | None:
    try:
        record.read()
    except (OSError, ValueError) as error:
        what = str(error).removeprefix(f"{record.path}: ")
        return Problem("error", str(record.path), record.id, what, "training refuses")
    if not record.apply_exif:
        what = "EXIF turns the image, but the JSON's height and width match it as stored"
        return Problem("warning", str(record.path), record.id, what, "used as stored, not turned")
    return None
