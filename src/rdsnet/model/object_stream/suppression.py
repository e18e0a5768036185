"""Non-maximum suppression within each class: the rules that a stream can end with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor
from torchvision.ops import batched_nms

Rule = Literal["greedy", "fast", "traditional"]

FAST_TOP_K = 200  # boxes of a class that YOLACT's fast NMS looks at


def greedy_nms(boxes: Tensor, scores: Tensor, labels: Tensor, iou: float, limit: int | None = None) -> Tensor:
    """A box goes when it overlaps a kept, better one of its class by more than `iou`."""
    # batched_nms moves each class to a place of its own, `largest coordinate + 1` apart. float64, as float32 would
    # have 0.01 pixel left there; and nothing below 0, or boxes that were not clipped would reach into the class before
    boxes, scores = boxes.double(), scores.double()
    if len(boxes):
        boxes = boxes - boxes.amin().clamp(max=0)

    def stays(best: Tensor) -> Tensor:
        return batched_nms(boxes[best], scores[best], labels[best], iou).sort().values

    return _best_first(scores, limit, stays)


def traditional_nms(boxes: Tensor, scores: Tensor, labels: Tensor, iou: float, limit: int | None = None) -> Tensor:
    """Greedy NMS as YOLACT has it: x2 and y2 are the last pixels, and an overlap of exactly `iou` is enough."""
    return greedy_nms(boxes + boxes.new_tensor([0, 0, 1, 1]), scores, labels, math.nextafter(iou, 0), limit)


def fast_nms(
    boxes: Tensor, scores: Tensor, labels: Tensor, iou: float, limit: int | None = None, *, top_k: int = FAST_TOP_K
) -> Tensor:
    """YOLACT's fast NMS: a box goes when it overlaps any better one of its class by more than `iou`.

    The better one counts even when it goes itself, which makes one matrix a class enough. Only the `top_k` best of a
    class are looked at, the others go. Two boxes without area have no IoU (0 / 0): the worse one goes.
    """
    return _best_first(scores, limit, lambda best: _unbeaten(boxes[best], labels[best], iou, top_k))


def _best_first(scores: Tensor, limit: int | None, stays: Callable[[Tensor], Tensor]) -> Tensor:
    """The `limit` best boxes that stay.

    Whether a box stays depends on better ones only: begin with the best, and stop when enough of them stayed.

    Args:
        stays: which of the best boxes (K,), by descending score, stay: bool, or indices that ascend.
    """
    order = scores.argsort(descending=True, stable=True)
    looked = len(order) if limit is None else 8 * limit
    while True:
        best = order[:looked]
        kept = best[stays(best)]
        if looked >= len(order) or (limit is not None and len(kept) >= limit):
            return kept[:limit]
        looked *= 4


def _unbeaten(boxes: Tensor, labels: Tensor, iou: float, top_k: int) -> Tensor:
    """Which of (K, 4) boxes, best first, overlap none of the better ones of their class: (K,) bool."""
    stays = torch.zeros_like(labels, dtype=torch.bool)
    if len(boxes) == 0:
        return stays
    order = labels.argsort(stable=True)  # by class, best first within each
    _, row, counts = labels[order].unique_consecutive(return_inverse=True, return_counts=True)
    rank = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[row]
    seen = rank < top_k
    order, row, rank = order[seen], row[seen], rank[seen]
    table = boxes.new_zeros(len(counts), int(rank.max()) + 1, 4)  # each class's boxes, best first, then zeros
    table[row, rank] = boxes[order]
    overlap = _pairwise_iou(table).triu(diagonal=1)  # (classes, better, worse); the zeros are worse than all
    stays[order] = overlap.amax(dim=1)[row, rank] <= iou  # amax hands NaN on, and NaN is not <= iou
    return stays


def _pairwise_iou(boxes: Tensor) -> Tensor:
    """(G, K, 4) -> (G, K, K), each group's boxes against each other; 0/0 is NaN."""
    overlap: Tensor | None = None
    for axis in (0, 1):
        low = torch.maximum(boxes[:, :, None, axis], boxes[:, None, :, axis])
        high = torch.minimum(boxes[:, :, None, axis + 2], boxes[:, None, :, axis + 2])
        side = (high - low).clamp_(min=0)
        overlap = side if overlap is None else overlap.mul_(side)
    assert overlap is not None
    areas = (boxes[:, :, 2:] - boxes[:, :, :2]).prod(dim=2)
    return overlap / (areas[:, :, None] + areas[:, None, :] - overlap)


class Suppress(Protocol):
    """(boxes (K, 4) xyxy, scores (K,), labels (K,) int64, iou, limit) -> int64 indices of the boxes that stay.

    They come by descending score, the best `limit` of them, or all.
    """

    def __call__(
        self, boxes: Tensor, scores: Tensor, labels: Tensor, iou: float, limit: int | None = None
    ) -> Tensor: ...


NMS: dict[Rule, Suppress] = {"greedy": greedy_nms, "fast": fast_nms, "traditional": traditional_nms}
