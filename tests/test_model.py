"""The whole network: shapes, losses that reach every parameter, and results that depend on the image alone."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from make import images
from rdsnet.config import get_config
from rdsnet.model.build import build_model
from rdsnet.model.rdsnet import RDSNet
from rdsnet.structures import Objects, Targets

CLASSES = 3


def tiny(changes: dict[str, Any] | None = None) -> RDSNet:
    """rdsnet_tiny at half its width."""
    narrow = {"model": {"channels": 32, "representation": 8}, "retinanet": {"tower_depth": 1}}
    config = get_config("rdsnet_tiny", narrow)
    for section, values in (changes or {}).items():
        setattr(config, section, replace(getattr(config, section), **values))
    torch.manual_seed(0)
    return build_model(config, num_classes=CLASSES)


def lively(changes: dict[str, Any] | None = None) -> RDSNet:
    """An untrained model that finds objects with scores well apart and masks with structure, in evaluation mode."""
    model = tiny(changes)
    classify = model.object_stream.get_submodule("classify")
    nn.init.normal_(classify.get_parameter("weight"), std=0.3)
    nn.init.zeros_(classify.get_parameter("bias"))
    if model.pixel_stream is not None:
        nn.init.normal_(model.object_stream.represent.weight, std=0.3)
    return model.eval()


def truth(
    *boxes: tuple[int, int, int, int], size: tuple[int, int] = (64, 64), has_mask: bool = True, label: int = 1
) -> Targets:
    """Objects that fill their boxes."""
    n = len(boxes)
    masks = torch.zeros(n, *(-(-side // 32) * 8 for side in size), dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0 // 4 : y1 // 4, x0 // 4 : x1 // 4] = has_mask
    corners = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    return Targets(
        boxes=corners,
        labels=torch.full((n,), label),
        masks=masks,
        has_mask=torch.full((n,), has_mask),
        areas=(corners[:, 2:] - corners[:, :2]).prod(dim=1),
        image_size=size,
    )


# --- forward ---


@pytest.mark.parametrize(("h", "w"), [(32, 32), (64, 96), (160, 32)])
def test_forward_gives_every_level_and_the_pixel_map(h: int, w: int) -> None:
    raw, pixels = tiny()(torch.zeros(2, 3, h, w))
    assert raw.map_sizes == [(-(-h // s), -(-w // s)) for s in (4, 8, 16, 32)]
    assert raw.logits[0].shape == (2, 9 * CLASSES, h // 4, w // 4)
    assert raw.deltas[0].shape == (2, 9 * 4, h // 4, w // 4)
    assert pixels is not None
    assert pixels.shape == (2, 8, h // 2, w // 2)


def test_padding_is_normalised_to_zero() -> None:
    model = tiny()
    normal = model.normalise(torch.full((1, 3, 32, 32), 255, dtype=torch.uint8), [(20, 10)])
    assert normal[0, :, 20:].count_nonzero() == 0
    assert normal[0, :, :, 10:].count_nonzero() == 0
    torch.testing.assert_close(normal[0, :, 0, 0], (255 - model.image_mean[:, 0, 0]) / model.image_std[:, 0, 0])


# --- losses ---


CASES = {
    "no objects": [truth(), truth()],
    "one object": [truth((8, 8, 40, 48)), truth()],
    "boxes only": [truth((8, 8, 40, 48), has_mask=False), truth()],
    "mixed": [truth((8, 8, 40, 48), (0, 0, 64, 64), (20, 20, 24, 24)), truth((4, 4, 20, 60), has_mask=False)],
}


@pytest.mark.parametrize("case", CASES)
def test_every_trained_parameter_has_a_gradient(case: str) -> None:
    """One without would stall training on several machines."""
    model = tiny()
    sum(model.losses(images((64, 64), (64, 64), padded=(64, 64)), CASES[case]).values(), torch.zeros(())).backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_an_image_without_objects_has_a_class_loss_only() -> None:
    losses = tiny().losses(images((64, 64), padded=(64, 64)), [truth()])
    assert losses["cls"] > 0
    assert losses["box"] == 0
    assert losses["mask"] == 0


def test_an_object_without_a_segmentation_trains_its_box_only() -> None:
    batch = images((64, 64), padded=(64, 64))
    boxes_only = tiny().losses(batch, [truth((8, 8, 40, 48), has_mask=False)])
    with_mask = tiny().losses(batch, [truth((8, 8, 40, 48))])
    assert boxes_only["mask"] == 0
    assert with_mask["mask"] > 0
    assert boxes_only["box"] == with_mask["box"] > 0
    assert boxes_only["cls"] == with_mask["cls"]


def test_an_object_without_a_segmentation_leaves_the_others_mask_loss_alone() -> None:
    batch, left, both = (
        images((64, 64), padded=(64, 64)),
        truth((4, 4, 28, 28)),
        truth((4, 4, 28, 28), (36, 36, 60, 60)),
    )
    both.masks[1], both.has_mask[1] = False, False
    torch.testing.assert_close(tiny().losses(batch, [both])["mask"], tiny().losses(batch, [left])["mask"])


def test_an_object_too_small_for_a_mask_trains_its_box_only() -> None:
    batch, target = images((64, 64), padded=(64, 64)), [truth((8, 8, 40, 48))]
    assert tiny({"rules": {"min_mask_area": 32 * 40}}).losses(batch, target)["mask"] == 0
    assert tiny({"rules": {"min_mask_area": 32 * 40 - 1}}).losses(batch, target)["mask"] > 0


def test_losses_are_weighted_as_in_equation_8() -> None:
    batch, target = images((64, 64), padded=(64, 64)), [truth((8, 8, 40, 48))]
    plain = tiny().losses(batch, target)
    weighted = tiny({"loss": {"box_weight": 3.0, "mask_weight": 0.5}}).losses(batch, target)
    torch.testing.assert_close(weighted["cls"], plain["cls"])
    torch.testing.assert_close(weighted["box"], 3 * plain["box"])
    torch.testing.assert_close(weighted["mask"], 0.5 * plain["mask"])


def test_images_of_several_sizes_train_together() -> None:
    targets = [truth((8, 8, 40, 24), size=(30, 90)), truth((2, 8, 30, 60), size=(64, 33))]
    losses = tiny().losses(images((30, 90), (64, 33), padded=(64, 96)), targets)
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())


def test_the_limit_of_masks_draws_with_the_generator() -> None:
    model = tiny({"loss": {"max_masks": 3}})
    nn.init.normal_(model.object_stream.represent.weight, std=0.3)
    batch, target = images((64, 64), padded=(64, 64)), [truth((8, 8, 40, 48), (20, 20, 60, 60))]

    def value(seed: int) -> float:
        return model.losses(batch, target, torch.Generator().manual_seed(seed))["mask"].item()

    assert value(0) == value(0)
    assert len({value(seed) for seed in range(4)}) > 1


def test_mixed_precision_gives_float32_losses() -> None:
    model = tiny()
    batch, target = images((64, 64), padded=(64, 64)), [truth((8, 8, 40, 48))]
    plain = model.losses(batch, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model.losses(batch, target)
    for name, loss in mixed.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, plain[name], rtol=0.05, atol=0.01)
    sum(mixed.values(), torch.zeros(())).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_losses_compute_in_float32_what_the_network_gave_in_mixed_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively()
    batch, target = images((64, 64), padded=(64, 64)), [truth((8, 8, 40, 48))]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model.losses(batch, target)
        raw, pixels = model(model.normalise(batch, [(64, 64)]))
    monkeypatch.setattr(model.object_stream, "forward", lambda pyramid, size: raw)
    monkeypatch.setattr(model.pixel_stream, "forward", lambda pyramid: pixels)
    assert mixed == model.losses(batch, target)


def test_a_few_steps_lower_the_loss() -> None:
    model = tiny()
    batch, target = images((64, 64), padded=(64, 64)), [truth((8, 8, 40, 48))]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    history = []
    for _ in range(15):
        losses = model.losses(batch, target)
        optimizer.zero_grad()
        sum(losses.values(), torch.zeros(())).backward()
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})
    assert all(history[-1][name] < 0.9 * history[0][name] for name in ("cls", "box", "mask"))


# --- what is frozen ---


@pytest.fixture(scope="module")
def paper() -> RDSNet:
    return build_model(get_config("rdsnet_r50", {"model": {"pretrained": "none", "channels": 64}}), num_classes=CLASSES)


def test_the_papers_preset_freezes_stem_first_stage_and_all_statistics(paper: RDSNet) -> None:
    assert paper.training
    norms = {n: m for n, m in paper.backbone.trunk.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert len(norms) == 53
    assert not any(m.training for m in norms.values())
    learns = {name.split(".")[0] for name, p in paper.backbone.trunk.named_parameters() if p.requires_grad}
    assert learns == {"layer2", "layer3", "layer4"}
    affine = [m.weight.requires_grad for name, m in norms.items() if name.startswith(("layer2", "layer3", "layer4"))]
    assert all(affine)


def test_training_steps_leave_the_frozen_parts_as_they_were(paper: RDSNet) -> None:
    paper.train()
    frozen = {k: v.clone() for k, v in paper.state_dict().items() if _is_frozen(k)}
    optimizer = torch.optim.SGD([p for p in paper.parameters() if p.requires_grad], lr=0.1)
    losses = paper.losses(images((64, 64), padded=(64, 64)), [truth((8, 8, 40, 48))])
    sum(losses.values(), torch.zeros(())).backward()
    optimizer.step()
    after = paper.state_dict()
    assert len(frozen) > 100
    assert [k for k, v in frozen.items() if not torch.equal(v, after[k])] == []
    scale = paper.backbone.trunk.get_submodule("layer2.0.bn3").weight
    assert isinstance(scale, nn.Parameter)
    assert scale.grad is not None
    assert scale.grad.count_nonzero() > 0


def _is_frozen(name: str) -> bool:
    stem = name.startswith(("backbone.trunk.conv1", "backbone.trunk.bn1", "backbone.trunk.layer1"))
    return stem or (name.startswith("backbone") and "running" in name) or name.startswith("mbrm")


def test_the_tiny_preset_trains_all_of_its_trunk() -> None:
    model = tiny()
    assert all(p.requires_grad for p in model.backbone.parameters())
    assert all(m.training for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d))


# --- detection ---


def assert_same(ours: Objects, other: Objects, tolerance: float = 0.0) -> None:
    for field in fields(Objects):
        a, b = getattr(ours, field.name), getattr(other, field.name)
        if isinstance(a, Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance if a.is_floating_point() else 0, msg=field.name)
    for a, b in zip(ours.masks, other.masks, strict=True):
        assert (a != b).sum() <= (1 if tolerance else 0)  # a logit beside the threshold may fall to its other side
    assert ours.image_size == other.image_size


SIZES = [(64, 96), (50, 70), (37, 96)]
OUTPUTS = [(64, 96), (100, 140), (74, 30)]


def test_an_images_objects_do_not_depend_on_its_batch() -> None:
    model = lively({"detect": {"max_detections": 20}})
    batch = images(*SIZES, padded=(64, 96))
    together = model.detect(batch, SIZES, OUTPUTS)
    for i, objects in enumerate(together):
        assert len(objects) == 20
        alone = model.detect(batch[i : i + 1], SIZES[i : i + 1], OUTPUTS[i : i + 1])[0]
        assert_same(objects, alone, 1e-3)
        torch.testing.assert_close(objects.scores, alone.scores, rtol=0, atol=1e-5)
        assert objects.profiles is not None
        assert alone.profiles is not None
        torch.testing.assert_close(objects.profiles[0], alone.profiles[0], rtol=0, atol=1e-4)


def test_what_lies_in_the_padding_changes_nothing() -> None:
    model = lively()
    batch = images((50, 70), padded=(64, 96))
    noisy = batch.clone()
    noisy[:, :, 50:] = 200
    noisy[:, :, :, 70:] = 100
    plain, other = (model.detect(b, [(50, 70)], [(50, 70)])[0] for b in (batch, noisy))
    assert_same(plain, other)


def test_detecting_twice_gives_the_same() -> None:
    model = lively()
    batch = images((64, 96), padded=(64, 96))
    first, second = (model.detect(batch, [(64, 96)], [(64, 96)])[0] for _ in range(2))
    assert_same(first, second)


def test_objects_are_in_pixels_of_the_original_image() -> None:
    """The image is half as high and three times as wide as the network's."""
    model = lively({"detect": {"refine": "off"}})
    batch = images((64, 96), padded=(64, 96))
    plain = model.detect(batch, [(64, 96)], [(64, 96)])[0]
    scaled = model.detect(batch, [(64, 96)], [(32, 288)])[0]
    assert torch.equal(plain.anchors, scaled.anchors)
    torch.testing.assert_close(scaled.boxes, plain.boxes * torch.tensor([3, 0.5, 3, 0.5]))
    assert scaled.image_size == (32, 288)
    assert scaled.windows[:, 2].max() > 96
    assert scaled.windows[:, 3].max() <= 32
    assert scaled.profiles is not None
    assert scaled.profiles[0].shape[1:] == (288,)
    assert scaled.profiles[1].shape[1:] == (32,)


def test_detections_keep_to_their_promises() -> None:
    objects = lively().detect(images((50, 70), padded=(64, 96)), [(50, 70)], [(101, 140)])[0]
    assert 0 < len(objects) <= 100
    assert (objects.scores.diff() <= 0).all()
    assert objects.scores.min() > 0.05
    for boxes in (objects.boxes, objects.regressed_boxes, objects.direct_boxes):
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert boxes.min() >= 0
        assert boxes[:, [0, 2]].max() <= 140 + 1e-3
        assert boxes[:, [1, 3]].max() <= 101 + 1e-3
    assert objects.edge_std.isfinite().all()
    assert any(mask.any() for mask in objects.masks)


def test_each_box_setting_gives_its_boxes() -> None:
    batch = images((64, 96), padded=(64, 96))
    found = {
        refine: lively({"detect": {"refine": refine}}).detect(batch, [(64, 96)], [(64, 96)])[0]
        for refine in ("argmax", "mean", "direct", "off")
    }
    assert torch.equal(found["off"].boxes, found["off"].regressed_boxes)
    assert torch.equal(found["direct"].boxes, found["direct"].direct_boxes)
    assert not torch.equal(found["argmax"].boxes, found["off"].boxes)
    assert not torch.equal(found["mean"].boxes, found["argmax"].boxes)
    no_gamma = lively({"detect": {"gamma": 0.0}}).detect(batch, [(64, 96)], [(64, 96)])[0]
    assert torch.equal(no_gamma.boxes, no_gamma.regressed_boxes)


@pytest.mark.parametrize("refine", ["argmax", "mean", "direct"])
def test_an_empty_mask_leaves_the_regressed_box(refine: str) -> None:
    model = lively({"detect": {"refine": refine}})
    assert model.pixel_stream is not None
    with torch.no_grad():  # every pixel is background, by 10 times each of the 8 channels
        model.pixel_stream.get_parameter("project.weight").zero_()
        model.pixel_stream.get_parameter("project.bias").fill_(1)
        model.object_stream.get_parameter("represent.weight").zero_()
        model.object_stream.get_parameter("represent.bias").view(9, 2, 8)[:, 0] = 10
    objects = model.detect(images((64, 96), padded=(64, 96)), [(64, 96)], [(64, 96)])[0]
    assert len(objects) > 0
    assert not any(mask.any() for mask in objects.masks)
    assert torch.equal(objects.boxes, objects.regressed_boxes)


def test_nothing_found_is_an_empty_result() -> None:
    objects = tiny().eval().detect(images((64, 96), padded=(64, 96)), [(64, 96)], [(64, 96)])[0]
    assert len(objects) == 0
    assert objects.boxes.shape == (0, 4)
    assert objects.masks == []


def test_a_plain_detector_has_boxes_and_no_masks() -> None:
    model = lively({"model": {"masks": False}})
    assert not [name for name, _ in model.named_parameters() if "represent" in name or "pixel" in name]
    batch = images((64, 96), padded=(64, 96))
    objects = model.detect(batch, [(64, 96)], [(64, 96)])[0]
    assert len(objects) > 0
    assert objects.masks == []
    assert objects.profiles is None
    assert torch.equal(objects.boxes, objects.regressed_boxes)
    assert set(model.losses(batch, [truth((8, 8, 40, 48), size=(64, 96))])) == {"cls", "box"}


def test_detection_in_mixed_precision_gives_float32() -> None:
    model = lively()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        objects = model.detect(images((64, 96), padded=(64, 96)), [(64, 96)], [(64, 96)])[0]
    assert len(objects) > 0
    assert objects.boxes.dtype == objects.scores.dtype == objects.edge_std.dtype == torch.float32


# --- building ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"stream": "detr"}}, "unknown model.stream 'detr'; valid are retinanet, yolact, fcos"),
        ({"model": {"norm": "layer"}}, "unknown norm 'layer'; valid are group, batch, none"),
        ({"model": {"levels": (3, 4, 5)}}, "expected levels that go on from trunk_levels"),
        ({"model": {"trunk": "nonsense"}}, "timm has no trunk 'nonsense'"),
        ({"model": {"mask_stride": 3}}, "a mask_stride that divides 4"),
        ({"model": {"pixel_levels": (3, 4, 7)}}, r"pixel_levels among levels \(2, 3, 4, 5\), got \(3, 4, 7\)"),
        ({"model": {"channels": 48}}, "channels"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(changes)


def test_a_model_knows_at_least_one_class() -> None:
    with pytest.raises(ValueError, match="expected at least 1 class, got 0"):
        build_model("rdsnet_tiny", num_classes=0)


def test_a_model_is_built_for_training() -> None:
    assert build_model("rdsnet_tiny", num_classes=1).training
