"""Crops (3.2): how far a box is expanded, and which cells of a map lie inside."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rdsnet.model.cropping import crop_windows, expand_boxes, resize_boxes

NOTHING = [0, 0, 0, 0]


def boxes(*rows: tuple[float, float, float, float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32).view(-1, 4)


def window(box: tuple[float, float, float, float], size: tuple[int, int], **rule: object) -> list[int]:
    return crop_windows(boxes(box), size, **rule)[0].tolist()  # type: ignore[arg-type]


def test_a_box_is_scaled_about_its_centre() -> None:
    box = boxes((10, 20, 30, 60))
    assert expand_boxes(box, 1.5).tolist() == [[5, 10, 35, 70]]
    torch.testing.assert_close(expand_boxes(box, 1.2), boxes((8, 16, 32, 64)))
    assert torch.equal(expand_boxes(box, 1.0), box)


def test_resizing_multiplies() -> None:
    assert resize_boxes(boxes((1, 2, 3, 5)), (2, 10)).tolist() == [[2, 20, 6, 50]]


def test_the_release_resizes_the_last_pixel_instead() -> None:
    # columns 1..2 inclusive, times 2: 2..4 inclusive, so x2 = 5
    assert resize_boxes(boxes((1, 2, 3, 5)), (2, 10), inclusive=True).tolist() == [[2, 20, 5, 41]]


def test_a_cell_belongs_to_the_crop_if_its_centre_does() -> None:
    assert window((2, 1, 5, 4), (10, 10), expand=1) == [2, 1, 5, 4]
    assert window((2.4, 1, 5.4, 4), (10, 10), expand=1) == [2, 1, 5, 4]
    assert window((2.6, 1, 5.6, 4), (10, 10), expand=1) == [3, 1, 6, 4]


def test_a_centre_on_the_first_edge_is_inside_and_on_the_last_is_outside() -> None:
    assert window((2.5, 1, 5.5, 4), (10, 10), expand=1) == [2, 1, 5, 4]


def test_the_crop_of_training_on_the_mask_grid() -> None:
    # on the grid of stride 4 the box is (4, 6, 12, 8); 1.5 times: (2, 5.5, 14, 8.5)
    assert window((16, 24, 48, 32), (20, 30), expand=1.5, step=(4, 4)) == [2, 5, 14, 8]


def test_the_crop_of_inference() -> None:
    assert window((10, 20, 30, 60), (100, 50), expand=1.2) == [8, 16, 32, 64]


def test_a_crop_ends_with_the_map() -> None:
    # rows and columns are not exchanged: the map is 8 high and 20 wide
    assert window((-5, -5, 50, 50), (8, 20), expand=1.2) == [0, 0, 20, 8]
    assert window((15, 2, 19, 7), (8, 20), expand=1.5) == [14, 1, 20, 8]


@pytest.mark.parametrize(
    "box",
    [
        (2.6, 1.0, 3.4, 4.0),  # between two centres
        (3.0, 3.0, 3.0, 9.0),  # no width
        (30.0, 2.0, 40.0, 6.0),  # right of the map
        (2.0, -9.0, 6.0, -3.0),  # above it
    ],
)
def test_a_crop_without_cells_is_all_zeros(box: tuple[float, float, float, float]) -> None:
    assert window(box, (8, 20), expand=1) == NOTHING


def test_no_boxes_give_no_crops() -> None:
    assert crop_windows(boxes(), (8, 20), expand=1.5).shape == (0, 4)


corner = st.floats(-30, 60, width=32)
extent = st.floats(0, 60, width=32)


@given(corner, corner, extent, extent, st.sampled_from([1.0, 1.2, 1.5]), st.sampled_from([1, 4]))
def test_a_crop_holds_the_cells_whose_centres_lie_in_the_expanded_box(
    x: float, y: float, w: float, h: float, expand: float, stride: int
) -> None:
    box = boxes((x, y, x + w, y + h))
    x0, y0, x1, y1 = (expand_boxes(box / stride, expand)[0]).tolist()
    rows, columns = torch.arange(9) + 0.5, torch.arange(13) + 0.5
    inside = ((rows >= y0) & (rows < y1))[:, None] & ((columns >= x0) & (columns < x1))

    left, top, right, bottom = crop_windows(box, (9, 13), expand=expand, step=(stride, stride))[0].tolist()
    crop = torch.zeros(9, 13, dtype=torch.bool)
    crop[top:bottom, left:right] = True
    assert torch.equal(crop, inside)


def test_the_release_truncates_and_leaves_the_last_column_out() -> None:
    # columns 10..20 inclusive are 11 wide: 1.1 is added on each side, (8.9, 21.1) truncated is 8 to 21
    assert window((10, 10, 21, 21), (50, 50), expand=1.2, rule="truncate") == [8, 8, 21, 21]
    # without expansion nothing is added, and column 20 is left out
    assert window((10, 10, 21, 21), (50, 50), expand=1, rule="truncate") == [10, 10, 20, 20]


def test_the_release_adds_at_least_one_cell() -> None:
    # columns 10..13 inclusive: 0.1 * 4 is less than the one cell that is added
    assert window((10, 10, 14, 14), (50, 50), expand=1.2, rule="truncate") == [9, 9, 14, 14]


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown crop rule 'round'; valid are centre, truncate"):
        window((0, 0, 1, 1), (2, 2), expand=1, rule="round")
