"""COCO metrics: box AP before and after refinement, mask AP and boundary AP.

The numbers are pycocotools' (to 1e-6), computed by faster-coco-eval; boundary AP is that of Boundary IoU (Cheng et al.,
2021). Detection limits are per image and class, as everywhere in COCO.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal

import cv2
import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as coco_mask

from rdsnet.data.coco import CocoFolder
from rdsnet.data.records import Annotation, ImageRecord
from rdsnet.results.exchange import BoxKind, ImageId, PackedObjects, Results, coco_results, pack
from rdsnet.rle import Rle, crop_to_rle, mask_crop
from rdsnet.structures import Objects

Metrics = dict[str, float | None]
"""AP, AP50, AP75, APs, APm, APl in 0..1; None where there is no object of that size"""

COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


class CocoEvaluator:
    """Collects what was found in the images of a data set, and measures it.

    The images that were added are evaluated, also those without annotations, whose detections are all wrong. Objects
    have their boxes and areas as the JSON gives them. Where an annotation has only a box, its mask is unknown: for mask
    and boundary AP it is no object, and detections inside the box are neither right nor wrong, as in a crowd.

    Args:
        folder: the data set; its images are not opened.
        max_detections: detections of an image and class that count, the highest scores.

    Raises:
        ValueError: fewer than one detection.
    """

    def __init__(self, folder: CocoFolder, max_detections: int) -> None:
        if max_detections < 1:
            raise ValueError(f"expected max_detections of at least 1, got {max_detections}")
        self.folder = folder
        self.max_detections = max_detections
        self._records = {record.id: record for record in folder.images}
        self._found: dict[ImageId, PackedObjects] = {}

    def add(self, image_id: ImageId, objects: Objects | PackedObjects) -> None:
        """Add one image; an image that is there already is left as it is.

        Args:
            image_id: as in the JSON.
            objects: found in it, in its pixels; none if it is empty.

        Raises:
            ValueError: an unknown image, another size than the JSON's, or a label without a category.
        """
        if image_id in self._found:
            return
        path, classes = self.folder.json_path, len(self.folder.class_names)
        if image_id not in self._records:
            raise ValueError(f"{path}: expected the id of an image, got {image_id!r}")
        if isinstance(objects, Objects):
            size, own = self._records[image_id].size, tuple(objects.image_size)
            if size != own:
                raise ValueError(f"{path}: image {image_id!r} has (height, width) {size}, objects are of {own}")
            objects = pack(objects)
        if len(objects.labels) and objects.labels.max() >= classes:
            raise ValueError(f"image {image_id!r}: expected labels below {classes}, got {objects.labels.max()}")
        self._found[image_id] = objects

    def state(self) -> list[tuple[ImageId, PackedObjects]]:
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
        for record in self.folder.images:
            if field not in record.entry:
                raise ValueError(
                    f"{self.folder.json_path}: expected {field!r} of every image, "
                    f"image {record.id!r} has {', '.join(record.entry)}"
                )
        parts: dict[str, CocoEvaluator] = {}
        for image_id, found in self._found.items():
            name = str(self._records[image_id].entry[field])
            parts.setdefault(name, CocoEvaluator(self.folder, self.max_detections))._found[image_id] = found
        return dict(sorted(parts.items()))

    def results(self) -> list[dict[str, Any]]:
        """The results JSON that a COCO server takes, see `coco_results`; boxes are the refined ones."""
        category_ids = self.folder.category_ids
        return [entry for id in self._ids() for entry in coco_results(self._found[id], id, category_ids)]

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
        masks = all(found.rles is not None for found in self._found.values())
        kinds: tuple[BoxKind, ...] = ("regressed", "direct", "refined") if masks else ("regressed",)
        precision = {kind: self.precision("bbox", kind) for kind in kinds}
        metrics: dict[str, Any] = {"box": {kind: _metrics(values) for kind, values in precision.items()}}
        of_masks = None
        if masks:
            of_masks = self.precision("segm")
            metrics["mask"] = _metrics(of_masks)
            if boundary:
                metrics["boundary"] = _metrics(self.precision("boundary"))
        counts = Counter(a.label for id in self._found for a in _counted(self._records[id]) if not a.crowd)
        metrics["per_class"] = [
            {
                "class": name,
                "objects": counts[label],
                "box_AP": _mean(precision[kinds[-1]][:, :, label, 0]),
                "mask_AP": None if of_masks is None else _mean(of_masks[:, :, label, 0]),
            }
            for label, name in enumerate(self.folder.class_names)
        ]
        totals = {"images": len(self._found), "objects": counts.total(), "max_detections": self.max_detections}
        return metrics | totals

    def precision(self, of: Literal["bbox", "segm", "boundary"], boxes: BoxKind = "refined") -> np.ndarray:
        """Precision (10 IoU thresholds, 101 recalls, C, 4 sizes: all, small, medium, large), -1 where undefined.

        Args:
            of: what is compared with the truth.
            boxes: those of the objects; detections are sorted into sizes by their area.
        """
        # Images, categories and annotations are numbered from 1: COCO's matching takes an annotation with the id 0 for
        # none, and cannot read ids that are text.
        numbers = range(1, 1 + len(self.folder.class_names))
        images, truth, found = [], [], []
        for number, id in enumerate(self._ids(), start=1):
            record = self._records[id]
            images.append({"id": number, "height": record.height, "width": record.width})
            truth += [{**entry, "image_id": number} for entry in _truth_entries(record, masks=of != "bbox")]
            found += coco_results(self._found[id], number, numbers, boxes)
        for entry in found:
            # Sorted into sizes by the box's area, masks too: so does pycocotools, and with it the COCO server, with
            # results that have a box. (Without one it counts the mask's pixels; this changes APs, APm, APl a little.)
            entry |= {"area": entry["bbox"][2] * entry["bbox"][3], "iscrowd": 0}
        categories = [{"id": id, "name": name} for id, name in zip(numbers, self.folder.class_names, strict=True)]
        sets = []
        for entries in (truth, found):
            annotations = [{**entry, "id": number} for number, entry in enumerate(entries, start=1)]
            sets.append(COCO({"images": images, "categories": categories, "annotations": annotations}))
        evaluation = BoundaryEval(*sets, iouType="segm") if of == "boundary" else COCOeval_faster(*sets, iouType=of)
        evaluation.params.maxDets = [self.max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
        return evaluation.eval["precision"][..., 0]


def _counted(record: ImageRecord) -> list[Annotation]:
    return record.annotations + record.unusable


def _truth_entries(record: ImageRecord, *, masks: bool) -> list[dict[str, Any]]:
    """Annotations as COCO has them; `masks`: where one has only a box, this is a region to be ignored."""
    entries = []
    for annotation in _counted(record):
        rle, crowd = annotation.rle, annotation.crowd
        if masks and rle is None:
            x, y, width, height = annotation.bbox
            x0, x1 = (min(max(math.floor(v), 0), record.width) for v in (x, x + width))
            y0, y1 = (min(max(math.floor(v), 0), record.height) for v in (y, y + height))
            rle, crowd = crop_to_rle(np.ones((y1 - y0, x1 - x0), bool), (x0, y0, x1, y1), record.size), True
        entry = {"category_id": annotation.label + 1, "bbox": list(annotation.bbox), "area": annotation.area}
        entries.append({**entry, "iscrowd": int(crowd), "segmentation": rle})
    return entries


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


def box_ap(truth: CocoFolder, results: Results, boxes: np.ndarray, max_detections: int = MAX_DETECTIONS) -> np.ndarray:
    """Box AP at IoU 0.5, 0.55, ... 0.95: (10,), 0..1, NaN without an object.

    Args:
        truth: all its images count, also those of no result.
        results: scores and classes.
        boxes: (M, 4) xyxy, in place of those of the results.
    """
    evaluator = CocoEvaluator(truth, max_detections)
    labels = np.array(results.labels, np.int64)
    for record in truth.images:
        chosen = [i for i in results.by_image.get(record.id, ()) if labels[i] >= 0]
        evaluator.add(
            record.id, PackedObjects(results.scores(chosen), labels[chosen], {"regressed": boxes[chosen]}, None)
        )
    everything = evaluator.precision("bbox", "regressed")[..., 0]
    return np.array([_mean(values) for values in everything], np.float64)


WIDTH = 0.02  # of the boundary, times the diagonal of the image


def boundary_rle(rle: Rle) -> Rle:
    """The pixels of a mask within 2% of the image's diagonal of its boundary; the border of the image is one too."""
    height, width = rle["size"]
    mask, window = mask_crop(rle)
    steps = max(1, round(WIDTH * float(np.hypot(height, width))))
    around = np.pad(mask, 1).astype(np.uint8)
    inside = cv2.erode(around, np.ones((3, 3), np.uint8), iterations=steps)[1:-1, 1:-1]
    return crop_to_rle(mask & (inside == 0), window, (height, width))


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
