"""Which object of the truth a detection has found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from faster_coco_eval.core import mask as coco_mask
from torch import Tensor
from torchvision.ops import box_iou

from rdsnet.results.exchange import pack, xywh
from rdsnet.structures import Objects

MATCH_IOU = 0.5


class Detected(Protocol):
    """What a fit reads of an image's detections, the best scores first; `Objects` of a model of ours have it.

    regressed_boxes  (N, 4) float32 xyxy
    labels           (N,) int64
    profiles         highest foreground probability of each column (N, W) and row (N, H)
    """

    @property
    def regressed_boxes(self) -> Tensor: ...

    @property
    def labels(self) -> Tensor: ...

    @property
    def profiles(self) -> tuple[Tensor, Tensor] | None: ...


def match(objects: Detected, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Detections and the ground truth that they find, at an IoU of 0.5 or more, the best scores first.

    Args:
        boxes, labels: (K, 4) and (K,) of the ground truth, in the same pixels.

    Returns:
        (M,) indices of detections and of ground truth; each is used once.
    """
    iou = box_iou(objects.regressed_boxes, boxes) * (objects.labels[:, None] == labels)
    pairs = []
    for detection in range(len(iou) if len(boxes) else 0):
        best, found = iou[detection].max(dim=0)
        if best >= MATCH_IOU:
            pairs.append((detection, int(found)))
            iou[:, found] = 0
    index = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    return index[:, 0], index[:, 1]


@dataclass(frozen=True)
class Matches:
    """Detections of an image and the annotations that they find; numbers are indices of both.

    pairs   (detection, annotation, IoU)
    missed  annotations that no detection finds
    false   detections that find nothing

    In neither: crowds, and detections inside them.
    """

    pairs: list[tuple[int, int, float]]
    missed: list[int]
    false: list[int]


def match_truth(objects: Objects, record: Any) -> Matches:
    """Match by COCO's rule at an IoU of 0.5: the best score first, each takes the best free object of its class.

    The IoU is that of the masks; that of the boxes where one of the two has no mask.

    Args:
        objects: found in the image, in its pixels.
        record: a `rdsnet.data.ImageRecord`, the truth.
    """
    annotations = record.annotations
    crowd = np.array([annotation.crowd for annotation in annotations], bool)
    labels = np.array([annotation.label for annotation in annotations], int)
    iou = overlaps(objects, annotations, crowd)
    free, pairs, false = ~crowd, [], []
    for detection, label in enumerate(objects.labels.tolist()):
        overlap = iou[detection] * (labels == label)
        best = int((overlap * free).argmax()) if free.any() else -1
        if best >= 0 and overlap[best] >= MATCH_IOU:
            pairs.append((detection, best, float(overlap[best])))
            free[best] = False
        elif not (overlap[crowd] >= MATCH_IOU).any():
            false.append(detection)
    return Matches(pairs, np.flatnonzero(free).tolist(), false)


def overlaps(objects: Objects, annotations: Sequence[Any], crowd: np.ndarray) -> np.ndarray:
    """IoU (N, K); for a crowd, the share of the detection that lies in it."""
    if not len(objects) or not annotations:
        return np.zeros((len(objects), len(annotations)))
    flags = crowd.astype(int).tolist()
    true_boxes = np.array([annotation.box for annotation in annotations], np.float64)
    iou = np.array(coco_mask.iou(xywh(objects.boxes.numpy()), xywh(true_boxes), flags))
    known = [i for i, annotation in enumerate(annotations) if annotation.rle is not None]
    if objects.masks and known:
        iou[:, known] = coco_mask.iou(
            pack(objects).rles, [annotations[i].rle for i in known], [flags[i] for i in known]
        )
    return iou


def best_overlap(boxes: Tensor, labels: Tensor, true_boxes: Tensor, true_labels: Tensor) -> Tensor:
    """(K,) the best-scoring detection of each object with an IoU of 0.5 or more, -1 for none."""
    hit = (box_iou(true_boxes, boxes) >= MATCH_IOU) & (true_labels[:, None] == labels)
    if not len(boxes):
        return torch.full((len(true_boxes),), -1)
    return torch.where(hit.any(1), hit.int().argmax(1), -1)  # detections are sorted by score
