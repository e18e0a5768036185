"""YOLACT's checkpoints: what they become, which settings they get, and which are refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rdsnet
from rdsnet.cli.main import main
from rdsnet.config import get_config
from rdsnet.model.build import build_model
from rdsnet.model.rdsnet import RDSNet
from rdsnet.weights.checkpoint import initialise, load
from rdsnet.weights.convert import COCO_IDS, COCO_NAMES, YOLACT_KEYS, convert, from_yolact, source_names

UNTRAINED = {"model": {"pretrained": "none"}}


def fresh(preset: str, num_classes: int = 80) -> RDSNet:
    torch.manual_seed(0)
    return build_model(get_config(preset, UNTRAINED), num_classes=num_classes)


def yolacts(model: RDSNet) -> dict[str, Tensor]:
    names, state = source_names(model, YOLACT_KEYS), model.state_dict()
    assert names.keys() == {name for name in state if not name.startswith("mbrm.")}
    return {names[ours]: state[ours].clone() for ours in names}


@pytest.fixture(scope="module")
def r50() -> dict[str, Tensor]:
    """A state of YOLACT's names and shapes on ResNet-50."""
    return yolacts(fresh("yolact_r50"))


@pytest.fixture(scope="module")
def r101() -> dict[str, Tensor]:
    """The same on ResNet-101; only the shapes are real."""
    with torch.device("meta"):
        names = yolacts(fresh("yolact_base"))
    return {name: torch.zeros(()).expand(values.shape) for name, values in names.items()}


def test_a_checkpoint_becomes_a_file_that_load_opens(
    r50: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(r50, tmp_path / "yolact_resnet50_54_800000.pth")
    output = tmp_path / "new" / "r50.safetensors"
    assert main(["convert", "yolact", str(tmp_path / "yolact_resnet50_54_800000.pth"), "--output", str(output)]) == 0
    assert f"(550 pixels, resnet50): {output}" in capsys.readouterr().out
    predictor = rdsnet.load(output, device="cpu")
    assert predictor.class_names == list(COCO_NAMES)
    assert predictor.category_ids == list(COCO_IDS)
    assert predictor.config == get_config("yolact_r50", UNTRAINED)
    state = load(output)[0].state_dict()
    pairs = {
        "backbone.trunk.layer3.5.conv2.weight": "backbone.layers.2.5.conv2.weight",
        "backbone.fpn.inner_blocks.0.0.bias": "fpn.lat_layers.2.bias",
        "backbone.fpn.layer_blocks.2.0.weight": "fpn.pred_layers.0.weight",
        "backbone.fpn.extra_blocks.convs.1.weight": "fpn.downsample_layers.1.weight",
        "object_stream.represent.bias": "prediction_layers.0.mask_layer.bias",
        "pixel_stream.before.2.0.weight": "proto_net.4.weight",
        "pixel_stream.after.0.weight": "proto_net.8.weight",
        "pixel_stream.project.weight": "proto_net.10.weight",
        "semantic.classify.weight": "semantic_seg_conv.weight",
    }
    for ours, theirs in pairs.items():
        assert torch.equal(state[ours], r50[theirs]), ours


def test_depth_of_the_trunk_and_name_of_the_file_say_which_settings(
    r50: dict[str, Tensor], r101: dict[str, Tensor], tmp_path: Path
) -> None:
    assert from_yolact(r50)[1].config == get_config("yolact_r50", UNTRAINED)
    assert from_yolact(r101)[1].config == get_config("yolact_base", UNTRAINED)
    torch.save(r101, tmp_path / "yolact_im700_54_800000.pth")  # a zero a tensor, on the disk too
    checkpoint = convert("yolact", tmp_path / "yolact_im700_54_800000.pth", tmp_path / "a.safetensors")
    assert checkpoint.config == get_config("yolact_im700", UNTRAINED)
    checkpoint = convert("yolact", tmp_path / "yolact_im700_54_800000.pth", tmp_path / "a.safetensors", "yolact_base")
    assert checkpoint.config == get_config("yolact_base", UNTRAINED)


def test_settings_of_another_trunk_are_refused(
    r50: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=r"r50\.pth does not fit the model: missing backbone\.layers\.2\.6\."):
        from_yolact(r50, "r50.pth", preset="yolact_im700")
    (tmp_path / "x.pth").touch()
    options = ["release", str(tmp_path / "x.pth"), "--output", "x.safetensors", "--preset", "yolact_base"]
    assert main(["convert", *options]) == 2
    assert "release says itself which preset it is" in capsys.readouterr().err


def test_leftovers_of_earlier_versions_are_dropped(r50: dict[str, Tensor]) -> None:
    old = {name: values for name, values in r50.items() if not name.endswith("num_batches_tracked")}
    old["backbone.layer1.0.conv1.weight"] = torch.zeros(3)
    old["fpn.downsample_layers.2.weight"] = torch.zeros(3)
    model, _ = from_yolact(old)
    assert torch.equal(model.pixel_stream.project.weight, r50["proto_net.10.weight"])


@pytest.mark.parametrize(
    ("how", "name", "answer"),
    [
        ("removed", "fpn.pred_layers.0.bias", "missing fpn.pred_layers.0.bias"),
        ("added", "prediction_layers.1.bbox_layer.bias", "left over prediction_layers.1.bbox_layer.bias"),
        ("reshaped", "semantic_seg_conv.bias", "semantic_seg_conv.bias is (80, 1), expected (80,)"),
    ],
)
def test_a_checkpoint_with_a_wrong_key_is_refused(r50: dict[str, Tensor], how: str, name: str, answer: str) -> None:
    state = dict(r50)
    if how == "removed":
        del state[name]
    else:
        state[name] = torch.zeros(3) if how == "added" else state[name][:, None]
    with pytest.raises(ValueError, match=f"^r50.pth does not fit the model: {re.escape(answer)}$"):
        from_yolact(state, "r50.pth")


def test_other_classes_start_from_their_rows_of_every_classifier(r50: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(r50, tmp_path / "r50.pth")
    convert("yolact", tmp_path / "r50.pth", tmp_path / "r50.safetensors")
    model = fresh("yolact_r50", num_classes=2)
    before = model.object_stream.classify.weight.clone()
    messages = initialise(model, tmp_path / "r50.safetensors", ["unicorn", "dog"])
    assert len(messages) == 1
    assert "unicorn" in messages[0]
    dog = COCO_NAMES.index("dog")
    new = model.object_stream.classify.weight.unflatten(0, (3, 3))
    old = r50["prediction_layers.0.conf_layer.weight"].unflatten(0, (3, 81))
    assert torch.equal(new[:, 0], old[:, 0])  # background
    assert torch.equal(new[:, 1], before.unflatten(0, (3, 3))[:, 1])
    assert torch.equal(new[:, 2], old[:, 1 + dog])
    assert torch.equal(model.semantic.classify.weight[1], r50["semantic_seg_conv.weight"][dog])
