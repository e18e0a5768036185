"""Object streams (3.1): anchors, assignment, box coding, losses, lazy representations, and what is found at the end."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou, sigmoid_focal_loss

import make
from rdsnet.model.object_stream.dense import DenseStream, Raw
from rdsnet.model.object_stream.learning import BACKGROUND, IGNORED, focal_loss, grid_iou
from rdsnet.model.object_stream.retinanet import (
    RetinaNetStream,
    anchor_shapes,
    assign_anchors,
    base_anchors,
    decode,
    encode,
    place_anchors,
)
from rdsnet.structures import Targets

A, D = 9, 4


def stream(num_classes: int = 3, **settings: Any) -> RetinaNetStream:
    """Levels of stride 8 and 16."""
    narrow: dict[str, Any] = {"channels": 32, "tower_depth": 1, "norm": "group", "representation": (2, D)}
    torch.manual_seed(0)
    return make.retinanet(num_classes=num_classes, **(narrow | settings))


def pyramid(*sizes: tuple[int, int], images: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(images, 32, h, w, generator=generator) for h, w in sizes]


def truth(*boxes: tuple[float, float, float, float], labels: list[int] | None = None, size: tuple[int, int]) -> Targets:
    n = len(boxes)
    return Targets(
        boxes=torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        labels=torch.tensor(labels if labels is not None else [0] * n, dtype=torch.int64),
        masks=torch.zeros(n, 8, 8, dtype=torch.bool),
        has_mask=torch.zeros(n, dtype=torch.bool),
        areas=torch.zeros(n),
        image_size=size,
    )


# --- anchors ---


def test_anchors_have_three_scales_an_octave_in_three_shapes() -> None:
    sizes = anchor_shapes(4, 3, (0.5, 1, 2))
    assert sizes.shape == (9, 2)
    torch.testing.assert_close(sizes.prod(dim=1).sqrt()[:3], 4 * 2 ** (torch.arange(3).double() / 3))
    torch.testing.assert_close(sizes[:, 1] / sizes[:, 0], torch.tensor([0.5] * 3 + [1.0] * 3 + [2.0] * 3).double())


def test_anchors_are_centred_on_their_cells() -> None:
    square = anchor_shapes(4, 1, (1.0,))
    assert base_anchors(8, square, False).tolist() == [[-12, -12, 20, 20]]
    # row 1, column 2 of a map of 2 x 3 cells of 8 pixels: centre (20, 12)
    assert place_anchors(base_anchors(8, square, False), (2, 3), (8, 8))[5].tolist() == [4, -4, 36, 28]


def test_overlaps_on_a_grid_are_those_of_all_pairs() -> None:
    base = base_anchors(8, anchor_shapes(4, 3, (0.5, 1, 2)), False)
    boxes = torch.tensor([[3.0, 4, 50, 30], [-20, -30, 200, 300], [10, 10, 11, 11], [500, 0, 600, 10]])
    out = torch.empty(4, 5, 7, 9)
    grid_iou(boxes, base, (8, 8), out)
    anchors = place_anchors(base, (5, 7), (8, 8))
    torch.testing.assert_close(out.flatten(1), box_iou(boxes, anchors))


# --- assignment ---


def assign(anchors: Tensor, boxes: Tensor) -> Tensor:
    return assign_anchors(box_iou(boxes, anchors), 0.5, 0.4)


ANCHORS = torch.tensor(
    [[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 4.5], [0, 0, 10, 4], [0, 0, 5, 7], [50, 50, 60, 60]]
)


def test_an_anchor_learns_object_nothing_or_background_by_its_overlap() -> None:
    # IoU with the object: 1, 0.5, 0.45, 0.4, 0.35, 0
    assigned = assign(ANCHORS, torch.tensor([[0.0, 0, 10, 10]]))
    assert assigned.tolist() == [0, 0, IGNORED, IGNORED, BACKGROUND, BACKGROUND]


def test_the_best_anchors_of_an_object_learn_it_however_small_the_overlap() -> None:
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [20, 0, 30, 10], [60, 60, 70, 70]])
    # an object of one pixel in the second and third anchor, which overlap it alike: IoU 0.01
    assert assign(anchors, torch.tensor([[25.0, 5, 26, 6]])).tolist() == [
        BACKGROUND,
        0,
        0,
        BACKGROUND,
    ]


def test_an_anchor_that_is_best_for_two_objects_learns_the_later() -> None:
    anchors = torch.tensor([[0.0, 0, 10, 10]])
    assert assign(anchors, torch.tensor([[0.0, 0, 10, 9], [1, 1, 2, 2]])).tolist() == [1]


def test_an_anchor_learns_the_object_that_it_overlaps_most() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 8], [0, 0, 10, 10], [0, 0, 10, 7]])
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8], [0, 0, 10, 7], [0, 0, 10, 9.5]])
    assert assign(anchors, boxes).tolist() == [1, 0, 2, 1]


def test_an_object_that_no_anchor_overlaps_is_learned_by_none() -> None:
    assigned = assign(ANCHORS, torch.tensor([[0.0, 0, 10, 10], [200, 200, 210, 210]]))
    assert 1 not in assigned


def test_without_objects_every_anchor_learns_the_background() -> None:
    assert assign(ANCHORS, torch.zeros(0, 4)).tolist() == [BACKGROUND] * 6


def test_anchors_beyond_an_images_own_padding_learn_nothing() -> None:
    s = stream()
    sizes = [(8, 12), (4, 6)]  # a batch of 64 x 96
    # an image that is 64 x 64 when padded by itself, and an object that the anchors beyond would fit best
    assigned = s.assign(make.raw(sizes), truth((60, 16, 92, 48), size=(40, 33)))
    first, second = assigned[: 8 * 12 * A].view(8, 12, A), assigned[8 * 12 * A :].view(4, 6, A)
    assert (first[:, 8:] == IGNORED).all()
    assert (second[:, 4:] == IGNORED).all()
    assert (first[:, 0] == BACKGROUND).all()
    assert (second[:, 0] == BACKGROUND).all()
    assert (assigned == 0).any()  # its best among the others learn it all the same


# --- box coding ---


def test_a_box_is_coded_relative_to_its_anchor() -> None:
    anchor, wanted = torch.tensor([[10.0, 10, 30, 20]]), torch.tensor([[20.0, 10, 60, 20]])
    # 20 right of the centre, which is one width; twice as wide
    torch.testing.assert_close(encode(anchor, wanted), torch.tensor([[1.0, 0, math.log(2), 0]]))


def test_decoding_undoes_encoding() -> None:
    generator = torch.Generator().manual_seed(0)
    corner, extent = 100 * torch.rand(2, 50, 2, generator=generator), 1 + 60 * torch.rand(2, 50, 2, generator=generator)
    anchors, boxes = torch.cat([corner, corner + extent], dim=2)
    torch.testing.assert_close(decode(anchors, encode(anchors, boxes)), boxes, atol=1e-3, rtol=1e-5)


def test_a_decoded_box_is_at_most_62_times_its_anchor() -> None:
    box = decode(torch.tensor([[0.0, 0, 16, 16]]), torch.tensor([[0.0, 0, 1e9, -1e9]]))[0]
    assert (box[2] - box[0]).item() == pytest.approx(1000, rel=1e-4)
    assert (box[3] - box[1]).item() == pytest.approx(16 * 16 / 1000, rel=1e-3)


# --- losses ---


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.5, 1.0), (0.25, 0.0)])
def test_focal_loss_is_torchvisions_on_one_hot_targets(alpha: float, gamma: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(2, 30, 4, generator=generator)).requires_grad_()
    plain_logits = logits.detach().clone().requires_grad_()
    learns = torch.rand(2, 30, generator=generator) > 0.3
    learns[0, 3] = learns[0, 7] = learns[1, 29] = True
    positives = (torch.tensor([0, 0, 1]), torch.tensor([3, 7, 29]), torch.tensor([0, 3, 2]))
    one_hot = torch.zeros(2, 30, 4)
    one_hot[positives] = 1
    plain = (sigmoid_focal_loss(plain_logits, one_hot, alpha, gamma) * learns[..., None]).sum()
    ours = focal_loss(logits, learns, positives, alpha, gamma)
    torch.testing.assert_close(ours, plain)
    ours.backward()
    plain.backward()
    torch.testing.assert_close(logits.grad, plain_logits.grad, atol=1e-6, rtol=1e-4)


def test_focal_loss_stays_finite_for_extreme_logits() -> None:
    logits = torch.tensor([[[1e4, -1e4]]], requires_grad=True)
    value = focal_loss(
        logits, torch.tensor([[True]]), (torch.tensor([0]), torch.tensor([0]), torch.tensor([1])), 0.25, 2
    )
    value.backward()
    assert value.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_losses_are_torchvisions_over_the_number_of_positives() -> None:
    s = stream(num_classes=3)
    raw = s(pyramid((8, 8), (4, 4)), (64, 64))
    targets = [truth((4, 4, 40, 36), (30, 20, 60, 60), labels=[2, 0], size=(64, 64)), truth(size=(64, 64))]
    losses, positives = s.losses(raw, targets)

    anchors = torch.cat(s.anchors(raw))
    logits = torch.cat([m.view(2, A, 3, -1).permute(0, 3, 1, 2).reshape(2, -1, 3) for m in raw.logits], dim=1)
    deltas = torch.cat([m.view(2, A, 4, -1).permute(0, 3, 1, 2).reshape(2, -1, 4) for m in raw.deltas], dim=1)
    assigned = [assign(anchors, t.boxes) for t in targets]
    one_hot, box_loss = torch.zeros_like(logits), torch.zeros(())
    count = 0
    for b, (target, of_anchor) in enumerate(zip(targets, assigned, strict=True)):
        found = (of_anchor >= 0).nonzero()[:, 0]
        one_hot[b, found, target.labels[of_anchor[found]]] = 1
        wanted = encode(anchors[found], target.boxes[of_anchor[found]])
        box_loss = box_loss + F.smooth_l1_loss(deltas[b, found], wanted, beta=0.11, reduction="sum")
        count += max(len(found), 1)  # an image without objects counts as one
    learns = torch.stack([a != IGNORED for a in assigned])
    plain = (sigmoid_focal_loss(logits, one_hot, 0.25, 2.0) * learns[..., None]).sum()
    torch.testing.assert_close(losses["cls"], plain / count)
    torch.testing.assert_close(losses["box"], box_loss / count)
    assert positives.image.unique().tolist() == [0]
    assert torch.equal(positives.object, assigned[0][positives.anchor])


def test_without_objects_there_is_a_class_loss_and_no_box_loss() -> None:
    s = stream()
    losses, positives = s.losses(s(pyramid((8, 8), (4, 4)), (64, 64)), [truth(size=(64, 64))] * 2)
    assert losses["cls"] > 0
    assert losses["box"] == 0
    assert len(positives.image) == 0
    sum(losses.values(), torch.zeros(())).backward()
    assert s.regress.weight.grad is not None


# --- representations (DESIGN.md 6.3) ---


def every_representation(s: DenseStream, raw: Raw) -> Tensor:
    """(B, R, 2, D): the last convolution of the branch at every location of every level."""
    maps = [s.represent(features) for features in raw.features]
    return torch.cat([m.unflatten(1, (A, 2, D)).permute(0, 4, 5, 1, 2, 3).flatten(1, 3) for m in maps], dim=1)


SIZES = ((5, 7), (3, 4))
ALL = (5 * 7 + 3 * 4) * A


def test_lazy_representations_are_those_of_the_full_convolution() -> None:
    """At every anchor of both images and levels, borders and corners included, in a random order."""
    s = stream()
    raw = s(pyramid(*SIZES), (64, 64))
    order = torch.randperm(2 * ALL, generator=torch.Generator().manual_seed(0))
    image, anchor = order // ALL, order % ALL
    expected = every_representation(s, raw)[image, anchor]
    torch.testing.assert_close(s.representations(raw, image, anchor), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("anchors", [[], [0], [ALL - 1, 3, 3, ALL - 1, 5 * 7 * A, 5 * 7 * A - 1]])
def test_lazy_representations_have_the_gradient_of_the_full_convolution(anchors: list[int]) -> None:
    s = stream()
    anchor = torch.tensor(anchors, dtype=torch.int64)
    image = torch.arange(len(anchors)) % 2
    gradients = []
    for lazy in (True, False):
        levels = [level.requires_grad_() for level in pyramid(*SIZES)]
        raw = s(levels, (64, 64))
        chosen = s.representations(raw, image, anchor) if lazy else every_representation(s, raw)[image, anchor]
        assert chosen.shape == (len(anchors), 2, D)
        assert s.representation_tower is not None
        parameters = [*s.represent.parameters(), *s.representation_tower.parameters()]
        weights = torch.linspace(-1, 2, chosen.numel()).view_as(chosen)
        gradients.append(torch.autograd.grad((chosen * weights).sum(), [*levels, *parameters]))
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-4)


# --- detection ---


def raw_of(s: RetinaNetStream, sizes: tuple[tuple[int, int], ...], images: int = 1) -> Raw:
    """Every score 0, every anchor its own box."""
    classes = s.num_classes
    return Raw(
        size=(sizes[0][0] * 8, sizes[0][1] * 8),
        logits=[torch.full((images, A * classes, h, w), -20.0) for h, w in sizes],
        deltas=[torch.zeros(images, A * 4, h, w) for h, w in sizes],
        features=[],
    )


def set_logit(
    raw: Raw, s: RetinaNetStream, level: int, cell: tuple[int, int], kind: int, label: int, logit: float
) -> None:
    raw.logits[level][0, kind * s.num_classes + label, cell[0], cell[1]] = logit


def test_an_anchor_that_scores_becomes_an_object() -> None:
    s = stream()
    raw = raw_of(s, ((8, 8), (4, 4)))
    set_logit(raw, s, 1, (1, 2), 4, 2, 2.0)
    raw.deltas[1][0, 4 * 4 : 4 * 5, 1, 2] = torch.tensor([0.5, 0, math.log(0.5), 0])
    found = s.detect(raw, 0, (64, 64), (64, 64))
    flat = 8 * 8 * A + (1 * 4 + 2) * A + 4
    assert found.anchors.tolist() == [flat]
    assert found.labels.tolist() == [2]
    assert found.scores[0].item() == pytest.approx(1 / (1 + math.exp(-2)))
    # shape 4 is a square of 64 * 2 ** (1 / 3), centred at (40, 24), moved half its width and made half as wide
    side = 64 * 2 ** (1 / 3)
    left, right = 40 + side / 2 - side / 4, 40 + side / 2 + side / 4
    clipped = torch.tensor([[min(left, 64), max(24 - side / 2, 0), min(right, 64), min(24 + side / 2, 64)]])
    torch.testing.assert_close(found.boxes, clipped)


def test_anchors_in_the_padding_are_never_found() -> None:
    s = stream(score_threshold=0.0, max_detections=10_000, nms_iou=1.0)
    raw = raw_of(s, ((8, 8), (4, 4)))
    found = s.detect(raw, 0, (20, 64), (20, 64))
    assert (found.boxes[:, 2:] > found.boxes[:, :2]).all()
    assert (found.boxes[:, 1] < 20).all()
    anchors = torch.cat(s.anchors(raw))
    assert (anchors[found.anchors, 1] < 20).all()


def test_boxes_end_with_the_image_and_are_scaled_to_the_output() -> None:
    s = stream(score_threshold=0.0, max_detections=10_000)
    found = s.detect(raw_of(s, ((8, 8), (4, 4))), 0, (50, 60), (100, 30))
    assert found.boxes[:, :2].min() == 0
    assert found.boxes[:, 2].max().item() == pytest.approx(30)
    assert found.boxes[:, 3].max().item() == pytest.approx(100)


def test_candidates_are_the_levels_best_anchors_by_their_best_class() -> None:
    s = stream(pre_nms=20)
    raw = s(pyramid((8, 8), (4, 4)), (64, 64))
    index, scores = s.candidates(raw, 1, 0)
    all_scores = raw.logits[0][1].view(A, 3, -1).permute(2, 0, 1).reshape(-1, 3).sigmoid()
    assert set(index.tolist()) == set(all_scores.amax(dim=1).topk(20).indices.tolist())
    torch.testing.assert_close(scores, all_scores[index])


def test_nothing_above_the_threshold_is_nothing_found() -> None:
    s = stream()
    nothing = s.detect(raw_of(s, ((8, 8), (4, 4))), 0, (64, 64), (64, 64))
    assert nothing.boxes.shape == (0, 4)


def test_no_pair_of_one_class_overlaps_more_than_allowed() -> None:
    s = stream(score_threshold=0.0, max_detections=1000)
    raw = s(pyramid((8, 8), (4, 4)), (64, 64))
    result = s.detect(raw, 0, (64, 64), (64, 64))
    iou = box_iou(result.boxes, result.boxes) * (result.labels[:, None] == result.labels)
    assert iou.fill_diagonal_(0).max() <= 0.5
    assert (result.scores.diff() <= 0).all()


def test_a_stream_without_representations_has_no_third_branch() -> None:
    s = stream(representation=None)
    assert s(pyramid((8, 8), (4, 4)), (64, 64)).features == []
    assert not [name for name, _ in s.named_parameters() if "represent" in name]


def test_without_a_tower_of_their_own_representations_read_the_box_tower() -> None:
    s = stream(representation_tower=False)
    levels = pyramid((8, 8), (4, 4))
    raw = s(levels, (64, 64))
    assert not [name for name, _ in s.named_parameters() if name.startswith("representation_tower")]
    image, anchor = torch.tensor([0, 1]), torch.tensor([5, 8 * 8 * A + 3])
    plain = [s.represent(s.box_tower(level)) for level in levels]
    values = s.representations(raw, image, anchor)
    for found, level, kind, cell in ((values[0], plain[0][0], 5, 0), (values[1], plain[1][1], 3, 0)):
        numbers = level.flatten(1)[:, cell].view(A, 2, -1)
        torch.testing.assert_close(found, numbers[kind])
