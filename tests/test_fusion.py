"""Batch norms folded into convolutions, and the network in bfloat16 or compiled, against the network as it was."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rdsnet.config import get_config
from rdsnet.model.build import build_model
from rdsnet.model.fusion import fuse_norms
from rdsnet.model.rdsnet import RDSNet
from rdsnet.predict.predictor import Predictor, load, untrained
from rdsnet.weights import checkpoint
from rdsnet.weights.checkpoint import Checkpoint


def model(trunk: str, norm: str = "batch", seed: int = 0) -> RDSNet:
    """With statistics, scales and shifts such as training leaves behind, and heads that say something."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    changes = {"model": {"trunk": trunk, "norm": norm, "pretrained": "none"}}
    built = build_model(get_config("rdsnet_tiny", changes), num_classes=3).eval()
    for module in built.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 2.0),
                (module.weight.data, 0.7, 1.3),
                (module.bias.data, -0.2, 0.2),
            ):
                tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))
    return built


def maps(network: RDSNet, images: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        raw, pixels = network(images)
    assert pixels is not None
    return [*raw.logits, *raw.deltas, *raw.features, pixels]


def norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


@pytest.mark.parametrize("trunk", ["resnet10t", "resnet18", "mobilenetv3_small_050", "efficientnet_b0"])
def test_a_fused_model_gives_the_same_maps_without_a_batch_norm(trunk: str) -> None:
    plain = model(trunk)
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    expected = maps(plain, images)
    fused = fuse_norms(copy.deepcopy(plain))
    assert norms(plain) > 0
    assert norms(fused) == 0
    for ours, wanted in zip(maps(fused, images), expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_group_norm_stays() -> None:
    fused = fuse_norms(model("resnet10t", norm="group"))
    assert any(isinstance(module, nn.GroupNorm) for module in fused.object_stream.modules())
    assert norms(fused) == 0


def test_a_convolution_that_something_else_reads_as_well_stays() -> None:
    class Trunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> list[Tensor]:
            x = self.conv(x)
            return [x, self.norm(x)]

    network = model("resnet10t")
    network.backbone.trunk = Trunk().eval()
    before = network.backbone.trunk.conv.weight.clone()
    fuse_norms(network)
    assert isinstance(network.backbone.trunk.norm, nn.BatchNorm2d)
    assert torch.equal(network.backbone.trunk.conv.weight, before)


def test_a_convolution_of_two_norms_and_a_norm_of_two_convolutions_stay() -> None:
    class Trunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(3, 4, 3) for _ in range(3))
            self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))

        def forward(self, x: Tensor) -> list[Tensor]:
            twice = [norm(self.convs[0](x)) for norm in self.norms[:2]]
            return twice + [self.norms[2](conv(x)) for conv in self.convs[1:]]

    network = model("resnet10t")
    network.backbone.trunk = Trunk().eval()
    fuse_norms(network)
    assert norms(network.backbone.trunk) == 3


def test_a_pair_that_several_levels_share_is_folded_once() -> None:
    plain = model("resnet10t")
    tower = plain.object_stream.class_tower
    assert isinstance(tower, nn.Sequential)
    conv, norm = tower[0][0], tower[0][1]
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    expected = conv.weight * scale[:, None, None, None]
    fuse_norms(plain)
    torch.testing.assert_close(conv.weight, expected)


def test_a_loaded_model_is_fused_and_finds_the_same(tmp_path: Path) -> None:
    plain = model("resnet10t")
    config = get_config("rdsnet_tiny", {"model": {"trunk": "resnet10t", "norm": "batch"}})
    nn.init.normal_(plain.object_stream.classify.weight, std=0.3)  # so that something is found
    checkpoint.save(tmp_path / "m.safetensors", plain, config, ["a", "b", "c"], [1, 2, 3])
    loaded = load(tmp_path / "m.safetensors", device="cpu")
    given = Predictor(plain, Checkpoint(config, ["a", "b", "c"], [1, 2, 3]))
    assert norms(loaded.model) == 0
    assert norms(given.model) > 0  # may be in training still
    image = torch.randint(0, 256, (256, 320, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    ours, wanted = loaded.detect([image])[0], given.detect([image])[0]
    assert len(wanted) > 10
    assert ours.anchors.tolist() == wanted.anchors.tolist()
    torch.testing.assert_close(ours.boxes, wanted.boxes, rtol=0, atol=0.01)
    for a, b in zip(ours.masks, wanted.masks, strict=True):
        assert float((a == b).float().mean()) > 0.999


def test_a_trunk_that_cannot_be_traced_stays_as_it_is() -> None:
    class Trunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)) if float(x.sum()) > 0 else x

    network = model("resnet10t")
    network.backbone.trunk = Trunk().eval()
    fuse_norms(network)
    assert isinstance(network.backbone.trunk.norm, nn.BatchNorm2d)


def test_a_model_in_training_is_refused() -> None:
    with pytest.raises(ValueError, match="evaluation mode"):
        fuse_norms(model("resnet10t").train())


def test_bf16_keeps_refinement_and_normalisation_in_float32_and_the_maps_nearly() -> None:
    plain, low = (
        untrained("rdsnet_tiny", num_classes=3),
        untrained("rdsnet_tiny", num_classes=3, precision="bf16-forced"),
    )
    assert low.model.mbrm.weight.dtype == low.model.image_mean.dtype == torch.float32
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    for ours, wanted in zip(maps(low.model, images), maps(plain.model, images), strict=True):
        assert ours.dtype == torch.bfloat16
        assert float((ours.float() - wanted).norm() / wanted.norm()) < 0.05


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown precision '64'; valid are auto, 32, bf16 and bf16-forced"):
        untrained("rdsnet_tiny", num_classes=1, precision="64")  # type: ignore[arg-type]


def test_where_nothing_can_be_compiled_the_reason_is_given_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*_: object) -> None:
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1")

    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.raises(ValueError, match=r"torch\.compile does not work .*: InvalidCxxCompiler: .* found$"):
        untrained("rdsnet_tiny", num_classes=3, device="cpu", compile=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_finds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    config = get_config("rdsnet_tiny", {"detect": {"score_threshold": 0.0, "max_detections": 20}})
    plain, compiled = (untrained(config, num_classes=3, compile=choice) for choice in (False, True))
    image = torch.randint(0, 256, (256, 256, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    ours, wanted = compiled.detect([image])[0], plain.detect([image])[0]
    assert ours.anchors.tolist() == wanted.anchors.tolist()
    torch.testing.assert_close(ours.regressed_boxes, wanted.regressed_boxes, rtol=0, atol=0.01)
