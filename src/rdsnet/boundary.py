"""Boundary IoU (Cheng et al., 2021): the smaller of mask IoU and the IoU of what lies near the masks' boundaries.

The same numbers as faster-coco-eval's, which erodes masks in arrays of the whole image; here it is done in their boxes.
"""

from __future__ import annotations

import cv2
import numpy as np
from faster_coco_eval import COCOeval_faster
from faster_coco_eval.core import mask as coco_mask

from rdsnet.data.rle import Rle, mask_box, rasterise
from rdsnet.rle import crop_to_rle

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
