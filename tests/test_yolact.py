"""YOLACT's detector as object stream: priors, matching, hard negatives, losses, and what it offers to NMS."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

import make
from rdsnet.model.object_stream.dense import Raw
from rdsnet.model.object_stream.learning import BACKGROUND, IGNORED
from rdsnet.model.object_stream.yolact import (
    YolactStream,
    assign_priors,
    classification_loss,
    corners,
    decode,
    encode,
    hard_negatives,
    own_priors,
    place_priors,
    prior_shapes,
    share_inside,
)
from rdsnet.structures import Targets

A, C = 3, 4
CPU = torch.device("cpu")
SIZES = [(8, 12), (4, 6)]  # of the maps of stream()


def stream(**settings: Any) -> YolactStream:
    """Levels of stride 8 and 16 with priors of 16 and 32 pixels, for images of 64 x 96."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"prior_sizes": (16.0, 32.0), "norm": "none", "representation": (1, 5), **settings}
    return make.yolact(num_classes=C, channels=8, **arguments)


def pyramid(images: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(images, 8, h, w, generator=generator) for h, w in SIZES]


def truth(
    *boxes: tuple[float, float, float, float],
    labels: list[int] | None = None,
    crowds: list[tuple[float, float, float, float]] | None = None,
    size: tuple[int, int] = (64, 96),
) -> Targets:
    n = len(boxes)
    return Targets(
        boxes=torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        labels=torch.tensor(labels if labels is not None else [0] * n, dtype=torch.int64),
        masks=torch.zeros(n, 8, 8, dtype=torch.bool),
        has_mask=torch.zeros(n, dtype=torch.bool),
        areas=torch.zeros(n),
        image_size=size,
        crowd_boxes=torch.tensor(crowds or [], dtype=torch.float32).view(-1, 4),
    )


# --- priors and box code ---


def test_priors_of_a_location_have_one_area_in_three_shapes_or_are_squares() -> None:
    root = math.sqrt(2)
    shapes = prior_shapes((24.0,), (1.0, 0.5, 2.0), square=False)
    torch.testing.assert_close(
        torch.tensor(shapes), torch.tensor([[24, 24], [24 / root, 24 * root], [24 * root, 24 / root]])
    )
    squares = prior_shapes((24.0,), (1.0, 0.5, 2.0), square=True)
    assert [width for width, _ in squares] == [width for width, _ in shapes]
    assert all(width == height for width, height in squares)


def test_priors_are_centred_on_cells_that_divide_the_input_evenly() -> None:
    # 50 x 100 pixels in 2 x 3 cells: 25 high and 33.3 wide
    priors = place_priors(((10.0, 20.0),), (2, 3), (50, 100), CPU)
    assert priors.shape == (6, 4)
    torch.testing.assert_close(priors[5], torch.tensor([250 / 3, 37.5, 10, 20]))
    torch.testing.assert_close(priors[1], torch.tensor([50, 12.5, 10, 20]))


def test_priors_run_over_level_row_column_and_shape() -> None:
    raw = stream()(pyramid(), (64, 96))
    levels = stream().priors(raw)
    assert [len(p) for p in levels] == [8 * 12 * A, 4 * 6 * A]
    row, column, kind = 2, 3, 1
    prior = levels[1][(row * 6 + column) * A + kind]
    torch.testing.assert_close(prior, torch.tensor([3.5 * 16, 2.5 * 16, 32 / math.sqrt(2), 32 / math.sqrt(2)]))


def test_priors_that_were_made_in_inference_serve_training() -> None:
    s = stream()
    place_priors.cache_clear()
    with torch.inference_mode():
        s.priors(s(pyramid(), (64, 96)))
    losses, _ = s.losses(s(pyramid(), (64, 96)), [truth((0, 0, 16, 16)), truth((8, 8, 40, 40))])
    sum(losses.values(), torch.zeros(())).backward()


def test_as_many_prior_sizes_as_levels_are_needed() -> None:
    with pytest.raises(ValueError, match="2 prior_sizes"):
        stream(prior_sizes=(16.0,))


def test_deltas_are_shares_of_the_prior_divided_by_variances() -> None:
    prior = torch.tensor([[50.0, 50, 20, 10]])
    # centre 4 pixels right and 1 down; width times e, height the same
    half = 10 * math.e
    box = torch.tensor([[54 - half, 46, 54 + half, 56]])
    torch.testing.assert_close(encode(prior, box), torch.tensor([[4 / 20 / 0.1, 1 / 10 / 0.1, 1 / 0.2, 0.0]]))
    torch.testing.assert_close(decode(prior, encode(prior, box)), box)


def test_a_box_stays_finite_whatever_the_network_says() -> None:
    box = decode(torch.tensor([[50.0, 50, 20, 10]]), torch.tensor([[0.0, 0, 1e4, -1e4]]))
    torch.testing.assert_close(box, torch.tensor([[50 - 625, 50.0, 50 + 625, 50]]))


# --- matching ---


def plain_assignment(iou: Tensor, positive: float, negative: float) -> Tensor:
    """As YOLACT does it: as often as there are objects, the largest IoU left over takes its object and prior out."""
    best, assigned = iou.max(dim=0)
    assigned = assigned.masked_fill(best < positive, IGNORED).masked_fill(best < negative, BACKGROUND)
    left = iou.clone()
    for _ in range(min(iou.shape)):
        i, prior = divmod(int(left.argmax()), iou.shape[1])
        left[i], left[:, prior] = -1, -1
        assigned[prior] = i
    return assigned


@pytest.mark.parametrize(("objects", "side"), [(1, 64), (5, 64), (40, 64), (40, 12), (90, 6)])
def test_matching_is_the_plain_loop(objects: int, side: int) -> None:
    """Also where objects crowd so that most do not get their best prior, and where there are more of them."""
    generator = torch.Generator().manual_seed(objects)
    shapes = prior_shapes((8.0,), (1.0, 0.5, 2.0), square=False)
    priors = corners(place_priors(shapes, (5, 5), (64, 64), CPU))
    low = 26 + (torch.rand(objects, 2, generator=generator) - 0.5) * side
    boxes = torch.cat([low, low + 2 + 14 * torch.rand(objects, 2, generator=generator)], dim=1)
    iou = box_iou(boxes, priors)
    assert assign_priors(iou, 0.5, 0.4).tolist() == plain_assignment(iou, 0.5, 0.4).tolist()


def test_of_two_objects_with_one_best_prior_the_worse_gets_its_second_choice() -> None:
    iou = torch.tensor([[0.6, 0.3, 0.1], [0.7, 0.2, 0.0]])
    objects, priors = own_priors(iou)
    assert dict(zip(objects.tolist(), priors.tolist(), strict=True)) == {1: 0, 0: 1}
    assert assign_priors(iou, 0.5, 0.4).tolist() == [1, 0, BACKGROUND]


def test_equal_overlaps_go_to_the_lower_index() -> None:
    iou = torch.full((2, 1000), 0.25)
    iou[:, 500:] = 0.3
    objects, priors = own_priors(iou)
    assert dict(zip(objects.tolist(), priors.tolist(), strict=True)) == {0: 500, 1: 501}


def test_a_prior_learns_object_nothing_or_background_by_its_overlap() -> None:
    iou = torch.tensor([[0.9, 0.5, 0.49, 0.4, 0.39, 0.0]])
    assert assign_priors(iou, 0.5, 0.4).tolist() == [0, 0, IGNORED, IGNORED, BACKGROUND, BACKGROUND]


def test_without_objects_all_is_background() -> None:
    assert assign_priors(torch.zeros(0, 3), 0.5, 0.4).tolist() == [BACKGROUND] * 3


def test_overlaps_are_those_of_the_priors_with_the_boxes() -> None:
    s = stream()
    raw = s(pyramid(1), (64, 96))
    target = truth((3, 5, 30, 40), (50, 20, 66, 36))
    iou = box_iou(target.boxes, corners(torch.cat(s.priors(raw))))
    assert s.assign(raw, target).tolist() == plain_assignment(iou, 0.5, 0.4).tolist()


def test_priors_in_a_crowd_learn_nothing_unless_they_have_an_object() -> None:
    s = stream()
    raw = s(pyramid(1), (64, 96))
    target = truth((0, 0, 16, 16))
    before = s.assign(raw, target)
    after = s.assign(raw, truth((0, 0, 16, 16), crowds=[(-50, -50, 48, 200)]))
    inside = share_inside(corners(torch.cat(s.priors(raw))), torch.tensor([[-50.0, -50, 48, 200]])) > 0.7
    assert 0 < inside.sum() < len(inside)
    assert (after[~inside] == before[~inside]).all()
    assert (after[inside] == torch.where(before[inside] >= 0, before[inside], IGNORED)).all()


def test_the_share_of_a_box_in_a_region_is_of_its_own_area() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 40, 10], [50, 50, 60, 60]])
    regions = torch.tensor([[0.0, 0, 10, 5], [0, 0, 10, 8]])
    torch.testing.assert_close(share_inside(boxes, regions), torch.tensor([0.8, 0.2, 0.0]))
    assert share_inside(boxes, regions[:0]).tolist() == [0, 0, 0]


def test_priors_beyond_the_images_own_padding_learn_nothing() -> None:
    s = stream()
    raw = s(pyramid(1), (64, 96))
    assigned = s.assign(raw, truth((0, 0, 16, 16), size=(40, 30)))  # padded to 64 x 32
    level = assigned[: 8 * 12 * A].view(8, 12, A)
    assert (level[:, 4:] == IGNORED).all()
    assert (level[:, :4] != IGNORED).any()


# --- losses ---


def test_the_hardest_background_learns_three_times_as_often_as_objects() -> None:
    logits = torch.zeros(1, 8, 2)
    logits[0, :, 1] = torch.tensor([9.0, 1, 5, 2, 7, 3, 4, 8])  # of the only class: the larger the harder
    wanted = torch.tensor([[1, 0, 0, 0, 0, 0, 0, IGNORED]])
    assert hard_negatives(logits, wanted, 3.0)[0].nonzero()[:, 0].tolist() == [2, 4, 6]


def test_an_image_has_as_many_negatives_as_there_are() -> None:
    wanted = torch.tensor([[1, 1, 0, IGNORED, 0], [0, 0, 0, 0, 0]])
    chosen = hard_negatives(torch.randn(2, 5, 3), wanted, 3.0)
    assert chosen.tolist() == [[False, False, True, False, True], [False] * 5]


def test_class_loss_is_the_cross_entropy_of_what_learns() -> None:
    logits = torch.tensor([[[0.0, 2.0], [0.0, 1.0], [3.0, 0.0]]], requires_grad=True)
    loss = classification_loss(logits, torch.tensor([[1, 0, 0]]), 1.0)  # the third is easier than the second
    torch.testing.assert_close(loss, F.softplus(torch.tensor(-2.0)) + F.softplus(torch.tensor(1.0)))
    loss.backward()
    assert logits.grad is not None
    assert (logits.grad[0, 2] == 0).all()


def test_losses_are_divided_by_the_positives_of_the_batch() -> None:
    s = stream()
    raw = s(pyramid(2), (64, 96))
    targets = [truth((0, 0, 16, 16), (30, 10, 60, 50), labels=[1, 3]), truth((70, 30, 90, 60), labels=[2])]
    losses, positives = s.losses(raw, targets)
    count = len(positives.image)
    assert count > 3
    priors = torch.cat(s.priors(raw))
    box, cls = torch.zeros(()), torch.zeros(())
    for b, target in enumerate(targets):
        logits = torch.cat([m[b].view(A, C + 1, -1).permute(2, 0, 1).flatten(0, 1) for m in raw.logits])
        deltas = torch.cat([m[b].view(A, 4, -1).permute(2, 0, 1).flatten(0, 1) for m in raw.deltas])
        assigned = s.assign(raw, target)
        positive = assigned >= 0
        wanted = encode(priors[positive], target.boxes[assigned[positive]])
        box = box + F.smooth_l1_loss(deltas[positive], wanted, reduction="sum")
        classes = torch.where(positive, target.labels[assigned.clamp(min=0)] + 1, 0)
        terms = F.cross_entropy(logits, classes, reduction="none")
        hardest = terms[assigned == BACKGROUND].sort(descending=True).values[: 3 * int(positive.sum())]
        cls = cls + terms[positive].sum() + hardest.sum()
    torch.testing.assert_close(losses["box"], box / count)
    torch.testing.assert_close(losses["cls"], cls / count)


def test_images_without_objects_give_no_loss_and_gradients_of_zero() -> None:
    s = stream()
    losses, positives = s.losses(s(pyramid(2), (64, 96)), [truth(), truth()])
    assert len(positives.image) == 0
    assert losses["cls"] == 0
    assert losses["box"] == 0
    (losses["cls"] + losses["box"]).backward()
    assert s.classify.weight.grad is not None
    assert (s.classify.weight.grad == 0).all()
    assert s.regress.weight.grad is not None


def test_an_image_beside_one_without_objects_learns_as_alone() -> None:
    s = stream()
    levels = pyramid(2)
    target = truth((0, 0, 16, 16), labels=[2])
    both, _ = s.losses(s(levels, (64, 96)), [target, truth()])
    alone, _ = s.losses(s([x[:1] for x in levels], (64, 96)), [target])
    for name, loss in both.items():
        torch.testing.assert_close(loss, alone[name])


# --- detection ---


def say(raw: Raw, level: int, row: int, column: int, kind: int, logits: list[float]) -> int:
    """Let a prior of the first image have these C + 1 logits; its index in the level."""
    raw.logits[level][0].view(A, C + 1, *SIZES[level])[kind, :, row, column] = torch.tensor(logits)
    return (row * SIZES[level][1] + column) * A + kind


def quiet(s: YolactStream) -> Raw:
    """Nothing but background anywhere, and boxes that are the priors."""
    raw = s(pyramid(1), (64, 96))
    for logits, deltas in zip(raw.logits, raw.deltas, strict=True):
        logits.data.view(1, A, C + 1, -1)[:, :, 0] = 20
        logits.data.view(1, A, C + 1, -1)[:, :, 1:] = 0
        deltas.data.zero_()
    return raw


@torch.no_grad()
def test_candidates_are_the_priors_with_a_class_above_the_threshold() -> None:
    s = stream(score_threshold=0.2)
    raw = quiet(s)
    third = say(raw, 0, 1, 2, 2, [0.0, 0, 0, 0, 5])
    first = say(raw, 0, 7, 11, 0, [0.0, 1, 0, 0, 0])
    say(raw, 0, 3, 3, 1, [0.0, 0, 0, 0, 0])  # a fifth each: not above
    index, scores = s.candidates(raw, 0, 0)
    assert index.tolist() == [third, first]
    torch.testing.assert_close(scores[0], torch.tensor([0.0, 0, 0, 0, 5]).softmax(dim=0)[1:])
    boxes = s.decode(raw, 0, 0, index)
    torch.testing.assert_close(boxes, corners(s.priors(raw)[0])[index])


@torch.no_grad()
def test_a_limit_leaves_the_best_candidates() -> None:
    s = stream(pre_nms=2)
    raw = quiet(s)
    best = [say(raw, 0, 2, i, 0, [0.0, float(i), 0, 0, 0]) for i in range(5)]
    index, _ = s.candidates(raw, 0, 0)
    assert sorted(index.tolist()) == best[3:]


@torch.no_grad()
def test_fast_nms_gets_all_classes_of_a_candidate_and_others_those_above_the_threshold() -> None:
    for nms, expected in (("fast", [1, 0, 2, 3]), ("traditional", [1])):
        s = stream(nms=nms, score_threshold=0.3)
        raw = quiet(s)
        say(raw, 1, 1, 1, 0, [0.0, 2, 4, 1, 0])
        found = s.detect(raw, 0, (64, 96), (64, 96))
        assert found.labels.tolist() == expected
        assert len(found.anchors.unique()) == 1


@torch.no_grad()
def test_boxes_that_are_not_clipped_meet_in_nms_as_pixels_of_the_network() -> None:
    # Squares of 4 and 2.83 pixels at one centre overlap by 0.5; with the last pixel counted by (3.83 / 5)^2 = 0.59,
    # and in a photo of ten times the size by (29.3 / 41)^2 = 0.51
    for clip, expected in ((False, 1), (True, 2)):
        s = stream(nms="traditional", nms_iou=0.55, prior_sizes=(4.0, 32.0), whole_boxes=not clip)
        raw = quiet(s)
        for kind, score in ((0, 5.0), (1, 4.0)):
            say(raw, 0, 1, 1, kind, [0.0, score, 0, 0, 0])
        found = s.detect(raw, 0, (64, 96), (640, 960))
        assert (found.labels == 0).sum() == expected
        torch.testing.assert_close(found.boxes[0], torch.tensor([100.0, 100, 140, 140]))


@torch.no_grad()
def test_representations_are_those_of_the_whole_convolution() -> None:
    s = stream()
    raw = s(pyramid(2), (64, 96))
    image, anchor = torch.tensor([0, 1, 1]), torch.tensor([5, 8 * 12 * A + 40, 0])
    wholes = [s.represent(f).unflatten(1, (A, 5)).permute(0, 3, 4, 1, 2).flatten(1, 3) for f in raw.features]
    expected = torch.cat(wholes, dim=1)[image, anchor]
    torch.testing.assert_close(s.representations(raw, image, anchor)[:, 0], expected)
