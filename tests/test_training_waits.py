"""A training step on a GPU: how often its losses wait for it, and that they are the CPU's."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from pretend_gpu import GPU, OnGPU, PretendGPU, move
from rdsnet import device as transfer
from rdsnet.config import get_config
from rdsnet.model.build import build_model
from rdsnet.structures import Targets

PRESETS = ("rdsnet_tiny", "rdsnet_fcos_tiny", "rdsnet_s_tiny", "yolact_tiny")
FEW, MANY = 3, 20  # objects of each of two images
WAITS = 12  # at most: which anchors learn and what is drawn among them, of either image; fewer than MANY objects
SIZES = [(64, 96), (50, 70)]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> PretendGPU:
    pretended = PretendGPU()
    monkeypatch.setattr(transfer, "finish", lambda device: pretended.finish())
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it does not know this device
    return pretended


def targets(grid: tuple[int, int], objects: int) -> list[Targets]:
    """As many objects in each image, alternating between two classes; one has no mask."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for h, w in SIZES:
        corner = torch.rand(objects, 2, generator=generator) * torch.tensor([w / 2, h / 2])
        size = 8 + torch.rand(objects, 2, generator=generator) * torch.tensor([w / 3, h / 3])
        has_mask = torch.arange(objects) != 1
        masks = (torch.rand(objects, *grid, generator=generator) > 0.5) & has_mask[:, None, None]
        made.append(
            Targets(
                boxes=torch.cat([corner, corner + size], dim=1),
                labels=torch.arange(objects) % 2,
                masks=masks,
                has_mask=has_mask,
                areas=masks.flatten(1).sum(dim=1).float(),
                image_size=(h, w),
            )
        )
    return made


@pytest.mark.parametrize("preset", PRESETS)
def test_losses_wait_as_often_for_many_objects_as_for_few_and_are_the_cpus(gpu: PretendGPU, preset: str) -> None:
    torch.manual_seed(0)
    model = build_model(get_config(preset, {"loss": {"max_masks": 8}}), num_classes=2).eval()
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        pixels = model(model.normalise(images, SIZES))[1]
        assert pixels is not None
        grid = (pixels.shape[2], pixels.shape[3])
        truths = {objects: targets(grid, objects) for objects in (FEW, MANY)}
        expected = {n: model.losses(images, truths[n], torch.Generator().manual_seed(0)) for n in truths}
    move(model)
    for objects, truth in truths.items():
        gpu.waits.clear()
        with gpu, torch.no_grad():
            there = [target.to(GPU) for target in truth]
            found = model.losses(OnGPU(images), there, torch.Generator().manual_seed(0))
        assert len(gpu.waits) <= WAITS
        assert all(torch.equal(found[name].inner, loss) for name, loss in expected[objects].items())


def test_targets_are_checked_where_they_are_made_and_not_on_the_way(gpu: PretendGPU) -> None:
    (target, _) = targets((16, 24), 3)
    with gpu:
        there = target.to(GPU)
        assert len(there) == 3
        assert gpu.waits == []
        there.to("cpu")
    with pytest.raises(ValueError, match="box 2 has no width or height"):
        target.boxes[2, 2] = target.boxes[2, 0]
        target.to("cpu")
