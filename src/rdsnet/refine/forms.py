"""Reading masks of any model: the highest foreground probability of each column and row (Eq. 4), and nothing else.

A mask is read where it lies: in a whole image, in a crop of it, or in the crops of an `sv.CompactMask`. Outside of a
crop a profile is exactly 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import supervision as sv
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Array: TypeAlias = np.ndarray | Tensor

Masks: TypeAlias = Array | Sequence[Array] | sv.CompactMask


class Profiles(NamedTuple):
    """Profiles of N masks.

    axes    columns (N, S) and rows (N, T), float32 in 0..1, 0 beyond the end of a crop
    first   (N, 2) int64, the column and row that the entries 0 stand for, 0 or more
    size    (H, W) of the image, None where it is not known
    soft    whether any entry lies between 0 and 1; masks are binary otherwise, whatever their dtype
    """

    axes: tuple[Tensor, Tensor]
    first: Tensor
    size: tuple[int, int] | None
    soft: bool

    def whole(self) -> tuple[Tensor, Tensor]:
        """Columns (N, W) and rows (N, H) of the whole image, whose size must be known unless there are no masks."""
        height, width = self.size or (1, 1)
        return self._whole(0, width), self._whole(1, height)

    def _whole(self, axis: int, length: int) -> Tensor:
        values, first = self.axes[axis], self.first[:, axis, None]
        entry = (first + torch.arange(values.shape[1], device=values.device)).clamp(max=length - 1)
        # what would lie beyond the image is 0 and changes no highest value
        return values.new_zeros(len(values), length).scatter_reduce_(1, entry, values, "amax")


def read_profiles(
    masks: Masks, count: int, origins: Any = None, image_size: tuple[int, int] | None = None, device: Any = "cpu"
) -> Profiles:
    """The profiles of an image's masks.

    Args:
        masks: N masks of the whole image, (N, H, W) or (N, 1, H, W); or N crops (h, w) with their origins; or compact
            masks. Probabilities 0..1, or binary (bool, or integers 0 and 1).
        count: N, the number of boxes.
        origins: (N, 2) integers x, y of each crop's top left pixel.
        image_size: (H, W); what a crop has outside of it is left out.
        device: of the profiles.

    Raises:
        ValueError: masks of another form or number, or values outside 0..1; says which mask.
    """
    if isinstance(masks, sv.CompactMask):
        if origins is not None:
            raise ValueError("expected no origins with an sv.CompactMask, which knows where its crops lie")
        image_size = _same_size(image_size, masks.image_shape)
        origins, masks = masks.offsets, [masks.crop(i) for i in range(len(masks))]
    elif isinstance(masks, (np.ndarray, Tensor)):
        masks = _without_channel(masks)
        if origins is None:
            height, width = (int(side) for side in masks.shape[1:])
            image_size = _same_size(image_size, (height, width))
    elif not isinstance(masks, (list, tuple)):
        raise ValueError(f"expected masks as an array, a tensor, a list of crops or sv.CompactMask, got {type(masks)}")
    elif origins is None and count:
        raise ValueError("expected origins (N, 2), the x and y of each crop's top left pixel, with a list of crops")
    if len(masks) != count:
        raise ValueError(f"expected a mask for each of {count} boxes, got {len(masks)}")
    if count == 0:
        empty = torch.zeros(0, 1, device=device)
        return Profiles((empty, empty), torch.zeros(0, 2, dtype=torch.int64, device=device), image_size, False)
    if image_size is not None and min(image_size) < 1:
        raise ValueError(f"expected an image_size (H, W) of at least 1 x 1, got {image_size}")
    corner = np.zeros((count, 2), np.int64) if origins is None else _read_origins(origins, count)
    if origins is None and isinstance(masks, (np.ndarray, Tensor)):
        columns, rows, lowest = _whole_images(masks)
    else:
        columns, rows, lowest = _crops(list(masks), corner, image_size)
    columns, rows, lowest = columns.to(device), rows.to(device), lowest.to(device)
    soft = _check_values(columns, lowest)
    return Profiles((columns, rows), torch.as_tensor(corner.clip(min=0), device=device), image_size, soft)


def _same_size(asked: tuple[int, int] | None, size: tuple[int, int]) -> tuple[int, int]:
    if asked is not None and tuple(asked) != tuple(size):
        raise ValueError(f"expected masks of the image_size {tuple(asked)}, got {tuple(size)}")
    return size


def _without_channel(masks: Array) -> Array:
    if masks.ndim == 4 and masks.shape[1] == 1:
        masks = masks[:, 0]
    if masks.ndim != 3:
        raise ValueError(f"expected masks of shape (N, H, W) or (N, 1, H, W), got {tuple(masks.shape)}")
    return masks


def _read_origins(origins: Any, count: int) -> np.ndarray:
    values = np.asarray(origins.cpu() if isinstance(origins, Tensor) else origins)
    if values.shape != (count, 2):
        raise ValueError(f"expected origins of shape ({count}, 2), got {values.shape}")
    whole = values.astype(np.int64)
    if not (whole == values).all():
        raise ValueError("expected whole pixels as origins: a crop starts at a pixel, not between two")
    return whole


def _on_cpu(mask: Array) -> Array:
    """numpy is several times faster than torch at the maxima of small arrays."""
    if isinstance(mask, Tensor) and mask.device.type == "cpu":
        mask = mask.detach()
        return (mask.float() if mask.dtype == torch.bfloat16 else mask).numpy()
    return mask


def _require_numbers(mask: Array, name: str) -> None:
    if isinstance(mask, np.ndarray):
        known = mask.dtype.kind in "bifu"
    else:
        known = isinstance(mask, Tensor) and not mask.is_complex()
    if not known:
        raise ValueError(f"expected {name} as an array or tensor of numbers, got {getattr(mask, 'dtype', type(mask))}")


def _extremes(masks: Array) -> tuple[Array, Array, Array]:
    """Highest values of columns (..., W) and rows (..., H), and smallest values (...,), of masks (..., H, W)."""
    if isinstance(masks, Tensor):
        masks = masks.detach()
        least = masks.new_zeros(masks.shape[:-2]) if masks.dtype == torch.bool else masks.amin((-2, -1))
        return masks.amax(-2), masks.amax(-1), least
    lowest = np.zeros(masks.shape[:-2]) if masks.dtype == bool else np.asarray(masks.min((-2, -1)))
    return masks.max(-2), masks.max(-1), lowest


def _whole_images(masks: Array) -> tuple[Tensor, Tensor, Tensor]:
    """Columns (N, W), rows (N, H) and smallest values (N,) of masks (N, H, W)."""
    masks = _on_cpu(masks)
    _require_numbers(masks, "masks")
    columns, rows, lowest = (
        values.float() if isinstance(values, Tensor) else torch.from_numpy(np.asarray(values, np.float32))
        for values in _extremes(masks)
    )
    return columns, rows, lowest


def _crops(
    crops: list[Array], origins: np.ndarray, image_size: tuple[int, int] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Columns (N, S), rows (N, T) and smallest values (N,) of masks (h, w)."""
    read: list[tuple[Array, Array, Array]] = []
    for i, (crop, (x, y)) in enumerate(zip(crops, origins.tolist(), strict=True)):
        crop = _on_cpu(crop)
        _require_numbers(crop, f"mask {i}")
        if crop.ndim != 2:
            raise ValueError(f"expected mask {i} as a crop (h, w), got shape {tuple(crop.shape)}")
        if x < 0 or y < 0 or image_size is not None:
            height, width = image_size or (y + crop.shape[0], x + crop.shape[1])
            crop = crop[max(-y, 0) : max(height - y, 0), max(-x, 0) : max(width - x, 0)]
        if 0 in crop.shape:
            crop = np.zeros((1, 1), bool)
        read.append(_extremes(crop))
    columns, rows, lowest = zip(*read, strict=True)
    return _together(columns), _together(rows), _together([value.reshape(1) for value in lowest])[:, 0]


def _together(vectors: Sequence[Array]) -> Tensor:
    """Vectors of several lengths as rows, with zeros at their ends."""
    device = next((v.device for v in vectors if isinstance(v, Tensor)), None)
    if device is not None:
        moved = [torch.as_tensor(vector, dtype=torch.float32, device=device) for vector in vectors]
        return pad_sequence(moved, batch_first=True)
    rows = np.zeros((len(vectors), max(len(v) for v in vectors)), np.float32)
    for row, vector in zip(rows, vectors, strict=True):
        row[: len(vector)] = vector
    return torch.from_numpy(rows)


def _check_values(columns: Tensor, lowest: Tensor) -> bool:
    """Whether masks are soft; a ValueError names the first that holds something else than 0..1."""
    highest = columns.amax(1)
    good = (lowest >= 0) & (highest <= 1)  # False for NaN
    good_and_soft = torch.stack([good.all(), ((columns > 0) & (columns < 1)).any()]).tolist()  # one wait for a GPU
    if not good_and_soft[0]:
        i = int((~good).nonzero()[0])
        low, high = lowest[i].item(), highest[i].item()
        what = "NaN" if low != low or high != high else f"values from {low:g} to {high:g}"
        raise ValueError(
            f"expected masks of probabilities 0..1 (logits need a sigmoid), or of 0 and 1; mask {i} holds {what}"
        )
    return bool(good_and_soft[1])


FARTHEST = 2.0**24  # pixels; float32 knows each whole number up to this


def read_boxes(boxes: Any) -> Tensor:
    """(N, 4) float32 boxes of an array or tensor, where they are; a ValueError for anything else."""
    if not isinstance(boxes, (np.ndarray, Tensor)):
        raise ValueError(f"expected boxes as an array or tensor (N, 4), sv.Detections or a dict, got {type(boxes)}")
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"expected boxes of shape (N, 4), xyxy, got {tuple(boxes.shape)}")
    if isinstance(boxes, np.ndarray) and boxes.dtype.kind not in "fiu":
        raise ValueError(f"expected boxes of numbers, got {boxes.dtype}")
    corners = torch.as_tensor(boxes).detach().float()
    finite = (corners.abs() <= FARTHEST).all(dim=1)  # NaN is not
    for right, what in (
        (finite, f"boxes of finite numbers up to {FARTHEST:.0f}"),
        ((corners[:, 2:] >= corners[:, :2]).all(dim=1), "boxes xyxy with x2 >= x1 and y2 >= y1"),
    ):
        if not right.all():
            i = int((~right).nonzero()[0])
            raise ValueError(f"expected {what}, got {corners[i].tolist()} for box {i}")
    return corners


def require_inside(corners: Tensor, size: tuple[int, int] | None) -> None:
    """Raise a ValueError for a box beyond the image of its mask, as where one of them is scaled and the other not."""
    if size is None or not len(corners):
        return
    end = corners.new_tensor([size[1], size[0]])
    beyond = ((corners[:, :2] >= end) | (corners[:, 2:] <= 0)).any(dim=1)
    if beyond.any():
        i = int(beyond.nonzero()[0])
        raise ValueError(f"box {i}, {corners[i].tolist()}, lies outside of its image of (H, W) {tuple(size)}")


def read_output(output: sv.Detections | Mapping[str, Any]) -> tuple[Any, ...]:
    """Boxes, masks, labels, scores, origins and image_size of detections, or of torchvision's dict of an image.

    Of the last four each is None where there is none.
    """
    if isinstance(output, sv.Detections):
        masks = output.mask
        if masks is None and len(output):
            raise ValueError("expected sv.Detections with masks, got none: there is nothing to refine boxes by")
        masks = np.zeros((0, 1, 1), bool) if masks is None else masks
        return output.xyxy, masks, output.class_id, output.confidence, None, None
    if "boxes" not in output or "masks" not in output:
        raise ValueError(f"expected a dict with boxes and masks, as torchvision's models give, got {sorted(output)}")
    rest = (output.get(name) for name in ("labels", "scores", "origins", "image_size"))
    return output["boxes"], output["masks"], *rest


Prediction: TypeAlias = sv.Detections | Mapping[str, Any] | tuple[Array, Masks] | tuple[Array, Masks, Array]

Truth: TypeAlias = sv.Detections | Mapping[str, Any] | tuple[Array, Array] | Array


class OfImage(NamedTuple):
    """A prediction, on the CPU, the best scores first: boxes (N, 4), masks, and labels (N,) if there are any."""

    boxes: Tensor
    profiles: Profiles
    labels: Tensor | None


def read_prediction(prediction: Any) -> OfImage:
    """What `fit_refiner` takes of an image; a ValueError for anything else."""
    if isinstance(prediction, (sv.Detections, Mapping)):
        boxes, masks, labels, scores, origins, image_size = read_output(prediction)
    elif isinstance(prediction, (tuple, list)) and len(prediction) in (2, 3):
        boxes, masks, labels, scores, origins, image_size = (*prediction, None, None, None, None)[:6]
    else:
        raise ValueError(
            f"expected a prediction as sv.Detections, a dict or (boxes, masks[, labels]), got {type(prediction)}"
        )
    corners = read_boxes(boxes).cpu()
    profiles = read_profiles(masks, len(corners), origins, image_size)
    if profiles.size is None and len(corners):
        raise ValueError("expected the image_size (H, W) of masks given as crops")
    read_labels, read_scores = _vector(labels, len(corners), "labels"), _vector(scores, len(corners), "scores")
    order = torch.arange(len(corners)) if read_scores is None else read_scores.argsort(descending=True, stable=True)
    columns, rows = profiles.axes
    sorted_profiles = profiles._replace(axes=(columns[order], rows[order]), first=profiles.first[order])
    return OfImage(corners[order], sorted_profiles, None if read_labels is None else read_labels[order])


def read_truth(truth: Any) -> tuple[Tensor, Tensor | None]:
    """True boxes (K, 4) on the CPU, and labels (K,) if there are any; a ValueError for anything else."""
    boxes: Any
    labels: Any
    if isinstance(truth, sv.Detections):
        boxes, labels = truth.xyxy, truth.class_id
    elif isinstance(truth, Mapping):
        if "boxes" not in truth:
            raise ValueError(f"expected a dict with boxes as truth, got {sorted(truth)}")
        boxes, labels = truth["boxes"], truth.get("labels")
    elif isinstance(truth, (tuple, list)) and len(truth) == 2:
        boxes, labels = truth
    elif isinstance(truth, (np.ndarray, Tensor)):
        boxes, labels = truth, None
    else:
        raise ValueError(f"expected truth as sv.Detections, a dict, (boxes, labels) or boxes, got {type(truth)}")
    corners = read_boxes(boxes).cpu()
    return corners, _vector(labels, len(corners), "labels")


def _vector(values: Any, count: int, name: str) -> Tensor | None:
    if values is None:
        return None
    vector = torch.as_tensor(values).cpu()
    if vector.shape != (count,):
        raise ValueError(f"expected {name} of shape ({count},), got {tuple(vector.shape)}")
    return vector
