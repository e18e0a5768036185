"""A synthetic data set: overlapping textured shapes with exact masks, for tests, the demo and a first look.

Every pixel belongs to one shape or to the background: nothing is antialiased, a shape covers those before it, and
masks and boxes are of what stays visible.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from faster_coco_eval.core import mask as coco_mask

_SMALLEST = 12
"""visible pixels below which a shape is not placed"""
_TRIES = 20
"""places tried for a shape before it is given up"""

Field = np.ndarray
"""(h, w) float"""


def _star(u: Field, v: Field, thin: float) -> Field:
    wave = np.abs((np.arctan2(v, u) * 5 / (2 * np.pi)) % 1 - 0.5) * 2  # 1 at the five points, 0 between them
    return np.hypot(u, v) <= 0.4 + 0.6 * wave


# Which points of the plane belong to a shape of radius 1; `thin` in 0..1 makes it slender.
_SHAPES: dict[str, Callable[[Field, Field, float], Field]] = {
    "ellipse": lambda u, v, thin: u**2 + (v / (1 - 0.6 * thin)) ** 2 <= 1,
    "bar": lambda u, v, thin: (np.abs(u) <= 0.97) & (np.abs(v) <= 0.6 - 0.5 * thin),
    "triangle": lambda u, v, thin: (v >= -0.5) & (1.732 * np.abs(u) + v <= 1),
    "star": _star,
    "ring": lambda u, v, thin: (np.hypot(u, v) <= 1) & (np.hypot(u, v) >= 0.45 + 0.3 * thin),
}


def make_shapes(
    folder: str | Path,
    *,
    images: int = 200,
    val_images: int | None = None,
    size: int = 256,
    objects: tuple[int, int] = (3, 12),
    object_size: tuple[float, float] = (0.08, 0.4),
    overlap: float = 0.5,
    seed: int = 0,
) -> Path:
    """Writes train.json, val.json and images/ (PNG); a file that is there is replaced.

    Args:
        folder: made if need be.
        images: for training.
        val_images: for validation; default: a quarter of `images`.
        size: pixels of an image's side.
        objects: fewest and most shapes of an image.
        object_size: smallest and largest diameter of a shape, as a share of the image's side.
        overlap: share of a shape that others may cover, 0..1 (wholly covered ones are dropped).
        seed: the same seed and settings give the same files.

    Returns:
        The folder.

    Raises:
        ValueError: a setting out of its range.
    """
    splits = {"train": images, "val": max(1, images // 4) if val_images is None else val_images}
    if min(splits.values()) < 1 or size < 16:
        raise ValueError(f"expected at least 1 image a split of at least 16 pixels, got {splits} of {size} pixels")
    if not 0 <= objects[0] <= objects[1]:
        raise ValueError(f"expected objects (fewest, most), got {objects}")
    if not (0 < object_size[0] <= object_size[1] <= 1 and 0 <= overlap <= 1):
        raise ValueError(f"expected object_size and overlap within 0..1, got {object_size} and {overlap}")
    path = Path(folder)
    (path / "images").mkdir(parents=True, exist_ok=True)
    for part, (split, count) in enumerate(splits.items()):
        entries: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for i in range(count):
            rng = np.random.default_rng((seed, part, i))
            image, owner, labels = _draw(rng, size, int(rng.integers(objects[0], objects[1] + 1)), object_size, overlap)
            entries.append({"id": i + 1, "file_name": f"{split}_{i:05d}.png", "height": size, "width": size})
            _write(path / "images" / f"{split}_{i:05d}.png", _png(image))
            for mask_id, label in labels.items():
                annotation = _annotation(owner == mask_id, label)
                annotations.append({"id": len(annotations) + 1, "image_id": i + 1, **annotation})
        categories = [{"id": label + 1, "name": name} for label, name in enumerate(_SHAPES)]
        content = {"images": entries, "annotations": annotations, "categories": categories}
        _write(path / f"{split}.json", json.dumps(content).encode())
    return path


def _draw(
    rng: np.random.Generator, size: int, count: int, object_size: tuple[float, float], overlap: float
) -> tuple[np.ndarray, np.ndarray, dict[int, int]]:
    """An image uint8 (size, size, 3), the number of the shape that each pixel shows (0: none), and their labels."""
    image = _background(rng, size)
    owner = np.zeros((size, size), np.int64)
    areas = [0]  # pixels of each shape before others cover it; entry 0 is the background
    labels = [-1]
    for _ in range(count * _TRIES):
        if len(labels) > count:
            break
        label = int(rng.integers(len(_SHAPES)))
        rows, columns, inside = _place(rng, size, list(_SHAPES.values())[label], object_size)
        region = owner[rows, columns]
        covered = np.bincount(region[inside], minlength=len(areas))
        left = np.bincount(owner.ravel(), minlength=len(areas)) - covered
        if inside.sum() < _SMALLEST or (left[1:] < (1 - overlap) * np.array(areas[1:])).any():
            continue
        region[inside] = len(labels)
        image[rows, columns][inside] = _texture(rng, inside.shape)[inside]
        areas.append(int(inside.sum()))
        labels.append(label)
    visible = np.bincount(owner.ravel(), minlength=len(labels))
    grain = rng.normal(0, 6, image.shape)
    pixels = (image + grain).clip(0, 255).astype(np.uint8)
    return pixels, owner, {i: labels[i] for i in range(1, len(labels)) if visible[i]}


def _place(
    rng: np.random.Generator, size: int, shape: Callable[[Field, Field, float], Field], sizes: tuple[float, float]
) -> tuple[slice, slice, np.ndarray]:
    """A random place: rows and columns of its window in the image, and the pixels (h, w) bool inside the shape."""
    radius = size * np.exp(rng.uniform(*np.log(sizes))) / 2  # log-uniform: as many small shapes as large ones
    x, y = rng.uniform(0, size, 2)
    rows = slice(max(0, int(y - radius)), min(size, int(y + radius) + 1))
    columns = slice(max(0, int(x - radius)), min(size, int(x + radius) + 1))
    angle = rng.uniform(0, 2 * np.pi)
    dy, dx = np.mgrid[rows, columns] + 0.5  # pixel centres
    dy, dx = (dy - y) / radius, (dx - x) / radius
    u, v = np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx
    return rows, columns, shape(u, v, rng.uniform())


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Soft greyish clouds, float (size, size, 3)."""
    base = rng.uniform(50, 190)
    clouds = base + rng.normal(0, 22, (6, 6, 1)) + rng.normal(0, 8, (6, 6, 3))
    return cv2.resize(clouds, (size, size), interpolation=cv2.INTER_CUBIC)


def _texture(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Stripes, checks, blobs or a gradient between two colours, float (h, w, 3)."""
    height, width = shape
    first = rng.uniform(0, 255, 3)
    second = (first + rng.choice([-1, 1], 3) * rng.uniform(30, 90, 3)).clip(0, 255)
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
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {
        "category_id": label + 1,
        "segmentation": {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")},
        "bbox": coco_mask.toBbox(rle).tolist(),
        "area": int(mask.sum()),
        "iscrowd": 0,
    }


def _png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()


def _write(path: Path, content: bytes) -> None:
    """So that nobody sees half a file."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_bytes(content)
    os.replace(temporary, path)
