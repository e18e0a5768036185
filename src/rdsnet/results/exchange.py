"""Objects as `sv.Detections` and as COCO, and COCO results of any model back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import supervision as sv

from rdsnet.data.coco import CocoFolder
from rdsnet.files import read_json
from rdsnet.rle import Rle, crop_to_rle, crop_to_runs, mask_crop, read_segmentation
from rdsnet.structures import Objects


def to_detections(objects: Objects, class_names: Sequence[str]) -> sv.Detections:
    """The objects of one image as supervision's result type, in pixels of the image, in the same order.

    Args:
        objects: N objects, on any device.
        class_names: by label.

    Returns:
        `xyxy` (N, 4) float32, refined boxes (half-open); `confidence` (N,) float32; `class_id` (N,) int64; `mask`,
        an `sv.CompactMask` cropped by the windows of the masks, so that a mask may reach beyond its refined box (None
        where a model without masks found objects); in `data` `class_name` (N,) str, `regressed_xyxy` (N, 4) float32,
        `edge_std` (N, 4) float32 and `interval` (N, 4, 2) float32, as in `Objects`.

    Raises:
        ValueError: a label without a name.
    """
    objects = objects.to("cpu")
    labels = objects.labels.numpy()
    if len(labels) and labels.max() >= len(class_names):
        raise ValueError(f"expected labels below {len(class_names)}, the number of class names, got {labels.max()}")
    mask = None
    if objects.masks or not len(objects):
        crops = [mask.numpy() for mask in objects.masks]
        mask = compact_mask(crops, objects.windows.numpy(), objects.image_size)
    return sv.Detections(
        xyxy=objects.boxes.numpy(),
        mask=mask,
        confidence=objects.scores.numpy(),
        class_id=labels,
        data={
            "class_name": np.array([class_names[label] for label in labels], dtype=str),
            "regressed_xyxy": objects.regressed_boxes.numpy(),
            "edge_std": objects.edge_std.numpy(),
            "interval": objects.interval.numpy(),
        },
    )


def compact_mask(crops: Sequence[np.ndarray], windows: np.ndarray, image_size: tuple[int, int]) -> sv.CompactMask:
    """Masks that are stored as crops, as supervision's compact masks.

    Args:
        crops: N bool arrays (h, w).
        windows: (N, 4) integers x0, y0, x1, y1 (half-open), where each crop lies in the image.
        image_size: (H, W) of the image.
    """
    height, width = image_size
    runs, shapes, offsets = [], [], []
    for crop, (x0, y0, _, _) in zip(crops, windows.tolist(), strict=True):
        if crop.size == 0:
            # a window without pixels: supervision's tools need at least one
            crop, x0, y0 = np.zeros((1, 1), bool), min(x0, width - 1), min(y0, height - 1)
        h, w = crop.shape
        runs.append(crop_to_runs(crop, (0, 0, w, h), (h, w)).astype(np.int32))
        shapes.append((h, w))
        offsets.append((x0, y0))
    return sv.CompactMask(
        runs,
        np.array(shapes, np.int32).reshape(-1, 2),
        np.array(offsets, np.int32).reshape(-1, 2),
        (height, width),
    )


ImageId = int | str

BoxKind = Literal["regressed", "direct", "refined"]


@dataclass
class PackedObjects:
    """The objects of one image, ready for measuring; small enough to be sent between processes.

    scores  (N,) float32
    labels  (N,) int64
    boxes   by kind, (N, 4) float32 xyxy
    rles    the masks' run-length codes, None without masks
    """

    scores: np.ndarray
    labels: np.ndarray
    boxes: dict[BoxKind, np.ndarray]
    rles: list[Rle] | None


def pack(objects: Objects) -> PackedObjects:
    """`Objects` as run-length codes and arrays on the CPU."""
    objects = objects.to("cpu")
    rles = None
    if objects.masks or not len(objects):  # an image without objects does not tell whether the model makes masks
        rles = [
            crop_to_rle(mask.numpy(), (x0, y0, x1, y1), objects.image_size)
            for mask, (x0, y0, x1, y1) in zip(objects.masks, objects.windows.tolist(), strict=True)
        ]
    return PackedObjects(
        scores=objects.scores.numpy(),
        labels=objects.labels.numpy(),
        boxes={
            "regressed": objects.regressed_boxes.numpy(),
            "direct": objects.direct_boxes.numpy(),
            "refined": objects.boxes.numpy(),
        },
        rles=rles,
    )


def coco_results(
    objects: Objects | PackedObjects, image_id: ImageId, category_ids: Sequence[int], boxes: BoxKind = "refined"
) -> list[dict[str, Any]]:
    """The objects of one image as entries of a COCO results JSON.

    Args:
        objects: in pixels of the image.
        image_id: as in the data set's JSON.
        category_ids: by label.
        boxes: which of the objects' are given.

    Returns:
        One dict an object: image_id, category_id, bbox (x, y, width, height), score, and, where there are masks,
        segmentation (compressed RLE with counts as text).
    """
    packed = pack(objects) if isinstance(objects, Objects) else objects
    columns = packed.labels.tolist(), xywh(packed.boxes[boxes]).tolist(), packed.scores.tolist()
    entries: list[dict[str, Any]] = [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score}
        for label, box, score in zip(*columns, strict=True)
    ]
    if packed.rles is not None:
        for entry, rle in zip(entries, packed.rles, strict=True):
            entry["segmentation"] = rle
    return entries


def coco_dataset(
    images: Sequence[dict[str, Any]],
    results: Sequence[dict[str, Any]],
    category_ids: Sequence[int],
    class_names: Sequence[str],
) -> dict[str, Any]:
    """What was found as a COCO data set: its images, their `coco_results` as annotations, and the classes by label."""
    return {
        "images": images,
        "annotations": [{"id": i, "iscrowd": 0, **entry} for i, entry in enumerate(results, start=1)],
        "categories": [{"id": id, "name": name} for id, name in zip(category_ids, class_names, strict=True)],
    }


def xywh(boxes: np.ndarray) -> np.ndarray:
    """(N, 4) float64 x, y, width, height, as COCO has them, of boxes xyxy."""
    corners = boxes.astype(np.float64)
    return np.concatenate((corners[:, :2], corners[:, 2:] - corners[:, :2]), axis=1)


def corners_of(sides: list[list[float]]) -> np.ndarray:
    """(M, 4) float32 xyxy of COCO's x, y, width, height."""
    boxes = np.array(sides, np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes.astype(np.float32)


@dataclass
class Results:
    """What a model found, `entries` in the order of the file, with what is needed to write them again.

    content   the file: a list of results, or a COCO data set of them
    by_image  indices of the entries of each image, by its id in the truth
    labels    by entry, as the truth numbers its classes, -1 for one that it does not know; without a truth, the
              entries' category ids
    """

    path: Path
    content: Any
    entries: list[dict[str, Any]]
    by_image: dict[ImageId, list[int]]
    labels: list[int]

    @property
    def images(self) -> list[ImageId]:
        return list(self.by_image)

    def boxes(self) -> np.ndarray:
        """(M, 4) float32 xyxy, by entry."""
        return corners_of([entry["bbox"] for entry in self.entries])

    def scores(self, chosen: Sequence[int]) -> np.ndarray:
        """(len(chosen),) float64; 1 where the file has none."""
        return np.array([self.entries[i].get("score", 1.0) for i in chosen], np.float64)

    def prediction(self, image: ImageId) -> dict[str, Any]:
        """Of an image, as `refine_boxes` and `fit_refiner` take it; masks as crops."""
        crops, origins, size = [], [], None
        chosen = self.by_image[image]
        for i in chosen:
            mask, origin, own = self._mask(i)
            if size is not None and own != size:
                raise ValueError(f"{self.path}: entry {i} has a mask of {own}, others of its image are of {size}")
            size = own
            crops.append(mask)
            origins.append(origin)
        return {
            "boxes": corners_of([self.entries[i]["bbox"] for i in chosen]),
            "masks": crops,
            "origins": np.array(origins, np.int64).reshape(-1, 2),
            "image_size": size,
            "labels": np.array([self.labels[i] for i in chosen], np.int64),
            "scores": self.scores(chosen),
        }

    def _mask(self, i: int) -> tuple[np.ndarray, tuple[int, int], tuple[int, int]]:
        """Mask of an entry as a crop (h, w), where that begins (x, y), and (H, W) of its image."""
        segmentation = self.entries[i].get("segmentation")
        size = segmentation.get("size") if isinstance(segmentation, dict) else None
        if not isinstance(size, list) or len(size) != 2 or not all(isinstance(side, int) for side in size):
            raise ValueError(f"{self.path}: entry {i} has no mask as run-length code: without masks nothing is refined")
        try:
            rle, _ = read_segmentation(segmentation, (size[0], size[1]))
        except ValueError as error:
            raise ValueError(f"{self.path}: entry {i}: {error}") from None
        mask, window = (np.zeros((0, 0), bool), (0, 0)) if rle is None else mask_crop(rle)
        return mask, (window[0], window[1]), (size[0], size[1])

    def with_boxes(self, boxes: np.ndarray) -> Any:
        """The file's content with other boxes."""
        entries = [{**entry, "bbox": side} for entry, side in zip(self.entries, xywh(boxes).tolist(), strict=True)]
        return {**self.content, "annotations": entries} if isinstance(self.content, dict) else entries


def read_results(path: Path, truth: CocoFolder | None = None) -> Results:
    """COCO results, or a COCO data set of what was found, whose images are matched by file name and classes by name.

    Args:
        truth: whose ids of images and whose classes are meant; default: the file's own.

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
    if truth is None:
        images = {entry["image_id"]: entry["image_id"] for entry in entries}
        labels = {entry["category_id"]: entry["category_id"] for entry in entries}
    elif isinstance(content, list):
        images = {record.id: record.id for record in truth.images}
        labels = {id: label for label, id in enumerate(truth.category_ids)}
    else:
        images = _same(path, content, "images", "file_name", {r.path.name: r.id for r in truth.images})
        labels = _same(path, content, "categories", "name", {n: label for label, n in enumerate(truth.class_names)})
    by_image: dict[ImageId, list[int]] = {}
    for i, entry in enumerate(entries):
        id = entry["image_id"]
        if id not in images:
            raise ValueError(f"{path}: entry {i} is of image {id!r}, which {truth and truth.json_path} does not have")
        by_image.setdefault(images[id], []).append(i)
    return Results(path, content, entries, by_image, [labels.get(entry["category_id"], -1) for entry in entries])


def _same(path: Path, content: dict[str, Any], key: str, field: str, known: dict[str, Any]) -> dict[Any, Any]:
    """What is `known` of the results' images (or categories) by name, by their ids in the results."""
    try:
        names = {item["id"]: Path(item[field]).name if key == "images" else item[field] for item in content[key]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: {key} cannot be matched by {field}: {error!r}") from None
    return {id: known[name] for id, name in names.items() if name in known}


def _has_box(entry: dict[str, Any]) -> bool:
    box = entry.get("bbox")
    return isinstance(box, list) and len(box) == 4 and all(isinstance(n, (int, float)) and n == n for n in box)
