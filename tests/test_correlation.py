"""Correlation (Eq. 1) and the mask loss with OHEM, against their plain forms."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import make
from rdsnet.model.correlation import correlate, correlation_vectors, draw_instances, mask_terms
from rdsnet.structures import Targets


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def two_channel_logits(representations: Tensor, pixels: Tensor) -> Tensor:
    """(N, 2, h, w): Eq. 1 as it is written, before its softmax."""
    return torch.einsum("nkd,dhw->nkhw", representations, pixels)


def plain_term(losses: Tensor, target: Tensor, ratio: float | None) -> Tensor:
    """Cross entropy of one instance's crop (h, w), its background losses sorted."""
    foreground, background = losses[target], losses[~target].sort(descending=True).values
    if ratio is not None:
        background = background[: int(ratio * len(foreground))]
    return (foreground.sum() + background.sum()) / (len(foreground) + len(background) + 1)


def test_the_sigmoid_of_the_difference_is_the_softmax_over_background_and_foreground() -> None:
    representations, pixels = random(3, 2, 8), random(8, 5, 7, seed=1)
    softmax = two_channel_logits(representations, pixels).softmax(dim=1)
    torch.testing.assert_close(correlate(correlation_vectors(representations), pixels).sigmoid(), softmax[:, 1])


def test_correlation_of_a_part_is_the_part_of_the_correlation() -> None:
    representations, pixels = random(3, 2, 8), random(8, 5, 7, seed=1)
    whole = correlate(correlation_vectors(representations), pixels)
    torch.testing.assert_close(correlate(correlation_vectors(representations), pixels[:, 1:4, 2:6]), whole[:, 1:4, 2:6])


def test_the_loss_on_differences_is_the_two_class_cross_entropy() -> None:
    representations, pixels = random(3, 2, 8), random(8, 5, 7, seed=1)
    target = random(5, 7, seed=2) > 0
    both = two_channel_logits(representations, pixels)
    plain = F.cross_entropy(both, target.long().expand(3, 5, 7), reduction="none").sum(dim=(1, 2))
    terms = mask_terms(correlate(correlation_vectors(representations), pixels), target, None)
    torch.testing.assert_close(terms * (5 * 7 + 1), plain)


@pytest.mark.parametrize("ratio", [None, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("foreground", [0, 1, 6, 12, 29, 30])  # of 30 pixels: from 15 on there are too few others
def test_mining_is_a_sort_of_the_background_losses(ratio: float | None, foreground: int) -> None:
    target = torch.zeros(30, dtype=torch.bool)
    target[torch.randperm(30, generator=torch.Generator().manual_seed(3))[:foreground]] = True
    target = target.view(5, 6)
    logits = random(2, 5, 6)
    losses = F.binary_cross_entropy_with_logits(logits, target.expand(2, 5, 6).double(), reduction="none")
    plain = torch.stack([plain_term(one, target, ratio) for one in losses])
    torch.testing.assert_close(mask_terms(logits, target, ratio), plain)


@pytest.mark.parametrize("ratio", [None, 1.0, 3.0])
def test_mining_has_the_gradient_of_the_sort(ratio: float | None) -> None:
    target = random(6, 7, seed=4) > 0.6
    logits, plain_logits = random(2, 6, 7).requires_grad_(), random(2, 6, 7).requires_grad_()
    mask_terms(logits, target, ratio).sum().backward()
    losses = F.binary_cross_entropy_with_logits(plain_logits, target.expand(2, 6, 7).double(), reduction="none")
    torch.stack([plain_term(one, target, ratio) for one in losses]).sum().backward()
    torch.testing.assert_close(logits.grad, plain_logits.grad)


def test_tied_background_losses_count_as_often_as_they_are_kept() -> None:
    # 2 foreground pixels at logit 0, six background ones at 0: two of these are kept, and 4 ln 2 / (2 + 2 + 1) is left
    target = torch.tensor([[True, True, False, False], [False, False, False, False]])
    terms = mask_terms(torch.zeros(1, 2, 4), target, 1.0)
    assert terms.item() == pytest.approx(4 * math.log(2) / 5)


def test_the_hardest_background_is_kept() -> None:
    # one foreground pixel, so one background pixel: the one believed to be foreground most
    target = torch.tensor([[True, False, False]])
    logits = torch.tensor([[[0.0, 3.0, -1.0]]], requires_grad=True)
    mask_terms(logits, target, 1.0).sum().backward()
    assert logits.grad is not None
    assert (logits.grad[0, 0] != 0).tolist() == [True, True, False]


def test_a_crop_without_foreground_has_no_loss_with_mining_and_a_mean_without() -> None:
    nothing = torch.zeros(2, 2, dtype=torch.bool)
    assert mask_terms(torch.zeros(1, 2, 2), nothing, 1.0).item() == 0
    assert mask_terms(torch.zeros(1, 2, 2), nothing, None).item() == pytest.approx(4 * math.log(2) / 5)


@pytest.mark.parametrize("ratio", [None, 1.0])
def test_the_gradient_of_the_mask_terms_is_right(ratio: float | None) -> None:
    target = random(4, 5, seed=5) > 0.3
    assert torch.autograd.gradcheck(lambda x: mask_terms(x, target, ratio), random(2, 4, 5).requires_grad_())


@pytest.mark.parametrize("ratio", [None, 1.0])
def test_terms_are_the_same_for_a_caller_who_knows_the_foreground(ratio: float | None) -> None:
    target, logits = random(6, 7, seed=4) > 0.6, random(2, 6, 7)
    known = mask_terms(logits, target, ratio, foreground=int(target.sum()))
    assert torch.equal(known, mask_terms(logits, target, ratio))


@pytest.mark.parametrize("where", [(0, 0), (5, 6)])  # in the foreground, in the background
def test_a_logit_that_is_not_a_number_shows_in_the_loss(where: tuple[int, int]) -> None:
    target = torch.zeros(6, 7, dtype=torch.bool)
    target[:2, :3] = True
    logits = random(1, 6, 7)
    logits[0, where[0], where[1]] = torch.nan
    assert mask_terms(logits, target, 1.0).isnan().all()


def two_squares() -> Targets:
    """Objects of 4 x 4 cells at the top left and 2 x 2 cells in the middle of a 12 x 16 grid of stride 4."""
    masks = torch.zeros(3, 12, 16, dtype=torch.bool)
    masks[0, 0:4, 0:4] = True
    masks[1, 5:7, 7:9] = True
    return Targets(
        # the third lies between the centres of cells, even 1.5 times as large
        boxes=torch.tensor([[0.0, 0, 16, 16], [28, 20, 36, 28], [42.5, 42.5, 43.5, 43.5]]),
        labels=torch.zeros(3, dtype=torch.int64),
        masks=masks,
        has_mask=torch.ones(3, dtype=torch.bool),
        areas=torch.tensor([256.0, 64, 1]),
        image_size=(48, 64),
    )


def loss_of(representations: Tensor, pixels: Tensor, objects: list[int], targets: Targets | None = None) -> Tensor:
    return make.mask_loss(
        make.masks(train_expand=1.5, ohem_ratio=1.0),
        correlation_vectors(representations),
        pixels,
        torch.tensor(objects, dtype=torch.int64),
        targets or two_squares(),
        step=(4, 4),
    )


def plain_loss(
    representations: Tensor, pixels: Tensor, objects: list[int], targets: Targets, crops: list[tuple[slice, slice]]
) -> Tensor:
    """Every instance by itself, cut from its whole map; `crops` has the rows and columns of each object."""
    logits = correlate(correlation_vectors(representations), pixels)
    terms = []
    for one, i in zip(logits, objects, strict=True):
        target = targets.masks[i][crops[i]]
        losses = F.binary_cross_entropy_with_logits(one[crops[i]], target.double(), reduction="none")
        terms.append(plain_term(losses, target, 1.0))
    return torch.stack(terms).sum()


def test_the_mask_loss_is_the_sum_over_instances_each_in_its_crop() -> None:
    representations, pixels = random(4, 2, 8), random(8, 12, 16, seed=1)
    # 1.5 times the boxes, on the grid: (-1, -1, 5, 5) and (6.5, 4.5, 9.5, 7.5); centres from 0.5 and from 6.5 on
    crops = [(slice(0, 5), slice(0, 5)), (slice(4, 7), slice(6, 9))]
    plain = plain_loss(representations, pixels, [1, 0, 1, 0], two_squares(), crops)
    torch.testing.assert_close(loss_of(representations, pixels, [1, 0, 1, 0]), plain)


def test_the_gradients_of_overlapping_crops_add_up() -> None:
    targets = two_squares()
    targets.boxes[1] = torch.tensor([4.0, 4, 28, 24])  # 1.5 times, on the grid: (-0.5, -0.25, 8.5, 7.25)
    crops = [(slice(0, 5), slice(0, 5)), (slice(0, 7), slice(0, 8))]
    inputs = [random(3, 2, 8).requires_grad_(), random(8, 12, 16, seed=1).requires_grad_()]
    loss, plain = loss_of(*inputs, [1, 0, 1], targets), plain_loss(*inputs, [1, 0, 1], targets, crops)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(torch.autograd.grad(loss, inputs), torch.autograd.grad(plain, inputs))


def test_pixels_outside_the_crop_learn_nothing() -> None:
    pixels = random(8, 12, 16).requires_grad_()
    loss_of(random(1, 2, 8, seed=1), pixels, [1]).backward()
    assert pixels.grad is not None
    learns = pixels.grad.abs().sum(dim=0) > 0
    assert learns[5:7, 7:9].all()  # the object
    learns[4:7, 6:9] = False
    assert not learns.any()


def test_an_object_whose_crop_holds_no_cell_has_no_loss() -> None:
    assert loss_of(random(2, 2, 8), random(8, 12, 16), [2, 2]).item() == 0


def test_no_instances_have_no_loss_and_a_gradient_of_zero() -> None:
    representations = torch.zeros(0, 2, 8, dtype=torch.float64)
    assert loss_of(representations, random(8, 12, 16), []).item() == 0


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_all_instances_are_kept_when_they_are_few() -> None:
    objects = torch.tensor([2, 0, 0, 1])
    assert draw_instances(objects, 4, seeded(0)).tolist() == [0, 1, 2, 3]
    assert draw_instances(objects[:0], 4, seeded(0)).tolist() == []


@pytest.mark.parametrize("seed", range(10))
def test_every_object_gets_an_instance_before_any_gets_a_second(seed: int) -> None:
    objects = torch.tensor([0] * 20 + [1] * 3 + [2] + [5] * 7)  # objects 3 and 4 have no anchor
    drawn = draw_instances(objects, 8, seeded(seed))
    assert len(drawn.unique()) == 8
    assert drawn.tolist() == sorted(drawn.tolist())
    # a round of four, then objects 0, 1 and 5 once more, then one of these
    counts = torch.bincount(objects[drawn], minlength=6)
    assert counts[2] == 1
    assert sorted(counts[[0, 1, 5]].tolist()) == [2, 2, 3]


def test_fewer_places_than_objects_go_to_different_ones() -> None:
    objects = torch.arange(5).repeat_interleave(3)
    met: set[int] = set()
    for seed in range(20):
        of_drawn = objects[draw_instances(objects, 2, seeded(seed))].tolist()
        assert len(set(of_drawn)) == 2
        met.update(of_drawn)
    assert met == {0, 1, 2, 3, 4}


def test_the_same_seed_draws_the_same_instances() -> None:
    objects = torch.arange(5).repeat_interleave(30)
    first = draw_instances(objects, 20, seeded(7))
    assert torch.equal(first, draw_instances(objects, 20, seeded(7)))
    assert not torch.equal(first, draw_instances(objects, 20, seeded(8)))
