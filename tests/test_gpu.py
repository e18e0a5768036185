"""Prediction on a GPU: how often it is waited for and how much it is given, and that the results are the CPU's."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from pretend_gpu import GPU, OnGPU, PretendGPU, move
from rdsnet import transfer
from rdsnet.config import get_config
from rdsnet.inference import detect
from rdsnet.model import RDSNet
from rdsnet.structures import Objects
from rdsnet.transfer import to_device, to_host
from test_streams import images, lively

PRESETS = ("rdsnet_tiny", "rdsnet_fcos_tiny", "rdsnet_s_tiny")
SIZES = [(64, 96), (50, 70)]
OUTPUTS = [(128, 192), (101, 133)]
WAITS = {preset: ["torchvision::nms", "fetched"] for preset in PRESETS}
# YOLACT's detector: the candidates of each level; for fast NMS the classes, and how many stay
WAITS["rdsnet_s_tiny"] = ["aten::nonzero"] * 4 + ["fetched", "aten::nonzero", "fetched"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> PretendGPU:
    pretended = PretendGPU()
    monkeypatch.setattr(transfer, "finish", lambda device: pretended.waits.append("fetched"))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it does not know this device
    # torch hands tensors of inference mode on where the pretended GPU does not see them
    monkeypatch.setattr(RDSNet, "detect", torch.no_grad()(RDSNet.detect.__wrapped__))  # type: ignore[attr-defined]
    return pretended


def on_gpu(gpu: PretendGPU, preset: str, images_of: int, **changes: object) -> list[Objects]:
    """What a model finds there; the second time, when what depends on sizes alone is at hand."""
    model = lively(preset, {"detect": changes})
    move(model)
    batch = images(*SIZES[:images_of], padded=(64, 96))
    for _ in range(2):
        gpu.waits.clear()
        gpu.tasks = 0
        with gpu:
            found = model.detect(OnGPU(batch), SIZES[:images_of], OUTPUTS[:images_of])
    return found


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("count", [1, 2])
def test_a_prediction_waits_in_nms_and_for_what_stayed_and_nowhere_else(
    gpu: PretendGPU, preset: str, count: int
) -> None:
    found = on_gpu(gpu, preset, count)
    assert all(len(objects) > 0 and isinstance(objects.masks[0], OnGPU) for objects in found)
    assert gpu.waits == WAITS[preset] * count


def test_more_objects_are_no_more_tasks(gpu: PretendGPU) -> None:
    tasks = []
    for limit in (5, 60):
        objects = on_gpu(gpu, "rdsnet_tiny", 1, max_detections=limit)[0]
        assert len(objects) == limit
        tasks.append(gpu.tasks)
    assert tasks[0] == tasks[1]


def test_a_hundred_objects_are_a_few_hundred_tasks(gpu: PretendGPU) -> None:
    assert len(on_gpu(gpu, "rdsnet_tiny", 1, max_detections=100)[0]) == 100
    assert gpu.tasks < 600  # with those of the network


@pytest.mark.parametrize("preset", PRESETS)
def test_results_are_fetched_with_one_wait_and_are_the_cpus(gpu: PretendGPU, preset: str) -> None:
    batch, config = images(*SIZES, padded=(64, 96)), get_config(preset)
    expected = detect(lively(preset), batch, SIZES, OUTPUTS, config)
    model = lively(preset)
    move(model)
    with gpu:
        found = detect(model, batch, SIZES, OUTPUTS, config)
    assert gpu.waits[-len(found) :] == ["fetched"] * len(found)
    for ours, other in zip(found, expected, strict=True):
        assert len(ours) > 0
        assert ours.boxes.device.type == ours.masks[0].device.type == "cpu"
        for name in ("boxes", "regressed_boxes", "direct_boxes", "scores", "labels", "edge_std", "windows", "anchors"):
            torch.testing.assert_close(getattr(ours, name), getattr(other, name), equal_nan=True)
        assert all(torch.equal(mask, same) for mask, same in zip(ours.masks, other.masks, strict=True))


def test_views_of_one_tensor_are_fetched_together(gpu: PretendGPU) -> None:
    whole, alone, nothing = torch.arange(40), torch.arange(3.0), torch.zeros(0, 4)
    with gpu:
        base = OnGPU(whole)
        views = [base[4:16].view(3, 4).t(), base[30:32], base[20:30:3]]
        tasks = gpu.tasks
        copies = to_host(*views, OnGPU(alone), OnGPU(nothing), alone)
    assert gpu.tasks - tasks == 3
    assert gpu.waits == ["fetched"]
    expected = (whole[4:16].view(3, 4).t(), whole[30:32], whole[20:30:3], alone, nothing, alone)
    assert all(torch.equal(copy, own) for copy, own in zip(copies, expected, strict=True))
    assert copies[0].stride() == (1, 4)
    assert copies[0].untyped_storage().data_ptr() == copies[1].untyped_storage().data_ptr()
    assert copies[-1] is alone


def test_a_copy_to_the_gpu_does_not_wait(gpu: PretendGPU) -> None:
    with gpu:
        assert isinstance(to_device(torch.ones(3), GPU), OnGPU)
    assert gpu.waits == []


def test_the_pretended_gpu_notices_what_waits(gpu: PretendGPU) -> None:
    with gpu:
        t = OnGPU(torch.tensor([0.0, 1.0, 2.0]))
        for ask in (t.nonzero, t.tolist, t.sum().item, lambda: t[t > 0], lambda: bool(t.any()), t.cpu):
            before = len(gpu.waits)
            ask()
            assert len(gpu.waits) > before, ask
        with pytest.raises(RuntimeError, match="waits for a GPU"):
            t + torch.ones(3)
        with pytest.raises(RuntimeError, match="waits for a GPU"):
            t + t.new_tensor([1, 2, 3])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("preset", PRESETS)
def test_a_gpu_finds_what_the_cpu_finds(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    batch, config = images(*SIZES, padded=(64, 96)), get_config(preset)
    expected = detect(lively(preset), batch, SIZES, OUTPUTS, config)
    found = detect(lively(preset).cuda(), batch, SIZES, OUTPUTS, config)
    for ours, other in zip(found, expected, strict=True):
        same = ours.anchors == other.anchors  # but for two whose scores are as good as equal
        assert same.float().mean() > 0.9
        torch.testing.assert_close(ours.boxes[same], other.boxes[same], rtol=0, atol=0.05)
        for i in same.nonzero()[:, 0].tolist():
            differ = (ours.masks[i] != other.masks[i]).sum()
            assert differ <= 0.02 * ours.masks[i].numel() + 2
