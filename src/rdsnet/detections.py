"""`Objects` as `sv.Detections`, the result type of supervision's drawing, tracking and video tools."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import supervision as sv

from rdsnet.rle import crop_to_runs
from rdsnet.structures import Objects


def to_detections(objects: Objects, class_names: Sequence[str]) -> sv.Detections:
    """The objects of one image as supervision's result type, in pixels of the image, in the same order.

    Args:
        objects: N objects, on any device.
        class_names: by label.

    Returns:
        `xyxy` (N, 4) float32, refined boxes (half-open); `confidence` (N,) float32; `class_id` (N,) int64; `mask`,
        an `sv.CompactMask` cropped by the windows of the masks, so that a mask may reach beyond its refined box (None
        where a model without masks found objects); in `data` `class_name` (N,) str, `regressed_xyxy` (N, 4) float32
        and `edge_std` (N, 4) float32.

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
