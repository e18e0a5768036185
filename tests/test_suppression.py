"""Non-maximum suppression: the three rules against plain loops, and where they differ."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from rdsnet.model.object_stream.suppression import NMS, Rule, fast_nms, greedy_nms, traditional_nms


def scene(count: int = 120, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes that overlap much, some of them far outside the image; scores and labels."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 2, generator=generator) * 50 - 30
    boxes = torch.cat([low, low + 10 + 50 * torch.rand(count, 2, generator=generator)], dim=1)
    scores = torch.rand(count, generator=generator)
    return boxes, scores, torch.randint(classes, (count,), generator=generator)


def plain(boxes: Tensor, scores: Tensor, labels: Tensor, drops: Callable[[int, int, set[int]], bool]) -> list[int]:
    """One by one, the best first: kept unless a better one of its class drops it."""
    kept: set[int] = set()
    order = scores.argsort(descending=True).tolist()
    for n, i in enumerate(order):
        if not any(labels[j] == labels[i] and drops(j, i, kept) for j in order[:n]):
            kept.add(i)
    return [i for i in order if i in kept]


@pytest.mark.parametrize("seed", range(3))
def test_greedy_is_the_plain_loop_within_each_class(seed: int) -> None:
    boxes, scores, labels = scene(seed=seed)
    iou = box_iou(boxes, boxes)
    expected = plain(boxes, scores, labels, lambda j, i, kept: j in kept and bool(iou[j, i] > 0.5))
    assert greedy_nms(boxes, scores, labels, 0.5).tolist() == expected


@pytest.mark.parametrize("seed", range(3))
def test_fast_is_the_plain_loop_where_dropped_boxes_still_drop(seed: int) -> None:
    boxes, scores, labels = scene(seed=seed)
    iou = box_iou(boxes, boxes)
    expected = plain(boxes, scores, labels, lambda j, i, kept: bool(iou[j, i] > 0.5))
    assert fast_nms(boxes, scores, labels, 0.5).tolist() == expected
    assert len(expected) < len(greedy_nms(boxes, scores, labels, 0.5))


@pytest.mark.parametrize("seed", range(3))
def test_traditional_counts_the_last_pixel(seed: int) -> None:
    boxes, scores, labels = scene(seed=seed)
    larger = boxes + torch.tensor([0, 0, 1, 1])
    iou = box_iou(larger, larger)
    expected = plain(boxes, scores, labels, lambda j, i, kept: j in kept and bool(iou[j, i] >= 0.5))
    assert traditional_nms(boxes, scores, labels, 0.5).tolist() == expected


def test_a_chain_of_three_tells_greedy_from_fast() -> None:
    # the second overlaps the first and the third by 2/3, which overlap by 3/7 only
    boxes = torch.tensor([[0.0, 0, 10, 10], [2, 0, 12, 10], [4, 0, 14, 10]])
    scores, labels = torch.tensor([0.9, 0.8, 0.7]), torch.zeros(3, dtype=torch.int64)
    assert greedy_nms(boxes, scores, labels, 0.5).tolist() == [0, 2]
    assert fast_nms(boxes, scores, labels, 0.5).tolist() == [0]


def test_an_overlap_of_exactly_the_limit_is_enough_for_traditional_only() -> None:
    # 10 x 10 and 10 x 5 pixels when the last one counts: IoU 0.5
    boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 4]])
    scores, labels = torch.tensor([0.9, 0.8]), torch.zeros(2, dtype=torch.int64)
    assert traditional_nms(boxes, scores, labels, 0.5).tolist() == [0]
    whole = boxes + torch.tensor([0, 0, 1, 1])
    assert greedy_nms(whole, scores, labels, 0.5).tolist() == fast_nms(whole, scores, labels, 0.5).tolist() == [0, 1]


def test_boxes_outside_the_image_do_not_touch_another_class() -> None:
    # moved by its class alone, the second would lie over the first
    boxes = torch.tensor([[50.0, 50, 100, 100], [-51, -51, -1, -1]])
    for rule in NMS.values():
        assert rule(boxes, torch.tensor([0.9, 0.8]), torch.tensor([0, 1]), 0.5).tolist() == [0, 1]


def test_fast_looks_at_the_best_of_each_class_only() -> None:
    boxes = torch.arange(6)[:, None] * 20 + torch.tensor([0.0, 0, 10, 10])  # nothing overlaps
    scores, labels = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4]), torch.tensor([0, 0, 0, 1, 1, 1])
    assert fast_nms(boxes, scores, labels, 0.5, top_k=2).tolist() == [0, 1, 3, 4]


def test_of_boxes_without_area_fast_keeps_the_best() -> None:
    boxes = torch.tensor([[5.0, 5, 5, 5], [5, 5, 5, 5], [9, 9, 9, 9], [0, 0, 20, 20]])
    labels = torch.zeros(4, dtype=torch.int64)
    assert fast_nms(boxes, torch.tensor([0.7, 0.8, 0.9, 0.6]), labels, 0.5).tolist() == [2, 3]


@pytest.mark.parametrize("rule", list(NMS))
@pytest.mark.parametrize("limit", [1, 3, 10, 1000])  # the best 8 * limit may hold too few that stay
def test_a_limit_gives_the_beginning_of_the_same_list(rule: Rule, limit: int) -> None:
    boxes, scores, labels = scene(count=400)
    everything = NMS[rule](boxes, scores, labels, 0.5)
    assert NMS[rule](boxes, scores, labels, 0.5, limit).tolist() == everything[:limit].tolist()


def test_fast_looks_on_until_enough_boxes_stayed() -> None:
    # a hundred times one place, and then others: the third that stays has rank 102
    boxes = torch.cat([torch.tensor([[0.0, 0, 10, 10]]).repeat(100, 1), scene(count=50)[0] + 200])
    scores = torch.linspace(1, 0, 150)
    kept = fast_nms(boxes, scores, torch.zeros(150, dtype=torch.int64), 0.5, 3)
    assert kept[:2].tolist() == [0, 100]
    assert len(kept) == 3


@pytest.mark.parametrize("rule", list(NMS))
def test_nothing_gives_nothing(rule: Rule) -> None:
    kept = NMS[rule](torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), 0.5, 100)
    assert kept.dtype == torch.int64
    assert kept.shape == (0,)
