"""From an image and its objects to what the network takes: scale, crop, turns, colour; masks last, on the grid.

A `View` says where every pixel goes. The image follows it by resizing, slicing and turning. Boxes follow by
arithmetic. Masks stay run-length codes until the crop is known; then the pixels inside it are rasterised, and their
edges, not their colours, follow the view, so that the grid is exact at any scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from rdsnet.config import DataConfig
from rdsnet.data.parsing import Annotation
from rdsnet.data.rle import rasterise
from rdsnet.structures import Targets, ceil32

_COLOUR_RANGE = 0.4
"""brightness, contrast and saturation are multiplied by 1 - this .. 1 + this"""
_HUE_RANGE = 0.05
"""hue is shifted by at most this share of the circle"""
_MORE_THAN_HALF = 0.5 + 1e-9
"""of a cell; the second term is for rounding, so that exactly half is background at every scale"""


@dataclass
class Sample:
    """A training image: uint8 RGB (3, H, W), and its ground truth."""

    image: Tensor
    targets: Targets


@dataclass(frozen=True)
class View:
    """Where the pixels of an image go: resized, cut to a window, then transposed, then flipped.

    original   (height, width) of the image
    size       (height, width) after resizing
    window     x0, y0, x1, y1 of the resized image
    transpose, flip_x, flip_y: the eight flips and right-angled turns of a square
    pad        zeros are appended until both sides have this many pixels
    """

    original: tuple[int, int]
    size: tuple[int, int]
    window: tuple[int, int, int, int]
    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False
    pad: int = 0

    @property
    def scale(self) -> tuple[float, float]:
        """True ratio along x and y."""
        return self.size[1] / self.original[1], self.size[0] / self.original[0]

    @property
    def output(self) -> tuple[int, int]:
        """(H, W) of the content, before padding."""
        x0, y0, x1, y1 = self.window
        return (x1 - x0, y1 - y0) if self.transpose else (y1 - y0, x1 - x0)

    @property
    def padded(self) -> tuple[int, int]:
        """(H, W) after padding."""
        return max(self.output[0], self.pad), max(self.output[1], self.pad)


def eval_scale(height: int, width: int, short_side: int | None, long_side: int) -> float:
    """What both sides are multiplied by: the shorter becomes short_side (None: stays as it is), or less where the
    longer would exceed long_side."""
    return min((short_side or min(height, width)) / min(height, width), long_side / max(height, width))


def eval_size(height: int, width: int, short_side: int | None, long_side: int) -> tuple[int, int]:
    """(h, w) in pixels: both sides by `eval_scale`, rounded."""
    scale = eval_scale(height, width, short_side, long_side)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize_image(image: np.ndarray, size: tuple[int, int]) -> Tensor:
    """uint8 (H, W, 3) to uint8 (3, h, w): bilinear, antialiased where it shrinks."""
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    return functional.resize(tensor, list(size), antialias=True) if tensor.shape[1:] != size else tensor.contiguous()


def draw_view(height: int, width: int, config: DataConfig, rng: np.random.Generator) -> View:
    """A random view of an image for training."""
    short_side = config.short_side
    if config.train_short_side is not None:
        low, high = config.train_short_side
        short_side = int(rng.integers(low, high + 1))
    h, w = eval_size(height, width, short_side, config.long_side)
    crop = config.train_crop
    ch, cw = (h, w) if crop is None else (min(h, crop), min(w, crop))
    y0, x0 = int(rng.integers(h - ch + 1)), int(rng.integers(w - cw + 1))
    turns = int(rng.integers(4)) if config.rotate90 else 0  # anticlockwise
    return View(
        original=(height, width),
        size=(h, w),
        window=(x0, y0, x0 + cw, y0 + ch),
        transpose=turns in (1, 3),
        flip_x=(turns in (2, 3)) != bool(rng.random() < config.horizontal_flip),
        flip_y=(turns in (1, 2)) != bool(rng.random() < config.vertical_flip),
        pad=crop or 0,
    )


def train_transform(
    image: np.ndarray,
    annotations: Sequence[Annotation],
    config: DataConfig,
    mask_stride: int,
    rng: np.random.Generator,
) -> Sample:
    """A random view of an image and its objects.

    Args:
        image: uint8 RGB (H, W, 3).
        annotations: its objects; crowds are left out.
        mask_stride: network pixels of a cell of the mask grid.
        rng: all randomness; the same state gives the same sample.
    """
    view = draw_view(image.shape[0], image.shape[1], config, rng)
    pixels = view_image(image, view)
    if rng.random() < config.colour:
        pixels = _change_colour(pixels, rng)
    bottom, right = (padded - side for padded, side in zip(view.padded, view.output, strict=True))
    pixels = torch.nn.functional.pad(pixels, (0, right, 0, bottom))
    return Sample(pixels, view_objects(annotations, view, mask_stride))


def view_image(image: np.ndarray, view: View) -> Tensor:
    """uint8 RGB (H, W, 3) seen through a view: uint8 (3, h, w), not padded."""
    x0, y0, x1, y1 = view.window
    pixels = resize_image(image, view.size)[:, y0:y1, x0:x1]
    if view.transpose:
        pixels = pixels.transpose(1, 2)
    if view.flip_x:
        pixels = functional.horizontal_flip(pixels)
    if view.flip_y:
        pixels = functional.vertical_flip(pixels)
    return pixels.contiguous()


def _change_colour(image: Tensor, rng: np.random.Generator) -> Tensor:
    low, high = 1 - _COLOUR_RANGE, 1 + _COLOUR_RANGE
    image = functional.adjust_brightness(image, rng.uniform(low, high))
    image = functional.adjust_contrast(image, rng.uniform(low, high))
    image = functional.adjust_saturation(image, rng.uniform(low, high))
    return functional.adjust_hue(image, rng.uniform(-_HUE_RANGE, _HUE_RANGE))


@dataclass
class _Seen:
    """An object seen through a view, in network pixels: the interval that its box spans on each axis, and its mask
    (h, w) with the edges of the mask's columns (w + 1) and rows (h + 1), or None."""

    x: tuple[float, float]
    y: tuple[float, float]
    mask: np.ndarray | None
    columns: np.ndarray
    rows: np.ndarray

    def transpose(self) -> _Seen:
        return _Seen(self.y, self.x, None if self.mask is None else self.mask.T, self.rows, self.columns)

    def flip_x(self, width: int) -> _Seen:
        mask = None if self.mask is None else self.mask[:, ::-1]
        return _Seen((width - self.x[1], width - self.x[0]), self.y, mask, width - self.columns[::-1], self.rows)

    def flip_y(self, height: int) -> _Seen:
        return self.transpose().flip_x(height).transpose()


def view_objects(annotations: Sequence[Annotation], view: View, mask_stride: int) -> Targets:
    """The ground truth seen through a view.

    An object that the window cuts gets the tight box of what remains of its mask (without a mask: its clipped box).
    Crowds, objects whose mask is wholly outside, and those of less than a pixel in width or height are left out. A cell
    of the grid is foreground where more than half of it is covered by the part of the mask inside the box.
    """
    seen: list[_Seen] = []
    labels: list[int] = []
    for annotation in annotations:
        found = None if annotation.crowd else _see(annotation, view)
        if found is None or min(found.x[1] - found.x[0], found.y[1] - found.y[0]) < 1:
            continue
        found = found.transpose() if view.transpose else found
        found = found.flip_x(view.output[1]) if view.flip_x else found
        found = found.flip_y(view.output[0]) if view.flip_y else found
        seen.append(found)
        labels.append(annotation.label)
    grid = [ceil32(side) // mask_stride for side in view.padded]
    masks = torch.zeros(len(seen), *grid, dtype=torch.bool)
    areas = [_paint(mask, found, mask_stride) for mask, found in zip(masks, seen, strict=True)]
    boxes = [(found.x[0], found.y[0], found.x[1], found.y[1]) for found in seen]
    return Targets(
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor(labels, dtype=torch.int64),
        masks=masks,
        has_mask=torch.tensor([found.mask is not None for found in seen], dtype=torch.bool),
        areas=torch.tensor(areas, dtype=torch.float32),
        image_size=view.output,
    )


def _see(annotation: Annotation, view: View) -> _Seen | None:
    """An object in the window, before transposing and flipping; None where nothing of it is left."""
    sx, sy = view.scale
    left, top, right, bottom = view.window
    x1, y1, x2, y2 = (v * s for v, s in zip(annotation.box, (sx, sy, sx, sy), strict=True))
    x = max(x1, left), min(x2, right)
    y = max(y1, top), min(y2, bottom)
    if x[0] >= x[1] or y[0] >= y[1]:
        return None
    cut = (x[0], y[0], x[1], y[1]) != (x1, y1, x2, y2)
    if annotation.rle is None:
        return _Seen((x[0] - left, x[1] - left), (y[0] - top, y[1] - top), None, np.zeros(0), np.zeros(0))
    columns, rows = _pixels(x, sx, view.original[1]), _pixels(y, sy, view.original[0])
    mask = rasterise(annotation.rle, (columns[0], rows[0], columns[1], rows[1]), view.original)
    column_edges = (np.arange(columns[0], columns[1] + 1) * sx).clip(*x) - left
    row_edges = (np.arange(rows[0], rows[1] + 1) * sy).clip(*y) - top
    if not cut:
        return _Seen((x[0] - left, x[1] - left), (y[0] - top, y[1] - top), mask, column_edges, row_edges)
    if not mask.any():
        return None
    return _Seen(_span(np.any(mask, 0), column_edges), _span(np.any(mask, 1), row_edges), mask, column_edges, row_edges)


def _pixels(interval: tuple[float, float], scale: float, side: int) -> tuple[int, int]:
    """The pixels of the original image, half-open, that an interval of network pixels touches."""
    return max(0, math.floor(interval[0] / scale)), min(side, math.ceil(interval[1] / scale))


def _span(occupied: Any, edges: np.ndarray) -> tuple[float, float]:
    where = np.flatnonzero(occupied)
    return float(edges[where[0]]), float(edges[where[-1] + 1])


def _paint(grid: Tensor, seen: _Seen, stride: int) -> float:
    """Writes an object's mask into its grid (Hm, Wm) and returns its area in network pixels."""
    if seen.mask is None:
        return (seen.x[1] - seen.x[0]) * (seen.y[1] - seen.y[0])
    first_x, last_x = math.floor(seen.x[0] / stride), math.ceil(seen.x[1] / stride)
    first_y, last_y = math.floor(seen.y[0] / stride), math.ceil(seen.y[1] / stride)
    rows = coverage_matrix(seen.rows.clip(*seen.y), stride, first_y, last_y)
    columns = coverage_matrix(seen.columns.clip(*seen.x), stride, first_x, last_x)
    covered = rows @ (torch.from_numpy(seen.mask.astype(np.float64)) @ columns.T)
    grid[first_y:last_y, first_x:last_x] = covered > _MORE_THAN_HALF
    return float(covered.sum()) * stride**2


def coverage_matrix(edges: np.ndarray, stride: int, first: int, last: int) -> Tensor:
    """What share of each cell lies in each pixel, along one axis.

    Args:
        edges: (n + 1,) ascending, where the n pixels begin and end.
        stride: length of a cell; cell j covers [j * stride, (j + 1) * stride).
        first, last: cells asked for, half-open.

    Returns:
        (last - first, n) float64 in 0..1. rows @ mask @ columns.T is the covered share of each cell of a grid.
    """
    begin = torch.arange(first, last, dtype=torch.float64)[:, None] * stride
    pixel = torch.from_numpy(edges)
    overlap = torch.minimum(pixel[1:], begin + stride) - torch.maximum(pixel[:-1], begin)
    return overlap.clamp(min=0) / stride
