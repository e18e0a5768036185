"""Settings: presets, changes over them, and the way through JSON."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest

from rdsnet.config import Config, ModelConfig, config_from_dict, config_to_dict, get_config
from rdsnet.model.build import build_model
from rdsnet.presets import PRESETS


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_survives_json(preset: str) -> None:
    config = get_config(preset)
    stored = config_to_dict(config)
    assert config_to_dict(config_from_dict(json.loads(json.dumps(stored)))) == stored


def test_the_default_is_the_papers_rdsnet_on_resnet_50() -> None:
    assert get_config("rdsnet_r50") == Config()
    assert get_config("rdsnet_r50").model.trunk.startswith("resnet50")
    assert get_config("rdsnet_r101").model.trunk.startswith("resnet101")
    long = get_config("rdsnet_r101_2x")
    assert long.train.epochs == 24
    assert long.data.train_short_side == (640, 800)


def test_changes_go_over_the_preset() -> None:
    config = get_config("rdsnet_tiny", {"train": {"epochs": 3}, "seed": 5, "model": {"levels": [2, 3, 4]}})
    assert (config.train.epochs, config.seed, config.model.levels) == (3, 5, (2, 3, 4))
    assert config.model.channels == get_config("rdsnet_tiny").model.channels


def test_a_change_reaches_no_other_configuration() -> None:
    get_config("rdsnet_r50").model.channels = 1
    assert get_config("rdsnet_r50").model.channels == 256


def test_an_unknown_preset_is_answered_with_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=f"unknown preset 'rdsnet'; the presets are {', '.join(PRESETS)}"):
        get_config("rdsnet")


def test_an_unknown_setting_is_answered_with_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"^unknown setting 'model.chanels'; did you mean model\.channels\?$"):
        get_config("rdsnet_tiny", {"model": {"chanels": 8}})
    with pytest.raises(ValueError, match=r"^unknown setting 'modell'; did you mean model\?$"):
        get_config("rdsnet_tiny", {"modell": {}})
    with pytest.raises(ValueError, match=r"unknown setting 'model.zzzz'; there are .*model\.channels") as error:
        get_config("rdsnet_tiny", {"model": {"zzzz": 8}})
    assert all(f"model.{f.name}" in str(error.value) for f in fields(ModelConfig))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"square": 550, "train_crop": 256}}, "data.square gives every image one size"),
        ({"data": {"square": 550, "train_short_side": (640, 800)}}, "data.square gives every image one size"),
        ({"data": {"square": 0}}, "data.square is 0, expected a whole number, 1 or more, or null"),
        ({"data": {"train_zoom": (2.0, 0.5)}}, r"expected a list of 2 \(each a number, 0.1 to 10\), the smaller first"),
        ({"data": {"train_zoom": (0.0, 1.0)}}, r"expected a list of 2 \(each a number, 0.1 to 10\), the smaller first"),
        ({"data": {"train_aspect": 0.5}}, "data.train_aspect is 0.5, expected a number, 1 or more"),
        (
            {"train": {"milestones": (8, 11)}},
            r"milestones is \(8, 11\), expected a list \(each a number, 0 to 1\)",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_config("rdsnet_r50", changes)


def test_the_tiny_preset_is_tiny() -> None:
    model = build_model("rdsnet_tiny", num_classes=80)
    assert sum(p.numel() for p in model.parameters()) < 5_000_000
