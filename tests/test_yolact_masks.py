"""YOLACT's rules for masks, against the plain forms with whole maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import make
from rdsnet.model.correlation import correlate
from rdsnet.model.mask_rules import YolactMasks, in_cells, padded_windows
from rdsnet.model.masks import PastedMasks
from rdsnet.structures import Targets

D = 6


def rules(**settings: Any) -> YolactMasks:
    return YolactMasks(**{"max_instances": 100, "threshold": 0.5, **settings})


def drawn(count: int, h: int, w: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Vectors (count, D) and pixels (D, h, w), smooth enough that masks have an inside."""
    generator = torch.Generator().manual_seed(seed)
    rough = torch.randn(1, D, 4, 5, generator=generator).relu()
    return (
        torch.randn(count, D, generator=generator).tanh(),
        F.interpolate(rough, (h, w), mode="bilinear", align_corners=False)[0],
    )


def truth(boxes: list[list[float]], masks: Tensor, has_mask: list[bool] | None = None) -> Targets:
    n = len(boxes)
    return Targets(
        boxes=torch.tensor(boxes).view(-1, 4),
        labels=torch.zeros(n, dtype=torch.int64),
        masks=masks,
        has_mask=torch.tensor(has_mask or [True] * n),
        areas=torch.zeros(n),
        image_size=(64, 64),
    )


# --- crop ---


def test_a_crop_has_the_cells_whose_index_is_within_a_cell_of_the_box() -> None:
    boxes = torch.tensor([[3.0, 4, 6, 7], [2.1, 2.9, 5.1, 5.9], [-5, -5, 2, 2], [8, 8, 30, 30]])
    # indices 2..6 for 3..6, as 7 is not below 6 + 1; 1.1 to 6.1 leaves 2..6
    assert padded_windows(boxes, (10, 12)).tolist() == [[2, 3, 7, 8], [2, 2, 7, 7], [0, 0, 3, 3], [7, 7, 12, 10]]


def test_a_box_far_outside_leaves_no_cell() -> None:
    boxes = torch.tensor([[14.0, 2, 20, 8], [-9, 2, -2, 8], [2, 12, 8, 20]])
    assert padded_windows(boxes, (10, 12)).tolist() == [[0, 0, 0, 0]] * 3


def test_a_whole_number_of_cells_comes_out_as_one() -> None:
    """138 cells over 115 pixels: 25 pixels are 30 cells, where float32 has 30.000002 and would begin a cell later."""
    cells = in_cells(torch.tensor([[25.0, 0, 45, 115]]), (115 / 138, 115 / 138))
    assert cells.tolist() == [[30, 0, 54, 138]]


# --- loss ---


def plain_loss(vectors: Tensor, pixels: Tensor, objects: Tensor, targets: Targets, step: tuple[float, float]) -> Tensor:
    """Probabilities of the whole map, set to 0 outside the crop."""
    total = torch.zeros(())
    for vector, i in zip(vectors, objects.tolist(), strict=True):
        x1, y1, x2, y2 = (targets.boxes[i] / torch.tensor([step[1], step[0]]).repeat(2)).tolist()
        y, x = torch.arange(pixels.shape[1])[:, None], torch.arange(pixels.shape[2])
        inside = (x >= x1 - 1) & (x < x2 + 1) & (y >= y1 - 1) & (y < y2 + 1)
        probabilities = correlate(vector[None], pixels)[0].sigmoid() * inside
        loss = F.binary_cross_entropy(probabilities, targets.masks[i].float(), reduction="sum")
        total = total + loss / (x2 - x1) / (y2 - y1)
    return total


def test_the_loss_and_its_gradient_are_those_of_whole_maps() -> None:
    vectors, pixels = drawn(7, 16, 20)
    boxes = [[5.0, 9, 33, 41], [20, 2, 76, 30], [-6, 30, 21, 70]]
    masks = torch.rand(3, 16, 20) > 0.6  # with cells outside the crops
    target, objects = truth(boxes, masks), torch.tensor([1, 0, 2, 1, 1, 0, 0])
    gradients, losses = [], []
    for form in (plain_loss, None):
        leaves = vectors.clone().requires_grad_(), pixels.clone().requires_grad_()
        loss = (
            make.mask_loss(rules(), *leaves, objects, target, step=(4, 3.9), positives=7)
            if form is None
            else form(*leaves, objects, target, (4, 3.9))
        )
        gradients.append(torch.autograd.grad(loss, leaves))
        losses.append(loss)
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_a_cell_of_the_object_outside_its_crop_costs_100() -> None:
    masks = torch.zeros(1, 16, 16, dtype=torch.bool)
    masks[0, 15, 15] = True
    target = truth([[0.0, 0, 8, 8]], masks)
    certain = -1000 * torch.ones(1, 16, 16)  # nothing anywhere, which is right inside
    loss = make.mask_loss(rules(), torch.ones(1, 1), certain, torch.tensor([0]), target, step=(4, 4), positives=1)
    torch.testing.assert_close(loss, torch.tensor(100 / 4))  # the box has 2 x 2 cells


def test_instances_that_were_drawn_stand_for_all() -> None:
    vectors, pixels = drawn(4, 16, 16)
    target, objects = truth([[5.0, 9, 33, 41]], torch.rand(1, 16, 16) > 0.5), torch.zeros(4, dtype=torch.int64)

    def loss(limit: int, positives: int) -> Tensor:
        return make.mask_loss(
            rules(max_instances=limit), vectors, pixels, objects, target, step=(4, 4), positives=positives
        )

    torch.testing.assert_close(loss(4, 10), 2.5 * loss(5, 4))
    torch.testing.assert_close(loss(5, 10), loss(5, 4))  # the other six have no mask


def test_no_instances_make_no_loss() -> None:
    vectors, pixels = drawn(0, 16, 16)
    target = truth([], torch.zeros(0, 16, 16, dtype=torch.bool))
    assert (
        make.mask_loss(rules(), vectors, pixels, torch.zeros(0, dtype=torch.int64), target, step=(4, 4), positives=0)
        == 0
    )
    assert rules().divisor(torch.tensor(0.0), torch.tensor(0.0)) == 1
    assert rules().divisor(torch.tensor(7.0), torch.tensor(3.0)) == 7


def test_positives_with_a_mask_are_drawn_at_random() -> None:
    target = truth([[0.0, 0, 8, 8]] * 2, torch.zeros(2, 16, 16, dtype=torch.bool), has_mask=[True, False])
    objects = torch.tensor([0, 1] * 10)
    everything = rules().choose(objects, target, None)
    assert everything.tolist() == list(range(0, 20, 2))
    few = [rules(max_instances=4).choose(objects, target, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert all(len(chosen) == 4 and (objects[chosen] == 0).all() for chosen in few)
    assert few[0].tolist() == few[1].tolist() != few[2].tolist()


# --- paste ---


def plain_paste(
    vectors: Tensor, pixels: Tensor, boxes: Tensor, size: tuple[int, int], output: tuple[int, int], step: float
) -> Tensor:
    """(N, H, W) probabilities: whole maps, cropped on the grid, then resized, then cut to the image."""
    padded = [round(cells * step * out / side) for cells, out, side in zip(pixels.shape[1:], output, size, strict=True)]
    probabilities = correlate(vectors, pixels).sigmoid()
    scale = torch.tensor([size[1] / output[1] / step, size[0] / output[0] / step]).repeat(2)
    y, x = torch.arange(pixels.shape[1])[:, None], torch.arange(pixels.shape[2])
    for plane, (x1, y1, x2, y2) in zip(probabilities, (boxes * scale).tolist(), strict=True):
        plane *= (x >= x1 - 1) & (x < x2 + 1) & (y >= y1 - 1) & (y < y2 + 1)
    whole = F.interpolate(probabilities[None], padded, mode="bilinear", align_corners=False)[0]
    return whole[:, : output[0], : output[1]]


@pytest.mark.parametrize(
    ("size", "output"),
    [((64, 80), (64, 80)), ((64, 80), (200, 150)), ((64, 80), (20, 10)), ((48, 60), (96, 120))],
    ids=["same", "larger", "smaller", "padded"],
)
@pytest.mark.parametrize("threshold", [0.5, 0.6])
def test_masks_and_profiles_are_those_of_whole_maps(
    size: tuple[int, int], output: tuple[int, int], threshold: float
) -> None:
    vectors, pixels = drawn(5, 16, 20)
    h, w = output
    boxes = torch.tensor(
        [[0.11, 0.22, 0.63, 0.74], [-0.3, 0.33, 0.44, 1.4], [0.51, 0.51, 0.53, 0.52], [0, 0, 1, 1], [2, 2, 3, 3]]
    )
    boxes = boxes * torch.tensor([w, h, w, h])
    pasted = make.paste(rules(threshold=threshold), vectors, pixels, boxes, size=size, output_size=output, step=(4, 4))
    expected = plain_paste(vectors, pixels, boxes, size, output, 4)
    check_pasted(pasted, expected, threshold)
    assert pasted.windows[4].tolist() == [0, 0, 0, 0]


def check_pasted(pasted: PastedMasks, expected: Tensor, threshold: float) -> None:
    torch.testing.assert_close(pasted.columns, expected.amax(dim=1), atol=1e-5, rtol=0)
    torch.testing.assert_close(pasted.rows, expected.amax(dim=2), atol=1e-5, rtol=0)
    for n, (mask, (x0, y0, x1, y1)) in enumerate(zip(pasted.masks, pasted.windows.tolist(), strict=True)):
        whole = torch.zeros_like(expected[n], dtype=torch.bool)
        whole[y0:y1, x0:x1] = mask
        sure = (expected[n] - threshold).abs() > 1e-5
        assert (whole == (expected[n] > threshold))[sure].all()
        if whole.any():
            rows, columns = whole.any(dim=1).nonzero()[:, 0], whole.any(dim=0).nonzero()[:, 0]
            box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            assert pasted.direct_boxes[n].tolist() == [float(i) for i in box]
        else:
            assert pasted.direct_boxes[n].isnan().any()


def test_a_mask_reaches_a_cell_beyond_its_box_and_two_on_the_right() -> None:
    """Cells 2..6 are kept of a box of cells 3..6 of 10 pixels; half a cell more comes with the interpolation."""
    boxes = torch.tensor([[30.0, 30, 60, 60]])
    pasted = make.paste(
        rules(),
        torch.ones(1, 1),
        torch.full((1, 10, 10), 9.0),
        boxes,
        size=(100, 100),
        output_size=(100, 100),
        step=(10, 10),
    )
    # centre of cell 2 at 25: the probability is 1 from there on, and 1/2 at 20; centre of cell 6 at 65, 1/2 at 70
    assert pasted.direct_boxes.tolist() == [[20, 20, 70, 70]]
    assert pasted.windows.tolist() == [[15, 15, 75, 75]]  # where cells 2 and 6 count at all


def test_no_objects_make_no_masks() -> None:
    vectors, pixels = drawn(0, 16, 16)
    pasted = make.paste(rules(), vectors, pixels, torch.zeros(0, 4), size=(64, 64), output_size=(64, 64), step=(4, 4))
    assert pasted.masks == []
    assert pasted.columns.shape == (0, 64)
    assert pasted.direct_boxes.shape == (0, 4)


def test_a_threshold_is_a_probability() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        rules(threshold=1.0)
