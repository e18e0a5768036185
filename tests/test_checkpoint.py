"""Weights in a file: everything comes back, and nothing that does not fit is taken in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from rdsnet.config import Config, config_to_dict, get_config
from rdsnet.model.build import build_model
from rdsnet.model.rdsnet import RDSNet
from rdsnet.weights import checkpoint
from rdsnet.weights.bundled import find_weights

NAMES, IDS = ["cat", "dog", "fox"], [7, 3, 12]


def tiny_config(**model: Any) -> Config:
    changes = {
        "model": {"channels": 32, "representation": 8, **model},
        "retinanet": {"tower_depth": 1, "anchor_scales": 1},
        "detect": {"max_detections": 10},
    }
    return get_config("rdsnet_tiny", changes)


def classifier(model: RDSNet, name: str) -> nn.Parameter:
    return model.object_stream.get_parameter(f"classify.{name}")


def lively(classes: int = 3, seed: int = 0) -> RDSNet:
    """A model that finds objects, with every number different from another seed's."""
    torch.manual_seed(seed)
    model = build_model(tiny_config(), num_classes=classes)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(0.01 * torch.rand_like(value))
        nn.init.normal_(classifier(model, "weight"), std=0.3)
        nn.init.normal_(classifier(model, "bias"))
    return model.eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "best.safetensors"
    checkpoint.save(path, lively(), tiny_config(), NAMES, IDS)
    return path


def rewrite(path: Path, *, drop: str = "", add: str = "", shape: str = "", **metadata: str) -> Path:
    """The file with a weight less, a weight more, a weight of another shape, or other metadata."""
    weights = load_file(path)
    with safe_open(path, framework="pt") as file:
        stored = file.metadata()
    if drop:
        del weights[drop]
    if add:
        weights[add] = torch.zeros(2)
    if shape:
        weights[shape] = torch.zeros(5, 6)
    save_file(weights, path, {**stored, **metadata})
    return path


def test_a_loaded_model_finds_exactly_the_same(saved: Path) -> None:
    image = torch.randint(0, 256, (1, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    loaded, _ = checkpoint.load(saved)
    ours, theirs = (m.detect(image, [(64, 64)], [(64, 64)])[0] for m in (loaded, lively()))
    assert len(ours) == 10
    for name in ("boxes", "scores", "labels", "anchors", "edge_std", "interval"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert all(torch.equal(a, b) for a, b in zip(ours.masks, theirs.masks, strict=True))
    assert not loaded.training


def test_what_is_needed_to_use_the_weights_is_stored_with_them(saved: Path) -> None:
    _, stored = checkpoint.read(saved)
    assert config_to_dict(stored.config) == config_to_dict(tiny_config())
    assert (stored.class_names, stored.category_ids) == (NAMES, IDS)


def test_a_run_folder_means_its_best_weights(saved: Path) -> None:
    assert find_weights(saved.parent) == saved
    assert checkpoint.load(saved.parent)[1].class_names == NAMES


def test_loading_fetches_nothing_and_remembers_where_the_training_began(tmp_path: Path) -> None:
    config = tiny_config()
    config.model.pretrained = "imagenet"
    checkpoint.save(tmp_path / "x.safetensors", lively(), config, NAMES, IDS)
    assert checkpoint.load(tmp_path / "x.safetensors")[1].config.model.pretrained == "imagenet"


def test_a_missing_weight_is_named(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"best\.safetensors does not fit the model: missing mbrm\.bias$"):
        checkpoint.load(rewrite(saved, drop="mbrm.bias"))


def test_a_weight_too_many_is_named(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"does not fit the model: left over extra$"):
        checkpoint.load(rewrite(saved, add="extra"))


def test_a_weight_of_another_shape_is_named(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"mbrm\.weight is \(5, 6\), expected \(9,\)$"):
        checkpoint.load(rewrite(saved, shape="mbrm.weight"))


def test_every_problem_is_named_at_once(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"missing mbrm\.bias; left over extra; mbrm\.weight is"):
        checkpoint.load(rewrite(saved, drop="mbrm.bias", add="extra", shape="mbrm.weight"))


def test_a_file_that_is_not_safetensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    for content in (b"", b"these are not weights" * 10):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"weights\.safetensors is not a safetensors file") as error:
            checkpoint.load(path)
        assert "\n" not in str(error.value)


def test_half_a_file_is_refused(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[: saved.stat().st_size // 2])
    with pytest.raises(ValueError, match="is not a safetensors file"):
        checkpoint.load(saved)


def test_weights_of_another_format_are_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected weights of format 'rdsnet/1', got 'rdsnet/0'"):
        checkpoint.load(rewrite(saved, format="rdsnet/0"))
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="expected weights of format 'rdsnet/1', got None"):
        checkpoint.load(tmp_path / "plain.safetensors")


def test_unreadable_metadata_is_an_error_of_the_file(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"\.safetensors: what is stored with the weights cannot be read"):
        checkpoint.load(rewrite(saved, class_names="["))


def test_settings_that_this_version_does_not_know_are_named(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown setting 'model.colour'"):
        checkpoint.load(rewrite(saved, config=json.dumps({"model": {"colour": 1}})))


def test_nothing_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"found nothing at .*none\.safetensors"):
        checkpoint.load(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match=r"holds no best\.safetensors"):
        checkpoint.load(tmp_path)


def test_a_failed_write_leaves_the_old_file_and_no_rest(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def half(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[:100])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(saved, lively(seed=1), tiny_config(), NAMES, IDS)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_second_write_replaces_the_first(saved: Path) -> None:
    checkpoint.save(saved, lively(seed=1), tiny_config(), NAMES, IDS)
    assert torch.equal(load_file(saved)["mbrm.weight"], lively(seed=1).mbrm.weight)
    assert list(saved.parent.iterdir()) == [saved]


# --- starting from another run ---


def rows(model: RDSNet, name: str = "weight") -> torch.Tensor:
    """(C, A, ...): what the classifier has for each class."""
    values = classifier(model, name).detach()
    return values.unflatten(0, (-1, model.object_stream.num_classes)).transpose(0, 1)


def test_classes_are_matched_by_name(saved: Path) -> None:
    model, fresh = lively(classes=4, seed=1), lively(classes=4, seed=1)
    messages = checkpoint.initialise(model, saved, ["dog", "wolf", "cat", "owl"])
    for name in ("weight", "bias"):
        ours, before, old = rows(model, name), rows(fresh, name), rows(lively(), name)
        assert torch.equal(ours[[0, 2]], old[[1, 0]])
        assert torch.equal(ours[[1, 3]], before[[1, 3]])
    assert messages == [f"classes that {saved} does not know start fresh: wolf, owl"]


def test_everything_but_the_classes_is_taken(saved: Path) -> None:
    model = lively(classes=2, seed=1)
    checkpoint.initialise(model, saved, ["fish", "owl"])
    old = lively().state_dict()
    for name, value in model.state_dict().items():
        if not name.startswith("object_stream.classify"):
            assert torch.equal(value, old[name]), name


def test_the_same_classes_in_another_order_are_all_known(saved: Path) -> None:
    model = lively(seed=1)
    assert checkpoint.initialise(model, saved, ["fox", "cat", "dog"]) == []
    assert torch.equal(rows(model), rows(lively())[[2, 0, 1]])


def test_another_network_is_refused_and_left_as_it_was(saved: Path) -> None:
    model = build_model(tiny_config(representation=4), num_classes=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"object_stream\.represent\.weight is .*expected"):
        checkpoint.initialise(model, saved, NAMES)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
