"""Run-length codes of crops against pycocotools' code of the whole mask."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from rdsnet.rle import crop_to_rle, crop_to_runs, mask_crop

SIZE = (12, 17)
WINDOWS = {
    "inside": (4, 3, 9, 8),
    "left": (0, 3, 5, 8),
    "top": (4, 0, 9, 5),
    "right": (10, 3, 17, 8),
    "bottom": (4, 7, 9, 12),
    "all rows": (4, 0, 9, 12),
    "all columns": (0, 3, 17, 8),
    "whole image": (0, 0, 17, 12),
    "last pixel": (16, 11, 17, 12),
    "no columns": (4, 3, 4, 8),
    "no rows": (4, 3, 9, 3),
    "no pixels at the corner": (17, 12, 17, 12),
}


def whole_image_rle(mask: np.ndarray, window: tuple[int, int, int, int]) -> dict:
    x0, y0, x1, y1 = window
    image = np.zeros(SIZE, np.uint8)
    image[y0:y1, x0:x1] = mask
    rle = coco_mask.encode(np.asfortranarray(image))
    return {**rle, "counts": rle["counts"].decode()}


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
@pytest.mark.parametrize("density", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_the_code_of_a_crop_is_that_of_the_mask_in_its_image(window, density):
    x0, y0, x1, y1 = window
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = rng.random((y1 - y0, x1 - x0)) < density
        assert crop_to_rle(mask, window, SIZE) == whole_image_rle(mask, window)


def test_the_crop_of_a_mask_is_its_rectangle():
    mask = np.array([[False, True, True], [True, False, False]])
    inside = np.pad(mask, ((2, 1), (1, 3)))
    crop, window = mask_crop(crop_to_rle(inside, (4, 3, 11, 8), SIZE))
    np.testing.assert_array_equal(crop, mask)
    assert window == (5, 5, 8, 7)
    crop, window = mask_crop(crop_to_rle(np.zeros_like(inside), (4, 3, 11, 8), SIZE))
    assert (crop.shape, window) == ((0, 0), (0, 0, 0, 0))


def test_runs_count_down_the_columns_background_first():
    # 3 rows, 4 columns; the crop is rows 1..2 of columns 1..2, filled: column 1 has pixels 4 and 5, column 2 has 7, 8
    assert crop_to_runs(np.ones((2, 2), bool), (1, 1, 3, 3), (3, 4)).tolist() == [4, 2, 1, 2, 3]


def test_runs_that_meet_from_column_to_column_are_one():
    assert crop_to_runs(np.ones((3, 4), bool), (0, 0, 4, 3), (3, 4)).tolist() == [0, 12]


@pytest.mark.parametrize(
    ("window", "message"),
    [((0, 0, 2, 3), "for the window"), ((-1, 0, 2, 2), "window inside 17 x 12"), ((15, 0, 18, 2), "window inside")],
)
def test_a_window_that_does_not_fit_is_an_error(window, message):
    with pytest.raises(ValueError, match=message):
        crop_to_rle(np.ones((2, 3), bool), window, SIZE)
