"""Checkpoints of other projects: what they become, and which are refused."""

from __future__ import annotations

import json
import os
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.anchor_utils import ImageList
from torchvision.ops.misc import FrozenBatchNorm2d

import rdsnet
from rdsnet.cli.main import main
from rdsnet.config import Config, get_config
from rdsnet.data.coco import CocoFolder
from rdsnet.data.loading import pad_images
from rdsnet.model.build import build_model
from rdsnet.model.mbrm import PUBLISHED
from rdsnet.model.object_stream.dense import Raw
from rdsnet.predict.predictor import Predictor
from rdsnet.weights.checkpoint import Checkpoint, initialise, load, read
from rdsnet.weights.convert import (
    COCO_IDS,
    COCO_NAMES,
    RELEASE_KEYS,
    convert,
    from_release,
    from_torchvision,
    read_state,
    source_names,
)

DETECTORS = {
    "v1": torchvision.models.detection.retinanet_resnet50_fpn,
    "v2": torchvision.models.detection.retinanet_resnet50_fpn_v2,
}
# of the weights drawn below: every level finds its share
GAINS = {
    "v1": {"cls_logits": 2.4, "bbox_reg": 0.1, "layer_blocks.0": 0.42, "layer_blocks.1": 0.48, "p6": 0.9, "p7": 2.5},
    "v2": {"cls_logits": 3.0, "bbox_reg": 0.1},
}
CLASS_BIAS = {"v1": 11.5, "v2": 13.0}
PHOTOS = Path(os.environ.get("RDSNET_COCO_MINI", Path(__file__).parents[2] / "shared" / "data" / "coco-mini"))


def detector(version: str, seed: int = 0, **options: Any) -> nn.Module:
    """torchvision's RetinaNet with drawn weights that find many objects of many classes in a photo."""
    model = DETECTORS[version](weights=None, weights_backbone=None, **options)
    generator = torch.Generator().manual_seed(seed)
    for name, values in model.state_dict().items():
        if name.endswith("running_mean"):
            values.normal_(0, 0.1, generator=generator)
        elif name.endswith("running_var") or (values.ndim == 1 and name.endswith("weight")):
            values.uniform_(0.5, 1.5, generator=generator)
            if name.endswith("bn3.weight"):  # or the residual branches would add up
                values.mul_(0.2)
        elif values.ndim == 4:
            values.normal_(generator=generator)
            if "body.conv1" not in name:  # filters without a mean see the photo's structure, not its brightness
                values.sub_(values.mean(dim=(1, 2, 3), keepdim=True))
            gain = next((gain for part, gain in GAINS[version].items() if part in name), 1.0)
            values.mul_(gain * (2 / values[0].numel()) ** 0.5)
        elif name.endswith("bias"):
            values.normal_(0, 0.05, generator=generator)
            if "cls_logits" in name:
                values.sub_(CLASS_BIAS[version])
                values.view(9, 91)[:, [i for i in range(91) if i not in COCO_IDS]] -= 100  # no row for these in ours
    return model.eval()


def photos(count: int = 3, side: int = 320) -> list[Tensor]:
    """Photos of coco-mini, uint8 RGB (3, h, w), the longer side at `side` pixels."""
    if not PHOTOS.is_dir():
        pytest.skip(f"no photos at {PHOTOS} (set RDSNET_COCO_MINI)")
    images = []
    for record in json.loads((PHOTOS / "val.json").read_text())["images"][:count]:
        image = Image.open(PHOTOS / "images" / record["file_name"]).convert("RGB")
        scale = side / max(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)))
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    return images


# --- torchvision ---


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_torchvisions_detector_finds_what_it_found_there(version: str) -> None:
    theirs = detector(version, min_size=1, max_size=320)
    ours, checkpoint = from_torchvision(theirs.state_dict())
    assert checkpoint.class_names == list(COCO_NAMES)
    for image in photos():
        size = (image.shape[1], image.shape[2])
        theirs.transform.min_size = (min(size),)  # it takes the photo as it is
        with torch.inference_mode():
            expected = theirs([image / 255])[0]
        found = ours.detect(pad_images([image]), [size], [size])[0]
        boxes, scores = expected["boxes"], expected["scores"]
        labels = torch.tensor([COCO_IDS.index(i) for i in expected["labels"].tolist()])
        assert len(found) == len(labels) >= 50
        levels = torch.bucketize(found.anchors, torch.tensor(level_ends(size)), right=True)
        assert len(levels.unique()) >= 3
        # Neighbours in score may change places: each of theirs is looked for among ours of its class
        distance = (found.boxes[None] - boxes[:, None]).abs().amax(dim=2)
        distance[labels[:, None] != found.labels] = torch.inf
        nearest = distance.argmin(dim=1)
        assert len(nearest.unique()) == len(labels)
        assert distance.amin(dim=1).max() <= 0.01
        assert (found.scores[nearest] - scores).abs().max() <= 1e-4


def level_ends(size: tuple[int, int]) -> list[int]:
    """First flat anchor index of each level but the first."""
    h, w = (-(-side // 32) * 32 for side in size)
    return torch.tensor([-(-h // s) * -(-w // s) * 9 for s in (8, 16, 32, 64)]).cumsum(0).tolist()


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_torchvisions_pyramid_is_its_own(version: str) -> None:
    theirs = detector(version)
    ours = from_torchvision(theirs.state_dict())[0]
    images = torch.randn(1, 3, 96, 160, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for level, expected in zip(ours.backbone(images), theirs.backbone(images).values(), strict=True):
            torch.testing.assert_close(level, expected, rtol=1e-4, atol=1e-4)


def test_torchvisions_anchors_are_its_own() -> None:
    stream = build_model(fresh("rdsnet_r50_torchvision"), num_classes=1).object_stream
    theirs = detector("v2").anchor_generator
    # at 96 x 160 the coarser levels are 53 or 80 pixels apart, not 64 or 128
    sizes = [(12, 20), (6, 10), (3, 5), (2, 3), (1, 2)]
    maps = [torch.zeros(1, 9, *size) for size in sizes]
    expected = theirs(ImageList(torch.zeros(1, 3, 96, 160), [(96, 160)]), maps)[0]
    assert torch.equal(torch.cat(stream.anchors(raw_of(maps))), expected)


def test_the_best_pairs_of_a_level_are_kept() -> None:
    model = build_model(fresh("rdsnet_r50_torchvision", {"pre_nms": 20, "nms_iou": 1.0}), num_classes=5)
    generator = torch.Generator().manual_seed(0)
    raw = raw_of([torch.randn(1, 45, *size, generator=generator) for size in ((8, 8), (4, 4), (2, 2), (1, 1), (1, 1))])
    found = model.object_stream.detect(raw, 0, (64, 64), (64, 64))
    plain = [m.unflatten(1, (9, 5)).permute(0, 3, 4, 1, 2).flatten().sigmoid() for m in raw.logits]
    best = torch.cat([scores[scores > 0.05].topk(20).values for scores in plain])
    torch.testing.assert_close(found.scores, best.sort(descending=True).values)


def test_boxes_of_the_padding_stay_where_torchvision_keeps_them() -> None:
    model = build_model(fresh("rdsnet_r50_torchvision", {"max_detections": 10_000}), num_classes=1)
    raw = raw_of([torch.zeros(1, 9, *size) for size in ((8, 8), (4, 4), (2, 2), (1, 1), (1, 1))])
    found = model.object_stream.detect(raw, 0, (1, 64), (1, 64))
    assert (found.boxes[:, 3] == found.boxes[:, 1]).any()


def raw_of(logits: list[Tensor]) -> Raw:
    size = (8 * logits[0].shape[2], 8 * logits[0].shape[3])
    return Raw(size, logits, [torch.zeros(1, 36, *m.shape[2:]) for m in logits], [])


def fresh(preset: str, detect: dict[str, Any] | None = None) -> Config:
    return get_config(preset, {"model": {"pretrained": "none", "masks": False}, "detect": detect or {}})


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As torchvision's first version called them; its published weights still do."""
    renamed = {}
    for name, values in state.items():
        name = re.sub(r"(inner|layer)_blocks\.(\d)\.0\.", r"\1_blocks.\2.", name)
        name = re.sub(r"head\.conv\.(\d)\.0\.", lambda m: f"head.conv.{2 * int(m[1])}.", name)
        renamed[name] = values
    return renamed


def test_old_names_and_frozen_norms_of_torchvision_are_read() -> None:
    """The published v1 weights: their norms count no batches, and have no epsilon."""
    theirs = detector("v1")
    ours = from_torchvision(theirs.state_dict())[0]
    frozen = {k: v for k, v in theirs.state_dict().items() if not k.endswith("num_batches_tracked")}
    again = from_torchvision(old_names(frozen))[0]
    differ = [k for k, v in ours.state_dict().items() if not torch.equal(v, again.state_dict()[k])]
    assert differ == []


def test_norms_trained_with_another_epsilon_give_the_same_maps() -> None:
    theirs = detector("v1")
    frozen = resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
    # variances so small that an epsilon of 1e-5 would be a tenth of them
    body = {k: v * 1e-4 if k.endswith("running_var") else v for k, v in theirs.backbone.body.state_dict().items()}
    body |= {k: v * 1e-2 for k, v in body.items() if v.ndim == 1 and k.endswith("weight")}
    frozen.load_state_dict(body, strict=False)
    overwrite_eps(frozen, 0.0)
    state = {k: body[k[14:]] if k.startswith("backbone.body.") else v for k, v in theirs.state_dict().items()}
    trunk = from_torchvision(state, norm_eps=0.0)[0].backbone.trunk
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = IntermediateLayerGetter(frozen.eval(), {f"layer{i}": str(i) for i in (2, 3, 4)})(images)
        for ours, wanted in zip(trunk(images), expected.values(), strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())


def test_training_starts_from_torchvisions_detector(tmp_path: Path) -> None:
    """The branches that it lacks are fresh, and the same each time; classes are matched by name."""
    theirs = detector("v2")
    torch.save({"model": theirs.state_dict(), "optimizer": {}}, tmp_path / "tv.pth")
    convert("torchvision", tmp_path / "tv.pth", tmp_path / "tv.safetensors")
    weights = from_torchvision(theirs.state_dict())[0].state_dict()
    assert all(torch.equal(values, weights[name]) for name, values in read(tmp_path / "tv.safetensors")[0].items())
    config = get_config("rdsnet_r50_torchvision_v2", {"model": {"pretrained": "none"}})
    model = build_model(config, num_classes=2)
    assert initialise(model, tmp_path / "tv.safetensors", ["dog", "unicorn"]) != []
    rows = model.object_stream.classify.weight.unflatten(0, (9, 2))
    dog = theirs.head.classification_head.cls_logits.weight.unflatten(0, (9, 91))[:, 18]
    assert torch.equal(rows[:, 0], dog)


# --- the release ---


@pytest.fixture(scope="module")
def release() -> dict[str, Tensor]:
    """A state of the release's names and shapes, from a fresh network."""
    torch.manual_seed(0)
    model = build_model(get_config("rdsnet_r50_release", {"model": {"pretrained": "none"}}), num_classes=80)
    names, state = source_names(model, RELEASE_KEYS), model.state_dict()
    assert names.keys() == state.keys()
    renamed = {names[ours]: values.clone() for ours, values in state.items()}
    renamed["mbrm.weight"] = renamed["mbrm.weight"].view(1, 1, 9)
    renamed["mbrm.bias"] = renamed["mbrm.bias"].view(1)
    return renamed


@pytest.mark.parametrize("zipped", [True, False], ids=["torch of today", "torch of 2019"])
def test_a_checkpoint_becomes_a_file_that_load_opens(
    release: dict[str, Tensor], tmp_path: Path, zipped: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    momentum = {"state": {0: {"momentum_buffer": torch.zeros(10)}}, "param_groups": [{"lr": 0.005, "params": [0]}]}
    meta = {"epoch": 12, "CLASSES": ("person",), "time": "Sun Dec  1 2019"}
    content = {"meta": meta, "state_dict": OrderedDict(release), "optimizer": momentum}
    torch.save(content, tmp_path / "r50.pth", _use_new_zipfile_serialization=zipped)
    output = tmp_path / "new" / "r50.safetensors"
    assert main(["convert", "release", str(tmp_path / "r50.pth"), "--output", str(output)]) == 0
    assert str(output) in capsys.readouterr().out
    predictor = rdsnet.load(output, device="cpu")
    assert predictor.class_names == list(COCO_NAMES)
    assert predictor.category_ids == list(COCO_IDS)
    assert predictor.config == get_config("rdsnet_r50_release", {"model": {"pretrained": "none"}})
    expected = from_release(release)[0].state_dict()
    for name, values in load(output)[0].state_dict().items():
        assert torch.equal(values, expected[name]), name


def test_a_checkpoint_without_refinement_gets_the_published_numbers(release: dict[str, Tensor]) -> None:
    """The authors' files are so: the numbers stand in their code."""
    model = from_release({name: values for name, values in release.items() if not name.startswith("mbrm.")})[0]
    assert torch.equal(model.mbrm.weight, torch.tensor(PUBLISHED.weight))
    assert model.mbrm.bias.item() == pytest.approx(PUBLISHED.bias)


def test_the_classes_are_those_of_coco_files() -> None:
    if not PHOTOS.is_dir():
        pytest.skip(f"no COCO file at {PHOTOS} (set RDSNET_COCO_MINI)")
    folder = CocoFolder(PHOTOS / "val.json")
    assert (tuple(folder.class_names), tuple(folder.category_ids)) == (COCO_NAMES, COCO_IDS)


def test_coco_has_80_classes_with_gaps_in_their_ids() -> None:
    assert len(COCO_NAMES) == len(COCO_IDS) == 80
    pairs = dict(zip(COCO_NAMES, COCO_IDS, strict=True))
    assert (pairs["person"], pairs["stop sign"], pairs["tv"], pairs["toothbrush"]) == (1, 13, 72, 90)


def one_scale(preset: str) -> float:
    """Where boxes that end with a 100 x 151 image come back to, when its shorter side was scaled to 64."""
    changes = {"model": {"trunk": "resnet10t", "channels": 64, "pretrained": "none", "masks": False}}
    config = get_config(preset, changes | {"data": {"short_side": 64}, "detect": {"score_threshold": 0.0}})
    predictor = Predictor(build_model(config, num_classes=1), Checkpoint(config, ["a"], [1]))
    return predictor.detect([np.zeros((100, 151, 3), np.uint8)])[0].boxes[:, 2].max().item()


def test_boxes_of_the_release_come_back_by_one_factor() -> None:
    assert one_scale("rdsnet_r50") == pytest.approx(151)
    # 151 * 0.64 = 96.64, rounded 97, whose last pixel is 96
    assert one_scale("rdsnet_r50_release") == pytest.approx(96 / 0.64 + 1)


# --- refused ---


def broken(state: dict[str, Tensor], how: str, name: str) -> dict[str, Tensor]:
    state = dict(state)
    if how == "removed":
        del state[name]
    elif how == "added":
        state[name] = torch.zeros(3)
    else:
        state[name] = state[name][..., None]
    return state


@pytest.mark.parametrize(
    ("how", "name", "answer"),
    [
        ("removed", "bbox_head.rep_convs.2.gn.weight", "missing bbox_head.rep_convs.2.gn.weight"),
        ("removed", "mbrm.bias", "missing mbrm.bias"),
        ("removed", "backbone.layer3.5.bn2.num_batches_tracked", "missing backbone.layer3.5.bn2.num_batches_tracked"),
        ("added", "neck.fpn_convs.5.conv.bias", "left over neck.fpn_convs.5.conv.bias"),
        ("reshaped", "mask_head.conv_reps.weight", "mask_head.conv_reps.weight is (32, 256, 1, 1, 1)"),
        ("reshaped", "mbrm.weight", "mbrm.weight is (1, 1, 9, 1), expected (1, 1, 9)"),
    ],
)
def test_a_release_checkpoint_with_a_wrong_key_is_refused(
    release: dict[str, Tensor], how: str, name: str, answer: str
) -> None:
    with pytest.raises(ValueError, match=f"^r50.pth does not fit the model: {re.escape(answer)}[^;]*$"):
        from_release(broken(release, how, name), "r50.pth")


@pytest.mark.parametrize(
    ("how", "name", "answer"),
    [
        ("removed", "head.regression_head.conv.3.0.bias", "missing head.regression_head.conv.3.0.bias"),
        ("added", "head.mask.weight", "left over head.mask.weight"),
        ("reshaped", "head.classification_head.cls_logits.bias", "cls_logits.bias is (819, 1), expected (819,)"),
    ],
)
def test_a_torchvision_checkpoint_with_a_wrong_key_is_refused(how: str, name: str, answer: str) -> None:
    state = DETECTORS["v1"](weights=None, weights_backbone=None).state_dict()
    with pytest.raises(ValueError, match=f"tv.pth does not fit the model: [^;]*{re.escape(answer)}[^;]*$"):
        from_torchvision(broken(state, how, name), "tv.pth")


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def test_a_malicious_pickle_is_refused_and_not_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in (("a.pth", {"state_dict": {}, "meta": Malicious()}), ("b.pth", Malicious())):
        torch.save(content, name)
        assert main(["convert", "release", name, "--output", "out.safetensors"]) == 2
        error = capsys.readouterr().err
        assert f"{name} is refused: unsafe, it would call" in error
        assert "mkdir" in error
    assert {path.name for path in tmp_path.iterdir()} == {"a.pth", "b.pth"}


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ([1, 2], "expected a dict of tensors, got list"),
        ({}, "expected a dict of tensors"),
        ({"state_dict": {"a": 3}}, "expected a tensor as 'a', got int"),
    ],
)
def test_a_file_without_tensors_is_refused(tmp_path: Path, content: Any, answer: str) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=f"x.pth: {answer}"):
        read_state(tmp_path / "x.pth")


def test_a_damaged_or_missing_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"x\.pth is refused: cannot be read"):
        read_state(tmp_path / "x.pth")
    with pytest.raises(FileNotFoundError, match=r"no such file: .*y\.pth"):
        read_state(tmp_path / "y.pth")
