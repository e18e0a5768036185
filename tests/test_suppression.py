"""Non-maximum suppression: the three rules against plain loops, and where they differ."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from rdsnet.model.object_stream.suppression import (
    NMS,
    NO_PAIR,
    Rule,
    Suppress,
    fast_nms,
    greedy_nms,
    suppress,
    traditional_nms,
)


def scene(count: int = 120, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes that overlap much, some of them far outside the image; scores and labels."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 2, generator=generator) * 50 - 30
    boxes = torch.cat([low, low + 10 + 50 * torch.rand(count, 2, generator=generator)], dim=1)
    scores = torch.rand(count, generator=generator)
    return boxes, scores, torch.randint(classes, (count,), generator=generator)


def kept(rule: Suppress, boxes: Tensor, scores: Tensor, labels: Tensor, iou: float = 0.5, **options: int) -> list[int]:
    """Indices of the boxes that stay, by descending score."""
    order = scores.argsort(descending=True)
    return order[rule(boxes[order], labels[order], iou, **options)].tolist()


def plain(boxes: Tensor, scores: Tensor, labels: Tensor, drops: Callable[[int, int, set[int]], bool]) -> list[int]:
    """One by one, the best first: kept unless a better one of its class drops it."""
    stay: set[int] = set()
    order = scores.argsort(descending=True).tolist()
    for n, i in enumerate(order):
        if not any(labels[j] == labels[i] and drops(j, i, stay) for j in order[:n]):
            stay.add(i)
    return [i for i in order if i in stay]


@pytest.mark.parametrize("seed", range(3))
def test_greedy_is_the_plain_loop_within_each_class(seed: int) -> None:
    boxes, scores, labels = scene(seed=seed)
    iou = box_iou(boxes, boxes)
    expected = plain(boxes, scores, labels, lambda j, i, stay: j in stay and bool(iou[j, i] > 0.5))
    assert kept(greedy_nms, boxes, scores, labels) == expected


@pytest.mark.parametrize("seed", range(3))
def test_fast_is_the_plain_loop_where_dropped_boxes_still_drop(seed: int) -> None:
    boxes, scores, labels = scene(seed=seed)
    iou = box_iou(boxes, boxes)
    expected = plain(boxes, scores, labels, lambda j, i, stay: bool(iou[j, i] > 0.5))
    assert kept(fast_nms, boxes, scores, labels) == expected
    assert len(expected) < len(kept(greedy_nms, boxes, scores, labels))


@pytest.mark.parametrize("seed", range(3))
def test_traditional_counts_the_last_pixel(seed: int) -> None:
    boxes, scores, labels = scene(seed=seed)
    larger = boxes + torch.tensor([0, 0, 1, 1])
    iou = box_iou(larger, larger)
    expected = plain(boxes, scores, labels, lambda j, i, stay: j in stay and bool(iou[j, i] >= 0.5))
    assert kept(traditional_nms, boxes, scores, labels) == expected


def test_a_chain_of_three_tells_greedy_from_fast() -> None:
    # the second overlaps the first and the third by 2/3, which overlap by 3/7 only
    boxes = torch.tensor([[0.0, 0, 10, 10], [2, 0, 12, 10], [4, 0, 14, 10]])
    scores, labels = torch.tensor([0.9, 0.8, 0.7]), torch.zeros(3, dtype=torch.int64)
    assert kept(greedy_nms, boxes, scores, labels) == [0, 2]
    assert kept(fast_nms, boxes, scores, labels) == [0]


def test_an_overlap_of_exactly_the_limit_is_enough_for_traditional_only() -> None:
    # 10 x 10 and 10 x 5 pixels when the last one counts: IoU 0.5
    boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 4]])
    scores, labels = torch.tensor([0.9, 0.8]), torch.zeros(2, dtype=torch.int64)
    assert kept(traditional_nms, boxes, scores, labels) == [0]
    whole = boxes + torch.tensor([0, 0, 1, 1])
    assert kept(greedy_nms, whole, scores, labels) == kept(fast_nms, whole, scores, labels) == [0, 1]


def test_boxes_outside_the_image_do_not_touch_another_class() -> None:
    # moved by its class alone, the second would lie over the first
    boxes = torch.tensor([[50.0, 50, 100, 100], [-51, -51, -1, -1]])
    for rule in NMS.values():
        assert kept(rule, boxes, torch.tensor([0.9, 0.8]), torch.tensor([0, 1])) == [0, 1]


def test_fast_looks_at_the_best_of_each_class_only() -> None:
    boxes = torch.arange(6)[:, None] * 20 + torch.tensor([0.0, 0, 10, 10])  # nothing overlaps
    scores, labels = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4]), torch.tensor([0, 0, 0, 1, 1, 1])
    assert kept(fast_nms, boxes, scores, labels, top_k=2) == [0, 1, 3, 4]


def test_of_boxes_without_area_fast_keeps_the_best() -> None:
    boxes = torch.tensor([[5.0, 5, 5, 5], [5, 5, 5, 5], [9, 9, 9, 9], [0, 0, 20, 20]])
    labels = torch.zeros(4, dtype=torch.int64)
    assert kept(fast_nms, boxes, torch.tensor([0.7, 0.8, 0.9, 0.6]), labels) == [2, 3]


def pairs(count: int = 400, classes: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, scores of which a third are no pairs, and anchors."""
    boxes = scene(count)[0]
    scores = torch.rand(count, classes, generator=torch.Generator().manual_seed(1))
    return boxes, scores.masked_fill(scores < 0.33, NO_PAIR), torch.arange(count) * 10


@pytest.mark.parametrize("rule", list(NMS))
@pytest.mark.parametrize("limit", [1, 3, 10, 1000])  # the best 8 * limit may hold too few that stay
def test_a_limit_gives_the_beginning_of_the_same_list(rule: Rule, limit: int) -> None:
    boxes, scores, anchors = pairs()
    row, label = (scores != NO_PAIR).nonzero().unbind(1)
    expected = kept(NMS[rule], boxes[row], scores[row, label], label)[:limit]
    found = suppress(boxes, scores, anchors, rule, 0.5, limit)
    assert found.anchors.tolist() == (row[expected] * 10).tolist()
    assert torch.equal(found.boxes, boxes[row[expected]])
    assert torch.equal(found.scores, scores[row, label][expected])
    assert torch.equal(found.labels, label[expected])


@pytest.mark.parametrize("rule", list(NMS))
def test_it_looks_on_until_enough_boxes_stayed(rule: Rule) -> None:
    # a hundred times one place, and then others: the third that stays has rank 102
    boxes = torch.cat([torch.tensor([[0.0, 0, 10, 10]]).repeat(100, 1), scene(count=50)[0] + 200])
    scores = torch.linspace(1, 0.1, 150)[:, None]
    found = suppress(boxes, scores, torch.arange(150), rule, 0.5, 3)
    assert found.anchors[:2].tolist() == [0, 100]
    assert len(found.anchors) == 3


@pytest.mark.parametrize("limit", [1, 4, 100])
def test_of_equal_scores_the_first_stay(limit: int) -> None:
    boxes = 20 * torch.arange(64)[:, None] + torch.tensor([0.0, 0, 10, 10])  # nothing overlaps
    found = suppress(boxes, torch.full((64, 1), 0.5), torch.arange(64), "greedy", 0.5, limit)
    assert found.anchors.tolist() == list(range(64))[:limit]


@pytest.mark.parametrize("rule", list(NMS))
def test_ties_do_not_change_the_beginning_of_the_list(rule: Rule) -> None:
    boxes, scores, anchors = pairs()
    scores = torch.where(scores == NO_PAIR, scores, (4 * scores).ceil() / 4)
    everything = suppress(boxes, scores, anchors, rule, 0.5, 10_000)
    for limit in (1, 7, 30):
        found = suppress(boxes, scores, anchors, rule, 0.5, limit)
        assert torch.equal(found.anchors, everything.anchors[:limit])
        assert torch.equal(found.labels, everything.labels[:limit])


@pytest.mark.parametrize("rule", list(NMS))
@pytest.mark.parametrize("count", [0, 5])
def test_without_a_pair_nothing_is_found(rule: Rule, count: int) -> None:
    boxes = torch.rand(count, 4)
    found = suppress(boxes, torch.full((count, 3), NO_PAIR), torch.arange(count), rule, 0.5, 100)
    assert found.boxes.shape == (0, 4)
    assert found.labels.dtype == found.anchors.dtype == torch.int64


@pytest.mark.parametrize("rule", list(NMS))
def test_nothing_gives_nothing(rule: Rule) -> None:
    stay = NMS[rule](torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 0.5)
    assert stay.dtype == torch.int64
    assert stay.shape == (0,)
