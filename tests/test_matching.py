"""Which object of the truth a detection finds: one rule for the fit, for pictures of errors and for figure 3."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rdsnet.results.matching import match, match_boxes


def match_of_one_class(boxes: Tensor, true: Tensor) -> list[tuple[int, int]]:
    zeros = torch.zeros(len(boxes), dtype=torch.int64), torch.zeros(len(true), dtype=torch.int64)
    found, known = match_boxes(boxes, zeros[0], true, zeros[1])
    return list(zip(found.tolist(), known.tolist(), strict=True))


def test_each_object_is_found_once_by_the_best_score() -> None:
    true = torch.tensor([[0.0, 0, 20, 20], [40, 40, 60, 60]])
    boxes = torch.tensor([[1.0, 0, 20, 20], [0, 0, 20, 20], [41, 40, 60, 60], [70, 60, 90, 70]])
    assert match_of_one_class(boxes, true) == [(0, 0), (2, 1)]


def test_another_class_is_no_match_and_half_an_overlap_is() -> None:
    true, boxes = torch.tensor([[0.0, 0, 20, 20]]), torch.tensor([[0.0, 0, 20, 10], [0, 0, 20, 9]])
    labels = torch.zeros(2, dtype=torch.int64)
    assert match_boxes(boxes, labels, true, torch.tensor([1]))[0].tolist() == []
    assert match_boxes(boxes, labels, true, torch.tensor([0]))[0].tolist() == [0]
    assert match_of_one_class(boxes[1:], true) == []


def test_a_detection_finds_one_object_and_an_object_of_another_class_none() -> None:
    true = torch.tensor([[0.0, 0, 10, 10], [20.0, 0, 30, 10], [40.0, 0, 50, 10]])
    boxes = torch.tensor([[0.0, 0, 10, 9], [0.0, 0, 10, 10], [20.0, 0, 30, 10], [20.0, 0, 30, 8]])
    labels = torch.tensor([0, 0, 1, 0])  # the third is of another class
    found, known = match_boxes(boxes, labels, true, torch.zeros(3, dtype=torch.int64))
    assert list(zip(found.tolist(), known.tolist(), strict=True)) == [(0, 0), (3, 1)]


def test_nothing_finds_nothing() -> None:
    nothing, one = torch.zeros(0, 4), torch.tensor([[0.0, 0, 10, 10]])
    for boxes, true in ((nothing, one), (one, nothing), (nothing, nothing)):
        assert match_of_one_class(boxes, true) == []


def test_a_crowd_is_not_found_and_what_lies_in_it_is_not_false() -> None:
    iou = np.array([[0.9, 0.0], [0.6, 0.3], [0.0, 0.4]])
    matches = match(iou, np.zeros(3, int), np.zeros(2, int), crowd=np.array([True, False]))
    assert (matches.pairs, matches.missed, matches.false) == ([], [1], [2])
