"""From candidates to what was found: non-maximum suppression within each class, by one of three rules."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torchvision.ops import nms

from rdsnet.device import to_device, to_host

Rule = Literal["greedy", "fast", "traditional"]

FAST_TOP_K = 200  # boxes of a class that YOLACT's fast NMS looks at
NO_PAIR = -1.0  # the score of an anchor and a class that are not a candidate


class Found(NamedTuple):
    """What the stream found in one image, on the CPU.

    (N, 4) boxes xyxy, (N,) scores descending, labels, flat anchor indices.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    anchors: Tensor

    def to(self, device: torch.device) -> Found:
        return Found(*(to_device(t, device) for t in self))


def suppress(boxes: Tensor, scores: Tensor, anchors: Tensor, rule: Rule, iou: float, limit: int) -> Found:
    """NMS within each class, then the best `limit` of what stays; of equal scores the first counts as the best.

    It begins with the best pairs and looks at more where too few of them stay. How many pairs there are is not asked
    before: each time round a GPU is waited for in NMS, which finds out how many stay, and to fetch these.

    Args:
        boxes: (K, 4) xyxy of the anchors that may have found something.
        scores: (K, C) in 0..1, or NO_PAIR.
        anchors: (K,) flat indices.
        rule: one of `NMS`.
        iou: the overlap that is allowed.
    """
    pairs, classes = scores.flatten(), scores.shape[1]
    count = (pairs != NO_PAIR).sum()
    looked = min(8 * limit, len(pairs))
    while True:
        index = pairs.topk(looked).indices.sort().values
        index = index[pairs[index].argsort(descending=True, stable=True)]
        row, label, score = index // classes, index % classes, pairs[index]
        # What is no pair comes last. All of it in one place and of a class of its own costs NMS least: one of it stays
        none = score == NO_PAIR
        places = boxes[row].masked_fill(none[:, None], 0)
        places[:, 2:] += none[:, None]
        keep = NMS[rule](places, label.masked_fill(none, -1), iou)[:limit]
        row = row[keep]
        *stayed, worst, total = to_host(boxes[row], score[keep], label[keep], anchors[row], score[-1:], count)
        # Pairs as good as the worst of those looked at may have been left out, and they might come first
        enough = len(keep) == limit and bool(stayed[1][-1] > worst)
        if enough or looked >= int(total):
            exists = stayed[1] != NO_PAIR
            return Found(*(t[exists] for t in stayed))
        looked = min(4 * looked, int(total))


def greedy_nms(boxes: Tensor, labels: Tensor, iou: float) -> Tensor:
    """A box goes when it overlaps a kept, better one of its class by more than `iou`."""
    if len(boxes) == 0:
        return torch.zeros_like(labels)
    # Each class has a place of its own. float64, as float32 would have 0.01 pixel left there; and nothing below 0, or
    # boxes that were not clipped would reach into the class before. torchvision's batched_nms would wait for a GPU
    boxes = boxes.double()
    boxes = boxes - boxes.amin().clamp(max=0)
    boxes = boxes + (labels * (boxes.amax() + 1))[:, None]
    return nms(boxes, -torch.arange(len(boxes), dtype=boxes.dtype, device=boxes.device), iou)


def traditional_nms(boxes: Tensor, labels: Tensor, iou: float) -> Tensor:
    """Greedy NMS as YOLACT has it: x2 and y2 are the last pixels, and an overlap of exactly `iou` is enough."""
    last = torch.cat([boxes[:, :2], boxes[:, 2:] + 1], dim=1)
    below = torch.nextafter(torch.tensor(iou), torch.tensor(0.0)).item()  # in float32, as the GPU's NMS takes it
    return greedy_nms(last, labels, below)


def fast_nms(boxes: Tensor, labels: Tensor, iou: float, *, top_k: int = FAST_TOP_K) -> Tensor:
    """YOLACT's fast NMS: a box goes when it overlaps any better one of its class by more than `iou`.

    The better one counts even when it goes itself, which makes one matrix a class enough. Only the `top_k` best of a
    class are looked at, the others go. Two boxes without area have no IoU (0 / 0): the worse one goes.
    """
    return _unbeaten(boxes, labels, iou, top_k).nonzero()[:, 0]


def _unbeaten(boxes: Tensor, labels: Tensor, iou: float, top_k: int) -> Tensor:
    """Which of (K, 4) boxes, best first, overlap none of the better ones of their class: (K,) bool."""
    stays = torch.zeros_like(labels, dtype=torch.bool)
    if len(boxes) == 0:
        return stays
    (labels,) = to_host(labels)  # sizes depend on them
    order = labels.argsort(stable=True)  # by class, best first within each
    _, row, counts = labels[order].unique_consecutive(return_inverse=True, return_counts=True)
    rank = torch.arange(len(order)) - (counts.cumsum(0) - counts)[row]
    seen = rank < top_k
    size = (len(counts), int(rank[seen].max()) + 1, 4)
    order, row, rank = to_device(torch.stack([order[seen], row[seen], rank[seen]]), boxes.device)
    table = boxes.new_zeros(size)  # each class's boxes, best first, then zeros
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
    """Which boxes stay. Whether one does depends on better ones only.

    Args:
        boxes: (K, 4) xyxy, best first.
        labels: (K,) int64.
        iou: the overlap that is allowed.

    Returns:
        int64 indices, ascending.
    """

    def __call__(self, boxes: Tensor, labels: Tensor, iou: float) -> Tensor: ...


NMS: dict[Rule, Suppress] = {"greedy": greedy_nms, "fast": fast_nms, "traditional": traditional_nms}
