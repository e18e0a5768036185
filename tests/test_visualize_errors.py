"""Errors against the truth: which objects count as missed or false, and the colours that show it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import make
from rdsnet.results.matching import match_truth
from rdsnet.rle import crop_to_rle
from rdsnet.structures import Objects
from rdsnet.visualize.errors import EXCESS, FALSE, FOUND, LACKING, MISSED, WRONG, comparison, draw_errors

SIZE = (40, 60)
GREY = 50 + 255 // 2  # what a white image becomes
Box = tuple[int, int, int, int]


def found(boxes: list[Box], labels: list[int] | None = None, *, masks: bool = True) -> Objects:
    """Objects whose masks fill their boxes, by descending score."""
    fields = {} if masks else {"masks": []}
    return make.objects(boxes, size=SIZE, labels=torch.tensor(labels or [0] * len(boxes), dtype=torch.int64), **fields)


def truth(boxes: list[Box], labels: list[int] | None = None, *, masks: bool = True, crowd: int = -1) -> SimpleNamespace:
    annotations = []
    for i, box in enumerate(boxes):
        filled = np.ones((box[3] - box[1], box[2] - box[0]), bool)
        rle = crop_to_rle(filled, box, SIZE) if masks else None
        label = (labels or [0] * len(boxes))[i]
        annotations.append(SimpleNamespace(label=label, box=box, rle=rle, crowd=i == crowd))
    return SimpleNamespace(height=SIZE[0], width=SIZE[1], annotations=annotations)


def white() -> np.ndarray:
    return np.full((*SIZE, 3), 255, np.uint8)


def errors(objects: Objects, record: SimpleNamespace, scale: int = 1) -> np.ndarray:
    return draw_errors(white(), objects, record, match_truth(objects, record), scale=scale)


def over_grey(colour: tuple[int, int, int]) -> np.ndarray:
    return (1 - WRONG) * GREY + WRONG * np.array(colour)


def test_what_overlaps_by_half_is_found_and_the_rest_is_missed_or_false():
    objects = found([(0, 0, 10, 10), (20, 0, 30, 10), (40, 0, 50, 10)])
    record = truth([(45, 0, 55, 10), (0, 0, 10, 20), (20, 1, 30, 11)])
    matches = match_truth(objects, record)  # IoU 1/2, 9/11, 1/3
    assert matches.pairs == [(0, 1, 0.5), (1, 2, pytest.approx(9 / 11))]
    assert (matches.missed, matches.false) == ([0], [2])


def test_an_object_is_found_once_by_the_best_score():
    matches = match_truth(found([(0, 0, 10, 9), (0, 0, 10, 10)]), truth([(0, 0, 10, 10)]))
    assert matches.pairs == [(0, 0, pytest.approx(0.9))]
    assert matches.false == [1]


def test_another_class_finds_nothing():
    matches = match_truth(found([(0, 0, 10, 10)], [1]), truth([(0, 0, 10, 10)], [0]))
    assert (matches.pairs, matches.missed, matches.false) == ([], [0], [0])


def test_detections_in_a_crowd_are_neither_right_nor_wrong():
    record = truth([(0, 0, 40, 40), (0, 0, 10, 10)], crowd=0)
    matches = match_truth(found([(0, 0, 10, 10), (20, 20, 30, 30), (45, 0, 55, 10)]), record)
    assert [pair[:2] for pair in matches.pairs] == [(0, 1)]
    assert (matches.missed, matches.false) == ([], [2])
    assert match_truth(found([]), record).missed == [1]


def test_without_masks_boxes_decide():
    for objects_have, truth_has in ((False, True), (True, False), (False, False)):
        objects = found([(0, 0, 10, 10)], masks=objects_have)
        record = truth([(0, 0, 10, 8)], masks=truth_has)
        assert match_truth(objects, record).pairs == [(0, 0, pytest.approx(0.8))]


@pytest.mark.parametrize("scale", [1, 3])
def test_pixels_that_differ_have_their_colours(scale):
    picture = errors(found([(10, 10, 20, 20)]), truth([(12, 10, 22, 20)]), scale)[
        scale // 2 :: scale, scale // 2 :: scale
    ]
    assert (picture[10:20, 10:12] == EXCESS).all()
    assert (picture[10:20, 20:22] == LACKING).all()
    assert (picture[11:19, 12:19] == GREY).all()
    assert (picture[25:] == GREY).all() and (picture[:, :10] == GREY).all() and (picture[:, 22:] == GREY).all()


def test_masks_are_compared_where_they_lie_in_the_image():
    objects, record = found([(10, 10, 20, 20)]), truth([(12, 11, 22, 21)])
    objects.masks[0][5, 5] = False  # pixel (15, 15)
    hole = np.ones((10, 10), bool)
    hole[6, 3] = False  # pixel (17, 15)
    record.annotations[0].rle = crop_to_rle(hole, (12, 11, 22, 21), SIZE)
    picture = errors(objects, record)
    inner = picture[12:19, 13:19]
    assert np.argwhere((inner == LACKING).all(axis=2)).tolist() == [[3, 2]]
    assert np.argwhere((inner == EXCESS).all(axis=2)).tolist() == [[5, 2]]


def test_a_perfect_mask_has_a_white_outline_only():
    picture = errors(found([(10, 10, 20, 20)]), truth([(10, 10, 20, 20)]))
    outline = np.zeros(SIZE, bool)
    outline[10:20, 10:20] = True
    outline[11:19, 11:19] = False
    np.testing.assert_array_equal((picture == FOUND).all(axis=2), outline)
    assert (picture[~outline] == GREY).all()


def test_missed_and_false_objects_are_filled():
    picture = errors(found([(40, 10, 50, 20)]), truth([(10, 10, 20, 20)]))
    for x, colour in ((10, MISSED), (40, FALSE)):
        assert (picture[10, x : x + 10] == colour).all()
        assert np.abs(picture[15, x + 5] - over_grey(colour)).max() <= 1
    assert (picture[15, 25:35] == GREY).all()


def test_boxes_without_masks_are_outlined():
    objects = found([(40, 10, 50, 20), (2, 2, 8, 8)], masks=False)
    picture = errors(objects, truth([(10, 10, 20, 20), (2, 2, 8, 8)]))
    for x, y, colour in ((10, 10, MISSED), (40, 10, FALSE), (2, 2, FOUND)):
        assert (picture[y, x : x + 6] == colour).all()
        assert (picture[y + 3, x + 3] == GREY).all()


def test_a_dark_image_is_seen_behind_its_errors():
    image = np.zeros((*SIZE, 3), np.uint8)
    image[20:, :] = 40
    picture = draw_errors(image, found([]), truth([]), match_truth(found([]), truth([])), scale=1)
    assert picture[0, 0].tolist() == [50] * 3
    assert picture[39, 0].tolist() == [GREY] * 3
    image[20:] = 8  # hardly more than noise
    picture = draw_errors(image, found([]), truth([]), match_truth(found([]), truth([])), scale=1)
    assert picture[39, 0].tolist() == [50 + 64 // 2] * 3


def test_a_comparison_has_truth_prediction_and_errors():
    record = truth([(10, 10, 20, 20), (40, 10, 50, 20)])
    objects = found([(10, 10, 20, 20), (30, 25, 40, 35)])  # scores 0.9 and 0.6
    image = np.zeros((*SIZE, 3), np.uint8)
    page = comparison(image, objects, record, ["cat"], scale=4)
    assert page.shape[1] == 3 * 240 + 2 * 8
    top = int(np.flatnonzero((page[:, 0] == 0).all(axis=1))[0])  # the captions end, the images begin
    left, middle, right = (page[top : top + 160, x : x + 240] for x in (0, 248, 496))
    assert left[40:80, 40:80].any() and left[40:80, 160:200].any() and not left[100:140, 120:160].any()
    assert middle[40:80, 40:80].any() and not middle[40:80, 160:200].any() and middle[100:140, 120:160].any()
    assert (right[40:80, 160:200] == MISSED).all(axis=2).any() and (right[100:140, 120:160] == FALSE).all(axis=2).any()
    below = page[top + 160 :, 496:]
    for colour in (MISSED, FALSE, LACKING, EXCESS):
        assert (below == colour).all(axis=2).any()  # the legend
    above = comparison(image, objects, record, ["cat"], threshold=0.7, scale=4)[top : top + 160, 496:]
    assert not (above == FALSE).all(axis=2).any()


def test_a_comparison_of_nothing():
    image = np.zeros((*SIZE, 3), np.uint8)
    assert comparison(image, found([]), truth([]), ["cat", "dog"], scale=1).shape[1] == 3 * 60 + 16


def test_other_sizes_are_an_error():
    objects, record = found([]), truth([])
    matches = match_truth(objects, record)
    with pytest.raises(ValueError, match=r"record's \(height, width\) \(40, 60\), got \(30, 60\)"):
        draw_errors(np.zeros((30, 60, 3), np.uint8), objects, record, matches)
    objects.image_size = (30, 60)
    with pytest.raises(ValueError, match="objects'"):
        draw_errors(white(), objects, record, matches)
    with pytest.raises(ValueError, match="uint8 image"):
        draw_errors(np.zeros(SIZE, np.uint8), objects, record, matches)
