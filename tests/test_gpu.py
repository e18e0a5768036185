"""Prediction on a GPU: how often it is waited for and how much it is given, and that the results are the CPU's."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

import make
from pretend_gpu import GPU, OnGPU, PretendGPU, move
from rdsnet import device as transfer
from rdsnet.config import get_config
from rdsnet.device import to_device, to_host
from rdsnet.model.rdsnet import RDSNet
from rdsnet.predict.predictor import Predictor
from rdsnet.structures import Objects
from rdsnet.weights.checkpoint import Checkpoint

SIZES = [(64, 96), (50, 70)]
OUTPUTS = [(128, 192), (101, 133)]
# Of an image, with room for one more. RDSNet: NMS, and what stayed. YOLACT's detector: the candidates of each of four
# levels; for fast NMS the classes, and how many stay
WAITS = {"rdsnet_tiny": 3, "rdsnet_fcos_tiny": 3, "rdsnet_s_tiny": 8, "yolact_tiny": 8}
PRESETS = tuple(WAITS)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> PretendGPU:
    pretended = PretendGPU()
    monkeypatch.setattr(transfer, "finish", lambda device: pretended.finish())
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it does not know this device
    # torch hands tensors of inference mode on where the pretended GPU does not see them
    monkeypatch.setattr(RDSNet, "detect", torch.no_grad()(RDSNet.detect.__wrapped__))  # type: ignore[attr-defined]
    return pretended


def on_gpu(gpu: PretendGPU, preset: str, images_of: int, **changes: object) -> list[Objects]:
    """What a model finds there."""
    model = make.lively(preset, {"detect": changes})
    move(model)
    gpu.tasks = 0
    with gpu:
        batch = OnGPU(make.images(*SIZES[:images_of], padded=(64, 96)))
        return model.detect(batch, SIZES[:images_of], OUTPUTS[:images_of])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("count", [1, 2])
def test_a_prediction_waits_a_few_times_and_not_for_each_object(gpu: PretendGPU, preset: str, count: int) -> None:
    found = on_gpu(gpu, preset, count)
    assert all(len(objects) > WAITS[preset] and isinstance(objects.masks[0], OnGPU) for objects in found)
    assert 0 < len(gpu.waits) <= WAITS[preset] * count


def test_where_few_boxes_stay_it_looks_and_waits_again(gpu: PretendGPU) -> None:
    on_gpu(gpu, "rdsnet_tiny", 1)
    once = len(gpu.waits)
    gpu.waits.clear()
    assert len(on_gpu(gpu, "rdsnet_tiny", 1, nms_iou=0.05)[0]) > 0
    assert len(gpu.waits) > once


def test_more_objects_are_no_more_tasks(gpu: PretendGPU) -> None:
    tasks = []
    for limit in (5, 60):
        objects = on_gpu(gpu, "rdsnet_tiny", 1, max_detections=limit)[0]
        assert len(objects) == limit
        tasks.append(gpu.tasks)
    assert tasks[1] < tasks[0] + 20  # not one for each of the 55


def test_a_hundred_objects_are_a_few_hundred_tasks(gpu: PretendGPU) -> None:
    assert len(on_gpu(gpu, "rdsnet_tiny", 1, max_detections=100)[0]) == 100
    assert gpu.tasks < 10 * 100  # with those of the network: less than any loop over the objects


@pytest.mark.parametrize("preset", PRESETS)
def test_results_are_fetched_with_one_wait_and_are_the_cpus(gpu: PretendGPU, preset: str) -> None:
    batch, stored = make.images(*SIZES, padded=(64, 96)), Checkpoint(get_config(preset), [], [])
    expected = Predictor(make.lively(preset), stored).detect_batch(batch, SIZES, OUTPUTS)
    model = make.lively(preset)
    move(model)
    with gpu:
        found = Predictor(model, stored).detect_batch(batch, SIZES, OUTPUTS)
    assert gpu.waits[-len(found) :] == ["finish"] * len(found)
    for ours, other in zip(found, expected, strict=True):
        assert len(ours) > 0
        assert ours.boxes.device.type == ours.masks[0].device.type == "cpu"
        for name in (
            "boxes",
            "regressed_boxes",
            "direct_boxes",
            "scores",
            "labels",
            "edge_std",
            "interval",
            "windows",
            "anchors",
        ):
            torch.testing.assert_close(getattr(ours, name), getattr(other, name), equal_nan=True)
        assert all(torch.equal(mask, same) for mask, same in zip(ours.masks, other.masks, strict=True))


def test_views_of_one_tensor_are_fetched_together(gpu: PretendGPU) -> None:
    whole, alone, nothing = torch.arange(40), torch.arange(3.0), torch.zeros(0, 4)
    with gpu:
        base = OnGPU(whole)
        views = [base[4:16].view(3, 4).t(), base[30:32], base[20:30:3]]
        tasks = gpu.tasks
        copies = to_host(*views, OnGPU(alone), OnGPU(nothing), alone, base.view(torch.int32)[5:9])
    assert gpu.tasks - tasks < 5  # of six tensors, four of which are views of one
    assert torch.equal(copies[-1], whole.view(torch.int32)[5:9])
    assert gpu.waits == ["finish"]
    expected = (whole[4:16].view(3, 4).t(), whole[30:32], whole[20:30:3], alone, nothing, alone)
    assert all(torch.equal(copy, own) for copy, own in zip(copies[:6], expected, strict=True))
    assert copies[0].stride() == (1, 4)
    assert copies[0].untyped_storage().data_ptr() == copies[1].untyped_storage().data_ptr()
    assert copies[5] is alone


def test_a_copy_to_the_gpu_does_not_wait(gpu: PretendGPU) -> None:
    with gpu:
        assert isinstance(to_device(torch.ones(3), GPU), OnGPU)
    assert gpu.waits == []


def test_the_pretended_gpu_notices_what_waits(gpu: PretendGPU) -> None:
    with gpu:
        t = OnGPU(torch.tensor([0.0, 1.0, 2.0]))
        index = OnGPU(torch.tensor([0, 2]))
        for ask in (
            t.nonzero,
            t.tolist,
            t.sum().item,
            lambda: t[t > 0],
            lambda: bool(t.any()),
            t.cpu,
            lambda: t[[0, 1]],
        ):
            before = len(gpu.waits)
            ask()
            assert len(gpu.waits) > before, ask
        for mix in (
            lambda: t + torch.ones(3),
            lambda: t + t.new_tensor([1, 2, 3]),
            lambda: torch.ones(3)[index],
            lambda: torch.stack([t[0], torch.tensor(1.0)]),
            lambda: t.index_put((index,), torch.ones(2)),
        ):
            with pytest.raises(RuntimeError, match="waits for a GPU"):
                mix()
        early = t.to("cpu", non_blocking=True)
        assert early.tolist() == [0, 0, 0]
        gpu.finish()
        assert early.tolist() == [0, 1, 2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("preset", PRESETS)
def test_a_gpu_finds_what_the_cpu_finds(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    batch, stored = make.images(*SIZES, padded=(64, 96)), Checkpoint(get_config(preset), [], [])
    expected = Predictor(make.lively(preset), stored).detect_batch(batch, SIZES, OUTPUTS)
    found = Predictor(make.lively(preset).cuda(), stored).detect_batch(batch, SIZES, OUTPUTS)
    for ours, other in zip(found, expected, strict=True):
        place = {pair: i for i, pair in enumerate(zip(other.anchors.tolist(), other.labels.tolist(), strict=True))}
        pairs = list(zip(ours.anchors.tolist(), ours.labels.tolist(), strict=True))
        both = [(i, place[pair]) for i, pair in enumerate(pairs) if pair in place]
        assert len(both) > 0.9 * len(other)  # but for some whose scores or overlaps are as good as equal
        for i, j in both:
            torch.testing.assert_close(ours.regressed_boxes[i], other.regressed_boxes[j], rtol=0, atol=0.05)
            if torch.equal(ours.windows[i], other.windows[j]):
                assert (ours.masks[i] != other.masks[j]).sum() <= 0.02 * ours.masks[i].numel() + 2
