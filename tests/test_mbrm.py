"""Boundary refinement (3.3), with masks whose edges a person can see."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import make
from rdsnet.model.mbrm import EVIDENCE, MBRM, PUBLISHED, Refined, whole, window

W, H = 60, 40


def step_reader(**numbers: Any) -> MBRM:
    """An MBRM that believes in an edge exactly where the profile steps from 0 to 1: m_i - m_{i-1}."""
    return make.mbrm(weight=(0.0, 0, 0, -20, 20, 0, 0, 0, 0), bias=-10.0, **numbers)


def profile(length: int, *spans: tuple[int, int]) -> Tensor:
    """(N, length), 1 in columns first..last - 1 of each object and 0 elsewhere."""
    rows = torch.zeros(len(spans), length)
    for row, (first, last) in zip(rows, spans, strict=True):
        row[first:last] = 1
    return rows


def box(*corners: float) -> Tensor:
    return torch.tensor([corners], dtype=torch.float32)


# An object in columns 20..49 and rows 10..29: its box is 20, 10, 50, 30.
COLUMNS, ROWS = profile(W, (20, 50)), profile(H, (10, 30))


@pytest.mark.parametrize("off", [-2.0, -1.3, 0.0, 0.4, 2.0])
@pytest.mark.parametrize("side", range(4))
def test_a_wrong_edge_moves_to_the_masks(side: int, off: float) -> None:
    regressed = box(20, 10, 50, 30)
    regressed[0, side] += off
    assert step_reader()(COLUMNS, ROWS, regressed).boxes.tolist() == [[20, 10, 50, 30]]


@pytest.mark.parametrize("off", [-2.0, 2.0])
@pytest.mark.parametrize("side", range(4))
def test_the_published_numbers_come_within_a_pixel_of_a_binary_masks_edges(side: int, off: float) -> None:
    # They were fitted to soft masks; on a hard step they take the last column outside for as likely as the first inside
    regressed = box(20, 10, 50, 30)
    regressed[0, side] += off
    assert (MBRM()(COLUMNS, ROWS, regressed).boxes - box(20, 10, 50, 30)).abs().max() <= 1


def test_an_object_that_fills_the_image_ends_with_it() -> None:
    refined = step_reader()(profile(W, (0, W)), profile(H, (0, H)), box(1.4, 1.4, W - 1.4, H - 1.4))
    assert refined.boxes.tolist() == [[0, 0, W, H]]


def test_several_boxes_are_refined_each_by_its_own_profiles() -> None:
    columns, rows = profile(W, (20, 50), (3, 9)), profile(H, (10, 30), (31, 38))
    refined = step_reader()(columns, rows, torch.tensor([[21.0, 11, 49, 29], [2, 30, 10, 39]]))
    assert refined.boxes.tolist() == [[20, 10, 50, 30], [3, 31, 9, 38]]


@pytest.mark.parametrize("make", [MBRM, step_reader])
@pytest.mark.parametrize("decision", ["argmax", "mean"])
def test_the_mirrored_object_has_the_mirrored_edges(make: Any, decision: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    columns, rows = torch.rand(5, W, generator=generator), torch.rand(5, H, generator=generator)
    boxes = torch.tensor([12.0, 8, 45, 33]) + 6 * torch.rand(5, 4, generator=generator)
    mirrored_boxes = torch.stack([W - boxes[:, 2], H - boxes[:, 3], W - boxes[:, 0], H - boxes[:, 1]], dim=1)
    plain = make()(columns, rows, boxes, decision)
    mirrored = make()(columns.flip(1), rows.flip(1), mirrored_boxes, decision)
    back = torch.tensor([W, H, W, H]) - mirrored.boxes
    torch.testing.assert_close(plain.boxes, back[:, [2, 3, 0, 1]], atol=1e-3, rtol=0)
    torch.testing.assert_close(plain.edge_std, mirrored.edge_std[:, [2, 3, 0, 1]], atol=1e-3, rtol=0)


def test_exchanging_the_axes_exchanges_the_edges() -> None:
    regressed = box(18.5, 11.2, 51, 28)
    refined = step_reader()(COLUMNS, ROWS, regressed)
    exchanged = step_reader()(ROWS, COLUMNS, regressed[:, [1, 0, 3, 2]])
    assert torch.equal(exchanged.boxes, refined.boxes[:, [1, 0, 3, 2]])
    assert torch.equal(exchanged.edge_std, refined.edge_std[:, [1, 0, 3, 2]])


def test_an_empty_mask_keeps_the_regressed_box_exactly() -> None:
    regressed = box(18.37, 9.81, 50.22, 30.05)
    for decision in ("argmax", "mean"):
        refined = MBRM()(torch.zeros(1, W), torch.zeros(1, H), regressed, decision)
        assert torch.equal(refined.boxes, regressed)


def test_a_mask_below_the_threshold_is_no_evidence() -> None:
    regressed = box(18.37, 9.81, 50.22, 30.05)
    assert torch.equal(step_reader(mask_threshold=0.4)(COLUMNS * 0.39, ROWS * 0.39, regressed).boxes, regressed)
    assert not torch.equal(step_reader(mask_threshold=0.4)(COLUMNS, ROWS, regressed).boxes, regressed)


def test_an_edge_far_from_every_foreground_pixel_is_kept_and_the_others_are_refined() -> None:
    # sigma is 1.625, so that the mask is asked within 3.3 * 1.625 + 5 = 10.4 pixels: column 20 is 14.5 from 5.5
    regressed = box(5.5, 10.4, 51, 29)
    assert EVIDENCE * 0.05 * 45.5 + 5 < 14.5
    assert step_reader()(COLUMNS, ROWS, regressed).boxes.tolist() == [[5.5, 10, 50, 30]]


def test_a_box_outside_the_image_is_kept() -> None:
    regressed = box(-90.5, 100.25, -70, 140)
    assert torch.equal(step_reader()(COLUMNS, ROWS, regressed).boxes, regressed)


def test_in_the_release_the_prior_decides_about_an_empty_mask() -> None:
    refined = make.mbrm(keep_without_evidence=False)(torch.zeros(1, W), torch.zeros(1, H), box(18.4, 9.8, 50.2, 30.05))
    assert refined.boxes.tolist() == [[18, 10, 50, 30]]


def test_edges_that_would_cross_are_kept_as_regressed() -> None:
    # the mask is 1 in column 30 only; a reader without weights believes the prior, which rounds both edges to 30
    mbrm = MBRM()
    mbrm.weight.data.zero_()
    regressed = box(29.8, 10.2, 30.2, 29.9)
    assert mbrm(profile(W, (30, 31)), ROWS, regressed).boxes.tolist() == [
        [pytest.approx(29.8), 10, pytest.approx(30.2), 30]
    ]


def test_sigma_grows_with_the_box_and_with_gamma() -> None:
    boxes = torch.tensor([[0.0, 0, 100, 40], [0, 0, 10, 10]])
    assert make.mbrm(gamma=0.05).sigma(boxes).tolist() == [[5, 2], [1, 1]]  # at least one pixel
    assert make.mbrm(gamma=0.1).sigma(boxes).tolist() == [[10, 4], [1, 1]]
    torch.testing.assert_close(make.mbrm(gamma=0.05, inclusive=True).sigma(boxes)[0], torch.tensor([4.95, 1.95]))


def test_a_wide_prior_lets_an_edge_move_further() -> None:
    # the true left edge is 8 away: 8 sigmas at gamma = 0.02, where the prior outweighs a reader that gives up e^-10
    regressed = box(28, 10, 50, 30)
    moved = [step_reader(gamma=gamma)(COLUMNS, ROWS, regressed).boxes[0, 0].item() for gamma in (0.02, 0.2)]
    assert moved == [28, 20]


def test_the_posterior_is_prior_times_likelihood_by_bayes() -> None:
    mbrm = MBRM(replace(PUBLISHED, gamma=0.1))
    m = torch.rand(W, generator=torch.Generator().manual_seed(1))
    left, right, sigma = 21.3, 48.9, 2.76
    weight, bias = mbrm.weight.double(), mbrm.bias.item()
    near, far = torch.zeros(W, dtype=torch.float64), torch.zeros(W, dtype=torch.float64)
    for i in range(W):
        around = [m[j].item() if 0 <= j < W else 0.0 for j in range(i - 4, i + 5)]
        for values, posterior, distance in ((around, near, i - left), (around[::-1], far, i + 1 - right)):
            score = sum(w * v for w, v in zip(weight.tolist(), values, strict=True)) + bias
            prior = torch.exp(torch.tensor(-(distance**2) / (2 * sigma**2), dtype=torch.float64))
            posterior[i] = prior * torch.sigmoid(torch.tensor(score, dtype=torch.float64))
    plain = torch.stack([near / near.sum(), far / far.sum()])
    ours = mbrm.posterior(m[None], torch.tensor([[left, right]]), torch.tensor([sigma]))[0]
    torch.testing.assert_close(ours.double(), plain, atol=1e-6, rtol=1e-4)


def test_the_mean_decides_between_two_equal_columns() -> None:
    # The prior is symmetric about 20.5 and the mask does not say more: the mean is 20.5, the argmax is an integer
    mbrm = MBRM()
    mbrm.weight.data.zero_()
    boxes = box(20.5, 10, 40.5, 30)
    torch.testing.assert_close(mbrm(COLUMNS, ROWS, boxes, "mean").boxes, boxes)
    assert mbrm(COLUMNS, ROWS, boxes).boxes[0, 0] in (20, 21)


def test_the_mean_of_a_sharp_edge_is_the_edge() -> None:
    refined = step_reader()(COLUMNS, ROWS, box(21, 11, 49, 29), "mean")
    torch.testing.assert_close(refined.boxes, box(20, 10, 50, 30), atol=1e-2, rtol=0)


def test_edge_std_is_small_for_a_sharp_edge_and_the_priors_for_a_flat_mask() -> None:
    mbrm, boxes = step_reader(gamma=0.1), box(80, 90, 110, 110)
    sharp = mbrm(profile(200, (80, 110)), profile(200, (90, 110)), boxes).edge_std
    assert sharp.max() < 0.1
    flat = mbrm(torch.full((1, 200), 0.5), torch.full((1, 200), 0.5), boxes).edge_std
    torch.testing.assert_close(flat, torch.tensor([[3.0, 2, 3, 2]]), atol=1e-3, rtol=0)


def test_a_cut_prior_that_leaves_no_column_keeps_the_edge_and_its_sigma() -> None:
    refined = make.mbrm(prior_cut=0.0044, keep_without_evidence=False)(COLUMNS, ROWS, box(-50, -50, -20, -10))
    assert refined.boxes.tolist() == [[-50, -50, -20, -10]]
    torch.testing.assert_close(refined.edge_std, torch.tensor([[1.5, 2, 1.5, 2]]))


def test_no_boxes_are_refined_to_no_boxes() -> None:
    refined = MBRM()(torch.zeros(0, W), torch.zeros(0, H), torch.zeros(0, 4))
    assert refined.boxes.shape == (0, 4)
    assert refined.edge_std.shape == (0, 4)
    assert refined.interval.shape == (0, 4, 2)


def test_mbrm_is_not_trained_with_the_network() -> None:
    assert not any(p.requires_grad for p in MBRM().parameters())
    assert sum(p.numel() for p in MBRM().parameters()) == 10


# --- how sure an edge is ---


def test_the_interval_of_a_sharp_edge_is_the_edge() -> None:
    interval = step_reader()(COLUMNS, ROWS, box(21, 11, 49, 29)).interval
    assert interval.tolist() == [[[20, 20], [10, 10], [50, 50], [30, 30]]]


def test_the_interval_of_a_flat_mask_is_the_priors() -> None:
    # sigma is 0.1 x 40 = 4 pixels across and 0.1 x 20 = 2 down; 1.96 sigma are 7.84 and 3.92
    mbrm, flat = step_reader(gamma=0.1), torch.full((1, 200), 0.5)
    interval = mbrm(flat, flat, box(80, 90, 120, 110)).interval
    assert interval.tolist() == [[[72, 88], [86, 94], [112, 128], [106, 114]]]
    half = mbrm(flat, flat, box(80, 90, 120, 110), credibility=0.5).interval  # 0.67 sigma
    assert half.tolist() == [[[77, 83], [89, 91], [117, 123], [109, 111]]]


def test_where_the_cut_leaves_no_column_there_is_no_interval() -> None:
    mbrm = make.mbrm(prior_cut=0.0044, keep_without_evidence=False)
    boxes = torch.tensor([[-50.0, 10, -20, 30], [20, 10, 50, 30]])
    interval = mbrm(COLUMNS.expand(2, W), ROWS.expand(2, H), boxes).interval
    assert interval[0, [0, 2]].isnan().all()
    assert interval[0, [1, 3]].isfinite().all()
    assert interval[1].isfinite().all()


# --- the two views of the profiles ---


@pytest.mark.parametrize("cut", [None, 0.0044])
@pytest.mark.parametrize("half", [3, 12, 200])
def test_a_window_is_a_part_of_the_whole(half: int, cut: float | None) -> None:
    """Also of profiles that are stored from a later column on, at the image's ends and beyond."""
    generator = torch.Generator().manual_seed(half)
    first, edges = torch.tensor([0, 7, 30]), torch.tensor([[-3.2, 4.5], [7.7, 31.5], [50.1, 66.0]])
    stored, sigma = torch.rand(3, 25, generator=generator), torch.tensor([1.0, 2.5, 4.0])
    profiles = torch.zeros(3, W)
    for row, values, start in zip(profiles, stored, first.tolist(), strict=True):
        row[start : start + 25] = values
    mbrm = make.mbrm(prior_cut=cut)
    everywhere = mbrm.log_joint(whole(profiles, edges, mbrm.s), sigma)
    span = window(stored, first, edges, half, W, mbrm.s)
    assert span.away.shape == (3, 2, min(2 * half + 1, W))
    first = (span.start - torch.tensor([0, 1])).long()  # entry i of the whole stands for the far edge i + 1
    index = first[:, :, None] + torch.arange(span.away.shape[2])
    torch.testing.assert_close(mbrm.log_joint(span, sigma), everywhere.gather(2, index))


@pytest.mark.parametrize("decision", ["argmax", "mean"])
@pytest.mark.parametrize("keep", [True, False])
def test_a_wide_window_decides_as_the_whole(decision: Any, keep: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    profiles = torch.rand(40, W, generator=generator).sqrt() * (torch.arange(40) % 4 > 0)[:, None]
    edges = torch.tensor([15.0, 42]) + 8 * torch.randn(40, 2, generator=generator)
    mbrm, sigma = make.mbrm(keep_without_evidence=keep), 1 + 2 * torch.rand(40, generator=generator)
    spans = whole(profiles, edges, mbrm.s), window(profiles, torch.zeros(40).long(), edges, 22, W, mbrm.s)
    everywhere, around = (mbrm.decide(span, edges, sigma, decision, 0.95) for span in spans)
    torch.testing.assert_close(around, everywhere, atol=1e-4, rtol=0)


def test_no_shape_depends_on_what_is_in_the_tensors() -> None:
    """One graph for any number of boxes, none of whose sizes is read from the values."""
    columns, rows = profile(W, (20, 50), (3, 9), (0, W)), profile(H, (10, 30), (31, 38), (0, H))
    boxes = torch.tensor([[21.0, 11, 49, 29], [2, 30, 10, 39], [1.5, 1, W - 1, H - 2]])
    count = torch.export.Dim("count")
    shapes = {"columns": {0: count}, "rows": {0: count}, "boxes": {0: count}}
    graph = torch.export.export(step_reader(), (columns, rows, boxes), dynamic_shapes=shapes).module()
    for many in (2, 3):
        values = columns[:many], rows[:many], boxes[:many].flip(0)
        expected = step_reader()(*values)
        for ours, plain in zip(Refined(*graph(*values)), expected, strict=True):
            torch.testing.assert_close(ours, plain)


# --- anything goes ---


anywhere = st.floats(-1e5, 1e5, width=32)


@settings(max_examples=200, deadline=None)
@given(
    corners=st.tuples(anywhere, anywhere, anywhere, anywhere)
    | st.tuples(*[st.floats(-20, 80, width=32)] * 4),  # degenerate, crossed, beside and inside the image
    columns=st.lists(st.floats(0, 1, width=32), min_size=12, max_size=12),
    rows=st.lists(st.sampled_from([0.0, 0.39, 0.41, 1.0]), min_size=7, max_size=7),
    cut=st.sampled_from([None, 0.0044]),
    keep=st.booleans(),
    decision=st.sampled_from(["argmax", "mean"]),
    gamma=st.sampled_from([0.0, 0.05, 1.0]),
)
def test_refinement_never_gives_nan(
    corners: tuple[float, ...],
    columns: list[float],
    rows: list[float],
    cut: float | None,
    keep: bool,
    decision: Any,
    gamma: float,
) -> None:
    regressed = box(*corners)
    mbrm = make.mbrm(gamma=gamma, prior_cut=cut, keep_without_evidence=keep)
    refined = mbrm(torch.tensor([columns]), torch.tensor([rows]), regressed, decision)
    assert refined.boxes.isfinite().all()
    assert refined.edge_std.isfinite().all()
    assert (refined.edge_std >= 0).all()
    if cut is None:
        assert (refined.interval == refined.interval.round()).all()
        assert (refined.interval[:, :, 0] <= refined.interval[:, :, 1]).all()
    if keep and (regressed[:, 2:] > regressed[:, :2]).all():
        assert (refined.boxes[:, 2:] > refined.boxes[:, :2]).all()
