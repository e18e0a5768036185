"""What holds for every object stream and every way to assemble masks, in the whole model."""

from __future__ import annotations

import pytest
import torch

from make import detector as tiny
from make import images, lively
from rdsnet.structures import MaskGrid, Targets

PRESETS = ("rdsnet_tiny", "rdsnet_s_tiny", "rdsnet_fcos_tiny", "yolact_tiny")
CLASSES = 3


def truth(*boxes: tuple[float, float, float, float], size: tuple[int, int], padded: tuple[int, int]) -> Targets:
    """Objects that fill their boxes, on a grid of 2 pixels."""
    grid = MaskGrid(4, 2)
    masks = torch.zeros(len(boxes), grid.cells(padded[0]), grid.cells(padded[1]), dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[int(y1) // 2 : int(y2) // 2, int(x1) // 2 : int(x2) // 2] = True
    return Targets(
        boxes=torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        labels=torch.arange(len(boxes)) % CLASSES,
        masks=masks,
        has_mask=torch.ones(len(boxes), dtype=torch.bool),
        areas=torch.tensor([(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in boxes]),
        image_size=size,
    )


PADDED = (64, 96)
SIZES = [(64, 96), (50, 70), (33, 96)]
EMPTY = truth(size=SIZES[0], padded=PADDED)
ONE = truth((10, 6, 40, 44), size=SIZES[1], padded=PADDED)
FOUR = truth((2, 2, 30, 30), (20, 4, 90, 20), (60, 10, 80, 30), (4, 20, 12, 28), size=SIZES[2], padded=PADDED)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "targets", [[EMPTY], [EMPTY, EMPTY], [ONE], [EMPTY, ONE, FOUR]], ids=["empty", "both empty", "one", "mixed"]
)
def test_every_trained_parameter_learns_and_losses_are_finite(preset: str, targets: list[Targets]) -> None:
    model = tiny(preset)
    batch = images(*(t.image_size for t in targets), padded=PADDED)
    losses = model.losses(batch, targets, torch.Generator().manual_seed(0))
    assert {"cls", "box", "mask"} <= set(losses)
    assert all(loss.isfinite() and loss >= 0 for loss in losses.values())
    sum(losses.values(), torch.zeros(())).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("preset", PRESETS)
def test_a_few_steps_lower_every_loss(preset: str) -> None:
    model = tiny(preset)
    batch, targets = images(*SIZES, padded=PADDED), [EMPTY, ONE, FOUR]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    history = []
    for _ in range(12):
        losses = model.losses(batch, targets, torch.Generator().manual_seed(0))
        history.append({name: loss.item() for name, loss in losses.items()})
        optimizer.zero_grad()
        sum(losses.values(), torch.zeros(())).backward()
        optimizer.step()
    assert sum(history[-1].values()) < 0.7 * sum(history[0].values()), history
    assert history[-1]["mask"] < history[0]["mask"], history


@pytest.mark.parametrize("preset", PRESETS)
def test_an_images_objects_do_not_depend_on_its_batch(preset: str) -> None:
    model = lively(preset, {"detect": {"max_detections": 20}, "model": {"norm": "none"}})
    sizes, padded = [(64, 96), (20, 30)], (64, 96)
    outputs = [(64, 96), (40, 60)]
    batch = images(*sizes, padded=padded)
    together = model.detect(batch, sizes, outputs)
    for i, objects in enumerate(together):
        again = model.detect(batch[i : i + 1], sizes[i : i + 1], outputs[i : i + 1])[0]
        assert len(objects) > 0
        assert torch.equal(objects.anchors, again.anchors)
        torch.testing.assert_close(objects.regressed_boxes, again.regressed_boxes, rtol=0, atol=1e-3)
        assert (objects.regressed_boxes[:, 2:] <= torch.tensor([outputs[i][1], outputs[i][0]])).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_masks_and_boxes_are_in_the_images_pixels(preset: str) -> None:
    model = lively(preset)
    objects = model.detect(images((64, 96), padded=PADDED), [(64, 96)], [(128, 300)])[0]
    assert len(objects) > 0
    assert objects.image_size == (128, 300)
    assert objects.boxes[:, 2].max() > 150  # the image is 300 wide, the network's input 96
    for mask, (x0, y0, x1, y1) in zip(objects.masks, objects.windows.tolist(), strict=True):
        assert mask.shape == (y1 - y0, x1 - x0)
        assert 0 <= x0 <= x1 <= 300
        assert 0 <= y0 <= y1 <= 128


@pytest.mark.parametrize("preset", ["rdsnet_s_tiny", "yolact_tiny"])
def test_a_square_that_is_no_multiple_of_32_is_not_padded(preset: str) -> None:
    """100 pixels are 25 cells of stride 4 and 50 of the mask grid; 70 are 18 and 36, each of 70/36 pixels."""
    model = lively(preset)
    for side, cells in ((100, 50), (70, 36)):
        batch = images((side, side), padded=(side, side))
        raw, pixels = model(model.normalise(batch, [(side, side)]))
        assert pixels is not None
        assert pixels.shape[2:] == (cells, cells)
        assert raw.size == (side, side)
        target = truth((10, 10, 40, 40), size=(side, side), padded=(side, side))
        assert all(loss.isfinite() for loss in model.losses(batch, [target]).values())
        objects = model.detect(batch, [(side, side)], [(side, 2 * side)])[0]
        assert objects.boxes[:, 2].max() > side


@pytest.mark.parametrize("assembly", ["correlation", "linear"])
@pytest.mark.parametrize("preset", ["rdsnet_tiny", "rdsnet_s_tiny", "rdsnet_fcos_tiny"])
def test_either_assembly_goes_with_every_stream(preset: str, assembly: str) -> None:
    model = tiny(preset, {"model": {"assembly": assembly}})
    halves = 2 if assembly == "correlation" else 1
    representation = model.object_stream.represent
    assert representation.out_channels == model.object_stream.anchors_per_location * halves * 8
    losses = model.losses(images(SIZES[1], padded=PADDED), [ONE])
    assert losses["mask"].isfinite()


def test_prototypes_of_a_linear_combination_are_not_negative() -> None:
    batch = images((64, 96), padded=PADDED)
    for assembly, negative in (("linear", False), ("correlation", True)):
        model = tiny("rdsnet_s_tiny", {"model": {"assembly": assembly}})
        _, pixels = model(model.normalise(batch, [(64, 96)]))
        assert pixels is not None
        assert bool((pixels < 0).any()) == negative


def test_yolacts_masks_refuse_the_settings_that_they_would_ignore() -> None:
    with pytest.raises(ValueError, match=r"plain boxes and without OHEM, got loss\.crop_expand 1\.5"):
        tiny("yolact_tiny", {"loss": {"crop_expand": 1.5}})


def test_yolacts_boxes_end_as_whole_pixels() -> None:
    objects = lively("yolact_tiny").detect(images((64, 96), padded=PADDED), [(64, 96)], [(64, 96)])[0]
    assert len(objects) > 0
    assert torch.equal(objects.boxes, objects.boxes.trunc())
