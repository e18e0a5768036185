"""Trunk and pyramid: levels, weights, and what is frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import make
from rdsnet.model.backbone import Backbone


def backbone(**settings: Any) -> Backbone:
    arguments: dict[str, Any] = {
        "trunk": "resnet10t",
        "trunk_levels": (2, 3, 4),
        "levels": (2, 3, 4, 5, 6),
        "channels": 32,
        "pretrained": "none",
        "norm": "batch",
        "frozen_stages": 0,
        **settings,
    }
    return make.backbone(**arguments)


@pytest.mark.parametrize(
    ("trunk_levels", "levels"), [((2, 3, 4), (2, 3, 4, 5, 6)), ((3, 4, 5), (3, 4, 5, 6, 7)), ((3, 4), (3, 4))]
)
def test_a_level_has_the_stride_of_its_power_of_two(trunk_levels: tuple[int, ...], levels: tuple[int, ...]) -> None:
    maps = backbone(trunk_levels=trunk_levels, levels=levels)(torch.zeros(2, 3, 128, 160))
    assert [m.shape for m in maps] == [(2, 32, -(-128 // 2**level), -(-160 // 2**level)) for level in levels]


@pytest.mark.parametrize("levels", [(3, 4, 5), (2, 3, 5), (2, 4, 5), (2, 3), (2, 3, 4, 6)])
def test_levels_that_do_not_go_on_from_the_trunks_are_refused(levels: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected levels that go on from trunk_levels \(2, 3, 4\) by one, got"):
        backbone(levels=levels)


def test_a_level_that_the_trunk_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'resnet10t' has maps of strides \[2, 4, 8, 16, 32\], none for levels \[6\]"):
        backbone(trunk_levels=(4, 5, 6), levels=(4, 5, 6))


@pytest.mark.parametrize("trunk", ["resnet9000", ""])
def test_an_unknown_trunk_is_refused(trunk: str) -> None:
    with pytest.raises(ValueError, match=f"timm has no trunk '{trunk}' with feature maps"):
        backbone(trunk=trunk)


@pytest.fixture(scope="module")
def timm_weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    model = timm.create_model("resnet10t")  # with its classifier, as weights are published
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            module.running_mean.normal_()
    return model.state_dict()


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_weights_come_from_a_file(tmp_path: Path, timm_weights: dict[str, torch.Tensor], name: str) -> None:
    if name.endswith(".pth"):
        torch.save(timm_weights, tmp_path / name)
    else:
        save_file(timm_weights, tmp_path / name)
    trunk = backbone(pretrained=str(tmp_path / name)).trunk.state_dict()
    assert len(trunk) > 50
    for key, value in trunk.items():
        assert torch.equal(value, timm_weights[key]), key


def test_a_weights_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"imagenet, none or a weights file, got .*missing\.pth"):
        backbone(pretrained=str(tmp_path / "missing.pth"))


def test_weights_of_something_else_are_refused(tmp_path: Path) -> None:
    """timm itself would take nothing from such a file, and go on."""
    torch.save({"unrelated.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth does not fit trunk 'resnet10t': missing conv1\.0\.weight"):
        backbone(pretrained=str(tmp_path / "other.pth"))


def test_weights_of_another_trunk_are_refused(tmp_path: Path) -> None:
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(ValueError, match=r"resnet18\.pth does not fit trunk 'resnet10t'"):
        backbone(pretrained=str(tmp_path / "resnet18.pth"))


@pytest.mark.parametrize("name", ["damaged.pth", "damaged.safetensors"])
def test_a_damaged_weights_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"these are not weights" * 10)
    with pytest.raises(ValueError, match=f"cannot read weights from .*{name}"):
        backbone(pretrained=str(tmp_path / name))


def test_imagenet_weights_that_cannot_be_fetched_are_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"could not fetch the ImageNet weights of 'resnet10t'.*pretrained none"
    ) as error:
        backbone(pretrained="imagenet")
    assert "\n" not in str(error.value)


def trained(module: nn.Module) -> set[str]:
    return {name.split(".")[0] for name, p in module.named_parameters() if p.requires_grad}


def test_frozen_stages_are_the_stem_and_then_stage_by_stage() -> None:
    stages = {"conv1", "bn1", "layer1", "layer2", "layer3"}
    assert trained(backbone(frozen_stages=0).trunk) == stages
    assert trained(backbone(frozen_stages=1).trunk) == {"layer1", "layer2", "layer3"}
    assert trained(backbone(frozen_stages=2).trunk) == {"layer2", "layer3"}
    assert trained(backbone(frozen_stages=2).fpn) == {"inner_blocks", "layer_blocks", "extra_blocks"}


def running(module: nn.Module) -> dict[str, bool]:
    """Which batch norms of the trunk learn their statistics."""
    return {name: m.training for name, m in module.named_modules() if isinstance(m, nn.BatchNorm2d)}


def test_frozen_stages_keep_their_statistics_in_training() -> None:
    network = backbone(frozen_stages=2).train()
    assert {name.split(".")[0] for name, learns in running(network.trunk).items() if learns} == {"layer2", "layer3"}
    before = {k: v.clone() for k, v in network.trunk.state_dict().items() if "running_mean" in k}
    network(torch.randn(2, 3, 64, 64))
    after = network.trunk.state_dict()
    changed = {k.split(".")[0] for k, v in before.items() if not torch.equal(v, after[k])}
    assert changed == {"layer2", "layer3"}


def test_frozen_norms_keep_their_statistics_and_train_scale_and_shift() -> None:
    network = backbone(norm="frozen").train()
    assert not any(running(network.trunk).values())
    assert all(p.requires_grad for p in network.trunk.parameters())
    assert not any(running(network.eval().trunk).values())


def test_live_norms_learn() -> None:
    assert all(running(backbone().train().trunk).values())
    assert not any(running(backbone().train().eval().trunk).values())


def test_more_frozen_stages_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot freeze 9 stages"):
        backbone(frozen_stages=9)


def pass_through(network: Backbone) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """The maps of two images, and the gradients of the trained parameters."""
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    maps = network(images)
    torch.stack([m.square().sum() for m in maps]).sum().backward()
    return maps, {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def with_and_without_checkpoints(**settings: Any) -> tuple[Backbone, Backbone]:
    """Two networks of the same weights."""
    checkpointed, plain = backbone(checkpoint_activations=True, **settings), backbone(**settings)
    plain.load_state_dict(checkpointed.state_dict())
    return checkpointed, plain


@pytest.mark.parametrize("norm", ["frozen", "batch"])
@pytest.mark.parametrize("frozen_stages", [0, 2])
@pytest.mark.parametrize("trunk", ["resnet10t", "convnext_atto"])
def test_checkpointed_activations_change_neither_maps_nor_gradients(norm: str, frozen_stages: int, trunk: str) -> None:
    networks = with_and_without_checkpoints(norm=norm, frozen_stages=frozen_stages, trunk=trunk)
    (maps, gradients), (plain_maps, plain_gradients) = (pass_through(network.train()) for network in networks)
    assert all(torch.equal(a, b) for a, b in zip(maps, plain_maps, strict=True))
    assert gradients.keys() == plain_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain_gradients[name], msg=name)


def test_recomputed_batches_count_once_in_the_statistics() -> None:
    networks = with_and_without_checkpoints()
    before = networks[0].state_dict()["trunk.layer2.0.bn1.running_mean"].clone()
    for network in networks:
        pass_through(network.train())
    state, plain = (network.state_dict() for network in networks)
    assert not torch.equal(state["trunk.layer2.0.bn1.running_mean"], before)
    assert int(state["trunk.layer2.0.bn1.num_batches_tracked"]) == 1
    assert [name for name in plain if not torch.equal(state[name], plain[name])] == []


def test_a_graph_of_checkpointed_activations_can_be_gone_through_again() -> None:
    network = backbone(checkpoint_activations=True).train()
    total = torch.stack([m.sum() for m in network(torch.randn(1, 3, 64, 64))]).sum()
    weight = next(network.trunk.layer2.parameters())
    first, second = (torch.autograd.grad(total, weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_trained_stages_are_computed_again_in_training_only() -> None:
    network = backbone(checkpoint_activations=True, frozen_stages=2)
    calls: list[str] = []
    for name, stage in network.trunk.items():
        stage.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    pass_through(network.train())
    forward = ["conv1", "bn1", "act1", "maxpool", "layer1", "layer2", "layer3"]
    assert calls == [*forward, "layer3", "layer2"]
    calls.clear()
    pass_through(network.eval())
    assert calls == forward


def test_checkpoints_of_a_trunk_without_a_list_of_stages_are_refused() -> None:
    with pytest.raises(ValueError, match="trunk 'test_efficientnet' cannot be checkpointed"):
        backbone(trunk="test_efficientnet", checkpoint_activations=True)
