"""Run-length codes of masks, straight from their crops: no step here makes an array of the whole image."""

from __future__ import annotations

from typing import Any

import numpy as np
from faster_coco_eval.core import mask as coco_mask


def crop_to_rle(mask: np.ndarray, window: tuple[int, int, int, int], image_size: tuple[int, int]) -> dict[str, Any]:
    """The COCO run-length code of a mask of which only a crop is stored.

    Args:
        mask: bool (h, w), the inside of the window; everything else is background.
        window: x0, y0, x1, y1 in pixels of the image, half-open.
        image_size: (H, W) of the image.

    Returns:
        `{"size": [H, W], "counts": bytes}`, equal to encoding the mask pasted into the image.

    Raises:
        ValueError: the window is not inside the image, or not of the mask's shape.
    """
    height, width = image_size
    runs = crop_to_runs(mask, window, image_size).tolist()
    return coco_mask.frPyObjects({"size": [height, width], "counts": runs}, height, width)


def crop_to_runs(mask: np.ndarray, window: tuple[int, int, int, int], image_size: tuple[int, int]) -> np.ndarray:
    """The same as plain run lengths, column by column: int64, background first (0 if there is none), then in turn."""
    (x0, y0, x1, y1), (height, width) = window, image_size
    if mask.shape != (y1 - y0, x1 - x0):
        raise ValueError(f"expected a mask of shape {(y1 - y0, x1 - x0)} for the window {window}, got {mask.shape}")
    if not (0 <= x0 <= x1 <= width and 0 <= y0 <= y1 <= height):
        raise ValueError(f"expected a window inside {width} x {height} pixels, got {window}")
    rows = y1 - y0
    pixels = mask.T
    if rows < height:  # a background pixel below each column, so that every run ends in its own
        rows += 1
        pixels = np.zeros((x1 - x0, rows), bool)
        pixels[:, :-1] = mask.T
    pixels = pixels.ravel()
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    if pixels[:1].any():
        changes = np.concatenate(([0], changes))
    if pixels[-1:].any():
        changes = np.concatenate((changes, [len(pixels)]))
    column, row = np.divmod(changes, max(rows, 1))
    ends = (x0 + column) * height + y0 + row  # first and one-past-last pixel of each run, in turn
    if len(ends) and ends[-1] == height * width:
        return np.diff(ends, prepend=0)
    return np.diff(ends, prepend=0, append=height * width)
