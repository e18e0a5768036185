"""What the page shows of an image. The network runs once: everything else only reads what it detected."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from rdsnet.data.records import image_sizes, read_image
from rdsnet.device import Device
from rdsnet.files import write_image, write_text
from rdsnet.predict.predictor import Predictor, load
from rdsnet.results.exchange import coco_dataset, coco_results
from rdsnet.structures import Objects, above
from rdsnet.visualize.overlay import LEGIBLE, draw_objects
from rdsnet.weights.bundled import find_weights

MAX_PIXELS = 40_000_000  # of an image: more takes minutes and gigabytes

VIEW_SIDE = 1280  # pixels; larger images are shown reduced to this, so that a slider moves at once

HEADERS = ["#", "class", "score", "regressed box", "refined box", "edge std", "area"]


@dataclass(frozen=True)
class Controls:
    """How the objects are shown, in the order of the page's controls.

    threshold    smallest score, 0..1
    refinement   where the boxes are drawn: 0 as regressed, 1 as refined, or between
    masks, uncertainty, names   drawn or not; uncertainty is that of the refined edges, and drawn there only
    """

    threshold: float
    refinement: float
    masks: bool
    uncertainty: bool
    names: bool


@dataclass(frozen=True)
class Detected:
    """An image and what a network detected in it.

    name          of the image's file
    weights       as they were asked for
    image         uint8 RGB (H, W, 3)
    objects       in its pixels, all of them
    view          the image, reduced to at most `VIEW_SIDE` pixels a side
    view_objects  the objects in pixels of the view
    class_names, category_ids   by label
    seconds       that the network took, with the resizing before it
    """

    name: str
    weights: str
    image: np.ndarray
    objects: Objects
    view: np.ndarray
    view_objects: Objects
    class_names: Sequence[str]
    category_ids: Sequence[int]
    seconds: float

    @property
    def is_refined(self) -> bool:
        """Whether the network refines its boxes, and so knows how sure each edge is."""
        return not self.objects.edge_std.isnan().any()


class Models:
    """Predictors by the name of their weights; the last one is kept, until its file changes."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._kept: tuple[tuple[str, int], Predictor] | None = None

    def predictor(self, weights: str) -> Predictor:
        """Raises FileNotFoundError or ValueError, as `rdsnet.load`, where there are no such weights."""
        source = os.path.expanduser(weights.strip())
        key = (source, find_weights(source).stat().st_mtime_ns)
        if self._kept is None or self._kept[0] != key:
            self._kept = None  # before the next one is loaded: two need not fit into memory
            self._kept = (key, load(source, device=self.device))
        return self._kept[1]


def read_upload(path: Path) -> np.ndarray:
    """The image of a file, uint8 RGB (H, W, 3).

    Raises:
        ValueError: not an image, or one of more than `MAX_PIXELS`; it names the file without its folder, which is
            none that the user knows.
    """
    try:
        height, width = image_sizes(path)[1]
        if height * width <= MAX_PIXELS:
            return read_image(path)
    except (OSError, ValueError) as error:
        raise ValueError(str(error).replace(str(path), path.name)) from error
    limit = f"at most {MAX_PIXELS // 1_000_000} million"
    raise ValueError(f"{path.name}: {width} x {height} pixels are too many for this page ({limit})")


def detect(predictor: Predictor, image: np.ndarray, *, name: str, weights: str) -> Detected:
    """Run the network on an image, uint8 RGB (H, W, 3)."""
    start = time.perf_counter()
    objects = predictor.detect([image])[0]
    seconds = time.perf_counter() - start
    height, width = image.shape[:2]
    factor = min(1.0, VIEW_SIDE / max(height, width))
    view, view_objects = image, objects
    if factor < 1:
        size = (max(1, round(height * factor)), max(1, round(width * factor)))
        view = cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)
        view_objects = reduced(objects, size)
    return Detected(
        name=name,
        weights=weights,
        image=image,
        objects=objects,
        view=view,
        view_objects=view_objects,
        class_names=predictor.class_names,
        category_ids=predictor.category_ids,
        seconds=seconds,
    )


def reduced(objects: Objects, size: tuple[int, int]) -> Objects:
    """Objects in pixels of their image resized to (H, W); masks take the nearest pixel, profiles are dropped."""
    factors = torch.tensor([size[1] / objects.image_size[1], size[0] / objects.image_size[0]]).repeat(2)
    windows = (objects.windows * factors).round().long()
    masks = []
    for mask, (x0, y0, x1, y1) in zip(objects.masks, windows.tolist(), strict=False):
        small = torch.zeros(y1 - y0, x1 - x0, dtype=torch.bool)
        if small.numel():
            pixels = cv2.resize(mask.numpy().astype(np.uint8), (x1 - x0, y1 - y0), interpolation=cv2.INTER_NEAREST)
            small = torch.from_numpy(pixels).bool()
        masks.append(small)
    return replace(
        objects,
        boxes=objects.boxes * factors,
        regressed_boxes=objects.regressed_boxes * factors,
        direct_boxes=objects.direct_boxes * factors,
        edge_std=objects.edge_std * factors,
        interval=objects.interval * factors[:, None],
        masks=masks,
        windows=windows,
        image_size=size,
        profiles=None,
    )


def picture(detected: Detected, controls: Controls, *, full_size: bool = False) -> np.ndarray:
    """The objects over their image, uint8 RGB; over the reduced one unless at full size."""
    image, objects = (detected.image, detected.objects) if full_size else (detected.view, detected.view_objects)
    shown = above(objects, controls.threshold)
    moved = torch.lerp(shown.regressed_boxes, shown.boxes, controls.refinement)
    return draw_objects(
        image,
        replace(shown, boxes=moved),
        detected.class_names,
        regressed=False,
        masks=controls.masks,
        uncertainty=controls.uncertainty and controls.refinement == 1 and detected.is_refined,
        labels=controls.names,
    )


def rows_of(detected: Detected, threshold: float) -> list[list[Any]]:
    """A row an object, by `HEADERS`: boxes x1 y1 x2 y2, standard deviations of the left, top, right and bottom edge in
    pixels, area of the mask in pixels (of the refined box for a model without masks)."""
    objects = above(detected.objects, threshold)
    sides = objects.boxes[:, 2:] - objects.boxes[:, :2]
    areas = [int(mask.sum()) for mask in objects.masks] or sides.prod(dim=1).round().int().tolist()
    columns = [
        range(1, len(objects) + 1),
        [detected.class_names[label] for label in objects.labels.tolist()],
        [round(score, 3) for score in objects.scores.tolist()],
        _texts(objects.regressed_boxes, 1),
        _texts(objects.boxes, 1),
        _texts(objects.edge_std, 2),
        areas,
    ]
    return [list(row) for row in zip(*columns, strict=True)]


def _texts(rows: torch.Tensor, digits: int) -> list[str]:
    return ["  ".join("–" if math.isnan(value) else f"{value:.{digits}f}" for value in row) for row in rows.tolist()]


def summarise(detected: Detected, controls: Controls) -> str:
    """A line of text: the image, how many objects, and how long the network took."""
    height, width = detected.image.shape[:2]
    scores = detected.objects.scores
    count = int((scores >= controls.threshold).sum())
    parts = [
        f"{detected.name}, {width} x {height} pixels",
        f"{count} of {len(scores)} objects score {controls.threshold:.2f} or more",
        f"{detected.seconds:.2f} s with {Path(detected.weights).name}",
    ]
    if detected.view_objects is not detected.objects:
        parts.append("shown reduced; the download is full size")
    if controls.names and count > LEGIBLE:
        parts.append(f"names are written for up to {LEGIBLE} objects")
    if not detected.is_refined:
        parts.append("these weights do not refine boxes")
    elif controls.uncertainty and controls.refinement < 1:
        parts.append("uncertainty is shown of refined boxes: move the slider to 1")
    return " · ".join(parts)


def save_overlay(detected: Detected, controls: Controls, folder: Path) -> Path:
    """The picture at full size, as FOLDER/NAME_objects.png."""
    path = folder / f"{Path(detected.name).stem}_objects.png"
    write_image(path, picture(detected, controls, full_size=True))
    return path


def save_json(detected: Detected, threshold: float, folder: Path) -> Path:
    """The objects that score at least `threshold`, as FOLDER/NAME.json: a COCO data set of one image."""
    height, width = detected.image.shape[:2]
    entries = coco_results(above(detected.objects, threshold), 1, detected.category_ids)
    image = {"id": 1, "file_name": detected.name, "height": height, "width": width}
    content = coco_dataset([image], entries, detected.category_ids, detected.class_names)
    path = folder / f"{Path(detected.name).stem}.json"
    write_text(path, json.dumps(content))
    return path
