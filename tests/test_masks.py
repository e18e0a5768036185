"""From the mask grid to the image: crops made by matrices, against resizing the whole map (DESIGN.md 6.4, 6.5)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import masks_to_boxes

import make
from rdsnet.model.correlation import correlate, correlation_vectors
from rdsnet.model.cropping import CropRule, crop_windows
from rdsnet.model.masks import PastedMasks, axis_matrix

# size of the image in the network input, before padding; cells of the padded map at stride 4; size of the output
SIZES = [
    ((64, 96), (16, 24), (64, 96)),  # nothing to pad, nothing to resize
    ((61, 83), (16, 24), (61, 83)),  # padding is cut off
    ((50, 70), (16, 24), (101, 133)),  # enlarged by no integer
    ((50, 70), (16, 24), (37, 41)),  # made smaller
    ((33, 70), (16, 24), (500, 7)),  # the axes differ
    ((1, 2), (8, 8), (3, 1)),
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole_map(grid: Tensor, size: tuple[int, int], output_size: tuple[int, int], two_steps: bool) -> Tensor:
    """(N, h, w) on the padded grid of stride 4 -> (N, *output_size), by `F.interpolate` of everything."""
    maps = grid[None].double()
    if two_steps:
        network = F.interpolate(maps, scale_factor=4, mode="bilinear")[..., : size[0], : size[1]]
        return F.interpolate(network, size=output_size, mode="bilinear", align_corners=True)[0]
    scale = [4 * out / s for out, s in zip(output_size, size, strict=True)]
    image = F.interpolate(maps, scale_factor=scale, mode="bilinear", recompute_scale_factor=False)
    return image[0, :, : output_size[0], : output_size[1]]


@pytest.mark.parametrize("two_steps", [False, True])
@pytest.mark.parametrize(("size", "cells", "output_size"), SIZES)
def test_two_matrices_resize_as_interpolation_of_the_whole_map(
    size: tuple[int, int], cells: tuple[int, int], output_size: tuple[int, int], two_steps: bool
) -> None:
    grid = random(2, *cells)
    rows, columns = (axis_matrix(output_size[i], size[i], cells[i], 4, two_steps) for i in (0, 1))
    plain = whole_map(grid, size, output_size, two_steps).float()
    torch.testing.assert_close(rows @ grid @ columns.T, plain, rtol=0, atol=1e-5)


def test_a_cell_of_stride_two_lies_between_pixels() -> None:
    # cell centres at pixels 1 and 3, pixel centres at 0.5, 1.5, 2.5, 3.5; clamped at both ends
    expected = torch.tensor([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    assert torch.equal(axis_matrix(4, 4, 2, 2, False), expected)


def test_beside_the_image_the_padding_is_read_as_it_was_written() -> None:
    # 3 of 4 pixels are the image; pixel 2 lies a quarter of a cell before the centre of the padded cell
    assert axis_matrix(3, 3, 2, 2, False)[2].tolist() == [0.25, 0.75]


@pytest.mark.parametrize("two_steps", [False, True])
def test_a_map_of_one_cell_is_constant(two_steps: bool) -> None:
    assert torch.equal(axis_matrix(5, 4, 1, 4, two_steps), torch.ones(5, 1))


def paste(
    size: tuple[int, int],
    cells: tuple[int, int],
    output_size: tuple[int, int],
    boxes: Tensor,
    *,
    rule: CropRule = "centre",
    two_steps: bool = False,
    threshold: float = 0.4,
) -> tuple[PastedMasks, Tensor]:
    """Masks of random representations, and their probabilities on the whole image, zero outside the crop."""
    representations, pixels = random(len(boxes), 2, 8), random(8, *cells, seed=1)
    pasted = make.paste(
        make.masks(expand=1.2, threshold=threshold, crop_rule=rule, two_steps=two_steps),
        correlation_vectors(representations),
        pixels,
        boxes,
        size=size,
        output_size=output_size,
        step=(4, 4),
    )
    probability = whole_map(
        correlate(correlation_vectors(representations), pixels), size, output_size, two_steps
    ).sigmoid()
    inside = torch.zeros_like(probability)
    windows = crop_windows(boxes, output_size, expand=1.2, rule=rule).tolist()
    for n, (x0, y0, x1, y1) in enumerate(windows):
        inside[n, y0:y1, x0:x1] = 1
    return pasted, probability * inside


def some_boxes(output_size: tuple[int, int]) -> Tensor:
    """In the middle, at each corner, over the whole image and beyond, next to it, and without a pixel."""
    relative = torch.tensor(
        [
            [0.3, 0.3, 0.7, 0.6],
            [0.0, 0.0, 0.3, 0.4],
            [0.6, 0.7, 1.0, 1.0],
            [-0.5, -0.5, 1.5, 1.5],
            [2.0, 0.1, 3.0, 0.5],
            [0.5, 0.5, 0.5, 0.5],
        ]
    )
    return relative * torch.tensor(output_size).flip(0).repeat(2)


def full(pasted: PastedMasks, output_size: tuple[int, int]) -> Tensor:
    masks = torch.zeros(len(pasted.masks), *output_size, dtype=torch.bool)
    for whole, crop, (x0, y0, x1, y1) in zip(masks, pasted.masks, pasted.windows.tolist(), strict=True):
        whole[y0:y1, x0:x1] = crop
    return masks


@pytest.mark.parametrize(("rule", "two_steps"), [("centre", False), ("truncate", True)])
@pytest.mark.parametrize(("size", "cells", "output_size"), SIZES)
def test_crops_are_the_whole_maps_cropped_and_thresholded(
    size: tuple[int, int], cells: tuple[int, int], output_size: tuple[int, int], rule: CropRule, two_steps: bool
) -> None:
    boxes = some_boxes(output_size)
    pasted, probability = paste(size, cells, output_size, boxes, rule=rule, two_steps=two_steps)
    undecided = (probability - 0.4).abs() < 1e-6
    assert torch.equal(full(pasted, output_size) | undecided, (probability > 0.4) | undecided)
    assert not undecided.all()


@pytest.mark.parametrize(("rule", "two_steps"), [("centre", False), ("truncate", True)])
@pytest.mark.parametrize(("size", "cells", "output_size"), SIZES)
def test_profiles_are_the_maxima_of_the_whole_probability_maps(
    size: tuple[int, int], cells: tuple[int, int], output_size: tuple[int, int], rule: CropRule, two_steps: bool
) -> None:
    boxes = some_boxes(output_size)
    pasted, probability = paste(size, cells, output_size, boxes, rule=rule, two_steps=two_steps)
    torch.testing.assert_close(pasted.columns, probability.amax(dim=1).float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(pasted.rows, probability.amax(dim=2).float(), rtol=0, atol=1e-5)


def test_many_objects_of_all_sizes_are_pasted_as_one_by_one() -> None:
    """More objects than have their maps made at once, and of one more tiles than are made at once."""
    size, output_size = (64, 96), (640, 960)
    boxes = torch.cat([some_boxes(output_size)] * 4)
    together, probability = paste(size, (16, 24), output_size, boxes)
    undecided = (probability - 0.4).abs() < 1e-6
    assert torch.equal(full(together, output_size) | undecided, (probability > 0.4) | undecided)
    torch.testing.assert_close(together.columns, probability.amax(dim=1).float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(together.rows, probability.amax(dim=2).float(), rtol=0, atol=1e-5)


def test_profiles_are_exactly_zero_outside_the_crop() -> None:
    pasted, _ = paste((64, 96), (16, 24), (64, 96), torch.tensor([[20.0, 20, 40, 30]]))
    assert pasted.windows.tolist() == [[18, 19, 42, 31]]
    assert (pasted.columns[0] > 0).nonzero()[:, 0].tolist() == list(range(18, 42))
    assert (pasted.rows[0] > 0).nonzero()[:, 0].tolist() == list(range(19, 31))


def test_the_direct_box_encloses_the_mask() -> None:
    output_size = (101, 133)
    pasted, _ = paste((50, 70), (16, 24), output_size, some_boxes(output_size)[:4])
    inclusive = masks_to_boxes(full(pasted, output_size))
    assert torch.equal(pasted.direct_boxes, inclusive + torch.tensor([0, 0, 1, 1]))


def test_the_direct_box_of_an_empty_mask_is_nan() -> None:
    boxes = torch.tensor([[20.0, 20, 40, 30]])
    pasted, probability = paste((64, 96), (16, 24), (64, 96), boxes, threshold=0.999999)
    assert probability.max() < 0.999999
    assert pasted.direct_boxes.isnan().all()
    outside, _ = paste((64, 96), (16, 24), (64, 96), boxes + 1000)
    assert outside.masks[0].shape == (0, 0)
    assert outside.direct_boxes.isnan().all()
    assert outside.columns.count_nonzero() == 0


def test_a_mask_with_known_edges() -> None:
    """Foreground in cells 2..4 of each row and 1..2 of each column, stride 4, image and input of one size."""
    pixels = torch.full((1, 8, 8), -10.0)
    pixels[0, 1:3, 2:5] = 10
    pasted = make.paste(
        make.masks(expand=1.5, threshold=0.5),
        torch.tensor([[1.0]]),
        pixels,
        torch.tensor([[8.0, 4, 20, 12]]),
        size=(32, 32),
        output_size=(32, 32),
        step=(4, 4),
    )
    assert pasted.direct_boxes.tolist() == [[8, 4, 20, 12]]
    assert full(pasted, (32, 32)).sum() == 12 * 8 - 4  # interpolation takes a pixel off each corner


def test_no_objects_give_no_masks() -> None:
    pasted = make.paste(
        make.masks(),
        torch.zeros(0, 8),
        random(8, 16, 24),
        torch.zeros(0, 4),
        size=(64, 96),
        output_size=(64, 96),
        step=(4, 4),
    )
    assert pasted.masks == []
    assert pasted.columns.shape == (0, 96)
    assert pasted.rows.shape == (0, 64)
    assert pasted.direct_boxes.shape == (0, 4)
