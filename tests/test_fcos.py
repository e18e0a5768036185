"""FCOS: points, which of them learn what, distances, centerness, losses, and what is found at the end."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.fcos import FCOS

import make
from rdsnet.config import get_config
from rdsnet.model.build import build_model
from rdsnet.model.object_stream import fcos as fcos_module
from rdsnet.model.object_stream.dense import Raw
from rdsnet.model.object_stream.fcos import FCOSStream, centerness, centres, decode, encode
from rdsnet.model.object_stream.learning import BACKGROUND, IGNORED
from rdsnet.model.rdsnet import RDSNet
from rdsnet.structures import Targets

SIZES = ((8, 8), (4, 4))  # 64 x 64 pixels at strides 8 and 16


def stream(num_classes: int = 3, **settings: Any) -> FCOSStream:
    """Levels of stride 8 and 16; the first learns distances up to 64 pixels."""
    arguments: dict[str, Any] = {
        "channels": 32,
        "tower_depth": 1,
        "norm": "group",
        "representation": (2, 4),
        "ranges": (64,),
        **settings,
    }
    torch.manual_seed(0)
    return make.fcos(num_classes=num_classes, **arguments)


def pyramid(*sizes: tuple[int, int], images: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(images, 32, h, w, generator=generator) for h, w in sizes]


def truth(*boxes: tuple[float, float, float, float], labels: list[int] | None = None, size: tuple[int, int]) -> Targets:
    """Objects that fill their boxes, on a mask grid of stride 4."""
    n = len(boxes)
    corners = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    masks = torch.zeros(n, *(-(-side // 32) * 8 for side in size), dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, (corners / 4).int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    return Targets(
        boxes=corners,
        labels=torch.tensor(labels if labels is not None else [0] * n, dtype=torch.int64),
        masks=masks,
        has_mask=torch.ones(n, dtype=torch.bool),
        areas=(corners[:, 2:] - corners[:, :2]).prod(dim=1),
        image_size=size,
    )


def random_boxes(count: int, side: float, seed: int = 0) -> list[tuple[float, ...]]:
    generator = torch.Generator().manual_seed(seed)
    corner, extent = side * torch.rand(2, count, 2, generator=generator) ** torch.tensor([1.0, 2.0]).view(2, 1, 1)
    return [tuple(box) for box in torch.cat([corner, corner + extent + 1], dim=1).tolist()]


# --- points and distances ---


def test_points_are_the_centres_of_cells() -> None:
    # a map 3 cells wide: cell 5 is row 1, column 2
    assert centres(torch.tensor([0, 5]), 3, 8).tolist() == [[4, 4], [20, 12]]


def test_a_box_is_told_by_the_distances_to_its_sides() -> None:
    point, box = torch.tensor([[20.0, 12]]), torch.tensor([[4.0, 4, 40, 36]])
    assert encode(point, box, 8).tolist() == [[2, 1, 2.5, 3]]  # left, top, right, bottom
    assert decode(point, torch.tensor([[2.0, 1, 2.5, 3]]), 8).tolist() == box.tolist()


def test_decoding_undoes_encoding() -> None:
    generator = torch.Generator().manual_seed(0)
    boxes = torch.tensor(random_boxes(50, 500))
    points = 500 * torch.rand(50, 2, generator=generator)
    stride = 2.0 ** torch.randint(2, 8, (50, 1), generator=generator)
    torch.testing.assert_close(decode(points, encode(points, boxes, stride), stride), boxes, atol=1e-3, rtol=0)


def test_centerness_is_1_in_the_middle_and_falls_to_0_at_the_sides() -> None:
    distances = torch.tensor([[3.0, 2, 3, 2], [1, 2, 4, 2], [1, 3, 4, 12], [0, 2, 6, 2]])
    assert centerness(distances).tolist() == pytest.approx([1, 0.5, 0.25, 0])


def test_levels_have_learnt_scales_and_distances_are_never_negative() -> None:
    s = stream()
    nn.init.zeros_(s.regress.get_parameter("bias"))
    plain = s(pyramid(*SIZES), (64, 64))
    assert all(deltas.min() == 0 and deltas.max() > 0 for deltas in plain.deltas)
    with torch.no_grad():
        s.scales[1] = 3.0
    scaled = s(pyramid(*SIZES), (64, 64))
    assert torch.equal(scaled.deltas[0], plain.deltas[0])
    torch.testing.assert_close(scaled.deltas[1], 3 * plain.deltas[1])


def test_every_side_can_be_learnt_from_the_start() -> None:
    """A distance that ReLU holds at 0 at all points would never move."""
    for deltas in stream()(pyramid(*SIZES), (64, 64)).deltas:
        assert 0.1 < deltas.min() < deltas.max() < 2  # strides


@pytest.mark.parametrize("ranges", [(), (64, 128), (0,), (-1,)])
def test_ranges_ascend_and_there_is_one_for_each_level_but_the_last(ranges: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="expected 1 ascending ranges for 2 levels"):
        stream(ranges=ranges)
    with pytest.raises(ValueError, match=r"expected 2 ascending ranges for 3 levels, got \(64, 64\)"):
        stream(num_classes=1, strides=(8, 16, 32), ranges=(64, 64))


# --- assignment ---


def assign(s: FCOSStream, *boxes: tuple[float, ...], size: tuple[int, int] = (64, 64)) -> tuple[Tensor, Tensor]:
    """What the points of the (8, 8) and the (4, 4) map learn."""
    first, second = s.assign(make.raw(SIZES), truth(*boxes, size=size)).split([64, 16])  # type: ignore[arg-type]
    return first.view(8, 8), second.view(4, 4)


def places(assigned: Tensor, learnt: int = 0) -> list[list[int]]:
    """Row and column of the points that learn an object."""
    return (assigned == learnt).nonzero().tolist()


SQUARE = [[y, x] for y in (3, 4) for x in (3, 4)]


def test_the_points_near_the_centre_of_an_object_learn_it() -> None:
    # The centre is (32, 32): the points at 28 and 36 are 4 away, those at 20 and 44 are 12, which is 1.5 strides
    whole = (0.0, 0.0, 64.0, 64.0)
    first, second = assign(stream(centre_radius=1.5), whole)
    assert places(first) == SQUARE
    assert (second == BACKGROUND).all()
    assert (first == BACKGROUND).sum() == 60
    wider, _ = assign(stream(centre_radius=1.51), whole)
    assert places(wider) == [[y, x] for y in (2, 3, 4, 5) for x in (2, 3, 4, 5)]


def test_only_points_inside_of_an_object_learn_it() -> None:
    # 8 wide: its left side is on the points at 28, its right side on those at 36; a little wider, and both are inside
    assert not (assign(stream(), (28, 20, 36, 44))[0] == 0).any()
    assert places(assign(stream(), (27.9, 20, 36, 44))[0]) == [[3, 3], [4, 3]]
    assert places(assign(stream(), (27.9, 20, 36.1, 44))[0]) == SQUARE


def test_objects_belong_to_the_level_of_their_size() -> None:
    # From the points at 28 and 36 the farthest side is 36 pixels away, from those at 24 and 40 of the second level 40
    whole = (0.0, 0.0, 64.0, 64.0)
    middle = [[1, 1], [1, 2], [2, 1], [2, 2]]
    for limit, of_first, of_second in ((35, [], middle), (36, SQUARE, middle), (40, SQUARE, middle), (41, SQUARE, [])):
        first, second = assign(stream(ranges=(limit,)), whole)
        assert places(first) == of_first
        assert places(second) == of_second


def test_one_axis_out_of_range_is_enough_for_the_next_level() -> None:
    # 60 x 20: the farthest sides are those on the left and right
    first, second = assign(stream(ranges=(30,)), (2, 22, 62, 42))
    assert not (first == 0).any()
    assert places(second) == [[1, 1], [1, 2], [2, 1], [2, 2]]


def test_a_point_of_several_objects_learns_the_smallest() -> None:
    small, large = (24.0, 24.0, 34.0, 34.0), (0.0, 0.0, 64.0, 64.0)
    for boxes, of_small in (((large, small), 1), ((small, large), 0)):
        first, _ = assign(stream(), *boxes)
        assert places(first, of_small) == [[3, 3]]
        assert places(first, 1 - of_small) == SQUARE[1:]


def test_of_equal_objects_a_point_learns_the_first() -> None:
    assert set(assign(stream(), (20, 20, 44, 44), (20, 20, 44, 44))[0].unique().tolist()) == {BACKGROUND, 0}


@pytest.mark.parametrize("box", [(29, 29, 35, 35), (0, 29, 64, 35)])
def test_an_object_between_the_points_is_not_learned(box: tuple[float, ...]) -> None:
    """As in the release: however long, it holds no point that could tell its sides."""
    assert all((assigned == BACKGROUND).all() for assigned in assign(stream(), box))


def test_without_objects_every_point_learns_the_background() -> None:
    assert all((assigned == BACKGROUND).all() for assigned in assign(stream()))


def test_points_beyond_an_images_own_padding_learn_nothing() -> None:
    target = truth(*random_boxes(10, 30), size=(40, 33))  # type: ignore[arg-type]
    wide = stream().assign(
        make.raw([(12, 12), (6, 6)]), target
    )  # of a batch of 96 x 96; by itself the image is 64 x 64
    first, second = wide[:144].view(12, 12), wide[144:].view(6, 6)
    for assigned, cells in ((first, 8), (second, 4)):
        assert (assigned[cells:] == IGNORED).all()
        assert (assigned[:, cells:] == IGNORED).all()
    alone = stream().assign(make.raw(SIZES), target)
    assert torch.equal(torch.cat([first[:8, :8].flatten(), second[:4, :4].flatten()]), alone)
    assert (alone >= 0).any()
    assert (alone != IGNORED).all()


def points_as_anchors() -> Tensor:
    """(R, 4) squares of a stride around the points, which is how torchvision has them."""
    levels = [
        torch.cat([point - stride / 2, point + stride / 2], dim=1)
        for (h, w), stride in zip(SIZES, (8, 16), strict=True)
        for point in [centres(torch.arange(h * w), w, stride)]
    ]
    return torch.cat(levels)


def torchvisions(targets: list[Targets], head: Any) -> Any:
    """FCOS of torchvision: its head's `compute_loss` on what its matching says."""
    model = SimpleNamespace(head=head, center_sampling_radius=1.5)
    dictionaries = [{"boxes": t.boxes, "labels": t.labels} for t in targets]
    return FCOS.compute_loss(model, dictionaries, {}, [points_as_anchors()] * len(targets), [64, 16])  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [0, 1, 3, 40])
def test_the_assignment_is_torchvisions(count: int) -> None:
    head = SimpleNamespace(compute_loss=lambda targets, outputs, anchors, matched: matched)
    for seed in range(10):
        target = truth(*random_boxes(count, 63, seed), size=(64, 64))  # type: ignore[arg-type]
        assert torch.equal(stream().assign(make.raw(SIZES), target), torchvisions([target], head)[0])


# --- losses ---


def batch() -> list[Targets]:
    return [
        truth((4, 4, 40, 36), (30, 20, 61, 60), (-60, -50, 120, 110), labels=[2, 0, 1], size=(64, 64)),
        truth((10, 30, 30, 50), labels=[1], size=(64, 64)),
    ]


def lively(s: FCOSStream) -> Raw:
    """Predictions far from those of an untrained network."""
    generator = torch.Generator().manual_seed(3)

    def maps(channels: int) -> list[Tensor]:
        return [torch.randn(2, channels, h, w, generator=generator).requires_grad_() for h, w in SIZES]

    deltas = [m.detach().add(2).relu().requires_grad_() for m in maps(4)]
    return Raw(size=(64, 64), logits=maps(s.num_classes), deltas=deltas, features=[], quality=maps(1))


def giou(a: list[float], b: list[float]) -> float:
    overlap = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return overlap / union - (hull - union) / hull


def plain_losses(raw: Raw, targets: list[Targets]) -> dict[str, float]:
    """Point by point, object by object."""
    focal = boxes = quality = weight = 0.0
    positives = 0
    for b, target in enumerate(targets):
        for level, (stride, low, high) in enumerate([(8, 0, 64), (16, 64, math.inf)]):
            h, w = SIZES[level]
            for i, j in [(i, j) for i in range(h) for j in range(w)]:
                x, y = (j + 0.5) * stride, (i + 0.5) * stride
                best, label = None, None
                for (x1, y1, x2, y2), of_object in zip(target.boxes.tolist(), target.labels.tolist(), strict=True):
                    far = max(x - x1, x2 - x, y - y1, y2 - y)
                    off = max(abs(x - (x1 + x2) / 2), abs(y - (y1 + y2) / 2))
                    if x1 < x < x2 and y1 < y < y2 and off < 1.5 * stride and low <= far <= high:
                        area = (x2 - x1) * (y2 - y1)
                        if best is None or area < (best[2] - best[0]) * (best[3] - best[1]):
                            best, label = [x1, y1, x2, y2], of_object
                for c, z in enumerate(raw.logits[level][b, :, i, j].tolist()):
                    p = 1 / (1 + math.exp(-z))
                    focal -= 0.25 * (1 - p) ** 2 * math.log(p) if c == label else 0.75 * p**2 * math.log(1 - p)
                if best is None:
                    continue
                positives += 1
                left, top, right, bottom = (stride * d for d in raw.deltas[level][b, :, i, j].tolist())
                sides = sorted((x - best[0], best[2] - x)) + sorted((y - best[1], best[3] - y))
                wanted = math.sqrt(sides[0] / sides[1] * sides[2] / sides[3])
                weight += wanted
                boxes += wanted * (1 - giou([x - left, y - top, x + right, y + bottom], best))
                q = 1 / (1 + math.exp(-raw.quality[level][b, 0, i, j].item()))
                quality -= wanted * math.log(q) + (1 - wanted) * math.log(1 - q)
    return {"cls": focal / positives, "box": boxes / weight, "centerness": quality / positives}


def test_losses_are_those_of_a_plain_loop() -> None:
    s = stream()
    raw, targets = lively(s), batch()
    losses, positives = s.losses(raw, targets)
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(plain_losses(raw, targets), rel=1e-4)
    assert set(positives.image.tolist()) == {0, 1}
    assert set(positives.object[positives.image == 0].tolist()) == {0, 1, 2}  # the large one at the second level
    assert (positives.anchor >= 64).any()


def test_class_and_centerness_losses_are_torchvisions() -> None:
    s = stream()
    raw, targets = lively(s), batch()
    reference = FCOS(SimpleNamespace(out_channels=32), num_classes=3).head  # type: ignore[arg-type]

    def flat(maps: list[Tensor]) -> Tensor:
        return torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1)

    outputs = {
        "cls_logits": flat(raw.logits),
        "bbox_regression": flat(raw.deltas),
        "bbox_ctrness": flat(raw.quality),
    }
    head = SimpleNamespace(
        compute_loss=lambda dictionaries, _, anchors, matched: reference.compute_loss(
            dictionaries, outputs, anchors, matched
        )
    )
    expected, (losses, _) = torchvisions(targets, head), s.losses(raw, targets)
    torch.testing.assert_close(losses["cls"], expected["classification"])
    torch.testing.assert_close(losses["centerness"], expected["bbox_ctrness"])


def test_a_perfect_box_costs_nothing_and_the_loss_pulls_every_side() -> None:
    s, target = stream(), truth((4, 4, 40, 36), size=(64, 64))
    places = [centres(torch.arange(h * w), w, stride) for (h, w), stride in zip(SIZES, s.strides, strict=True)]
    strides = torch.tensor(s.strides).repeat_interleave(torch.tensor([64, 16]))[:, None]
    exact = encode(torch.cat(places), target.boxes.expand(80, 4), strides)
    for shift, lowest, highest in ((0.0, 0.0, 1e-4), (0.5, 0.1, 1.0)):
        deltas = [
            (d.t().reshape(1, 4, *size) + shift).requires_grad_()
            for d, size in zip(exact.split([64, 16]), SIZES, strict=True)
        ]
        empty = [torch.zeros(1, 3, h, w) for h, w in SIZES]
        raw = Raw(size=(64, 64), logits=empty, deltas=deltas, features=[], quality=[m[:, :1] for m in empty])
        losses, positives = s.losses(raw, [target])
        assert lowest <= losses["box"].item() <= highest
        losses["box"].backward()
        assert deltas[0].grad is not None
        if shift:  # each side of the too large boxes of all points that learn is drawn in
            assert (deltas[0].grad.flatten(2)[0, :, positives.anchor] > 0).all()
            assert (deltas[0].grad != 0).sum() == 4 * len(positives.anchor)


def test_losses_do_not_grow_with_the_batch() -> None:
    s = stream()
    raw, targets = lively(s), batch()
    doubled = Raw(
        size=raw.size,
        logits=[m.repeat(2, 1, 1, 1) for m in raw.logits],
        deltas=[m.repeat(2, 1, 1, 1) for m in raw.deltas],
        features=[],
        quality=[m.repeat(2, 1, 1, 1) for m in raw.quality],
    )
    torch.testing.assert_close(s.losses(doubled, targets * 2)[0], s.losses(raw, targets)[0])


def test_losses_do_not_depend_on_what_lies_beyond_an_images_own_padding() -> None:
    s = stream()
    raw, targets = lively(s), batch()

    def widened(maps: list[Tensor]) -> list[Tensor]:
        """As in a batch of 96 x 128 pixels."""
        return [F.pad(m, (0, m.shape[3], 0, m.shape[2] // 2), value=3.0) for m in maps]

    wide = Raw(
        size=(96, 128),
        logits=widened(raw.logits),
        deltas=widened(raw.deltas),
        features=[],
        quality=widened(raw.quality),
    )
    torch.testing.assert_close(s.losses(wide, targets)[0], s.losses(raw, targets)[0])


def test_losses_are_divided_by_what_all_processes_have(monkeypatch: pytest.MonkeyPatch) -> None:
    s = stream()
    raw, targets = lively(s), batch()
    alone = s.losses(raw, targets)[0]
    monkeypatch.setattr(fcos_module, "mean_over_ranks", lambda value: 2 * value)  # the others have thrice as much
    together = s.losses(raw, targets)[0]
    torch.testing.assert_close({name: 2 * loss for name, loss in together.items()}, alone)


@pytest.mark.parametrize("lost", [(), ((29.0, 29.0, 35.0, 35.0),)])
def test_where_no_point_learns_an_object_there_is_a_class_loss_only(lost: tuple[tuple[float, ...], ...]) -> None:
    s = stream()
    raw = s(pyramid(*SIZES), (64, 64))
    losses, positives = s.losses(raw, [truth(*lost, size=(64, 64))] * 2)  # type: ignore[arg-type]
    assert losses["cls"] > 0
    assert losses["box"] == losses["centerness"] == 0
    assert len(positives.image) == 0
    total = sum(losses.values(), torch.zeros(())) + 0 * s.representations(raw, positives.image, positives.anchor).sum()
    total.backward()
    for name, parameter in s.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()


def test_objects_give_every_parameter_a_gradient() -> None:
    s = stream()
    raw = s(pyramid(*SIZES), (64, 64))
    losses, positives = s.losses(raw, batch())
    representations = s.representations(raw, positives.image, positives.anchor)
    (sum(losses.values(), torch.zeros(())) + representations.sum()).backward()
    still = [name for name, p in s.named_parameters() if p.grad is None or p.grad.count_nonzero() == 0]
    assert still == []


# --- detection ---


def silent(s: FCOSStream) -> Raw:
    """Of 64 x 96 pixels: every class score about 0, every centerness 1 in 2, every box of two strides."""
    sizes = ((8, 12), (4, 6))
    return Raw(
        size=(64, 96),
        logits=[torch.full((1, s.num_classes, h, w), -30.0) for h, w in sizes],
        deltas=[torch.ones(1, 4, h, w) for h, w in sizes],
        features=[],
        quality=[torch.zeros(1, 1, h, w) for h, w in sizes],
    )


def test_a_point_that_scores_becomes_an_object() -> None:
    s = stream()
    raw = silent(s)
    raw.logits[1][0, 2, 1, 4] = 2.0
    raw.deltas[1][0, :, 1, 4] = torch.tensor([0.5, 1, 3, 0.25])
    found = s.detect(raw, 0, (64, 96), (64, 96))
    assert found.anchors.tolist() == [8 * 12 + 1 * 6 + 4]
    assert found.labels.tolist() == [2]
    # the point is (72, 24); the right side would be 120 and ends with the image
    assert found.boxes.tolist() == [[64, 8, 96, 28]]


def test_the_score_is_the_geometric_mean_of_class_and_centerness() -> None:
    raw = silent(stream())
    raw.logits[0][0, 1, 2, 3] = math.log(0.8 / 0.2)
    raw.quality[0][0, 0, 2, 3] = math.log(0.45 / 0.55)
    assert stream().detect(raw, 0, (64, 96), (64, 96)).scores.tolist() == pytest.approx([0.6])
    # the threshold is one of this score
    assert len(stream(score_threshold=0.59).detect(raw, 0, (64, 96), (64, 96)).scores) == 1
    assert len(stream(score_threshold=0.61).detect(raw, 0, (64, 96), (64, 96)).scores) == 0


@pytest.mark.parametrize(("pre_nms", "kept"), [(20, 20), (None, 64), (1000, 64)])
def test_candidates_are_the_levels_best_points_by_class_and_centerness(pre_nms: int | None, kept: int) -> None:
    s = stream(pre_nms=pre_nms)
    raw = lively(s)
    index, scores = s.candidates(raw, 1, 0)
    plain = (raw.logits[0][1].sigmoid() * raw.quality[0][1].sigmoid()).sqrt().flatten(1).t()  # (64, C)
    assert index.tolist() == plain.amax(dim=1).argsort(descending=True)[:kept].tolist()
    torch.testing.assert_close(scores, plain[index])


def test_a_point_far_from_the_centre_yields_to_one_near_it() -> None:
    s = stream()
    raw = silent(s)
    for x, quality in ((3, 2.0), (4, -2.0)):
        raw.logits[0][0, 0, 3, x] = 3.0
        raw.quality[0][0, 0, 3, x] = quality
        point = centres(torch.tensor([3 * 12 + x]), 12, 8)
        raw.deltas[0][0, :, 3, x] = encode(point, torch.tensor([[10.0, 10, 44, 48]]), 8)[0]
    assert s.detect(raw, 0, (64, 96), (64, 96)).anchors.tolist() == [3 * 12 + 3]


# --- the whole network, beside what test_streams.py says of every stream ---

CLASSES = 3


def tiny(changes: dict[str, dict[str, Any]] | None = None) -> RDSNet:
    settings: dict[str, dict[str, Any]] = {
        "model": {"channels": 32, "representation": 8},
        "fcos": {"tower_depth": 1},
    }
    for section, values in (changes or {}).items():
        settings.setdefault(section, {}).update(values)
    torch.manual_seed(0)
    return build_model(get_config("rdsnet_fcos_tiny", settings), num_classes=CLASSES)


def noise(*sizes: tuple[int, int], padded: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(len(sizes), 3, *padded, dtype=torch.uint8)
    for image, (h, w) in zip(images, sizes, strict=True):
        image[:, :h, :w] = torch.randint(0, 256, (3, h, w), generator=generator, dtype=torch.uint8)
    return images


def test_images_of_several_sizes_train_together() -> None:
    targets = [truth((8, 8, 40, 24), size=(30, 90)), truth((2, 8, 30, 60), size=(64, 33))]
    losses = tiny().losses(noise((30, 90), (64, 33), padded=(64, 96)), targets)
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())


def test_without_masks_there_is_no_third_tower() -> None:
    model = tiny({"model": {"masks": False}})
    assert not [name for name, _ in model.named_parameters() if "represent" in name or "pixel" in name]
    losses = model.losses(noise((64, 64), padded=(64, 64)), [truth((8, 8, 40, 48), size=(64, 64))])
    assert set(losses) == {"cls", "box", "centerness"}


def test_mixed_precision_gives_float32_losses() -> None:
    model = tiny()
    images, targets = noise((64, 64), padded=(64, 64)), [truth((8, 8, 40, 48), size=(64, 64))]
    plain = model.losses(images, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model.losses(images, targets)
    for name, loss in mixed.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, plain[name], rtol=0.05, atol=0.01)
