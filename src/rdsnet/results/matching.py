"""Which object of the truth a detection has found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from faster_coco_eval.core import mask as coco_mask
from torch import Tensor
from torchvision.ops import box_iou

from rdsnet.data.records import Annotation, ImageRecord
from rdsnet.results.exchange import pack, xywh
from rdsnet.structures import Objects

MATCH_IOU = 0.5


@dataclass(frozen=True)
class Matches:
    """Detections of an image and the objects that they find; numbers are indices of both.

    pairs   (detection, object, IoU)
    missed  objects that no detection finds
    false   detections that find nothing

    In neither: crowds, and detections inside them.
    """

    pairs: list[tuple[int, int, float]]
    missed: list[int]
    false: list[int]


def match(iou: np.ndarray, labels: np.ndarray, true_labels: np.ndarray, crowd: np.ndarray | None = None) -> Matches:
    """Match by COCO's rule at an IoU of 0.5: the best score first, each takes the best free object of its class.

    Args:
        iou: (N, K) of detections, the best scores first, and objects; with a crowd, the share of the detection in it.
        labels, true_labels: (N,) and (K,).
        crowd: (K,) bool: regions that hold objects of which none is known by itself; default: none is.
    """
    crowd = np.zeros(len(true_labels), bool) if crowd is None else crowd
    iou = iou * (labels[:, None] == true_labels)
    free, pairs, false = ~crowd, [], []
    for detection, own in enumerate(iou):
        available = own * free
        best = int(available.argmax()) if len(free) else -1
        if best >= 0 and available[best] >= MATCH_IOU:
            pairs.append((detection, best, float(own[best])))
            free[best] = False
        elif not (own[crowd] >= MATCH_IOU).any():
            false.append(detection)
    return Matches(pairs, np.flatnonzero(free).tolist(), false)


def match_boxes(boxes: Tensor, labels: Tensor, true_boxes: Tensor, true_labels: Tensor) -> tuple[Tensor, Tensor]:
    """(M,) indices of detections, the best scores first, and (M,) of the objects whose boxes they find; see `match`."""
    pairs = match(box_iou(boxes, true_boxes).numpy(), labels.numpy(), true_labels.numpy()).pairs
    index = torch.tensor([pair[:2] for pair in pairs], dtype=torch.int64).view(-1, 2)
    return index[:, 0], index[:, 1]


def match_truth(objects: Objects, record: ImageRecord) -> Matches:
    """See `match`; the IoU is that of the masks, and that of the boxes where one of the two has no mask.

    Args:
        objects: found in the image, in its pixels.
        record: the truth.
    """
    annotations = record.annotations
    crowd = np.array([annotation.crowd for annotation in annotations], bool)
    labels = np.array([annotation.label for annotation in annotations], int)
    return match(overlaps(objects, annotations, crowd), objects.labels.numpy(), labels, crowd)


def overlaps(objects: Objects, annotations: Sequence[Annotation], crowd: np.ndarray) -> np.ndarray:
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
