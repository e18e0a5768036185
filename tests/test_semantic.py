"""The segmentation that only training has."""

from __future__ import annotations

import math

import torch

import make
from rdsnet.model.pixel_stream import SemanticBranch, class_maps
from rdsnet.structures import Targets


def truth(masks: torch.Tensor, labels: list[int]) -> Targets:
    boxes = torch.tensor([[0.0, 0, 4, 4]]).repeat(len(labels), 1)
    return make.targets(boxes, size=(8, 8), labels=torch.tensor(labels, dtype=torch.int64), masks=masks)


def blocks(*cells: tuple[int, int]) -> torch.Tensor:
    """Masks of 4 x 4 cells that fill one quarter each: (row, column) of it."""
    masks = torch.zeros(len(cells), 4, 4, dtype=torch.bool)
    for mask, (row, column) in zip(masks, cells, strict=True):
        mask[2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = True
    return masks


def test_objects_of_a_class_are_united() -> None:
    maps = class_maps(blocks((0, 0), (1, 1), (0, 1)), torch.tensor([2, 2, 0]), 4, (2, 2))
    assert maps.tolist() == [
        [[False, True], [False, False]],
        [[False, False], [False, False]],
        [[True, False], [False, True]],
        [[False, False], [False, False]],
    ]


def test_a_cell_belongs_to_an_object_that_fills_more_than_half_of_it() -> None:
    masks = torch.zeros(2, 4, 4, dtype=torch.bool)
    masks[0, 0, :2] = True  # half of the first quarter
    masks[1, :2, :2] = True
    masks[1, 0, 0] = False
    assert class_maps(masks, torch.tensor([0, 1]), 2, (2, 2))[:, 0, 0].tolist() == [False, True]


def test_the_loss_of_zeros_is_a_bit_a_class() -> None:
    branch = SemanticBranch(channels=8, num_classes=3)
    targets = [truth(blocks((0, 0)), [1]), truth(blocks(), [])]
    loss = branch.loss(torch.zeros(2, 3, 2, 2), targets)
    torch.testing.assert_close(loss, torch.tensor(3 * math.log(2)))


def test_the_right_answer_costs_nothing() -> None:
    branch = SemanticBranch(channels=8, num_classes=3)
    target = truth(blocks((0, 0), (1, 1)), [1, 2])
    wanted = class_maps(target.masks, target.labels, 3, (2, 2))[None]
    right = torch.where(wanted, 50.0, -50.0)
    assert branch.loss(right, [target]) < 1e-6
    # one of 12 values wrong by 50, over 4 cells
    right[0, 1, 0, 0] = -50
    torch.testing.assert_close(branch.loss(right, [target]), torch.tensor(50 / 4))


def test_a_level_gets_a_map_of_each_class() -> None:
    assert SemanticBranch(channels=8, num_classes=3)(torch.randn(2, 8, 5, 7)).shape == (2, 3, 5, 7)
