"""COCO metrics: box AP before and after refinement, mask AP and boundary AP.

The numbers are pycocotools' (to 1e-6), computed by faster-coco-eval; boundary AP is that of Boundary IoU (Cheng et al.,
2021). Detection limits are per image and class, as everywhere in COCO.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as coco_mask

from rdsnet.results.exchange import CocoTruth, Found, ImageId, Kind, Results, _entries, pack, read_dataset, xywh
from rdsnet.rle import Rle, crop_to_rle, mask_area, mask_box, rasterise, read_segmentation
from rdsnet.structures import Objects

Metrics = dict[str, float | None]
"""AP, AP50, AP75, APs, APm, APl in 0..1; None where there is no object of that size"""

COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


class CocoEvaluator:
    """Collects what was found in the images of a COCO data set, and measures it.

    The images that were added are evaluated, also those without annotations, whose detections are all wrong;
    annotations of unknown images and categories are left out. Where an annotation has only a box, its mask is unknown:
    for mask and boundary AP it is no object, and detections inside the box are neither right nor wrong, as in a crowd.

    Args:
        json_path: the data set. Ids of images are integers or strings; ids of annotations do not matter.
        category_ids: the JSON's id of each label.
        max_detections: detections of an image and class that count, the highest scores.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a COCO JSON, or fewer than one detection.
    """

    def __init__(self, json_path: str | Path, category_ids: Sequence[int], max_detections: int) -> None:
        if max_detections < 1:
            raise ValueError(f"expected max_detections of at least 1, got {max_detections}")
        self.json_path = Path(json_path)
        self.category_ids = list(category_ids)
        self.max_detections = max_detections
        self._dataset = read_dataset(self.json_path)
        self._images: dict[ImageId, dict[str, Any]] = {image["id"]: image for image in self._dataset["images"]}
        self._found: dict[ImageId, Found] = {}

    def add(self, image_id: ImageId, objects: Objects) -> None:
        """Add one image; an image that is there already is left as it is.

        Args:
            image_id: as in the JSON.
            objects: found in it, in its pixels; none if it is empty.

        Raises:
            ValueError: an unknown image, another size than the JSON's, or a label without a category.
        """
        if image_id in self._found:
            return
        if image_id not in self._images:
            raise ValueError(f"{self.json_path}: expected the id of an image, got {image_id!r}")
        size = self._size(image_id)
        if size is not None and size != tuple(objects.image_size):
            raise ValueError(
                f"{self.json_path}: image {image_id!r} has (height, width) {size}, objects are of {objects.image_size}"
            )
        if len(objects) and int(objects.labels.max()) >= len(self.category_ids):
            raise ValueError(
                f"image {image_id!r}: expected labels below {len(self.category_ids)}, got {int(objects.labels.max())}"
            )
        self._found[image_id] = pack(objects)

    def _size(self, image_id: ImageId) -> tuple[int, int] | None:
        image = self._images[image_id]
        if image.get("height") is None or image.get("width") is None:
            return None
        return int(image["height"]), int(image["width"])

    def state(self) -> list[tuple[ImageId, Found]]:
        """What was added in this process, for `torch.distributed.all_gather_object`."""
        return list(self._found.items())

    def merge(self, states: Iterable[Any]) -> None:
        """Take over the states of all processes; images that several have seen count once."""
        for state in states:
            for image_id, found in state:
                self._found.setdefault(image_id, found)

    def by(self, field: str) -> dict[str, CocoEvaluator]:
        """The images that were added, apart by what the JSON says of them under `field`, such as a modality.

        Raises:
            ValueError: an image of the JSON has no such entry.
        """
        for image_id, image in self._images.items():
            if field not in image:
                raise ValueError(
                    f"{self.json_path}: expected {field!r} of every image, image {image_id!r} has {', '.join(image)}"
                )
        parts: dict[str, CocoEvaluator] = {}
        for image_id, found in self._found.items():
            part = copy.copy(self)
            part._found = {}
            parts.setdefault(str(self._images[image_id][field]), part)._found[image_id] = found
        return dict(sorted(parts.items()))

    def results(self) -> list[dict[str, Any]]:
        """The results JSON that a COCO server takes, see `coco_results`; boxes are the refined ones."""
        return [entry for id in self._ids() for entry in _entries(self._found[id], id, self.category_ids)]

    def _ids(self) -> list[ImageId]:
        # the order of pycocotools, which decides between equal scores
        return sorted(self._found, key=lambda id: (isinstance(id, str), id))

    def summarize(self, *, boundary: bool = True) -> dict[str, Any]:
        """The metrics, ready for JSON.

        Args:
            boundary: also measure boundary AP, which takes longer than all the others together on large images.

        Returns:
            box         AP of "regressed", "direct" and "refined" boxes (see `Objects`); only "regressed" without masks
            mask        AP of the masks, if there are any
            boundary    AP by Boundary IoU, if asked for
            per_class   list of class (its name), objects, box_AP (refined boxes, if there are masks), mask_AP
            images, objects, max_detections     evaluated images, objects in them without crowds, and the limit

            Each AP is a dict of AP, AP50, AP75, APs, APm, APl in 0..1, None where there is no object of that size.
        """
        ids = self._ids()
        truth = self._truth(ids)
        masks = all(found.rles is not None for found in self._found.values())
        kinds: tuple[Kind, ...] = ("regressed", "direct", "refined") if masks else ("regressed",)
        precision = {kind: self._precision("bbox", truth, self._detections(ids, kind)) for kind in kinds}
        box_ap = [_mean(precision[kinds[-1]][:, :, label, 0]) for label in range(len(self.category_ids))]
        metrics: dict[str, Any] = {"box": {kind: _metrics(values) for kind, values in precision.items()}}
        mask_ap: list[float | None] = [None] * len(self.category_ids)
        if masks:
            mask_truth = [_with_mask(annotation) for annotation in truth]
            detections = self._detections(ids, "refined")
            values = self._precision("segm", mask_truth, detections)
            metrics["mask"] = _metrics(values)
            mask_ap = [_mean(values[:, :, label, 0]) for label in range(len(self.category_ids))]
            if boundary:
                metrics["boundary"] = _metrics(self._precision("boundary", mask_truth, detections))
        objects = [annotation["category_id"] - 1 for annotation in truth if not annotation["iscrowd"]]
        names = {category["id"]: category["name"] for category in self._dataset["categories"]}
        metrics["per_class"] = [
            {
                "class": names.get(id, str(id)),
                "objects": objects.count(label),
                "box_AP": box_ap[label],
                "mask_AP": mask_ap[label],
            }
            for label, id in enumerate(self.category_ids)
        ]
        return metrics | {"images": len(ids), "objects": len(objects), "max_detections": self.max_detections}

    # Inside, images, categories and annotations are numbered from 1: COCO's matching takes an annotation with the id 0
    # for none, and cannot read ids that are text.

    def _truth(self, ids: list[ImageId]) -> list[dict[str, Any]]:
        images = {id: number for number, id in enumerate(ids, start=1)}
        categories = {id: number for number, id in enumerate(self.category_ids, start=1)}
        truth: list[dict[str, Any]] = []
        for annotation in self._dataset["annotations"]:
            image_id, category = annotation.get("image_id"), annotation.get("category_id")
            if image_id not in images or category not in categories:
                continue
            numbers = {"id": len(truth) + 1, "image_id": images[image_id], "category_id": categories[category]}
            size = self._found[image_id].size
            entry = self._annotation(annotation, size)
            if entry is not None:
                truth.append(entry | numbers | {"image_size": size})
        return truth

    def _annotation(self, annotation: dict[str, Any], size: tuple[int, int]) -> dict[str, Any] | None:
        """Box, area, crowd and mask; None for an annotation with neither box nor mask."""
        try:
            rle, _ = read_segmentation(annotation.get("segmentation"), size)
        except ValueError as error:
            name = f"annotation {annotation.get('id')!r} of image {annotation['image_id']!r}"
            raise ValueError(f"{self.json_path}: {name}: {error}") from None
        bbox = annotation.get("bbox")
        if not bbox:
            if rle is None:
                return None
            x1, y1, x2, y2 = mask_box(rle)
            bbox = [x1, y1, x2 - x1, y2 - y1]
        area = annotation.get("area")
        if area is None:
            area = mask_area(rle) if rle is not None else bbox[2] * bbox[3]
        return {"bbox": bbox, "area": area, "iscrowd": int(annotation.get("iscrowd") or 0), "segmentation": rle}

    def _detections(self, ids: list[ImageId], kind: Kind) -> list[dict[str, Any]]:
        # Sorted into sizes by the box's area, masks too: so does pycocotools, and with it the COCO server, with results
        # that have a box. (Without one it counts the mask's pixels; this changes APs, APm and APl a little.)
        detections: list[dict[str, Any]] = []
        for number, id in enumerate(ids, start=1):
            found = self._found[id]
            rows = zip(found.labels.tolist(), found.scores.tolist(), xywh(found.boxes[kind]).tolist(), strict=True)
            for i, (label, score, box) in enumerate(rows):
                detection = {"id": len(detections) + 1, "image_id": number, "category_id": label + 1, "score": score}
                detection |= {"bbox": box, "area": box[2] * box[3], "iscrowd": 0}
                if found.rles is not None:
                    detection["segmentation"] = found.rles[i]
                detections.append(detection)
        return detections

    def _precision(
        self, kind: Literal["bbox", "segm", "boundary"], truth: list[dict[str, Any]], detections: list[dict[str, Any]]
    ) -> np.ndarray:
        """Precision (10 IoU thresholds, 101 recalls, C, 4 sizes), -1 where undefined."""
        images = [
            {"id": number, "height": self._found[id].size[0], "width": self._found[id].size[1]}
            for number, id in enumerate(self._ids(), start=1)
        ]
        categories = [{"id": label + 1, "name": str(id)} for label, id in enumerate(self.category_ids)]
        # fresh dicts each time: the evaluation writes into them
        sets = [
            COCO({"images": images, "categories": categories, "annotations": [dict(entry) for entry in entries]})
            for entries in (truth, detections)
        ]
        evaluation = BoundaryEval(*sets, iouType="segm") if kind == "boundary" else COCOeval_faster(*sets, iouType=kind)
        evaluation.params.maxDets = [self.max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
        return evaluation.eval["precision"][..., 0]


def _with_mask(annotation: dict[str, Any]) -> dict[str, Any]:
    """An annotation for mask AP: where it has only a box, the box is a region to be ignored."""
    if annotation["segmentation"] is not None:
        return annotation
    (height, width), (x, y, w, h) = annotation["image_size"], annotation["bbox"]
    x0, x1 = (min(max(math.floor(v), 0), width) for v in (x, x + w))
    y0, y1 = (min(max(math.floor(v), 0), height) for v in (y, y + h))
    filled = crop_to_rle(np.ones((y1 - y0, x1 - x0), bool), (x0, y0, x1, y1), (height, width))
    return annotation | {"segmentation": filled, "iscrowd": 1}


def _mean(precision: np.ndarray) -> float | None:
    defined = precision[precision > -1]
    return float(defined.mean()) if defined.size else None


def _metrics(precision: np.ndarray) -> Metrics:
    """From precision (10, 101, C, 4): IoU thresholds 0.5 to 0.95; sizes all, small, medium, large."""
    everything = precision[..., 0]
    values = (everything, everything[0], everything[5], precision[..., 1], precision[..., 2], precision[..., 3])
    return {name: _mean(value) for name, value in zip(COLUMNS, values, strict=True)}


MAX_DETECTIONS = 500  # of an image and class that AP counts

IOUS = np.linspace(0.5, 0.95, 10)


def box_ap(truth: CocoTruth, results: Results, boxes: np.ndarray, max_detections: int = MAX_DETECTIONS) -> np.ndarray:
    """Box AP at IoU 0.5, 0.55, ... 0.95: (10,), 0..1, NaN without an object.

    Args:
        results: scores and classes.
        boxes: (M, 4) xyxy, in place of those of the results.
    """
    images = {id: number for number, id in enumerate(truth.annotations, start=1)}  # ids may be text, or 0
    known = [category["id"] for category in truth.dataset["categories"]]
    categories = {id: number for number, id in enumerate(known, start=1)}
    objects = [
        {**_box_entry(a["bbox"], a.get("area")), "image_id": images[id], "category_id": categories[a["category_id"]]}
        | {"iscrowd": int(a.get("iscrowd") or 0)}
        for id, annotations in truth.annotations.items()
        for a in annotations
        if a.get("category_id") in categories
    ]
    sides = xywh(boxes).tolist()
    found = [
        {**_box_entry(sides[i], None), "image_id": images[id], "category_id": categories[category], "iscrowd": 0}
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


def _box_entry(bbox: list[float], area: float | None) -> dict[str, Any]:
    return {"bbox": bbox, "area": bbox[2] * bbox[3] if area is None else area}


WIDTH = 0.02  # of the boundary, times the diagonal of the image


def boundary_rle(rle: Rle) -> Rle:
    """The pixels of a mask within 2% of the image's diagonal of its boundary; the border of the image is one too."""
    height, width = rle["size"]
    x0, y0, x1, y1 = (int(edge) for edge in mask_box(rle))
    mask = rasterise(rle, (x0, y0, x1, y1), (height, width))
    steps = max(1, round(WIDTH * float(np.hypot(height, width))))
    around = np.pad(mask, 1).astype(np.uint8)
    inside = cv2.erode(around, np.ones((3, 3), np.uint8), iterations=steps)[1:-1, 1:-1]
    return crop_to_rle(mask & (inside == 0), (x0, y0, x1, y1), (height, width))


class BoundaryEval(COCOeval_faster):
    """Evaluation of masks (iouType "segm") by Boundary IoU; segmentations must be compressed RLE."""

    def computeIoU(self, imgId: int, catId: int) -> np.ndarray | list[float]:
        """Boundary IoU (detections by descending score, ground truth) in one image and class; mask IoU with crowds."""
        ious = super().computeIoU(imgId, catId)
        if len(ious) == 0:
            return ious
        truth, found = (
            [annotation for annotation in coco.imgToAnns[imgId] if annotation["category_id"] == catId]
            for coco in (self.cocoGt, self.cocoDt)
        )
        found = sorted(found, key=lambda detection: -detection["score"])[: self.params.maxDets[-1]]
        crowd = np.array([annotation["iscrowd"] for annotation in truth])
        edges = [[boundary_rle(annotation["segmentation"]) for annotation in group] for group in (found, truth)]
        return np.where(crowd, ious, np.minimum(ious, coco_mask.iou(*edges, crowd.tolist())))
