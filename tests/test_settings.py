"""Every setting refuses what it cannot be, from every entrance, in one line that says what it takes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from rdsnet.cli.main import main
from rdsnet.cli.options import parse
from rdsnet.cli.train import train
from rdsnet.config import (
    RENAMED,
    SETTINGS,
    VERSION,
    Config,
    config_from_dict,
    config_from_file,
    config_to_dict,
    flat_settings,
    get_config,
)
from rdsnet.settings import Listed, Range, Rules
from rdsnet.train import run_folder
from rdsnet.weights import checkpoint

ROOT = Path(__file__).parents[1]


def wrong_values(kind: Any) -> Iterator[Any]:
    """Of every wrong type, and on the wrong side of every end."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        yield from wrong_values(parts[0])
        for limit in parts[1:]:
            yield from beyond(limit, parts[0])
    elif NoneType in parts:
        yield from (
            value for part in parts if part is not NoneType for value in wrong_values(part) if value is not None
        )
    elif origin is Literal:
        yield from ("", "neither", 1, True, None, [parts[0]])
    elif origin is tuple:
        right = list(right_values(kind))
        yield from (None, 1, "text", {}, *([*right[:-1], wrong] for wrong in wrong_values(parts[0])))
        if parts[-1] is not ...:
            yield from (right[:-1], [*right, right[-1]], [])
    else:
        shared = {
            bool: (1, 0.0),
            int: (True, 1.5, math.nan),
            float: (True, math.nan, math.inf, -math.inf),
            str: (1, True),
        }
        yield from (*shared[kind], None, [], {"a": 1})
        if kind is not str:
            yield "fast"


def beyond(limit: Range | Listed, kind: Any) -> Iterator[Any]:
    if isinstance(limit, Listed):
        if limit.filled:
            yield []
        if limit.rising:
            right = list(right_values(kind))
            yield [right[0] + 1, right[0]]
        return
    yield from (end for end in (limit.above, limit.below) if math.isfinite(end))
    yield from (end + step for end, step in ((limit.low, -1), (limit.high, 1)) if math.isfinite(end))


def right_values(kind: Any) -> tuple[Any, ...]:
    """Items for a list of this type."""
    parts = get_args(kind)
    if get_origin(parts[0]) is Literal:
        return get_args(parts[0])[:1]
    limits = get_args(parts[0])[1:]
    item = 1 if not limits else next(x for x in (1, 0.5) if all(limit.holds(x) for limit in limits))
    return (item,) * (1 if parts[-1] is ... else len(parts))


CASES = [(name, value) for name, setting in SETTINGS.items() for value in wrong_values(setting.kind)]


def nested(name: str, value: Any) -> dict[str, Any]:
    section, _, field = name.rpartition(".")
    return {section: {field: value}} if section else {name: value}


def check(error: str, name: str) -> None:
    assert re.search(rf"(^|[ :])(--)?{re.escape(name)} is ", error), error
    assert f"expected {SETTINGS[name].takes}" in error
    assert "\n" not in error


def test_there_is_a_wrong_value_of_every_setting() -> None:
    assert {name for name, _ in CASES} == set(SETTINGS)
    assert len(CASES) > 5 * len(SETTINGS)


def test_changes_of_a_preset_are_checked() -> None:
    for name, value in CASES:
        with pytest.raises(ValueError) as error:
            get_config("rdsnet_tiny", nested(name, value))
        check(str(error.value), name)


def test_a_yaml_file_and_a_stored_configuration_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for name, value in CASES:
        path.write_text(yaml.safe_dump(nested(name, value)))
        for read in (config_from_file, lambda path: run_folder.read_config(path.parent)):
            with pytest.raises(ValueError) as error:
                read(path)
            check(str(error.value), name)
            assert str(error.value).startswith(f"{path}: ")


def test_the_command_line_is_checked() -> None:
    for name, value in CASES:
        text = yaml.safe_dump(value, default_flow_style=True).splitlines()[0] if value != "" else ""
        try:
            SETTINGS[name].read_text(text)
        except ValueError:
            with pytest.raises(ValueError) as error:
                parse(train, [f"--{name}={text}"])
            check(str(error.value), name)
        else:  # what is typed is text
            assert "text" in SETTINGS[name].takes, (name, value)


def test_the_metadata_of_weights_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    metadata = {"format": checkpoint.FORMAT, "class_names": "[]", "category_ids": "[]"}
    for name, value in CASES:
        save_file({"x": torch.zeros(1)}, path, metadata | {"config": json.dumps(nested(name, value))})
        with pytest.raises(ValueError) as error:
            checkpoint.read(path)
        check(str(error.value), name)
        assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": {"crop_expand": -1}},
        {"detect": {"crop_expand": 0}},
        {"retinanet": {"anchor_size": -4}},
        {"retinanet": {"anchor_ratios": []}},
        {"model": {"image_std": (0, 0, 0)}},
        {"model": {"levels": []}},
        {"data": {"train_short_side": (800, 640)}},
        {"detect": {"mask_threshold": 0}},
        {"detect": {"mask_threshold": 1}},
        {"train": {"ema": 1}},
        {"model": {"norm": "group", "channels": 40}},
        {"retinanet": {"positive_iou": 0.3}},
    ],
)
def test_absurd_settings_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        get_config("rdsnet_r50", changes)


def test_a_whole_number_and_a_list_become_what_the_field_holds() -> None:
    config = get_config("rdsnet_r50", {"train": {"lr": 1}, "data": {"train_zoom": [1, 2]}})
    assert isinstance(config.train.lr, float)
    assert config.data.train_zoom == (1.0, 2.0)


def test_a_yaml_file_may_write_1e_3(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("train:\n  lr: 1e-3\n")
    assert config_from_file(tmp_path / "a.yaml").train.lr == 0.001


def test_settings_of_other_streams_are_not_stored() -> None:
    stored = config_to_dict(get_config("rdsnet_fcos_tiny"))
    assert "fcos" in stored and not {"retinanet", "yolact"} & set(stored)


# --- names of before ---


def old_names(config: Config) -> dict[str, Any]:
    """A configuration as version 1 stored it."""
    values = asdict(config)
    rules = values.pop("rules")
    for old, new in RENAMED.items():
        section, field = old.split(".")
        values[section][field] = rules[new.split(".")[1]]
    if config.model.stream != "yolact":
        values["yolact"]["square_priors"] = True
    return values


@pytest.mark.parametrize("preset", ["rdsnet_tiny", "rdsnet_r50_release", "rdsnet_r50_torchvision", "yolact_r50"])
def test_settings_stored_under_their_old_names_are_read(preset: str) -> None:
    config = get_config(preset)
    assert config_from_dict(old_names(config)) == config


def test_every_rule_has_an_old_name() -> None:
    assert set(RENAMED.values()) == {f"rules.{name}" for name in asdict(Rules())}


def test_two_crop_rules_that_differ_are_refused() -> None:
    old = old_names(get_config("rdsnet_r50_release"))
    old["loss"]["crop_rule"] = "centre"
    with pytest.raises(ValueError, match=r"are one setting now, rules\.crop_rule"):
        config_from_dict(old)


def test_settings_of_a_newer_version_are_refused() -> None:
    with pytest.raises(ValueError, match=f"^version is {VERSION + 1}, expected a whole number, 1 to {VERSION}$"):
        config_from_dict({"version": VERSION + 1})


def test_the_bundled_weights_were_stored_by_the_first_version() -> None:
    path = checkpoint.find_weights("nuclei")
    with safe_open(path, framework="pt") as file:
        stored = json.loads(file.metadata()["config"])
    values = flat_settings(checkpoint.read("nuclei")[1].config)
    for section, content in stored.items():
        if section not in ("version", "seed", "yolact", "fcos"):
            for field, value in content.items():
                now = values[RENAMED.get(f"{section}.{field}", f"{section}.{field}")]
                assert now == (tuple(value) if isinstance(value, list) else value)


# --- where settings are named ---


def test_a_run_resumes_with_a_configuration_of_another_streams_defaults(tmp_path: Path) -> None:
    """Settings that are not stored do not count as different."""
    config = get_config("rdsnet_tiny")
    run_folder.create(tmp_path, config, ["a"])
    assert run_folder.resumed_config(tmp_path, config) == config
    with pytest.raises(ValueError, match=r"rules\.inclusive"):
        run_folder.resumed_config(tmp_path, replace(config, rules=Rules(inclusive=True)))


def test_every_setting_that_the_documents_name_exists() -> None:
    sections = "|".join(sorted({name.split(".")[0] for name in SETTINGS if "." in name}))
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        named = re.findall(rf"(?:`|--)((?:{sections})\.\w+)", path.read_text(encoding="utf-8"))
        ours = [name for name in named if not name.endswith((".py", ".json"))]
        assert not set(ours) - set(SETTINGS), path


def test_print_config_shows_the_settings_that_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text("train: {epochs: 5, ema: 0.5}\ndata: {short_side: null}\n")
    arguments = ["train", "--preset", "rdsnet_fcos_tiny", "--config", str(tmp_path / "a.yaml"), "--train.epochs", "7"]
    assert main([*arguments, "--model.levels", "[2, 3, 4, 5]", "--print_config"]) == 0
    shown = config_from_dict(yaml.safe_load(capsys.readouterr().out))
    assert (shown.train.epochs, shown.train.ema, shown.data.short_side) == (7, 0.5, None)
    assert shown.model.stream == "fcos"
