"""Targets and Objects are checked when they are built."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rdsnet.structures import Objects, Targets


def targets(n: int = 2) -> Targets:
    return Targets(
        boxes=torch.tensor([[1.0, 2, 3, 4]]).repeat(n, 1),
        labels=torch.zeros(n, dtype=torch.int64),
        masks=torch.zeros(n, 8, 8, dtype=torch.bool),
        has_mask=torch.ones(n, dtype=torch.bool),
        areas=torch.ones(n),
        image_size=(32, 32),
    )


def objects() -> Objects:
    """Three objects with masks of 1 x 2, 3 x 4 and 0 x 0 pixels."""
    boxes = torch.arange(12.0).view(3, 4)
    return Objects(
        boxes=boxes,
        regressed_boxes=boxes + 1,
        direct_boxes=boxes + 2,
        scores=torch.tensor([0.9, 0.8, 0.7]),
        labels=torch.tensor([2, 0, 1]),
        edge_std=boxes + 3,
        interval=torch.stack([boxes + 4, boxes + 5], dim=2),
        masks=[torch.ones(h, w, dtype=torch.bool) for h, w in ((1, 2), (3, 4), (0, 0))],
        windows=torch.tensor([[0, 0, 2, 1], [5, 5, 9, 8], [0, 0, 0, 0]]),
        anchors=torch.tensor([7, 8, 9]),
        image_size=(10, 20),
        profiles=(torch.arange(60.0).view(3, 20), torch.arange(30.0).view(3, 10)),
    )


def test_an_image_without_objects_is_fine() -> None:
    assert len(replace(targets(1), **{k: getattr(targets(), k)[:0] for k in _FIELDS})) == 0


_FIELDS = ("boxes", "labels", "masks", "has_mask", "areas")


@pytest.mark.parametrize("name", ["boxes", "masks", "has_mask", "areas"])
def test_ground_truth_of_another_length_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"expected {name} of shape \(2,.*got \(1,"):
        replace(targets(), **{name: getattr(targets(), name)[:1]})


def test_a_flat_box_is_named() -> None:
    boxes = torch.tensor([[1.0, 2, 3, 4], [5, 5, 5, 9]])
    with pytest.raises(ValueError, match=r"box 1 has no width or height: \[5.0, 5.0, 5.0, 9.0\]"):
        replace(targets(), boxes=boxes)


def test_a_mask_that_does_not_fill_its_window_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a mask of shape \(3, 4\), got \(4, 3\)"):
        replace(objects(), masks=[m.t() if i == 1 else m for i, m in enumerate(objects().masks)])


@pytest.mark.parametrize("name", ["boxes", "regressed_boxes", "direct_boxes", "edge_std", "windows"])
def test_objects_of_another_length_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"expected {name} of shape \(3, 4\), got \(2, 4\)"):
        replace(objects(), **{name: getattr(objects(), name)[:2]})


def test_intervals_have_two_ends() -> None:
    with pytest.raises(ValueError, match=r"expected interval of shape \(3, 4, 2\), got \(3, 4\)"):
        replace(objects(), interval=objects().edge_std)


def test_masks_of_some_objects_only_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 3 masks or none, got 2"):
        replace(objects(), masks=objects().masks[:2])


def test_selecting_keeps_what_belongs_together() -> None:
    whole, chosen = objects(), objects().select(torch.tensor([2, 0]))
    assert len(chosen) == 2
    for name in (
        "boxes",
        "regressed_boxes",
        "direct_boxes",
        "scores",
        "labels",
        "edge_std",
        "interval",
        "windows",
        "anchors",
    ):
        assert torch.equal(getattr(chosen, name), getattr(whole, name)[[2, 0]]), name
    assert [m.shape for m in chosen.masks] == [(0, 0), (1, 2)]
    assert whole.profiles is not None
    assert chosen.profiles is not None
    assert torch.equal(chosen.profiles[0], whole.profiles[0][[2, 0]])
    assert torch.equal(chosen.profiles[1], whole.profiles[1][[2, 0]])


def test_selecting_nothing_leaves_nothing() -> None:
    assert len(objects().select(torch.zeros(0, dtype=torch.int64))) == 0


def test_moving_keeps_everything() -> None:
    assert torch.equal(targets().to("cpu").boxes, targets().boxes)
    moved = objects().to("cpu")
    assert moved.profiles is not None
    assert torch.equal(moved.windows, objects().windows)
