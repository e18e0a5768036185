"""Image, boxes and masks agree to the pixel after scaling, cropping, flipping and turning."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as coco_mask
from torchvision.transforms.v2 import functional

from rdsnet.config import DataConfig
from rdsnet.data.parsing import Annotation
from rdsnet.data.transforms import (
    View,
    coverage_matrix,
    draw_view,
    eval_size,
    train_transform,
    view_image,
    view_objects,
)


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
    assert eval_size(height, width, 800, 1333) == expected


def test_coverage_matrix_equals_a_plain_loop() -> None:
    edges = 1.3 + 2.7 * np.arange(8)
    matrix = coverage_matrix(edges, 4, 0, 6)
    for cell, pixel in itertools.product(range(6), range(7)):
        overlap = min(edges[pixel + 1], 4 * cell + 4) - max(edges[pixel], 4 * cell)
        assert matrix[cell, pixel].item() == pytest.approx(max(overlap, 0) / 4)


def test_cells_more_than_half_covered_are_foreground() -> None:
    # Columns 0..6 of a grid of stride 4: cell 0 is full, cell 1 is exactly half covered, which is not more than half.
    targets = view_objects([annotation(rectangle(0, 0, 6, 4))], whole(40, 60), 4)
    assert targets.masks.shape == (1, 16, 16)  # 40 x 60 padded to 64 x 64
    assert targets.masks[0].nonzero().tolist() == [[0, 0]]
    # Columns 0..7: three quarters of cell 1.
    targets = view_objects([annotation(rectangle(0, 0, 7, 4))], whole(40, 60), 4)
    assert targets.masks[0].nonzero().tolist() == [[0, 0], [0, 1]]
    assert targets.areas.tolist() == [28]


def test_masks_are_covered_areas_at_any_scale() -> None:
    rng = np.random.default_rng(0)
    mask = rng.random((40, 60)) < 0.6
    view = replace(whole(40, 60), size=(53, 80), window=(0, 0, 80, 53))
    targets = view_objects([annotation(mask)], view, 4)
    # Pixels of the original so fine that each lies in one cell: 53 rows and 80 columns, repeated 40 and 60 times.
    fine = np.kron(mask, np.ones((53, 80), bool))  # (40 * 53, 60 * 80): 40 fine rows a network row, 60 a column
    fine = np.pad(fine, ((0, 64 * 40 - fine.shape[0]), (0, 96 * 60 - fine.shape[1])))
    cells = fine.reshape(16, 160, 24, 240).sum((1, 3))
    np.testing.assert_array_equal(targets.masks[0].numpy(), cells > 160 * 240 / 2)
    assert targets.areas.item() == pytest.approx(mask.sum() * (53 * 80) / (40 * 60))


@pytest.mark.parametrize(("transpose", "flip_x", "flip_y"), itertools.product([False, True], repeat=3))
def test_image_box_and_mask_turn_together(transpose: bool, flip_x: bool, flip_y: bool) -> None:
    rng = np.random.default_rng(1)
    blob = rng.random((37, 53)) < 0.3
    blob[:4] = blob[:, 40:] = False
    view = View((37, 53), (37, 53), (3, 2, 48, 33), transpose, flip_x, flip_y)
    image = np.repeat(blob[..., None].astype(np.uint8), 3, axis=2)
    pixels = view_image(image, view)[0].bool()
    targets = view_objects([annotation(blob)], view, mask_stride=1)
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
    box = view_objects([annotation(rectangle(10, 5, 20, 15), with_mask=False)], view, 4).boxes
    assert box.tolist() == [[40, 5, 50, 15]]


def test_resizing_multiplies_by_the_ratio_of_each_axis() -> None:
    view = replace(whole(40, 60), size=(53, 80), window=(0, 0, 80, 53))
    box = view_objects([annotation(rectangle(10, 5, 20, 15), with_mask=False)], view, 4).boxes
    expected = torch.tensor([[10 * 80 / 60, 5 * 53 / 40, 20 * 80 / 60, 15 * 53 / 40]])
    torch.testing.assert_close(box, expected)


def test_cut_object_gets_the_tight_box_of_what_remains() -> None:
    # An L: a bar of rows 5..10 in columns 10..30, and a bar of columns 10..14 in rows 5..35.
    ell = rectangle(10, 5, 30, 10) | rectangle(10, 5, 14, 35)
    view = replace(whole(40, 60), window=(0, 8, 60, 40))  # the window begins at row 8
    assert view_objects([annotation(ell)], view, 4).boxes.tolist() == [[10, 0, 30, 27]]
    view = replace(whole(40, 60), window=(0, 20, 60, 40))  # only the foot is left, 4 of 20 columns wide
    assert view_objects([annotation(ell)], view, 4).boxes.tolist() == [[10, 0, 14, 15]]
    without_mask = view_objects([annotation(ell, with_mask=False)], view, 4)
    assert without_mask.boxes.tolist() == [[10, 0, 30, 15]]
    assert without_mask.has_mask.tolist() == [False]
    assert not without_mask.masks.any()


def test_objects_of_which_nothing_remains_are_dropped() -> None:
    ell = rectangle(10, 5, 30, 10) | rectangle(10, 5, 14, 35)
    view = replace(whole(40, 60), window=(14, 10, 60, 40))  # inside the L's box, but not in the L
    assert len(view_objects([annotation(ell)], view, 4)) == 0
    sliver = replace(whole(40, 60), size=(20, 30), window=(0, 0, 30, 20))  # half size: 1 pixel becomes 0.5
    assert len(view_objects([annotation(rectangle(5, 5, 6, 20))], sliver, 4)) == 0
    assert len(view_objects([annotation(rectangle(5, 5, 7, 20))], sliver, 4)) == 1


def test_crowds_are_left_out() -> None:
    objects = [annotation(rectangle(0, 0, 20, 20), crowd=True), annotation(rectangle(30, 0, 50, 20), label=3)]
    assert view_objects(objects, whole(40, 60), 4).labels.tolist() == [3]


def test_image_without_objects_has_empty_targets() -> None:
    targets = view_objects([], whole(40, 60), 4)
    assert targets.boxes.shape == (0, 4) and targets.masks.shape == (0, 16, 16)


def test_small_images_are_padded_to_the_crop() -> None:
    config = DataConfig(short_side=40, train_crop=50, horizontal_flip=0)
    image = np.full((40, 60, 3), 7, np.uint8)
    sample = train_transform(image, [annotation(rectangle(0, 0, 60, 40))], config, 4, np.random.default_rng(0))
    assert sample.image.shape == (3, 50, 50)
    assert sample.targets.image_size == (40, 50)
    assert sample.targets.masks.shape == (1, 16, 16)
    assert sample.targets.boxes.tolist() == [[0, 0, 50, 40]]
    assert (sample.image[:, :40] == 7).all() and (sample.image[:, 40:] == 0).all()


def test_same_generator_state_gives_the_same_sample() -> None:
    config = DataConfig(train_short_side=(30, 90), train_crop=32, rotate90=True, colour=1.0)
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    objects = [annotation(rectangle(0, 0, 60, 40))]
    first, again, other = (train_transform(image, objects, config, 4, np.random.default_rng(s)) for s in (1, 1, 2))
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
