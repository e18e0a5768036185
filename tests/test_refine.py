"""Refinement of any model's boxes: the same numbers as MBRM on whole images, from every form of mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import supervision as sv
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rdsnet.config import get_config
from rdsnet.model.build import build_model
from rdsnet.model.mbrm import BINARY, MBRM, SOFT
from rdsnet.refine.boxes import RefinedBoxes, Refiner, refine_boxes
from rdsnet.results.exchange import compact_mask
from rdsnet.weights import checkpoint

W, H = 60, 40
STEP = Refiner(weight=(0, 0, 0, -20, 20, 0, 0, 0, 0), bias=-10)  # believes in an edge where a mask steps from 0 to 1

# An object in columns 20..49 and rows 10..29
BOX = np.array([[20, 10, 50, 30]], np.float32)
MASK = np.zeros((1, H, W), bool)
MASK[0, 10:30, 20:50] = True


def scene(seed: int, n: int = 15) -> tuple[Tensor, Tensor]:
    """Boxes anywhere in and around the image, and soft masks that roughly fill them; each seventh mask is empty."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(n, 2, generator=generator) * torch.tensor([W, H])
    half = torch.rand(n, 2, generator=generator) * torch.tensor([W, H]) / 3
    boxes = torch.cat([centre - half, centre + half], dim=1)
    true = boxes + 3 * torch.randn(n, 4, generator=generator)
    x, y = torch.arange(W) + 0.5, torch.arange(H) + 0.5
    across = (x > true[:, :1]) & (x < true[:, 2:3])
    down = (y > true[:, 1:2]) & (y < true[:, 3:])
    masks = torch.rand(n, H, W, generator=generator).sqrt() * (across[:, None] & down[:, :, None])
    masks[::7] = 0
    return boxes, masks


# --- numbers that a person can work out ---


@pytest.mark.parametrize("off", [-2.0, -1.3, 0.0, 0.4, 2.0])
@pytest.mark.parametrize("side", range(4))
@pytest.mark.parametrize("refiner", [None, STEP])
def test_an_edge_that_is_off_moves_to_a_binary_masks(side: int, off: float, refiner: Refiner | None) -> None:
    boxes = BOX.copy()
    boxes[0, side] += off
    refined = refine_boxes(boxes, MASK, refiner=refiner)
    assert refined.xyxy.tolist() == BOX.tolist()


def test_all_edges_off_by_a_few_pixels_find_the_tight_box_of_a_perfect_mask() -> None:
    generator = np.random.default_rng(0)
    true, masks = [], np.zeros((50, 200, 220), bool)
    for mask in masks:
        (width, height), (x, y) = generator.integers(60, 120, 2), generator.integers(10, 70, 2)
        mask[y : y + height, x : x + width] = True
        true.append([x, y, x + width, y + height])
    boxes = np.array(true, np.float32)
    off = boxes + generator.uniform(-4, 4, boxes.shape).astype(np.float32)
    np.testing.assert_array_equal(refine_boxes(off, masks).xyxy, boxes)


def test_a_sharp_edge_is_sure_and_its_interval_is_a_point() -> None:
    refined = refine_boxes(BOX + 1, MASK, refiner=STEP)
    assert refined.edge_std.max() < 0.05
    assert refined.interval.tolist() == [[[20, 20], [10, 10], [50, 50], [30, 30]]]


def test_without_evidence_the_box_stays_and_its_edges_are_as_sure_as_the_prior() -> None:
    # sigma is 0.1 x 40 = 4 pixels across and 0.1 x 20 = 2 down; 1.96 sigma are 7.84 and 3.92
    boxes = np.array([[80, 90, 120, 110]], np.float32)
    flat = Refiner(weight=(0.0,) * 9, bias=0.0, gamma=0.1)
    refined = refine_boxes(boxes, np.zeros((1, 200, 200), np.float32), refiner=flat)
    assert refined.xyxy.tolist() == boxes.tolist()
    np.testing.assert_allclose(refined.edge_std, [[4, 2, 4, 2]], rtol=1e-3)
    assert refined.interval.tolist() == [[[72, 88], [86, 94], [112, 128], [106, 114]]]


def test_a_wider_interval_holds_more_of_the_posterior() -> None:
    boxes, masks = scene(0)
    widths = []
    for credibility in (0.5, 0.9, 0.99):
        low, high = refine_boxes(boxes, masks, refiner=SOFT, credibility=credibility).interval.unbind(dim=2)
        widths.append(high - low)
    assert (widths[0] <= widths[1]).all()
    assert (widths[1] <= widths[2]).all()
    assert (widths[0] < widths[2]).any()


@pytest.mark.parametrize("credibility", [0.5, 0.95])
def test_the_interval_is_central_and_the_smallest_such(credibility: float) -> None:
    boxes, masks = scene(1)
    mbrm, tail = MBRM(SOFT), (1 - credibility) / 2
    interval = refine_boxes(boxes, masks, refiner=SOFT, credibility=credibility).interval
    for axis, profiles in enumerate((masks.amax(1), masks.amax(2))):
        posterior = mbrm.posterior(profiles, boxes[:, axis::2], mbrm.sigma(boxes)[:, axis])
        for side in (0, 1):  # entry i of the far edge is position i + 1
            low, high = (interval[:, axis + 2 * side] - side).long().unbind(dim=1)
            up_to = posterior[:, side].cumsum(dim=1)
            at = torch.arange(len(boxes))
            assert (up_to[at, low] >= tail - 1e-5).all()
            assert (up_to[at, high] >= 1 - tail - 1e-5).all()
            before_low, before_high = (torch.where(i > 0, up_to[at, i - 1], 0) for i in (low, high))
            assert (before_low < tail + 1e-5).all()
            assert (before_high < 1 - tail + 1e-5).all()


# --- the plain form ---


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    gamma=st.sampled_from([0.01, 0.05, 0.3]),
    scale=st.sampled_from([0.5, 3.0, 12.0]),
    decision=st.sampled_from(["argmax", "mean"]),
)
def test_boxes_and_deviations_are_those_of_mbrm_on_whole_images(
    seed: int, gamma: float, scale: float, decision: Any
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = tuple((scale * torch.randn(9, generator=generator)).tolist())
    refiner = Refiner(weight=weight, bias=float(scale * torch.randn(1, generator=generator)), gamma=gamma)
    boxes, masks = scene(seed)
    plain = MBRM(refiner)(masks.amax(1), masks.amax(2), boxes, decision)
    ours = refine_boxes(boxes, masks, refiner=refiner, decision=decision)
    torch.testing.assert_close(ours.edge_std, plain.edge_std, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(ours.xyxy, plain.boxes, atol=2e-3, rtol=0)


def test_intervals_are_those_of_mbrm_on_whole_images() -> None:
    for seed in range(5):
        boxes, masks = scene(seed)
        expected = MBRM(SOFT)(masks.amax(1), masks.amax(2), boxes, credibility=0.8).interval
        assert torch.equal(refine_boxes(boxes, masks, refiner=SOFT, credibility=0.8).interval, expected)


def test_edges_that_would_cross_are_kept_as_in_mbrm() -> None:
    masks = np.zeros((1, H, W), np.float32)
    masks[0, 10:30, 30] = 1
    boxes = np.array([[29.8, 10.2, 30.2, 29.9]], np.float32)
    flat = Refiner(weight=(0.0,) * 9, bias=0.0)
    refined = refine_boxes(boxes, masks, refiner=flat)
    np.testing.assert_allclose(refined.xyxy, [[29.8, 10, 30.2, 30]])


def test_an_object_that_fills_the_image_ends_with_it() -> None:
    boxes = np.array([[1.4, 1.4, W - 1.4, H - 1.4]], np.float32)
    assert refine_boxes(boxes, np.ones((1, H, W), bool)).xyxy.tolist() == [[0, 0, W, H]]


def test_many_objects_of_any_size_are_refined_each_by_itself() -> None:
    parts = [scene(seed) for seed in range(40)]
    boxes, masks = torch.cat([b for b, _ in parts]), torch.cat([m for _, m in parts])
    assert len(boxes) > 512
    together = refine_boxes(boxes, masks, refiner=SOFT)
    alone = [refine_boxes(b, m, refiner=SOFT) for b, m in parts]
    for values, part in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(values, torch.cat(part), atol=1e-4, rtol=1e-4)


# --- forms of input ---


def crops_of(masks: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """What is not 0 of each mask, and its origin; a mask without pixels is a crop without any."""
    crops, origins = [], []
    for mask in masks:
        rows, columns = np.nonzero(mask)
        y0, y1, x0, x1 = (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) if len(rows) else (0, 0, 0, 0)
        crops.append(mask[y0:y1, x0:x1])
        origins.append((x0, y0))
    return crops, np.array(origins)


@pytest.mark.parametrize("binary", [False, True])
def test_all_forms_of_masks_give_the_same(binary: bool) -> None:
    boxes, masks = scene(2)
    masks = (masks > 0.5) if binary else masks
    expected = refine_boxes(boxes, masks)
    crops, origins = crops_of(masks.numpy())
    size = (H, W)
    tensors = [torch.from_numpy(crop) for crop in crops]
    padded = [(np.pad(crop, ((2, 1), (3, 0))), origin - [3, 2]) for crop, origin in zip(crops, origins, strict=True)]
    forms: list[Any] = [
        refine_boxes(boxes.numpy(), masks.numpy()),
        refine_boxes(boxes, masks[:, None]),
        refine_boxes(boxes.double(), masks.double()),
        refine_boxes({"boxes": boxes, "masks": masks[:, None], "scores": torch.ones(len(boxes))}),
        refine_boxes(boxes, crops, origins=origins, image_size=size),
        refine_boxes(boxes, tensors, origins=torch.from_numpy(origins), image_size=size),
        # with parts outside of the image
        refine_boxes(boxes, [c for c, _ in padded], origins=[o for _, o in padded], image_size=size),
        refine_boxes(boxes, np.pad(masks.numpy(), ((0, 0), (5, 5), (5, 5))), origins=[[-5, -5]] * 15, image_size=size),
    ]
    if binary:
        forms += [refine_boxes(boxes, masks.to(dtype)) for dtype in (torch.uint8, torch.int64, torch.float32)]
        windows = np.array([(x, y, x + c.shape[1], y + c.shape[0]) for c, (x, y) in zip(crops, origins, strict=True)])
        forms.append(refine_boxes(boxes, compact_mask(crops, windows, size)))
    for refined in forms:
        assert isinstance(refined, RefinedBoxes)
        for ours, wanted in zip(refined, expected, strict=True):
            torch.testing.assert_close(torch.as_tensor(ours), wanted, atol=1e-5, rtol=0)


def test_half_precision_masks_are_read() -> None:
    boxes, masks = scene(3)
    for dtype in (torch.float16, torch.bfloat16):
        rounded = masks.to(dtype)
        expected = refine_boxes(boxes, rounded.float())
        torch.testing.assert_close(refine_boxes(boxes, rounded).xyxy, expected.xyxy)


def test_arrays_give_arrays_and_tensors_tensors_and_the_input_is_left_alone() -> None:
    boxes = BOX + 1
    refined = refine_boxes(boxes, MASK)
    assert boxes.tolist() == (BOX + 1).tolist()
    assert all(isinstance(values, np.ndarray) and values.dtype == np.float32 for values in refined)
    assert [values.shape for values in refined] == [(1, 4), (1, 4), (1, 4, 2)]
    tensors = refine_boxes(torch.from_numpy(boxes).requires_grad_(), torch.from_numpy(MASK))
    assert all(isinstance(values, Tensor) and not values.requires_grad for values in tensors)


def test_soft_and_binary_masks_are_read_with_numbers_of_their_own() -> None:
    boxes, masks = scene(4)
    soft = refine_boxes(boxes, masks)
    torch.testing.assert_close(soft.xyxy, refine_boxes(boxes, masks, refiner=SOFT).xyxy)
    binary = refine_boxes(boxes, masks > 0.5)
    torch.testing.assert_close(binary.xyxy, refine_boxes(boxes, (masks > 0.5).float(), refiner=BINARY).xyxy)
    assert not torch.equal(binary.xyxy, refine_boxes(boxes, masks > 0.5, refiner=SOFT).xyxy)


@pytest.mark.parametrize("compact", [False, True])
def test_detections_come_back_with_refined_boxes_and_their_own_masks(compact: bool) -> None:
    window = np.array([[18, 8, 53, 33]])
    masks = compact_mask([MASK[0, 8:33, 18:53]], window, (H, W)) if compact else MASK
    given = sv.Detections(
        xyxy=BOX + 1,
        mask=masks,
        confidence=np.array([0.7]),
        class_id=np.array([3]),
        data={"name": np.array(["a"])},
    )
    refined = refine_boxes(given)
    assert refined.xyxy.tolist() == BOX.tolist()
    assert given.xyxy.tolist() == (BOX + 1).tolist()
    assert set(given.data) == {"name"}
    assert refined.mask is masks
    assert (refined.class_id, refined.confidence, refined.data["name"]) == (3, 0.7, "a")
    assert refined.data["regressed_xyxy"].tolist() == (BOX + 1).tolist()
    assert refined.data["edge_std"].shape == (1, 4)
    assert refined.data["interval"].shape == (1, 4, 2)
    assert refined[0:1].data["interval"].shape == (1, 4, 2)


def test_without_an_image_size_crops_are_bounded_below_only() -> None:
    # a mask that ends with column 9 of its crop, a box that goes on
    refined = refine_boxes(
        np.array([[-2, -2, 11, 12]], np.float32), [np.ones((10, 10), bool)], origins=[[0, 0]], refiner=STEP
    )
    assert refined.xyxy.tolist() == [[0, 0, 10, 10]]


@pytest.mark.parametrize(
    "masks",
    [
        np.zeros((0, H, W), bool),
        np.zeros((0, 0, 0)),
        torch.zeros(0, 1, H, W),
        [],
        compact_mask([], np.zeros((0, 4), int), (H, W)),
    ],
)
def test_no_boxes_are_refined_to_no_boxes(masks: Any) -> None:
    refined = refine_boxes(np.zeros((0, 4), np.float32), masks)
    assert [values.shape for values in refined] == [(0, 4), (0, 4), (0, 4, 2)]


def test_empty_detections_stay_empty() -> None:
    refined = refine_boxes(sv.Detections.empty())
    assert len(refined) == 0
    assert refined.data["interval"].shape == (0, 4, 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_results_are_the_same_and_stay_there() -> None:
    boxes, masks = scene(5)
    expected = refine_boxes(boxes, masks)
    crops, origins = crops_of(masks.numpy())
    on_gpu = [torch.from_numpy(crop).cuda() for crop in crops]
    for refined in (
        refine_boxes(boxes.cuda(), masks.cuda()),
        refine_boxes(boxes.cuda(), masks.numpy()),
        refine_boxes(boxes.cuda(), on_gpu, origins=origins, image_size=(H, W)),
    ):
        for ours, wanted in zip(refined, expected, strict=True):
            assert isinstance(ours, Tensor)
            assert ours.is_cuda
            torch.testing.assert_close(ours.cpu(), wanted, atol=1e-3, rtol=1e-3)
    binary = refine_boxes(boxes.cuda(), (masks > 0.5).cuda())
    torch.testing.assert_close(binary.xyxy.cpu(), refine_boxes(boxes, masks > 0.5).xyxy)


# --- bad input ---


def logits() -> np.ndarray:
    masks = np.full((1, H, W), -4.0, np.float32)
    masks[0, 10:30, 20:50] = 5
    return masks


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (logits(), r"logits need a sigmoid.*mask 0 holds values from -4 to 5"),
        (MASK.astype(np.uint8) * 255, "values from 0 to 255"),
        (np.where(MASK, np.nan, 0), "mask 0 holds NaN"),
        (np.zeros((2, H, W)), "a mask for each of 1 boxes, got 2"),
        (MASK[0], r"\(N, H, W\) or \(N, 1, H, W\), got \(40, 60\)"),
        (np.zeros((1, 3, H, W)), r"got \(1, 3, 40, 60\)"),
        ([MASK[0]], "expected origins"),
        (MASK.astype(complex), "numbers, got complex128"),
        (None, "expected masks"),
        ("mask.png", "expected masks as an array"),
        (np.zeros((1, 0, W), bool), r"image_size \(H, W\) of at least 1 x 1"),
    ],
)
def test_bad_masks_are_refused(masks: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refine_boxes(BOX, masks)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (BOX[0], r"boxes of shape \(N, 4\), xyxy, got \(4,\)"),
        (BOX * np.nan, "finite numbers"),
        (BOX + np.inf, "finite numbers"),
        (BOX.tolist(), "boxes as an array or tensor"),
        ({"boxes": BOX}, "a dict with boxes and masks"),
        (np.array([[20.0, 10.0, 15.0, 30.0]], np.float32), r"x2 >= x1 and y2 >= y1, got \[20.0, 10.0, 15.0, 30.0\]"),
        (np.array([[200.0, 10.0, 230.0, 30.0]], np.float32), r"box 0, .* lies outside of its image of \(H, W\)"),
        (np.array([["a", "b", "c", "d"]]), "boxes of numbers, got <U1"),
    ],
)
def test_bad_boxes_are_refused(boxes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refine_boxes(boxes, None if isinstance(boxes, dict) else MASK)


def test_detections_without_masks_and_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sv\.Detections with masks"):
        refine_boxes(sv.Detections(xyxy=BOX))
    with pytest.raises(ValueError, match=r"refine_boxes\(boxes, masks\), .* got a tuple alone"):
        refine_boxes((np.zeros((1, 4), np.float32), np.zeros((1, 5, 5))))  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="holds its own"):
        refine_boxes(sv.Detections(xyxy=BOX, mask=MASK), MASK)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="unknown decision 'median'"):
        refine_boxes(BOX, MASK, decision="median")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="credibility"):
        refine_boxes(BOX, MASK, credibility=95)
    with pytest.raises(ValueError, match=r"masks of the image_size \(50, 60\), got \(40, 60\)"):
        refine_boxes(BOX, MASK, image_size=(50, 60))
    with pytest.raises(ValueError, match=r"origins of shape \(1, 2\)"):
        refine_boxes(BOX, [MASK[0]], origins=[0, 0])
    with pytest.raises(ValueError, match="whole pixels as origins"):
        refine_boxes(BOX, [MASK[0]], origins=[[0.5, 0]])
    with pytest.raises(ValueError, match="a Refiner, a path or None"):
        refine_boxes(BOX, MASK, refiner=0.05)  # type: ignore[call-overload]


# --- refiners in files ---


def test_a_refiner_is_saved_and_found_again(tmp_path: Path) -> None:
    path = tmp_path / "refiner.json"
    kept = Refiner(tuple(np.linspace(-1, 1, 9).tolist()), -2.5, 0.07, 0.5, "binary", 1234, 1.5, 0.25)
    kept.save(path)
    assert Refiner.load(path) == kept
    boxes, masks = scene(6)
    torch.testing.assert_close(refine_boxes(boxes, masks, refiner=path), refine_boxes(boxes, masks, refiner=kept))


def test_a_refiner_is_read_from_an_rdsnets_weights(tmp_path: Path) -> None:
    config = get_config("rdsnet_tiny", {"detect": {"gamma": 0.08, "mask_threshold": 0.3}})
    model = build_model(config, num_classes=1)
    model.mbrm.weight.data.copy_(torch.linspace(-1, 1, 9))
    model.mbrm.bias.data.fill_(-3)
    checkpoint.save(tmp_path / "best.safetensors", model, config, ["a"], [1])
    for source in (tmp_path, str(tmp_path / "best.safetensors")):
        found = Refiner.load(source)
        np.testing.assert_allclose(found.weight, np.linspace(-1, 1, 9), atol=1e-6)
        assert (found.bias, found.gamma, found.mask_threshold, found.masks) == (-3, 0.08, 0.3, "soft")
        assert refine_boxes(BOX, MASK, refiner=source).xyxy.shape == (1, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "format 'rdsnet-refiner/1', got None"),
        ('{"weight": [1], "bias": 0}', "got None"),
        ('{"format": "rdsnet-refiner/1", "bias": 0}', "only bias"),
        ('{"format": "rdsnet-refiner/1", "weight": [1, 2], "bias": 0}', "9 weights"),
        ('{"format": "rdsnet-refiner/1", "weight": [0,0,0,0,0,0,0,0,"x"], "bias": 0}', "finite numbers"),
        ('{"format": "rdsnet-refiner/1", "weight": [0,0,0,0,0,0,0,0,0], "bias": 0, "gamma": 0}', "gamma above 0"),
        ('{"format": "rdsnet-refiner/1", "weight": [0,0,0,0,0,0,0,0,0], "bias": 0, "sigma": 1}', "unknown sigma"),
    ],
)
def test_a_file_that_is_no_refiner_is_refused_by_name(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "refiner.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        refine_boxes(BOX, MASK, refiner=path)
    assert str(path) in str(caught.value)


def test_a_missing_refiner_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path / "run"):
        with pytest.raises(FileNotFoundError, match=path.name):
            refine_boxes(BOX, MASK, refiner=path)
