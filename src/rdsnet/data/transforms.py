"""From an image and its objects to what the network takes: scale, window, turns, colour; masks last, on the grid.

A `View` says where every pixel goes. The image follows it by resizing, slicing and turning. Boxes follow by
arithmetic. Masks stay run-length codes until the crop is known; then the pixels inside it are rasterised, and their
edges, not their colours, follow the view, so that the grid is exact at any scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from rdsnet.config import DataConfig
from rdsnet.data.records import Annotation
from rdsnet.rle import rasterise
from rdsnet.structures import PADDING, MaskGrid, Targets

_COLOUR_RANGE = 0.4
"""brightness, contrast and saturation are multiplied by 1 - this .. 1 + this"""
_HUE_RANGE = 0.05
"""hue is shifted by at most this share of the circle"""
_CANVAS = (124, 116, 104)
"""RGB beyond the image: ImageNet's mean colour, which the normalisation makes about 0"""
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
    window     x0, y0, x1, y1 of the resized image; it may reach beyond it, where there is a canvas of one colour
    transpose, flip_x, flip_y: the eight flips and right-angled turns of a square
    pad        zeros are appended until both sides have this many pixels,
    multiple   and until they are multiples of this
    """

    original: tuple[int, int]
    size: tuple[int, int]
    window: tuple[int, int, int, int]
    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False
    pad: int = 0
    multiple: int = PADDING

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
        height, width = self.output
        return padded_size((max(height, self.pad), max(width, self.pad)), self.multiple)


def padding_multiple(config: DataConfig) -> int:
    """What the sides of the network input are multiples of: squashed images are not padded."""
    return PADDING if config.square is None else 1


def padded_size(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """(H, W) of the network input for an image of (h, w) pixels: the next multiples of `multiple`."""
    return -(-size[0] // multiple) * multiple, -(-size[1] // multiple) * multiple


def eval_scale(height: float, width: float, config: DataConfig) -> float:
    """What both sides are multiplied by where the aspect is kept: the shorter becomes short_side (None: by `scale`),
    or less where the longer would exceed long_side."""
    short, long = min(height, width), max(height, width)
    return min(config.short_side / short if config.short_side else config.scale, config.long_side / long)


def eval_size(height: float, width: float, config: DataConfig) -> tuple[int, int]:
    """(h, w) in pixels that an image gets: squashed to `square`, or both sides by `eval_scale`, rounded."""
    if config.square is not None:
        return config.square, config.square
    scale = eval_scale(height, width, config)
    return _rounded(height * scale), _rounded(width * scale)


def _rounded(pixels: float) -> int:
    return max(1, int(pixels + 0.5))


def resize_image(image: np.ndarray, size: tuple[int, int], *, antialias: bool = True) -> Tensor:
    """uint8 (H, W, 3) to uint8 (3, h, w): bilinear with half-pixel centres; `antialias` smooths where it shrinks."""
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    if tensor.shape[1:] == size:
        return tensor.contiguous()
    if antialias:
        return functional.resize(tensor, list(size), antialias=True)
    # What is plain is plain to half a grey level: the uint8 kernel rounds after each axis, and is up to one level off
    return functional.resize(tensor.float(), list(size), antialias=False).round().to(torch.uint8)


def eval_image(image: np.ndarray, config: DataConfig) -> Tensor:
    """uint8 RGB (H, W, 3) at the size of inference: uint8 (3, h, w), not padded."""
    return resize_image(image, eval_size(image.shape[0], image.shape[1], config), antialias=config.antialias)


def draw_view(height: int, width: int, config: DataConfig, rng: np.random.Generator) -> View:
    """A random view of an image for training."""
    if config.train_short_side is not None:
        low, high = config.train_short_side
        config = replace(config, short_side=int(rng.integers(low, high + 1)))
    if config.short_side is None:  # before the zoom, which changes what is seen and not what the network gets
        config = replace(config, short_side=_rounded(min(height, width) * config.scale))
    seen = _draw_extent(height, width, config, rng)
    h, w = eval_size(*seen, config)
    size = _rounded(height * h / seen[0]), _rounded(width * w / seen[1])
    crop = config.train_crop
    ch, cw = (h, w) if crop is None else (min(h, crop), min(w, crop))
    y0 = _draw_offset(size[0], h, rng) + int(rng.integers(h - ch + 1))
    x0 = _draw_offset(size[1], w, rng) + int(rng.integers(w - cw + 1))
    turns = int(rng.integers(4)) if config.rotate90 else 0  # anticlockwise
    return View(
        original=(height, width),
        size=size,
        window=(x0, y0, x0 + cw, y0 + ch),
        transpose=turns in (1, 3),
        flip_x=(turns in (2, 3)) != bool(rng.random() < config.horizontal_flip),
        flip_y=(turns in (1, 2)) != bool(rng.random() < config.vertical_flip),
        pad=crop or 0,
        multiple=padding_multiple(config),
    )


def _draw_extent(height: int, width: int, config: DataConfig, rng: np.random.Generator) -> tuple[float, float]:
    """(h, w) of the rectangle that is seen, in pixels of the original: its own, times train_zoom and train_aspect."""
    zoom, stretch = 1.0, 1.0
    if config.train_zoom is not None:
        low, high = config.train_zoom
        zoom = low * (high / low) ** rng.random()
    if config.train_aspect != 1:
        stretch = config.train_aspect ** rng.uniform(-0.5, 0.5)
    return height * zoom / stretch, width * zoom * stretch


def _draw_offset(side: int, seen: int, rng: np.random.Generator) -> int:
    """Where `seen` pixels begin along an axis of an image of `side` pixels: inside it, or such that it is inside."""
    return int(rng.integers(min(0, side - seen), max(0, side - seen) + 1))


def train_transform(
    image: np.ndarray,
    annotations: Sequence[Annotation],
    config: DataConfig,
    grid: MaskGrid,
    rng: np.random.Generator,
) -> Sample:
    """A random view of an image and its objects.

    Args:
        image: uint8 RGB (H, W, 3).
        annotations: its objects and crowds.
        grid: that the masks are wanted on.
        rng: all randomness; the same state gives the same sample.
    """
    view = draw_view(image.shape[0], image.shape[1], config, rng)
    pixels = view_image(image, view, antialias=config.antialias)
    if rng.random() < config.colour:
        pixels = _change_colour(pixels, rng)
    bottom, right = (padded - side for padded, side in zip(view.padded, view.output, strict=True))
    pixels = torch.nn.functional.pad(pixels, (0, right, 0, bottom))
    return Sample(pixels, view_objects(annotations, view, grid))


def view_image(image: np.ndarray, view: View, *, antialias: bool = True) -> Tensor:
    """uint8 RGB (H, W, 3) seen through a view: uint8 (3, h, w), not padded."""
    pixels = _cut(resize_image(image, view.size, antialias=antialias), view.window)
    if view.transpose:
        pixels = pixels.transpose(1, 2)
    if view.flip_x:
        pixels = functional.horizontal_flip(pixels)
    if view.flip_y:
        pixels = functional.vertical_flip(pixels)
    return pixels.contiguous()


def _cut(image: Tensor, window: tuple[int, int, int, int]) -> Tensor:
    """The window of an image (3, H, W), with the canvas where it reaches beyond it."""
    x0, y0, x1, y1 = window
    left, right = (min(max(x, 0), image.shape[2]) for x in (x0, x1))
    top, bottom = (min(max(y, 0), image.shape[1]) for y in (y0, y1))
    inside = image[:, top:bottom, left:right]
    if (left, top, right, bottom) == window:
        return inside
    canvas = image.new_tensor(_CANVAS)[:, None, None].repeat(1, y1 - y0, x1 - x0)
    canvas[:, top - y0 : bottom - y0, left - x0 : right - x0] = inside
    return canvas


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


def view_objects(annotations: Sequence[Annotation], view: View, grid: MaskGrid) -> Targets:
    """The ground truth seen through a view.

    An object that the window cuts gets the tight box of what remains of its mask (without a mask: its clipped box).
    Objects whose mask is wholly outside, and those of less than a pixel in width or height are left out. A cell of the
    grid is foreground where more than half of it is covered by the part of the mask inside the box. Crowds are no
    objects: their clipped boxes stand apart.
    """
    seen: list[_Seen] = []
    labels: list[int] = []
    crowds: list[_Seen] = []
    for annotation in annotations:
        found = _see(replace(annotation, rle=None) if annotation.crowd else annotation, view)
        if found is None:
            continue
        found = found.transpose() if view.transpose else found
        found = found.flip_x(view.output[1]) if view.flip_x else found
        found = found.flip_y(view.output[0]) if view.flip_y else found
        if annotation.crowd:
            crowds.append(found)
        elif min(found.x[1] - found.x[0], found.y[1] - found.y[0]) >= 1:
            seen.append(found)
            labels.append(annotation.label)
    rows, columns = (grid.cells(side) for side in view.padded)
    step = view.padded[0] / rows, view.padded[1] / columns
    masks = torch.zeros(len(seen), rows, columns, dtype=torch.bool)
    areas = [_paint(mask, found, step) for mask, found in zip(masks, seen, strict=True)]
    return Targets(
        boxes=_boxes(seen),
        labels=torch.tensor(labels, dtype=torch.int64),
        masks=masks,
        has_mask=torch.tensor([found.mask is not None for found in seen], dtype=torch.bool),
        areas=torch.tensor(areas, dtype=torch.float32),
        image_size=view.output,
        crowd_boxes=_boxes(crowds),
    )


def _boxes(seen: Sequence[_Seen]) -> Tensor:
    boxes = [(found.x[0], found.y[0], found.x[1], found.y[1]) for found in seen]
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


def _see(annotation: Annotation, view: View) -> _Seen | None:
    """An object in the window, before transposing and flipping; None where nothing of it is left."""
    sx, sy = view.scale
    left, top, right, bottom = view.window
    x1, y1, x2, y2 = (v * s for v, s in zip(annotation.box, (sx, sy, sx, sy), strict=True))
    x = max(x1, left), min(x2, right)
    y = max(y1, top), min(y2, bottom)
    if x[0] >= x[1] or y[0] >= y[1]:
        return None
    whole = (x[0], y[0], x[1], y[1]) == (x1, y1, x2, y2)
    box = (x[0] - left, x[1] - left), (y[0] - top, y[1] - top)
    if annotation.rle is None:
        return _Seen(*box, None, np.zeros(0), np.zeros(0))
    columns, rows = _pixels(x, sx, view.original[1]), _pixels(y, sy, view.original[0])
    mask = rasterise(annotation.rle, (columns[0], rows[0], columns[1], rows[1]), view.original)
    column_edges = (np.arange(columns[0], columns[1] + 1) * sx).clip(*x) - left
    row_edges = (np.arange(rows[0], rows[1] + 1) * sy).clip(*y) - top
    if whole:
        return _Seen(*box, mask, column_edges, row_edges)
    if not mask.any():
        return None
    return _Seen(_span(np.any(mask, 0), column_edges), _span(np.any(mask, 1), row_edges), mask, column_edges, row_edges)


def _pixels(interval: tuple[float, float], scale: float, side: int) -> tuple[int, int]:
    """The pixels of the original image, half-open, that an interval of network pixels touches."""
    return max(0, math.floor(interval[0] / scale)), min(side, math.ceil(interval[1] / scale))


def _span(occupied: Any, edges: np.ndarray) -> tuple[float, float]:
    where = np.flatnonzero(occupied)
    return float(edges[where[0]]), float(edges[where[-1] + 1])


def _paint(grid: Tensor, seen: _Seen, step: tuple[float, float]) -> float:
    """Writes an object's mask into its grid (Hm, Wm), whose cells measure `step` (y, x) network pixels, and returns its
    area in network pixels."""
    if seen.mask is None:
        return (seen.x[1] - seen.x[0]) * (seen.y[1] - seen.y[0])
    first_y, last_y = math.floor(seen.y[0] / step[0]), math.ceil(seen.y[1] / step[0])
    first_x, last_x = math.floor(seen.x[0] / step[1]), math.ceil(seen.x[1] / step[1])
    rows = coverage_matrix(seen.rows.clip(*seen.y), step[0], first_y, last_y)
    columns = coverage_matrix(seen.columns.clip(*seen.x), step[1], first_x, last_x)
    covered = rows @ (torch.from_numpy(seen.mask.astype(np.float64)) @ columns.T)
    grid[first_y:last_y, first_x:last_x] = covered > _MORE_THAN_HALF
    return float(covered.sum()) * step[0] * step[1]


def coverage_matrix(edges: np.ndarray, step: float, first: int, last: int) -> Tensor:
    """What share of each cell lies in each pixel, along one axis.

    Args:
        edges: (n + 1,) ascending, where the n pixels begin and end.
        step: length of a cell; cell j covers [j * step, (j + 1) * step).
        first, last: cells asked for, half-open.

    Returns:
        (last - first, n) float64 in 0..1. rows @ mask @ columns.T is the covered share of each cell of a grid.
    """
    begin = torch.arange(first, last, dtype=torch.float64)[:, None] * step
    pixel = torch.from_numpy(edges)
    overlap = torch.minimum(pixel[1:], begin + step) - torch.maximum(pixel[:-1], begin)
    return overlap.clamp(min=0) / step
