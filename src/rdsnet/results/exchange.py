"""Objects as `sv.Detections` and as COCO, and COCO results of any model back."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import supervision as sv

from rdsnet.files import read_json
from rdsnet.rle import Rle, crop_to_rle, crop_to_runs, mask_box, rasterise, read_segmentation
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
    return sv.Detections(
        xyxy=objects.boxes.numpy(),
        mask=None if len(objects) and not objects.masks else _compact(objects),
        confidence=objects.scores.numpy(),
        class_id=labels,
        data={
            "class_name": np.array([class_names[label] for label in labels], dtype=str),
            "regressed_xyxy": objects.regressed_boxes.numpy(),
            "edge_std": objects.edge_std.numpy(),
            "interval": objects.interval.numpy(),
        },
    )


def _compact(objects: Objects) -> sv.CompactMask:
    crops = [mask.numpy() for mask in objects.masks]
    windows = objects.windows.numpy()
    return compact_mask(crops, windows, objects.image_size)


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

Kind = Literal["regressed", "direct", "refined"]


@dataclass
class Found:
    """The objects of one image, ready for measuring; small enough to be sent between processes.

    scores  (N,) float32
    labels  (N,) int64
    boxes   by kind, (N, 4) float32 xyxy
    rles    the masks' run-length codes, None without masks
    size    (H, W) of the image
    """

    scores: np.ndarray
    labels: np.ndarray
    boxes: dict[Kind, np.ndarray]
    rles: list[Rle] | None
    size: tuple[int, int]


def pack(objects: Objects) -> Found:
    """`Objects` as run-length codes and arrays on the CPU."""
    objects = objects.to("cpu")
    windows = [tuple(window) for window in objects.windows.tolist()]
    return Found(
        scores=objects.scores.numpy(),
        labels=objects.labels.numpy(),
        boxes={
            "regressed": objects.regressed_boxes.numpy(),
            "direct": objects.direct_boxes.numpy(),
            "refined": objects.boxes.numpy(),
        },
        # an image without objects does not tell whether the model makes masks
        rles=None
        if len(objects) and not objects.masks
        else [
            crop_to_rle(mask.numpy(), window, objects.image_size)
            for mask, window in zip(objects.masks, windows, strict=False)
        ],
        size=objects.image_size,
    )


def coco_results(objects: Objects, image_id: ImageId, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """The objects of one image as entries of a COCO results JSON.

    Args:
        objects: in pixels of the image.
        image_id: as in the data set's JSON.
        category_ids: by label.

    Returns:
        One dict an object: image_id, category_id, bbox (x, y, width, height of the refined box), score, and, where
        there are masks, segmentation (compressed RLE with counts as text).
    """
    return _entries(pack(objects), image_id, category_ids)


def _entries(found: Found, image_id: ImageId, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score}
        for label, box, score in zip(
            found.labels.tolist(), xywh(found.boxes["refined"]).tolist(), found.scores.tolist(), strict=True
        )
    ]
    if found.rles is not None:
        for entry, rle in zip(entries, found.rles, strict=True):
            entry["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode("ascii")}
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


def read_dataset(path: Path) -> dict[str, Any]:
    """A COCO JSON as it is; a FileNotFoundError or ValueError names it."""
    dataset = read_json(path)
    keys = ("images", "annotations", "categories")
    if not isinstance(dataset, dict) or not all(isinstance(dataset.get(key), list) for key in keys):
        raise ValueError(f"{path}: expected a COCO JSON with lists of images, annotations and categories")
    return dataset


@dataclass
class CocoTruth:
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

    def with_boxes(self, boxes: np.ndarray) -> Any:
        """The file's content with other boxes."""
        entries = [{**entry, "bbox": side} for entry, side in zip(self.entries, xywh(boxes).tolist(), strict=True)]
        return {**self.content, "annotations": entries} if isinstance(self.content, dict) else entries


def corners_of(sides: list[list[float]]) -> np.ndarray:
    """(M, 4) float32 xyxy of COCO's x, y, width, height."""
    boxes = np.array(sides, np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes.astype(np.float32)


def read_truth(path: Path) -> CocoTruth:
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
    return CocoTruth(path, dataset, annotations)


def read_results(path: Path, truth: CocoTruth | None = None) -> Results:
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


def _same(content: dict[str, Any], truth: CocoTruth, key: str, name: Callable[[dict[str, Any]], str]) -> dict[Any, Any]:
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
