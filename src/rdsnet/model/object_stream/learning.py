"""What the losses of several streams share: which anchor learns what, and the focal loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

BACKGROUND, IGNORED = -1, -2  # what an anchor learns that learns no object


def focal_loss(
    logits: Tensor, learns: Tensor, positives: tuple[Tensor, Tensor, Tensor], alpha: float, gamma: float
) -> Tensor:
    """Sum of the sigmoid focal loss (RetinaNet, Eq. 5) over the anchors that learn.

    Every entry is taken as negative first, then the few positive ones are exchanged: no one-hot target of the
    logits' size is made.

    Args:
        logits: (B, R, C).
        learns: (B, R) bool.
        positives: image, anchor and class of each positive entry, (M,) each.
    """
    logits = logits.float()
    negative = ((1 - alpha) * logits.sigmoid() ** gamma * F.softplus(logits)).sum(dim=2)
    chosen = logits[positives]
    right = alpha * (-chosen).sigmoid() ** gamma * F.softplus(-chosen)
    wrong = (1 - alpha) * chosen.sigmoid() ** gamma * F.softplus(chosen)
    return (negative * learns).sum() + (right - wrong).sum()


def flatten_levels(maps: Sequence[Tensor], numbers: int) -> Tensor:
    """Levels of (B, A * numbers, h, w) -> (B, R, numbers) float32, R over level, row, column, anchor."""
    return torch.cat([m.float().unflatten(1, (-1, numbers)).permute(0, 3, 4, 1, 2).flatten(1, 3) for m in maps], dim=1)


def overlaps(
    boxes: Tensor,
    bases: Sequence[Tensor],
    map_sizes: Sequence[tuple[int, int]],
    steps: Sequence[tuple[float, float]],
) -> Tensor:
    """(N, R) IoU of objects (N, 4) with the anchors of all levels, from those (A, 4) of each level's first location.

    Args:
        steps: (y, x) pixels between the locations of each level.
    """
    counts = [h * w * len(base) for base, (h, w) in zip(bases, map_sizes, strict=True)]
    iou = boxes.new_empty(len(boxes), sum(counts))
    for base, (h, w), step, out in zip(bases, map_sizes, steps, iou.split(counts, dim=1), strict=True):
        grid_iou(boxes, base, step, out.view(-1, h, w, len(base)))
    return iou


def grid_iou(boxes: Tensor, base: Tensor, step: tuple[float, float], out: Tensor) -> None:
    """IoU of objects with all anchors of a level.

    Anchors on a grid overlap a box by a width that depends on the column alone, times a height that depends on the
    row: the large tensor is touched three times, where comparing boxes one by one takes a dozen passes.

    Args:
        boxes: (N, 4) xyxy.
        base: (A, 4) anchors of the first location.
        step: (y, x) pixels between locations.
        out: (N, h, w, A), written.
    """
    overlaps = []
    for axis, cells, pixels in ((1, out.shape[1], step[0]), (0, out.shape[2], step[1])):
        shift = torch.arange(cells, device=base.device)[:, None] * pixels
        low = torch.maximum(base[:, axis] + shift, boxes[:, axis, None, None])
        high = torch.minimum(base[:, axis + 2] + shift, boxes[:, axis + 2, None, None])
        overlaps.append((high - low).clamp(min=0))
    torch.mul(overlaps[0][:, :, None], overlaps[1][:, None], out=out)
    areas = (base[:, 2:] - base[:, :2]).prod(dim=1) + (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)[:, None]
    out.div_(areas[:, None, None] - out)  # areas (N, 1, 1, A): the union is the sum of both areas less the overlap


def best_objects(iou: Tensor, positive_iou: float, negative_iou: float) -> Tensor:
    """(R,) the object that each anchor overlaps most, BACKGROUND or IGNORED, from the (N, R) IoU, N at least 1.

    Args:
        positive_iou: anchors from this on learn the object.
        negative_iou: anchors below this learn the background; those between learn nothing.
    """
    best, assigned = iou.max(dim=0)
    assigned.masked_fill_(best < positive_iou, IGNORED)
    return assigned.masked_fill_(best < negative_iou, BACKGROUND)
