"""Image, boxes and masks agree to the pixel after scaling, cropping, flipping and turning."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as coco_mask
from torchvision.transforms.v2 import functional

from parity import compare, vectors
from rdsnet.config import DataConfig
from rdsnet.data.records import Annotation
from rdsnet.data.transforms import (
    View,
    coverage_matrix,
    draw_view,
    eval_image,
    eval_size,
    train_transform,
    view_image,
    view_objects,
)
from rdsnet.structures import MaskGrid

GRID = MaskGrid(8, 4)


def annotation(mask: np.ndarray, label: int = 0, with_mask: bool = True, crowd: bool = False) -> Annotation:
    """An object with the tight box of its mask (H, W)."""
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
    return Annotation(1, label, box, rle if with_mask else None, float(mask.sum()), crowd)


def rectangle(x1: int, y1: int, x2: int, y2: int, height: int = 40, width: int = 60) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[y1:y2, x1:x2] = True
    return mask


def whole(height: int, width: int) -> View:
    return View((height, width), (height, width), (0, 0, width, height))


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(400, 600, (800, 1200)), (480, 640, (800, 1067)), (300, 900, (444, 1333)), (1000, 10, (1333, 13))],
)
def test_shorter_side_is_scaled_unless_the_longer_gets_too_long(
    height: int, width: int, expected: tuple[int, int]
) -> None:
    assert eval_size(height, width, DataConfig(short_side=800, long_side=1333)) == expected


def test_squashed_images_have_one_size_whatever_their_shape() -> None:
    config = DataConfig(square=50, short_side=800)
    assert eval_size(37, 90, config) == eval_size(200, 3, config) == (50, 50)
    view = draw_view(40, 60, config, np.random.default_rng(0))
    assert view.size == view.output == view.padded == (50, 50)
    assert view.window == (0, 0, 50, 50)
    assert view.scale == (50 / 60, 50 / 40)


def test_squashing_multiplies_each_axis_by_its_own_factor() -> None:
    config = DataConfig(square=120, horizontal_flip=0)
    image = np.zeros((40, 60, 3), np.uint8)
    sample = train_transform(image, [annotation(rectangle(10, 5, 20, 15))], config, GRID, np.random.default_rng(0))
    assert sample.image.shape == (3, 120, 120)
    assert sample.targets.boxes.tolist() == [[20, 15, 40, 45]]
    assert sample.targets.areas.item() == pytest.approx(20 * 30)


def test_coverage_matrix_equals_a_plain_loop() -> None:
    edges = 1.3 + 2.7 * np.arange(8)
    matrix = coverage_matrix(edges, 4, 0, 6)
    for cell, pixel in itertools.product(range(6), range(7)):
        overlap = min(edges[pixel + 1], 4 * cell + 4) - max(edges[pixel], 4 * cell)
        assert matrix[cell, pixel].item() == pytest.approx(max(overlap, 0) / 4)


def test_cells_more_than_half_covered_are_foreground() -> None:
    # Columns 0..6 of a grid of stride 4: cell 0 is full, cell 1 is exactly half covered, which is not more than half.
    targets = view_objects([annotation(rectangle(0, 0, 6, 4))], whole(40, 60), GRID)
    assert targets.masks.shape == (1, 16, 16)  # 40 x 60 padded to 64 x 64
    assert targets.masks[0].nonzero().tolist() == [[0, 0]]
    # Columns 0..7: three quarters of cell 1.
    targets = view_objects([annotation(rectangle(0, 0, 7, 4))], whole(40, 60), GRID)
    assert targets.masks[0].nonzero().tolist() == [[0, 0], [0, 1]]
    assert targets.areas.tolist() == [28]


def test_masks_are_covered_areas_at_any_scale() -> None:
    rng = np.random.default_rng(0)
    mask = rng.random((40, 60)) < 0.6
    view = replace(whole(40, 60), size=(53, 80), window=(0, 0, 80, 53))
    targets = view_objects([annotation(mask)], view, GRID)
    # Pixels of the original so fine that each lies in one cell: 53 rows and 80 columns, repeated 40 and 60 times.
    fine = np.kron(mask, np.ones((53, 80), bool))  # (40 * 53, 60 * 80): 40 fine rows a network row, 60 a column
    fine = np.pad(fine, ((0, 64 * 40 - fine.shape[0]), (0, 96 * 60 - fine.shape[1])))
    cells = fine.reshape(16, 160, 24, 240).sum((1, 3))
    np.testing.assert_array_equal(targets.masks[0].numpy(), cells > 160 * 240 / 2)
    assert targets.areas.item() == pytest.approx(mask.sum() * (53 * 80) / (40 * 60))


def test_cells_need_not_be_whole_pixels() -> None:
    # 50 pixels make 7 cells of the pyramid's stride 8, and 14 of the grid, each 50 / 14 = 3.571 pixels.
    square = replace(whole(50, 50), multiple=1)
    # Columns 0..5 reach 1.43 pixels into cell 1, less than half of it; columns 0..6 reach 2.43.
    five = view_objects([annotation(rectangle(0, 0, 5, 3, 50, 50))], square, GRID)
    assert five.masks.shape == (1, 14, 14)
    assert five.masks[0].nonzero().tolist() == [[0, 0]]
    six = view_objects([annotation(rectangle(0, 0, 6, 3, 50, 50))], square, GRID)
    assert six.masks[0].nonzero().tolist() == [[0, 0], [0, 1]]
    assert six.areas.item() == pytest.approx(18)
    # 14 fine pixels a pixel and 50 a cell
    mask = np.random.default_rng(0).random((50, 50)) < 0.55
    cells = np.kron(mask, np.ones((14, 14), bool)).reshape(14, 50, 14, 50).sum((1, 3))
    targets = view_objects([annotation(mask)], square, GRID)
    np.testing.assert_array_equal(targets.masks[0].numpy(), cells > 50 * 50 / 2)


@pytest.mark.parametrize(("side", "cells"), [(550, 138), (700, 176), (400, 100), (576, 144)])
def test_an_object_that_fills_the_image_fills_the_grid(side: int, cells: int) -> None:
    view = View((60, 60), (side, side), (0, 0, side, side), multiple=1)
    targets = view_objects([annotation(np.ones((60, 60), bool))], view, GRID)
    assert targets.masks.shape == (1, cells, cells) and targets.masks.all()
    assert targets.areas.item() == pytest.approx(side * side)


@pytest.mark.parametrize("window", [(3, 2, 48, 33), (-4, -7, 60, 39)])
@pytest.mark.parametrize(("transpose", "flip_x", "flip_y"), itertools.product([False, True], repeat=3))
def test_image_box_and_mask_turn_together(
    transpose: bool, flip_x: bool, flip_y: bool, window: tuple[int, int, int, int]
) -> None:
    rng = np.random.default_rng(1)
    blob = rng.random((37, 53)) < 0.3
    blob[:4] = blob[:, 40:] = False
    view = View((37, 53), (37, 53), window, transpose, flip_x, flip_y)
    image = np.repeat(blob[..., None].astype(np.uint8), 3, axis=2)
    pixels = view_image(image, view)[0] == 1
    targets = view_objects([annotation(blob)], view, MaskGrid(1, 1))
    height, width = view.output
    assert targets.image_size == tuple(pixels.shape) == (height, width)
    torch.testing.assert_close(targets.masks[0, :height, :width], pixels)
    rows, columns = pixels.any(1).nonzero(), pixels.any(0).nonzero()
    tight = [columns[0].item(), rows[0].item(), columns[-1].item() + 1, rows[-1].item() + 1]
    assert targets.boxes[0].tolist() == tight
    assert targets.areas.item() == pixels.sum()


def test_turns_of_the_pipeline_are_all_eight() -> None:
    config = DataConfig(short_side=16, horizontal_flip=0.5, vertical_flip=0.5, rotate90=True)
    rng = np.random.default_rng(0)
    views = [draw_view(16, 16, config, rng) for _ in range(300)]
    seen = {(view.transpose, view.flip_x, view.flip_y) for view in views}
    assert len(seen) == 8


def test_turns_without_flips_are_rotations() -> None:
    config = DataConfig(short_side=4, horizontal_flip=0, rotate90=True)
    image = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    rotations = {np.rot90(image, k).tobytes() for k in range(4)}
    rng = np.random.default_rng(0)
    seen = {view_image(image, draw_view(4, 4, config, rng)).permute(1, 2, 0).numpy().tobytes() for _ in range(50)}
    assert seen == rotations


def test_flip_mirrors_the_box() -> None:
    view = replace(whole(40, 60), flip_x=True)
    box = view_objects([annotation(rectangle(10, 5, 20, 15), with_mask=False)], view, GRID).boxes
    assert box.tolist() == [[40, 5, 50, 15]]


def test_resizing_multiplies_by_the_ratio_of_each_axis() -> None:
    view = replace(whole(40, 60), size=(53, 80), window=(0, 0, 80, 53))
    box = view_objects([annotation(rectangle(10, 5, 20, 15), with_mask=False)], view, GRID).boxes
    expected = torch.tensor([[10 * 80 / 60, 5 * 53 / 40, 20 * 80 / 60, 15 * 53 / 40]])
    torch.testing.assert_close(box, expected)


def test_cut_object_gets_the_tight_box_of_what_remains() -> None:
    # An L: a bar of rows 5..10 in columns 10..30, and a bar of columns 10..14 in rows 5..35.
    ell = rectangle(10, 5, 30, 10) | rectangle(10, 5, 14, 35)
    view = replace(whole(40, 60), window=(0, 8, 60, 40))  # the window begins at row 8
    assert view_objects([annotation(ell)], view, GRID).boxes.tolist() == [[10, 0, 30, 27]]
    view = replace(whole(40, 60), window=(0, 20, 60, 40))  # only the foot is left, 4 of 20 columns wide
    assert view_objects([annotation(ell)], view, GRID).boxes.tolist() == [[10, 0, 14, 15]]
    without_mask = view_objects([annotation(ell, with_mask=False)], view, GRID)
    assert without_mask.boxes.tolist() == [[10, 0, 30, 15]]
    assert without_mask.has_mask.tolist() == [False]
    assert not without_mask.masks.any()


def test_objects_of_which_nothing_remains_are_dropped() -> None:
    ell = rectangle(10, 5, 30, 10) | rectangle(10, 5, 14, 35)
    view = replace(whole(40, 60), window=(14, 10, 60, 40))  # inside the L's box, but not in the L
    assert len(view_objects([annotation(ell)], view, GRID)) == 0
    sliver = replace(whole(40, 60), size=(20, 30), window=(0, 0, 30, 20))  # half size: 1 pixel becomes 0.5
    assert len(view_objects([annotation(rectangle(5, 5, 6, 20))], sliver, GRID)) == 0
    assert len(view_objects([annotation(rectangle(5, 5, 7, 20))], sliver, GRID)) == 1


def test_crowds_are_no_objects_but_their_boxes_are_kept() -> None:
    objects = [annotation(rectangle(0, 0, 20, 20), crowd=True), annotation(rectangle(30, 0, 50, 20), label=3)]
    targets = view_objects(objects, whole(40, 60), GRID)
    assert targets.labels.tolist() == [3] and targets.masks.shape == (1, 16, 16)
    assert targets.crowd_boxes.tolist() == [[0, 0, 20, 20]]
    assert view_objects(objects[1:], whole(40, 60), GRID).crowd_boxes.shape == (0, 4)


def test_crowd_boxes_follow_the_view() -> None:
    inside, outside = rectangle(10, 5, 30, 20), rectangle(0, 0, 20, 40)
    crowds = [annotation(mask, crowd=True) for mask in (inside, outside)]
    view = replace(whole(40, 60), window=(20, 8, 60, 40))  # of the first columns 0..10 and rows 0..12 are left
    assert view_objects(crowds, view, GRID).crowd_boxes.tolist() == [[0, 0, 10, 12]]
    assert view_objects(crowds, replace(view, flip_x=True), GRID).crowd_boxes.tolist() == [[30, 0, 40, 12]]
    turned = replace(view, transpose=True, flip_x=True)  # 32 wide, 40 high
    assert view_objects(crowds, turned, GRID).crowd_boxes.tolist() == [[20, 0, 32, 10]]
    # clipped, never tightened to what remains of the mask
    ell = rectangle(10, 5, 30, 10) | rectangle(10, 5, 14, 35)
    foot = replace(whole(40, 60), window=(0, 20, 60, 40))
    assert view_objects([annotation(ell, crowd=True)], foot, GRID).crowd_boxes.tolist() == [[10, 0, 30, 15]]


def test_image_without_objects_has_empty_targets() -> None:
    targets = view_objects([], whole(40, 60), GRID)
    assert targets.boxes.shape == (0, 4) and targets.masks.shape == (0, 16, 16)


def test_small_images_are_padded_to_the_crop_and_to_multiples_of_32() -> None:
    config = DataConfig(short_side=40, train_crop=50, horizontal_flip=0)
    image = np.full((40, 60, 3), 7, np.uint8)
    sample = train_transform(image, [annotation(rectangle(0, 0, 60, 40))], config, GRID, np.random.default_rng(0))
    assert sample.image.shape == (3, 64, 64)
    assert sample.targets.image_size == (40, 50)
    assert sample.targets.masks.shape == (1, 16, 16)
    assert sample.targets.boxes.tolist() == [[0, 0, 50, 40]]
    assert (sample.image[:, :40, :50] == 7).all() and sample.image.sum() == 7 * 3 * 40 * 50


def test_a_window_beyond_the_image_shows_a_canvas() -> None:
    image = np.full((4, 6, 3), 7, np.uint8)
    pixels = view_image(image, View((4, 6), (4, 6), (-2, 1, 5, 9)))
    assert pixels.shape == (3, 8, 7)
    assert (pixels[:, :3, 2:] == 7).all()
    for channel, colour in zip(pixels, (124, 116, 104), strict=True):
        assert (channel[3:] == colour).all() and (channel[:, :2] == colour).all()
    away = view_image(image, View((4, 6), (4, 6), (-9, 6, -2, 8)))
    assert away.shape == (3, 2, 7) and (away == torch.tensor([124, 116, 104])[:, None, None]).all()


@pytest.mark.parametrize("square", [None, 40])
def test_zooming_out_puts_the_image_at_a_random_place(square: int | None) -> None:
    config = DataConfig(short_side=40, square=square, train_zoom=(2, 2), horizontal_flip=0)
    image = np.full((40, 60, 3), 7, np.uint8)
    whole_image = [annotation(rectangle(0, 0, 60, 40))]
    width = 60 if square is None else 40  # of what the network gets; the image fills half of it
    rng = np.random.default_rng(0)
    corners = set()
    for _ in range(100):
        sample = train_transform(image, whole_image, config, GRID, rng)
        assert sample.targets.image_size == (40, width)
        x1, y1, x2, y2 = (int(v) for v in sample.targets.boxes[0].tolist())
        assert (x2 - x1, y2 - y1) == (width // 2, 20)
        assert (sample.image[:, y1:y2, x1:x2] == 7).all()
        assert (sample.image[0, :40, :width] == 7).sum() == 20 * width // 2
        corners.add((x1, y1))
    columns, rows = zip(*corners, strict=True)
    assert (min(columns), min(rows)) == (0, 0)
    assert (max(columns), max(rows)) == (width // 2, 20)


def test_images_without_a_short_side_are_scaled_by_their_own_size() -> None:
    config = DataConfig(short_side=None, scale=1.5, long_side=100)
    assert eval_size(40, 60, config) == (60, 90)
    assert eval_size(40, 80, config) == (50, 100)  # the longer side is limited
    views = [draw_view(40, 60, replace(config, train_zoom=(0.5, 2.0)), np.random.default_rng(i)) for i in range(20)]
    assert {view.output for view in views} == {(60, 90)} and len({view.size for view in views}) > 10


@pytest.mark.parametrize("short_side", [40, None])  # None: the image's own
def test_zooming_in_shows_a_random_window(short_side: int | None) -> None:
    config = DataConfig(short_side=short_side, train_zoom=(0.5, 0.5))
    rng = np.random.default_rng(0)
    views = [draw_view(40, 60, config, rng) for _ in range(300)]
    assert {view.size for view in views} == {(80, 120)}
    assert {view.output for view in views} == {(40, 60)}
    lefts, tops = {view.window[0] for view in views}, {view.window[1] for view in views}
    assert (min(lefts), max(lefts), min(tops), max(tops)) == (0, 60, 0, 40)


def test_zoom_is_log_uniform_between_its_limits() -> None:
    config = DataConfig(square=1000, train_zoom=(0.25, 4.0))
    rng = np.random.default_rng(0)
    zooms = np.array([1000 / draw_view(100, 100, config, rng).size[0] for _ in range(2000)])
    assert 0.25 <= zooms.min() < 0.26 and 3.9 < zooms.max() <= 4.02  # sizes are whole pixels
    assert np.quantile(zooms, [0.25, 0.5, 0.75]) == pytest.approx([0.5, 1, 2], rel=0.1)


@pytest.mark.parametrize("square", [None, 300])
def test_aspect_changes_what_is_seen_and_only_squashing_distorts_it(square: int | None) -> None:
    config = DataConfig(short_side=300, square=square, train_aspect=2.0)
    rng = np.random.default_rng(0)
    views = [draw_view(300, 300, config, rng) for _ in range(300)]
    # What is seen, in pixels of the original: as much as the image, in another shape
    seen = np.array([[side / scale for side, scale in zip(v.output, v.scale[::-1], strict=True)] for v in views])
    assert seen.prod(1) == pytest.approx(300 * 300, rel=0.02)
    shapes = seen[:, 1] / seen[:, 0]
    assert 0.49 < shapes.min() < 0.55 and 1.8 < shapes.max() < 2.05
    stretched = [view.scale[0] / view.scale[1] for view in views]
    assert stretched == pytest.approx(np.ones(300) if square is None else 1 / shapes, rel=0.02)
    assert {min(view.output) for view in views} == {300}
    assert max(max(view.output) for view in views) == (300 if square else pytest.approx(600, rel=0.1))


def test_same_generator_state_gives_the_same_sample() -> None:
    config = DataConfig(train_short_side=(30, 90), train_crop=32, rotate90=True, colour=1.0)
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    objects = [annotation(rectangle(0, 0, 60, 40))]
    first, again, other = (train_transform(image, objects, config, GRID, np.random.default_rng(s)) for s in (1, 1, 2))
    torch.testing.assert_close(first.image, again.image, rtol=0, atol=0)
    torch.testing.assert_close(first.targets.boxes, again.targets.boxes, rtol=0, atol=0)
    assert not torch.equal(first.image, other.image)


def test_shrinking_is_antialiased_and_does_not_shift() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, 32:] = 200
    view = View((64, 64), (16, 16), (0, 0, 16, 16))
    columns = view_image(image, view)[0, 8].tolist()
    assert columns[:7] == [0] * 7 and columns[9:] == [200] * 7
    assert columns[7] + columns[8] == pytest.approx(200, abs=1)  # symmetric about the edge
    torch.testing.assert_close(
        view_image(image, view),
        functional.resize(torch.from_numpy(image).permute(2, 0, 1), [16, 16], antialias=True),
    )


def test_plain_bilinear_reads_two_pixels_an_axis_however_much_it_shrinks() -> None:
    # 8 columns become 2, centred at 2 and 6: between columns 1 and 2, and between columns 5 and 6
    row = np.array([0, 10, 30, 200, 0, 0, 42, 60], np.uint8)
    image = np.repeat(row[None, :, None], 2, axis=0).repeat(3, axis=2)
    assert view_image(image, View((2, 8), (2, 2), (0, 0, 2, 2)), antialias=False)[0].tolist() == [[20, 21]] * 2
    assert view_image(image, View((2, 8), (2, 2), (0, 0, 2, 2)))[0, 0].tolist() != [20, 21]


def test_training_and_inference_resize_alike() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    seen = []
    for antialias in (False, True):
        config = DataConfig(square=20, antialias=antialias, horizontal_flip=0)
        seen.append(train_transform(image, [], config, GRID, np.random.default_rng(0)).image)
        assert torch.equal(seen[-1], eval_image(image, config))
    assert not torch.equal(*seen)


def test_squashed_input_is_yolacts() -> None:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((123.68, 116.78, 103.94), (58.40, 57.12, 57.38)))
    config = DataConfig(square=550, antialias=False)
    for file, recorded in vectors("yolact/modules_preprocess*.npz"):
        ours = (eval_image(recorded["pre_rgb_u8"].numpy(), config) - mean) / std
        for path in ("fast", "base"):
            # YOLACT resizes floats; ours are rounded to whole grey levels
            tolerance = 0.5 / std.min().item() + 1e-4
            compare(f"{file.name} {path}", ours[:, ::10, ::10], recorded[f"pre_{path}_s10"], tolerance)
