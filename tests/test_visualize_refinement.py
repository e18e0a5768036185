"""The page that explains MBRM for one object."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from rdsnet.model.mbrm import MBRM
from rdsnet.structures import Objects
from rdsnet.visualize.refinement import edge_evidence, explain_refinement, pixel_borders, shown_window

SIZE = (80, 100)
BLUE, ORANGE, YELLOW = (0, 114, 178), (213, 94, 0), (240, 228, 66)


def make_objects(mbrm: MBRM, regressed: tuple[float, ...] = (28.0, 18.0, 62.0, 52.0)) -> Objects:
    """A square mask, columns 30..60 and rows 20..50, and what MBRM makes of a box that is 2 pixels off."""
    columns, rows = torch.zeros(1, 100), torch.zeros(1, 80)
    columns[:, 30:60], rows[:, 20:50] = 1, 1
    boxes = torch.tensor([regressed])
    refined = mbrm(columns, rows, boxes)
    return Objects(
        boxes=refined.boxes,
        regressed_boxes=boxes,
        direct_boxes=boxes,
        scores=torch.tensor([0.9]),
        labels=torch.zeros(1, dtype=torch.int64),
        edge_std=refined.edge_std,
        interval=refined.interval,
        masks=[torch.ones(30, 30, dtype=torch.bool)],
        windows=torch.tensor([[30, 20, 60, 50]]),
        anchors=torch.zeros(1, dtype=torch.int64),
        image_size=SIZE,
        profiles=(columns, rows),
    )


def image() -> np.ndarray:
    return np.random.default_rng(0).integers(100, 120, (*SIZE, 3), dtype=np.uint8)


def amount(page: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((np.abs(page.astype(int) - colour).max(axis=2) <= 3).sum())


def test_the_page_shows_both_kinds_of_edges_and_the_mask():
    mbrm = MBRM()
    page = explain_refinement(image(), make_objects(mbrm), 0, mbrm)
    assert page.dtype == np.uint8 and page.ndim == 3 and page.shape[2] == 3
    assert 900 < page.shape[0] < 1500 and 900 < page.shape[1] < 1500
    for colour in (BLUE, ORANGE, YELLOW):
        assert amount(page, colour) > 500


def test_curves_are_what_mbrm_computes_with():
    mbrm = MBRM()
    objects = make_objects(mbrm)
    assert objects.profiles is not None
    for axis, profile in enumerate(objects.profiles):
        evidence = edge_evidence(mbrm, objects.regressed_boxes, profile, axis)
        assert evidence.sigma == pytest.approx(0.05 * 34)
        np.testing.assert_allclose(evidence.prior.sum(axis=1), 1, rtol=1e-5)
        joint = evidence.prior * np.exp(evidence.likelihood)
        np.testing.assert_allclose(evidence.posterior, joint / joint.sum(axis=1, keepdims=True), atol=1e-5)
        # the refined edges are where the posteriors peak, in the pixels in which they are drawn
        peaks = evidence.positions[[0, 1], evidence.posterior.argmax(axis=1)]
        assert peaks.tolist() == objects.boxes[0, axis::2].tolist()


def test_the_window_holds_both_boxes_and_is_not_much_longer_than_wide():
    mbrm = MBRM()
    objects = make_objects(mbrm, regressed=(10.0, 20.0, 90.0, 24.0))
    evidence = [
        edge_evidence(mbrm, objects.regressed_boxes, profile, axis) for axis, profile in enumerate(objects.profiles)
    ]
    x0, y0, x1, y1 = shown_window(objects, evidence)
    assert x0 <= 10 - 3 * 4 and x1 >= 90 + 3 * 4
    assert 0.6 * (x1 - x0) <= y1 - y0 <= x1 - x0
    assert explain_refinement(image(), objects, 0, mbrm).shape[2] == 3


def test_the_outline_of_a_mask_runs_between_pixels():
    lines = (np.array([5, 7]) + pixel_borders(np.array([[True, True]]))).tolist()
    assert {frozenset(map(tuple, line)) for line in lines} == {
        frozenset(line)
        for line in (
            ((5, 7), (6, 7)),
            ((6, 7), (7, 7)),
            ((5, 8), (6, 8)),
            ((6, 8), (7, 8)),
            ((5, 7), (5, 8)),
            ((7, 7), (7, 8)),
        )
    }


def test_only_what_mbrm_refined_can_be_explained():
    mbrm = MBRM()
    objects = make_objects(mbrm)
    with pytest.raises(ValueError, match="index of one of 1 objects, got 1"):
        explain_refinement(image(), objects, 1, mbrm)
    with pytest.raises(ValueError, match="MBRM is off"):
        explain_refinement(image(), replace(objects, profiles=None), 0, mbrm)
    with pytest.raises(ValueError, match="MBRM is off"):
        explain_refinement(image(), replace(objects, edge_std=torch.full((1, 4), torch.nan)), 0, mbrm)
    with pytest.raises(ValueError, match=r"\(80, 100\), got \(100, 80\)"):
        explain_refinement(np.zeros((100, 80, 3), np.uint8), objects, 0, mbrm)
    with pytest.raises(ValueError, match="uint8 image"):
        explain_refinement(np.zeros(SIZE, np.uint8), objects, 0, mbrm)
