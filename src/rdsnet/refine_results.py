"""COCO results of any model beside their ground truth: read for the boundary refinement, and measured."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from rich.table import Table

from rdsnet.data.rle import Rle, mask_box, rasterise, read_segmentation
from rdsnet.evaluation import read_dataset, xywh
from rdsnet.files import read_json

MAX_DETECTIONS = 500  # of an image and class that AP counts
IOUS = np.linspace(0.5, 0.95, 10)


@dataclass
class Truth:
    """Ground truth of a COCO JSON; `annotations` by image."""

    path: Path
    dataset: dict[str, Any]
    annotations: dict[Hashable, list[dict[str, Any]]]

    def objects(self, image: Hashable) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (K, 4) xyxy and category ids (K,) of an image, without crowds."""
        known = [a for a in self.annotations.get(image, []) if not a.get("iscrowd")]
        boxes = corners_of([a["bbox"] for a in known])
        return boxes, np.array([a["category_id"] for a in known], np.int64)


@dataclass
class Results:
    """What a model found, `entries` in the order of the file, with what is needed to write them again.

    content     the file: a list of results, or a COCO data set of them
    by_image    indices of the entries of each image, by its id in the truth
    categories  id in the file -> in the truth; None where they are the same
    """

    path: Path
    content: Any
    entries: list[dict[str, Any]]
    by_image: dict[Hashable, list[int]]
    categories: dict[int, int] | None

    @property
    def images(self) -> list[Hashable]:
        return list(self.by_image)

    def boxes(self) -> np.ndarray:
        """(M, 4) float32 xyxy, by entry."""
        return corners_of([entry["bbox"] for entry in self.entries])

    def category(self, entry: dict[str, Any]) -> int:
        """As the truth numbers it; -1 for a class that it does not know."""
        category = int(entry["category_id"])
        return category if self.categories is None else self.categories.get(category, -1)

    def prediction(self, image: Hashable) -> dict[str, Any]:
        """Of an image, as `refine_boxes` and `fit_refiner` take it; masks as crops."""
        crops, origins, size = [], [], None
        chosen = [self.entries[i] for i in self.by_image[image]]
        for i, entry in zip(self.by_image[image], chosen, strict=True):
            rle, own = self._mask(i, entry)
            if size is not None and own != size:
                raise ValueError(f"{self.path}: entry {i} has a mask of {own}, others of its image are of {size}")
            size = own
            x0, y0, x1, y1 = (0, 0, 0, 0) if rle is None else (int(edge) for edge in mask_box(rle))
            crops.append(np.zeros((0, 0), bool) if rle is None else rasterise(rle, (x0, y0, x1, y1), size))
            origins.append((x0, y0))
        return {
            "boxes": corners_of([entry["bbox"] for entry in chosen]),
            "masks": crops,
            "origins": np.array(origins, np.int64).reshape(-1, 2),
            "image_size": size,
            "labels": np.array([self.category(entry) for entry in chosen], np.int64),
            "scores": np.array([entry.get("score", 1.0) for entry in chosen], np.float64),
        }

    def _mask(self, i: int, entry: dict[str, Any]) -> tuple[Rle | None, tuple[int, int]]:
        """Mask of an entry, None if it is empty, and (H, W) of its image."""
        segmentation = entry.get("segmentation")
        size = segmentation.get("size") if isinstance(segmentation, dict) else None
        if not isinstance(size, list) or len(size) != 2 or not all(isinstance(side, int) for side in size):
            raise ValueError(f"{self.path}: entry {i} has no mask as run-length code: without masks nothing is refined")
        try:
            return read_segmentation(segmentation, (size[0], size[1]))[0], (size[0], size[1])
        except ValueError as error:
            raise ValueError(f"{self.path}: entry {i}: {error}") from None

    def refined(self, refiner: Any) -> np.ndarray:
        """Boxes (M, 4) xyxy after refinement, by entry."""
        from rdsnet.refine import refine_boxes

        boxes = self.boxes()
        for image in self.images:
            boxes[self.by_image[image]] = refine_boxes(self.prediction(image), refiner=refiner).xyxy
        return boxes

    def with_boxes(self, boxes: np.ndarray) -> Any:
        """The file's content with other boxes."""
        entries = [{**entry, "bbox": side} for entry, side in zip(self.entries, xywh(boxes).tolist(), strict=True)]
        return {**self.content, "annotations": entries} if isinstance(self.content, dict) else entries


def corners_of(sides: list[list[float]]) -> np.ndarray:
    """(M, 4) float32 xyxy of COCO's x, y, width, height."""
    boxes = np.array(sides, np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes.astype(np.float32)


def read_truth(path: Path) -> Truth:
    """A COCO JSON whose images are not needed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a COCO JSON.
    """
    dataset = read_dataset(path)
    annotations: dict[Hashable, list[dict[str, Any]]] = {image["id"]: [] for image in dataset["images"]}
    for annotation in dataset["annotations"]:
        if annotation.get("image_id") in annotations and _has_box(annotation):
            annotations[annotation["image_id"]].append(annotation)
    return Truth(path, dataset, annotations)


def read_results(path: Path, truth: Truth | None = None) -> Results:
    """COCO results, or a COCO data set of what was found, whose images are matched by file name and classes by name.

    Args:
        truth: whose ids of images and categories are meant; default: the file's own.

    Raises:
        FileNotFoundError: no such file.
        ValueError: something else, or results of images that the truth does not have.
    """
    content = read_json(path)
    entries = content.get("annotations") if isinstance(content, dict) else content
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path}: expected COCO results, a list of objects, or a COCO data set of what was found")
    for i, entry in enumerate(entries):
        if not _has_box(entry) or "image_id" not in entry or not isinstance(entry.get("category_id"), int):
            raise ValueError(
                f"{path}: entry {i} needs image_id, category_id and bbox (x, y, width, height): {entry!s:.80}"
            )
    images: dict[Hashable, Hashable] | None = None
    categories: dict[int, int] | None = None
    if truth is not None and isinstance(content, dict):
        images = _same(content, truth, "images", lambda image: Path(image["file_name"]).name)
        categories = _same(content, truth, "categories", lambda category: category["name"])
    elif truth is not None:
        images = {id: id for id in truth.annotations}
    by_image: dict[Hashable, list[int]] = {}
    for i, entry in enumerate(entries):
        id = entry["image_id"]
        if images is not None and id not in images:
            raise ValueError(f"{path}: entry {i} is of image {id!r}, which {truth.path if truth else ''} does not have")
        by_image.setdefault(id if images is None else images[id], []).append(i)
    return Results(path, content, entries, by_image, categories)


def _same(content: dict[str, Any], truth: Truth, key: str, name: Callable[[dict[str, Any]], str]) -> dict[Any, Any]:
    """The truth's ids of images or categories, by id of the results; matched by name."""
    try:
        known = {name(item): item["id"] for item in truth.dataset[key]}
        return {item["id"]: known[name(item)] for item in content.get(key, []) if name(item) in known}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{truth.path}: {key} cannot be matched with those of the results by name: {error!r}"
        ) from None


def _has_box(entry: dict[str, Any]) -> bool:
    box = entry.get("bbox")
    return isinstance(box, list) and len(box) == 4 and all(isinstance(n, (int, float)) and n == n for n in box)


def box_ap(truth: Truth, results: Results, boxes: np.ndarray, max_detections: int = MAX_DETECTIONS) -> np.ndarray:
    """Box AP at IoU 0.5, 0.55, ... 0.95: (10,), 0..1, NaN without an object.

    Args:
        results: scores and classes.
        boxes: (M, 4) xyxy, in place of those of the results.
    """
    images = {id: number for number, id in enumerate(truth.annotations, start=1)}  # ids may be text, or 0
    known = [category["id"] for category in truth.dataset["categories"]]
    categories = {id: number for number, id in enumerate(known, start=1)}
    objects = [
        {**_entry(a["bbox"], a.get("area")), "image_id": images[id], "category_id": categories[a["category_id"]]}
        | {"iscrowd": int(a.get("iscrowd") or 0)}
        for id, annotations in truth.annotations.items()
        for a in annotations
        if a.get("category_id") in categories
    ]
    sides = xywh(boxes).tolist()
    found = [
        {**_entry(sides[i], None), "image_id": images[id], "category_id": categories[category], "iscrowd": 0}
        | {"score": float(results.entries[i].get("score", 1.0))}
        for id, chosen in results.by_image.items()
        for i in chosen
        if (category := results.category(results.entries[i])) in categories
    ]
    sets = []
    for entries in (objects, found):
        numbered = [{**entry, "id": number} for number, entry in enumerate(entries, start=1)]
        labels = [{"id": number, "name": str(number)} for number in categories.values()]
        sets.append(
            COCO({"images": [{"id": n} for n in images.values()], "categories": labels, "annotations": numbered})
        )
    evaluation = COCOeval_faster(*sets, iouType="bbox")
    evaluation.params.maxDets = [max_detections]
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"][..., 0, 0]  # (10, 101, C) of objects of any size
    defined = np.where(precision > -1, precision, np.nan).reshape(len(IOUS), -1)
    return defined[:, ~np.isnan(defined[0])].mean(axis=1) if (precision > -1).any() else np.full(len(IOUS), np.nan)


def _entry(bbox: list[float], area: float | None) -> dict[str, Any]:
    return {"bbox": bbox, "area": bbox[2] * bbox[3] if area is None else area}


def ap_table(columns: Mapping[str, np.ndarray]) -> Table:
    """Box AP in percent, averaged and at each IoU, for the terminal."""
    table = Table("box AP", title=f"on the images that were fitted to, at most {MAX_DETECTIONS} detections")
    for name in columns:
        table.add_column(name, justify="right")
    rows = {"AP": [values.mean() for values in columns.values()]}
    rows |= {f"IoU {iou:.2f}": [values[i] for values in columns.values()] for i, iou in enumerate(IOUS)}
    for name, row in rows.items():
        table.add_row(name, *(f"{100 * value:.1f}" for value in row))
    return table
