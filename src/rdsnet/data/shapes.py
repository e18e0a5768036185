"""A synthetic data set: overlapping textured shapes with exact masks, for tests, the demo and comparisons.

Every pixel belongs to one shape or to the background: nothing is antialiased, a shape covers those before it, and
masks and boxes are of what stays visible. The plain style is easy; the cluttered one has thin structures, strong
occlusion, low contrast, and marks that belong to no class.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

from rdsnet.files import make_folder, write_image, write_text
from rdsnet.rle import crop_to_rle, mask_box

_TRIES = 20
"""places tried for a shape before it is given up"""

Field = np.ndarray
"""(h, w) float"""
Shape = Callable[[Field, Field, float, float], Field]
"""Which points (u, v) of the plane belong to a shape of radius 1; `thin` in 0..1 makes it slender, `pixel` is a pixel's
size in its units."""


def _star(u: Field, v: Field, thin: float, pixel: float) -> Field:
    return np.hypot(u, v) <= 0.4 + 0.6 * _five_points(u, v)


def _sharp_star(u: Field, v: Field, thin: float, pixel: float) -> Field:
    return np.hypot(u, v) <= 0.28 + 0.72 * _five_points(u, v) ** (1 + 2 * thin)


def _five_points(u: Field, v: Field) -> Field:
    """1 in the directions of five points, 0 between them."""
    return np.abs((np.arctan2(v, u) * 5 / (2 * np.pi)) % 1 - 0.5) * 2


def _half_width(thin: float, pixel: float) -> float:
    """Of a stroke: 0.05 to 0.3, and at least 1.5 pixels."""
    return min(max(0.3 - 0.25 * thin, 1.5 * pixel), 0.5)


def _strokes(*segments: tuple[float, float, float, float]) -> Shape:
    """A drawing of round-ended lines from (u0, v0) to (u1, v1)."""

    def shape(u: Field, v: Field, thin: float, pixel: float) -> Field:
        half = _half_width(thin, pixel)
        inside = np.zeros(u.shape, bool)
        for segment in segments:
            u0, v0, u1, v1 = (value * (1 - half) for value in segment)
            du, dv = u1 - u0, v1 - v0
            along = (((u - u0) * du + (v - v0) * dv) / (du**2 + dv**2)).clip(0, 1)
            inside |= np.hypot(u - u0 - along * du, v - v0 - along * dv) <= half
        return inside

    return shape


def _soft_disc(u: Field, v: Field, thin: float, pixel: float) -> Field:
    """The weight of a background's patch, 0..1: without an outline, so that it is no shape."""
    return (2 - 2 * np.hypot(u, v)).clip(0, 1)


def _thin_ring(u: Field, v: Field, thin: float, pixel: float) -> Field:
    distance = np.hypot(u, v)
    return (distance <= 1) & (distance >= 1 - 2 * _half_width(thin, pixel))


def _frame(u: Field, v: Field, thin: float, pixel: float) -> Field:
    distance = np.maximum(np.abs(u), np.abs(v))
    return (distance <= 0.7) & (distance >= 0.7 - 2 * _half_width(thin, pixel))


def _wave(u: Field, v: Field, thin: float, pixel: float) -> Field:
    return (np.abs(u) <= 0.9) & (np.abs(v - 0.3 * np.sin(2.2 * np.pi * u)) <= 1.3 * _half_width(thin, pixel))


_ELLIPSE: Shape = lambda u, v, thin, pixel: u**2 + (v / (1 - 0.6 * thin)) ** 2 <= 1  # noqa: E731
_TRIANGLE: Shape = lambda u, v, thin, pixel: (v >= -0.5) & (1.732 * np.abs(u) + v <= 1)  # noqa: E731


@dataclass(frozen=True)
class _Style:
    """What a data set looks like; `make_shapes` explains objects, object_size and overlap."""

    shapes: dict[str, Shape]
    """by class"""
    objects: tuple[int, int]
    object_size: tuple[float, float]
    overlap: float
    smallest: int = 12
    """visible pixels below which a shape is not placed"""
    small: bool = True
    """as many small shapes as large ones (diameters log-uniform); False: more of the large ones (their root uniform)"""
    varied: bool = False
    """each image has its own share, 0..1, of what follows: there are easy images and hard ones"""
    patches: int = 0
    """textured patches of the background"""
    marks: Sequence[Shape] = ()
    """shapes of no class"""
    marked: float = 0.0
    """share of them"""
    huddled: float = 0.0
    """share of the shapes that are placed upon another"""
    faint: float = 0.0
    """share of the shapes that have nearly the colour of what lies under them"""


_STYLES: dict[str, _Style] = {
    "plain": _Style(
        shapes={
            "ellipse": _ELLIPSE,
            "bar": lambda u, v, thin, pixel: (np.abs(u) <= 0.97) & (np.abs(v) <= 0.6 - 0.5 * thin),
            "triangle": _TRIANGLE,
            "star": _star,
            "ring": lambda u, v, thin, pixel: (np.hypot(u, v) <= 1) & (np.hypot(u, v) >= 0.45 + 0.3 * thin),
        },
        objects=(3, 12),
        object_size=(0.08, 0.4),
        overlap=0.5,
    ),
    "cluttered": _Style(
        shapes={
            "ellipse": _ELLIPSE,
            "bar": _strokes((-1, 0, 1, 0)),
            "triangle": _TRIANGLE,
            "star": _sharp_star,
            "ring": _thin_ring,
            "cross": _strokes((-1, 0, 1, 0), (0, -1, 0, 1)),
            "branch": _strokes((-1, 0, 1, 0), (-0.4, 0, 0.25, 0.8), (0, 0, 0.55, -0.7)),
        },
        objects=(3, 12),
        object_size=(0.06, 1.0),
        overlap=0.7,
        smallest=40,
        small=False,
        varied=True,
        patches=16,
        marks=(_frame, _wave, _strokes((-0.8, -0.5, 0, 0.6), (0, 0.6, 0.8, -0.5))),
        marked=0.3,
        huddled=0.25,
        faint=0.25,
    ),
}


def make_shapes(
    folder: str | Path,
    *,
    images: int = 200,
    val_images: int | None = None,
    size: int = 256,
    style: Literal["plain", "cluttered"] = "plain",
    objects: tuple[int, int] | None = None,
    object_size: tuple[float, float] | None = None,
    overlap: float | None = None,
    seed: int = 0,
) -> Path:
    """Writes train.json, val.json and images/ (PNG); a file that is there is replaced.

    Args:
        folder: made if need be.
        images: for training.
        val_images: for validation; default: a quarter of `images`.
        size: pixels of an image's side.
        style: "plain" (ellipse, bar, triangle, star, ring) or "cluttered" (with cross and branch, many of them
            slender; from easy images to hard ones with shapes upon each other, faint ones, and marks of no class).
        objects: fewest and most shapes of an image, marks of no class too; default: 3 to 12.
        object_size: smallest and largest diameter of a shape, as a share of the image's side; default: 0.08 to 0.4,
            cluttered 0.06 to 1.
        overlap: share of a shape that others may cover, 0..1 (wholly covered ones are dropped); default: 0.5,
            cluttered 0.7.
        seed: the same seed and settings give the same files.

    Returns:
        The folder.

    Raises:
        ValueError: a setting out of its range.
    """
    splits = {"train": images, "val": max(1, images // 4) if val_images is None else val_images}
    if style not in _STYLES:
        raise ValueError(f"expected a style among {', '.join(_STYLES)}, got {style!r}")
    look = _STYLES[style]
    objects, object_size = objects or look.objects, object_size or look.object_size
    overlap = look.overlap if overlap is None else overlap
    if min(splits.values()) < 1 or size < 16:
        raise ValueError(f"expected at least 1 image a split of at least 16 pixels, got {splits} of {size} pixels")
    if not 0 <= objects[0] <= objects[1]:
        raise ValueError(f"expected objects (fewest, most), got {objects}")
    if not (0 < object_size[0] <= object_size[1] <= 1 and 0 <= overlap <= 1):
        raise ValueError(f"expected object_size and overlap within 0..1, got {object_size} and {overlap}")
    look = replace(look, objects=objects, object_size=object_size, overlap=overlap)
    path = Path(folder)
    make_folder(path / "images")
    for part, (split, count) in enumerate(splits.items()):
        entries: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for i in range(count):
            image, owner, labels = _draw(np.random.default_rng((seed, part, i)), size, look)
            entries.append({"id": i + 1, "file_name": f"{split}_{i:05d}.png", "height": size, "width": size})
            write_image(path / "images" / f"{split}_{i:05d}.png", image)
            for mask_id, label in labels.items():
                annotation = _annotation(owner == mask_id, label)
                annotations.append({"id": len(annotations) + 1, "image_id": i + 1, **annotation})
        categories = [{"id": label + 1, "name": name} for label, name in enumerate(look.shapes)]
        content = {"images": entries, "annotations": annotations, "categories": categories}
        write_text(path / f"{split}.json", json.dumps(content))
    return path


def _draw(rng: np.random.Generator, size: int, style: _Style) -> tuple[np.ndarray, np.ndarray, dict[int, int]]:
    """An image uint8 (size, size, 3), the number of the shape that each pixel shows (0: none), and their labels."""
    count = int(rng.integers(style.objects[0], style.objects[1] + 1))
    shapes = [*style.shapes.values(), *style.marks]
    clutter = rng.uniform() if style.varied else 1.0
    image = _background(rng, size, round(clutter * style.patches))
    owner = np.zeros((size, size), np.int64)
    areas = [0]  # pixels of each shape before others cover it; entry 0 is the background
    labels = [-1]
    for _ in range(count * _TRIES):
        if len(labels) > count:
            break
        marked = _happens(rng, clutter * style.marked)
        label = int(rng.integers(len(style.shapes), len(shapes)) if marked else rng.integers(len(style.shapes)))
        upon = owner if _happens(rng, clutter * style.huddled) else None
        rows, columns, inside = _place(rng, size, shapes[label], _radius(rng, size, style), upon)
        region = owner[rows, columns]
        covered = np.bincount(region[inside], minlength=len(areas))
        left = np.bincount(owner.ravel(), minlength=len(areas)) - covered
        if inside.sum() < style.smallest or (left[1:] < (1 - style.overlap) * np.array(areas[1:])).any():
            continue
        region[inside] = len(labels)
        under = image[rows, columns][inside].mean(0) if _happens(rng, clutter * style.faint) else None
        image[rows, columns][inside] = _texture(rng, inside.shape, under)[inside]
        areas.append(int(inside.sum()))
        labels.append(label)
    visible = np.bincount(owner.ravel(), minlength=len(labels))
    pixels = (image + rng.normal(0, 6, image.shape)).clip(0, 255).astype(np.uint8)
    shown = [i for i in range(1, len(labels)) if visible[i] and labels[i] < len(style.shapes)]
    return pixels, owner, {i: labels[i] for i in shown}


def _happens(rng: np.random.Generator, probability: float) -> bool:
    """Draws only where there is something to decide: the plain style's numbers stay as they are."""
    return probability > 0 and rng.uniform() < probability


def _radius(rng: np.random.Generator, size: int, style: _Style) -> float:
    """Of a shape, in pixels."""
    sizes = style.object_size
    diameter = np.exp(rng.uniform(*np.log(sizes))) if style.small else rng.uniform(*np.sqrt(sizes)) ** 2
    return float(size * diameter / 2)


def _place(
    rng: np.random.Generator, size: int, shape: Shape, radius: float, upon: np.ndarray | None
) -> tuple[slice, slice, np.ndarray]:
    """A random place: rows and columns of its window in the image, and the pixels (h, w) bool inside the shape.

    `upon` (size, size): the centre is a pixel where this is not 0, if there is any.
    """
    x, y = rng.uniform(0, size, 2)
    if upon is not None and upon.any():
        pixels = np.argwhere(upon)
        y, x = pixels[rng.integers(len(pixels))] + 0.5
    rows = slice(max(0, int(y - radius)), min(size, int(y + radius) + 1))
    columns = slice(max(0, int(x - radius)), min(size, int(x + radius) + 1))
    angle = rng.uniform(0, 2 * np.pi)
    dy, dx = np.mgrid[rows, columns] + 0.5  # pixel centres
    dy, dx = (dy - y) / radius, (dx - x) / radius
    u, v = np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx
    return rows, columns, shape(u, v, rng.uniform(), 1 / radius)


def _background(rng: np.random.Generator, size: int, patches: int) -> np.ndarray:
    """Soft greyish clouds with faintly textured patches, float (size, size, 3)."""
    base = rng.uniform(50, 190)
    clouds = base + rng.normal(0, 22, (6, 6, 1)) + rng.normal(0, 8, (6, 6, 3))
    image = cv2.resize(clouds, (size, size), interpolation=cv2.INTER_CUBIC)
    for _ in range(patches):
        rows, columns, weight = _place(rng, size, _soft_disc, size * rng.uniform(0.1, 0.45), None)
        texture = _texture(rng, weight.shape, image[rows, columns].mean((0, 1)))
        under = image[rows, columns]
        image[rows, columns] = under + weight[..., None] * (texture - under)
    return image


def _texture(rng: np.random.Generator, shape: tuple[int, ...], near: np.ndarray | None = None) -> np.ndarray:
    """Stripes, checks, blobs or a gradient between two colours, float (h, w, 3); both close to `near`, if given."""
    height, width = shape
    if near is None:
        first = rng.uniform(0, 255, 3)
        second = (first + rng.choice([-1, 1], 3) * rng.uniform(30, 90, 3)).clip(0, 255)
    else:
        first = near + rng.choice([-1, 1]) * rng.uniform(12, 30) + rng.normal(0, 6, 3)
        second = first + rng.choice([-1, 1], 3) * rng.uniform(5, 25, 3)
    y, x = np.mgrid[:height, :width]
    angle, period = rng.uniform(0, np.pi), rng.uniform(4, 14)
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    kind = rng.integers(4)
    if kind == 0:
        weight = np.sin(2 * np.pi * u / period) > 0
    elif kind == 1:
        weight = (np.floor(u / period) + np.floor(v / period)) % 2
    elif kind == 2:
        weight = cv2.resize(rng.uniform(0, 1, (5, 5)), (width, height))
    else:
        weight = (u - u.min()) / max(np.ptp(u), 1)
    return first + (second - first) * np.asarray(weight, np.float64)[..., None]


def _annotation(mask: np.ndarray, label: int) -> dict[str, Any]:
    height, width = mask.shape
    rle = crop_to_rle(mask, (0, 0, width, height), (height, width))
    x1, y1, x2, y2 = mask_box(rle)
    return {
        "category_id": label + 1,
        "segmentation": rle,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": int(mask.sum()),
        "iscrowd": 0,
    }
