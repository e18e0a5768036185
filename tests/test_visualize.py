from types import SimpleNamespace

import numpy as np
import pytest
import torch

import make
from rdsnet.results.exchange import to_detections
from rdsnet.rle import crop_to_rle
from rdsnet.structures import Objects
from rdsnet.visualize.overlay import COLOURS, CROWD, distinct_colours, draw_objects, draw_truth
from rdsnet.visualize.sheet import captioned, captioned_row, contact_sheet, legend

SIZE = (40, 60)
NAMES = ["cat", "dog"]


def black(size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.zeros((*size, 3), np.uint8)


def make_objects(
    boxes: list[list[float]], *, regressed: list[list[float]] | None = None, masks: bool = True, scores: float = 0.9
) -> Objects:
    """Objects whose masks are their boxes without the corner pixels, in windows 2 pixels wider."""
    n = len(boxes)
    xyxy = torch.tensor(boxes, dtype=torch.float32).reshape(n, 4)
    windows = xyxy.long() + torch.tensor([-2, -2, 2, 2])
    crops = []
    for x0, y0, x1, y1 in windows.tolist() if masks else []:
        crop = torch.zeros(y1 - y0, x1 - x0, dtype=torch.bool)
        crop[2:-2, 2:-2] = True
        crop[2:-2:y1 - y0 - 5, 2:-2:x1 - x0 - 5] = False  # fmt: skip
        crops.append(crop)
    return make.objects(
        boxes,
        size=SIZE,
        regressed_boxes=xyxy if regressed is None else torch.tensor(regressed),
        scores=torch.full((n,), scores),
        masks=crops,
        windows=windows,
    )


def make_record(objects: Objects, *, crowd: bool = False, masks: bool = True) -> SimpleNamespace:
    """Ground truth that is what was found."""
    annotations = [
        SimpleNamespace(
            label=int(label),
            box=tuple(box.tolist()),
            rle=crop_to_rle(mask.numpy(), tuple(window.tolist()), SIZE) if masks else None,
            crowd=crowd,
        )
        for label, box, mask, window in zip(objects.labels, objects.boxes, objects.masks, objects.windows, strict=True)
    ]
    return SimpleNamespace(height=SIZE[0], width=SIZE[1], annotations=annotations)


def touched(picture: np.ndarray) -> np.ndarray:
    return picture.any(axis=2)


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_a_box_is_drawn_on_its_first_and_last_pixels(scale):
    objects = make_objects([[10.0, 5.0, 30.0, 25.0]], masks=False)
    picture = draw_objects(black(), objects, NAMES, labels=False, scale=scale)
    expected = np.zeros((SIZE[0] * scale, SIZE[1] * scale), bool)
    expected[5 * scale : 25 * scale, 10 * scale : 30 * scale] = True
    expected[5 * scale + 1 : 25 * scale - 1, 10 * scale + 1 : 30 * scale - 1] = False
    np.testing.assert_array_equal(touched(picture), expected)


@pytest.mark.parametrize("scale", [1, 4])
def test_a_mask_tints_its_pixels_and_no_others(scale):
    objects = make_objects([[10.0, 5.0, 30.0, 25.0]])
    picture = draw_objects(np.full((*SIZE, 3), 100, np.uint8), objects, NAMES, labels=False, scale=scale)
    inside = picture[12 * scale, 20 * scale].astype(int)
    assert np.abs(inside - (0.65 * 100 + 0.35 * COLOURS[0])).max() <= 1
    # the mask lacks the corners of its box: without the box's line, that is where the image shows
    corner = make_objects([[10.0, 5.0, 30.0, 25.0]])
    corner.boxes = torch.tensor([[40.0, 30.0, 50.0, 35.0]])
    picture = draw_objects(black(), corner, NAMES, regressed=False, labels=False, scale=scale)
    expected = np.zeros(SIZE, bool)
    expected[5:25, 10:30] = True
    expected[[5, 5, 24, 24], [10, 29, 10, 29]] = False
    expected[30:35, 40:50] = True
    expected = expected.repeat(scale, 0).repeat(scale, 1)
    expected[30 * scale + 1 : 35 * scale - 1, 40 * scale + 1 : 50 * scale - 1] = False
    np.testing.assert_array_equal(touched(picture), expected)
    assert not touched(draw_objects(black(), corner, NAMES, regressed=False, masks=False, labels=False, scale=1))[
        5:25, 10:30
    ].any()


def test_the_regressed_box_is_dashed():
    objects = make_objects([[10.0, 5.0, 30.0, 25.0]], regressed=[[4.0, 2.0, 50.0, 36.0]], masks=False)
    line = touched(draw_objects(black(), objects, NAMES, labels=False, scale=1))[2, 4:50]
    assert 0.3 < line.mean() < 0.8  # gaps
    assert line[0]
    without = draw_objects(black(), objects, NAMES, regressed=False, labels=False, scale=1)
    assert not touched(without)[2].any()


def test_the_regressed_box_is_left_out_where_refinement_changed_nothing():
    same = make_objects([[10.0, 5.0, 30.0, 25.0]])
    moved = make_objects([[10.0, 5.0, 30.0, 25.0]], regressed=[[10.3, 5.0, 30.0, 25.4]])
    pictures = [draw_objects(black(), objects, NAMES) for objects in (same, moved)]
    np.testing.assert_array_equal(*pictures)


def test_small_images_are_enlarged():
    for side, expected in ((60, 240), (200, 800), (256, 1024), (500, 1000), (900, 900)):
        objects = make_objects([])
        objects.image_size = (side // 2, side)
        assert draw_objects(black((side // 2, side)), objects, NAMES).shape == (expected // 2, expected, 3)


def test_labels_are_written_up_to_40_objects():
    few, many = ([[10.0, 10.0, 30.0, 25.0]] * n for n in (40, 41))
    for boxes, written in ((few, True), (many, False)):
        objects = make_objects(boxes)
        with_labels, without = (draw_objects(black(), objects, NAMES, labels=labels) for labels in (True, False))
        assert (with_labels != without).any() == written


def test_the_image_is_left_as_it_is():
    image = black()
    draw_objects(image, make_objects([[10.0, 5.0, 30.0, 25.0]]), NAMES, scale=1)
    assert not image.any()


def test_detections_give_the_same_picture_as_objects():
    objects = make_objects([[10.0, 5.0, 30.0, 25.0], [12.0, 20.0, 50.0, 36.0]], regressed=[[9.0, 3.0, 33.0, 25.0]] * 2)
    detections = to_detections(objects, NAMES)
    expected = draw_objects(black(), objects, NAMES)
    np.testing.assert_array_equal(draw_objects(black(), detections, NAMES), expected)
    detections.mask = detections.mask.to_dense()
    np.testing.assert_array_equal(draw_objects(black(), detections, NAMES), expected)


def test_truth_is_drawn_as_objects_are():
    objects = make_objects([[10.0, 5.0, 30.0, 25.0], [12.0, 20.0, 50.0, 36.0]])
    detections = to_detections(objects, NAMES)
    detections.confidence = None
    expected = draw_objects(black(), detections, NAMES)
    np.testing.assert_array_equal(draw_truth(black(), make_record(objects), NAMES), expected)


def test_truth_may_be_boxes_only():
    objects = make_objects([[10.0, 5.0, 30.0, 25.0]])
    picture = draw_truth(black(), make_record(objects, masks=False), ["", ""], scale=1)
    assert touched(picture)[24, 10:30].all()
    assert not touched(picture)[20:24, 11:29].any()


def test_crowds_are_grey():
    picture = draw_truth(black(), make_record(make_objects([[10.0, 5.0, 30.0, 25.0]]), crowd=True), NAMES, scale=1)
    assert picture[24, 20].tolist() == list(CROWD)


def test_the_band_lies_one_deviation_to_either_side_of_each_edge():
    objects = make_objects([[10.0, 5.0, 30.0, 25.0]], masks=False)
    objects.edge_std = torch.tensor([[2.0, 1.0, 3.0, 4.0]])
    picture = draw_objects(black(), objects, NAMES, labels=False, uncertainty=True, scale=1)
    expected = np.zeros(SIZE, bool)
    expected[4:29, 8:33] = True
    expected[6:21, 12:27] = False
    np.testing.assert_array_equal(touched(picture), expected)
    # half as strong as the edge's own line
    assert np.abs(picture[10, 8].astype(int) - 0.5 * COLOURS[0]).max() <= 1
    assert picture[10, 10].tolist() == COLOURS[0].tolist()
    assert not touched(draw_objects(black(), objects, NAMES, labels=False, scale=1))[10, 8]


def test_the_band_shows_fractions_of_a_pixel_and_ends_at_the_border():
    objects = make_objects([[1.0, 5.0, 30.0, 25.0]], masks=False)
    objects.edge_std = torch.tensor([[2.0, 0.25, 0.0, 0.0]])
    picture = draw_objects(black(), objects, NAMES, labels=False, uncertainty=True, scale=1).astype(int)
    assert np.abs(picture[4, 10] - 0.5 * 0.25 * COLOURS[0]).max() <= 1
    assert np.abs(picture[10, 0] - 0.5 * COLOURS[0]).max() <= 1
    assert not touched(picture)[25:].any()
    assert not touched(picture)[:, 30:].any()


def test_the_band_is_enlarged_with_the_picture():
    objects = make_objects([[10.0, 5.0, 30.0, 25.0]], masks=False)
    objects.edge_std = torch.full((1, 4), 0.5)
    picture = draw_objects(black(), objects, NAMES, labels=False, uncertainty=True, scale=4)
    line = touched(picture)[60]
    assert np.flatnonzero(line).tolist() == [38, 39, 40, 41, 118, 119, 120, 121]


def test_uncertainty_needs_deviations():
    objects = make_objects([[10.0, 5.0, 30.0, 25.0]])
    objects.edge_std[0, 2] = torch.nan
    detections = to_detections(objects, NAMES)
    del detections.data["edge_std"]
    for found in (objects, detections):
        with pytest.raises(ValueError, match="not refined by MBRM"):
            draw_objects(black(), found, NAMES, uncertainty=True)
    assert not draw_objects(black(), make_objects([]), NAMES, uncertainty=True).any()


def test_images_without_objects():
    objects = make_objects([])
    assert not draw_objects(black(), objects, NAMES).any()
    assert not draw_truth(black(), make_record(objects), NAMES).any()


def test_a_contact_sheet_puts_pictures_into_rows():
    pictures = [np.full((h, w, 3), value, np.uint8) for h, w, value in ((10, 20, 1), (12, 8, 2), (5, 30, 3))]
    sheet = contact_sheet(pictures, columns=2)
    assert sheet.shape == (12 + 8 + 5, 30 + 8 + 8, 3)
    assert (sheet[:10, :20] == 1).all()
    assert (sheet[:12, 38:] == 2).all()
    assert (sheet[20:, :30] == 3).all()
    assert (sheet[10:12, :38] == 255).all()
    assert contact_sheet(pictures[:1], columns=4).shape == (10, 20, 3)
    with pytest.raises(ValueError, match="expected pictures"):
        contact_sheet([], columns=2)


def test_captions_of_a_row_take_as_many_lines_each():
    pictures = [np.zeros((100, width, 3), np.uint8) for width in (100, 600)]
    short, long = captioned_row(pictures, ["one two three four five six seven eight"] * 2)
    assert short.shape[0] == long.shape[0] > captioned(pictures[1], "one").shape[0]
    assert (short[-100:] == 0).all() and (long[:-100] < 128).any()
    assert not (long[24:-100] < 128).any()  # one line is enough for it


def test_a_legend_breaks_into_rows():
    entries = [((255, 0, 0), "red things"), ((0, 0, 255), "blue things")]
    wide, narrow = (legend(entries, width, size=12) for width in (400, 120))
    assert wide.shape == (24, 400, 3)
    assert narrow.shape[1] == 120 and narrow.shape[0] > 24
    for picture in (wide, narrow):
        for colour, _ in entries:
            assert 80 <= (picture == colour).all(axis=2).sum() <= 169


def test_neighbours_have_other_colours():
    # a lattice whose boxes touch: each has 8 neighbours, and there are 10 colours
    lattice = [[10.0 * x, 10.0 * y, 10.0 * x + 10, 10.0 * y + 10] for x in range(20) for y in range(20)]
    order = np.random.default_rng(0).permutation(400)
    chosen = np.zeros(400, int)
    chosen[order] = distinct_colours(np.array(lattice)[order])
    grid = chosen.reshape(20, 20)
    assert (grid[1:] != grid[:-1]).all()
    assert (grid[:, 1:] != grid[:, :-1]).all()
    assert (grid[1:, 1:] != grid[:-1, :-1]).all()
    assert len(set(chosen.tolist())) == len(COLOURS)
    assert distinct_colours(np.zeros((0, 4))).shape == (0,)


def test_bad_input_is_an_error():
    with pytest.raises(ValueError, match="uint8 image"):
        draw_objects(np.zeros((*SIZE, 3), np.float32), make_objects([]), NAMES)
    with pytest.raises(ValueError, match=r"masks of the image's size \(20, 20\), got \(40, 60\)"):
        draw_objects(black((20, 20)), make_objects([[10.0, 5.0, 30.0, 25.0]]), NAMES)
