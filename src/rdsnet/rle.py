"""Run-length codes (COCO's): read from polygons and codes, written from crops."""

from __future__ import annotations

from typing import Any

import numpy as np
from faster_coco_eval.core import mask as coco_mask

Rle = dict[str, Any]
"""{"size": [H, W], "counts": str}: compressed COCO RLE, column by column, as text so that JSON takes it"""

Window = tuple[int, int, int, int]
"""x0, y0, x1, y1 in pixels of an image, half-open"""


def read_segmentation(segmentation: Any, size: tuple[int, int]) -> tuple[Rle | None, str | None]:
    """The mask of an annotation.

    Args:
        segmentation: polygons, compressed or uncompressed RLE; None or an empty list where there is none.
        size: (H, W) of the image.

    Returns:
        The mask (None without one, or where no pixel of it is left), and what had to be mended (None if nothing).

    Raises:
        ValueError: a run-length code that does not fit the image, or something that is no segmentation.
    """
    if segmentation is None or segmentation == []:
        return None, None
    note = None
    if isinstance(segmentation, list):
        counts, note = _from_polygons(segmentation, size)
    elif isinstance(segmentation, dict):
        counts = _from_rle(segmentation, size)
    else:
        raise ValueError(f"segmentation is neither polygons nor RLE: {str(segmentation)[:40]!r}")
    if counts is None:
        return None, note
    runs = decode_counts(counts)
    if (runs < 0).any() or runs.sum() != size[0] * size[1]:
        raise ValueError(f"RLE counts do not add up to the image's {size[0] * size[1]} pixels")
    if not runs[1::2].any():
        return None, note or "mask without a pixel"
    return {"size": list(size), "counts": counts}, note


def _from_polygons(polygons: list[Any], size: tuple[int, int]) -> tuple[str | None, str | None]:
    if all(isinstance(number, (int, float)) for number in polygons):
        polygons = [polygons]  # one polygon that was not put into a list
    good = [part for part in polygons if _is_polygon(part, max(size))]
    note = None
    if len(good) < len(polygons):
        bad = len(polygons) - len(good)
        note = f"{bad} of {len(polygons)} polygons without 3 points (x, y), or far outside of the image"
    if not good:
        return None, note
    height, width = size
    return coco_mask.merge(coco_mask.frPyObjects(good, height, width))["counts"].decode("ascii"), note


def _is_polygon(part: Any, side: int) -> bool:
    # Rasterising takes time and memory in proportion to the coordinates, so wild ones must not get there.
    try:
        numbers = np.asarray(part, np.float64)
    except (TypeError, ValueError):
        return False
    return bool(
        numbers.ndim == 1 and len(numbers) >= 6 and len(numbers) % 2 == 0 and (np.abs(numbers) <= 2 * side).all()
    )


def _from_rle(rle: dict[str, Any], size: tuple[int, int]) -> str:
    height, width = size
    came = rle.get("size")
    if came != [height, width]:
        raise ValueError(f"RLE is for an image of (height, width) {came}; the image is {[height, width]}")
    counts = rle.get("counts")
    if isinstance(counts, list):
        if not all(isinstance(n, int) and 0 <= n <= height * width for n in counts):
            raise ValueError(f"RLE counts are not whole numbers of at most {height * width} pixels")
        return _compress(counts, size)
    if not isinstance(counts, (str, bytes)):
        raise ValueError(f"RLE counts are neither text nor a list: {str(counts)[:40]!r}")
    return counts if isinstance(counts, str) else counts.decode("ascii")


def _compress(runs: list[int], size: tuple[int, int]) -> str:
    compressed = coco_mask.frPyObjects({"size": list(size), "counts": runs}, *size)["counts"]
    return compressed.decode("ascii")


def mask_box(rle: Rle) -> tuple[float, float, float, float]:
    """The enclosing rectangle x1, y1, x2, y2 (half-open) of a mask that is not empty."""
    x, y, width, height = coco_mask.toBbox(rle).tolist()
    return x, y, x + width, y + height


def mask_area(rle: Rle) -> int:
    """Pixels of a mask."""
    return int(coco_mask.area(rle))


def decode_counts(counts: str | bytes) -> np.ndarray:
    """The runs of a compressed code: int64, background first, then foreground and background in turn.

    COCO's code: five bits a character, lowest first, the sixth says that more follow; from the fourth run on a run is
    stored as the difference to the run two before. An unfinished last run is left out.
    """
    characters = counts.encode("ascii", "replace") if isinstance(counts, str) else counts
    codes = np.frombuffer(characters, np.uint8).astype(np.int64) - 48
    last = np.flatnonzero((codes & 0x20) == 0)
    if len(last) == 0:
        return np.zeros(0, np.int64)
    codes = codes[: last[-1] + 1]
    first = np.concatenate(([0], last[:-1] + 1))
    lengths = last - first + 1
    shifts = 5 * (np.arange(len(codes)) - np.repeat(first, lengths))
    runs = np.add.reduceat((codes & 0x1F) << shifts, first)
    runs -= ((codes[last] & 0x10) != 0) * (np.int64(1) << (5 * lengths))  # sign of two's complement
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def rasterise(rle: Rle, window: Window, size: tuple[int, int]) -> np.ndarray:
    """The mask inside a window of the image, without decoding the columns beside it.

    Args:
        rle: compressed mask of the image.
        window: inside the image.
        size: (H, W) of the image.

    Returns:
        bool (y1 - y0, x1 - x0).

    Raises:
        ValueError: the mask is of another size, or the window is not inside the image.
    """
    height, width = size
    x0, y0, x1, y1 = window
    if list(rle["size"]) != [height, width]:
        raise ValueError(f"expected a mask of (height, width) {[height, width]}, got {rle['size']}")
    _require_inside(window, size)
    ends = np.cumsum(decode_counts(rle["counts"])).clip(x0 * height, x1 * height)
    lengths = np.diff(ends, prepend=x0 * height)
    pixels = np.repeat(np.arange(len(ends)) % 2 == 1, lengths)
    return np.ascontiguousarray(pixels.reshape(x1 - x0, height).T[y0:y1])


def mask_crop(rle: Rle) -> tuple[np.ndarray, Window]:
    """A mask inside its enclosing rectangle, bool (h, w), and the rectangle; both empty for a mask without a pixel."""
    x0, y0, x1, y1 = (int(edge) for edge in mask_box(rle))
    height, width = rle["size"]
    return rasterise(rle, (x0, y0, x1, y1), (height, width)), (x0, y0, x1, y1)


def crop_to_rle(mask: np.ndarray, window: Window, image_size: tuple[int, int]) -> Rle:
    """The COCO run-length code of a mask of which only a crop is stored.

    Args:
        mask: bool (h, w), the inside of the window; everything else is background.
        window: inside the image.
        image_size: (H, W) of the image.

    Returns:
        The same as encoding the mask pasted into the image.

    Raises:
        ValueError: the window is not inside the image, or not of the mask's shape.
    """
    height, width = image_size
    runs = crop_to_runs(mask, window, image_size).tolist()
    return {"size": [height, width], "counts": _compress(runs, image_size)}


def crop_to_runs(mask: np.ndarray, window: Window, image_size: tuple[int, int]) -> np.ndarray:
    """The same as plain run lengths, column by column: int64, background first (0 if there is none), then in turn."""
    (x0, y0, x1, y1), (height, width) = window, image_size
    if mask.shape != (y1 - y0, x1 - x0):
        raise ValueError(f"expected a mask of shape {(y1 - y0, x1 - x0)} for the window {window}, got {mask.shape}")
    _require_inside(window, image_size)
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


def _require_inside(window: Window, size: tuple[int, int]) -> None:
    (x0, y0, x1, y1), (height, width) = window, size
    if not (0 <= x0 <= x1 <= width and 0 <= y0 <= y1 <= height):
        raise ValueError(f"expected a window inside {width} x {height} pixels, got {window}")
