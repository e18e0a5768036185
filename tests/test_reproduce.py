"""The paper's comparisons: what is compared, what is trained once for all, and what is written."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import rdsnet.reproduce.study as run
from rdsnet.cli.main import main
from rdsnet.config import flat_settings
from rdsnet.model.mbrm import MBRM
from rdsnet.model.mbrm_fit import with_kernel
from rdsnet.predict.predictor import Predictor
from rdsnet.reproduce.figures import on_the_sphere, scenes
from rdsnet.reproduce.plan import COMPARISONS, FAMILIES, FULL, SIZES, Row
from rdsnet.reproduce.run import reproduce
from rdsnet.reproduce.study import DataSet, Study, find_data
from rdsnet.reproduce.tables import Line, Result, changes, comma_separated, markdown, spread
from rdsnet.rle import rasterise

# so small that it finds something after two steps
SETTINGS: dict[str, Any] = {
    "model": {"channels": 32},
    "detect": {"score_threshold": 0.0, "max_detections": 8},
    "data": {"workers": 0},
}


def make_study(folder: Path, family: str = "tiny") -> Study:
    source = DataSet("nothing", "nothing", {"data": {"train": "train.json", "val": "val.json"}}, family)
    return Study(folder, source, "small", family, {}, (0, 1), "cpu")


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Table 4 of two seeds, two steps each."""
    folder = tmp_path_factory.mktemp("reproduce")
    reproduce("table4", folder, budget="tiny", seeds=2, settings=SETTINGS, device="cpu")
    return folder


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(run, "train", refuse)


# What is compared


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_table_3_differ_by_the_named_switches_only(tmp_path: Path, family: str) -> None:
    study = make_study(tmp_path, family)
    rows = COMPARISONS["table3"].rows
    settings = [flat_settings(study.config(row, 0)) for row in rows]
    switches = ["model.assembly", "loss.crop_expand", "loss.ohem_ratio", "detect.crop_expand"]
    assert [[values[name] for name in switches] for values in settings] == [
        ["linear", 1.0, None, 1.0],
        ["correlation", 1.0, None, 1.0],
        ["correlation", 1.0, None, 1.2],
        ["correlation", 1.5, None, 1.0],
        ["correlation", 1.5, None, 1.2],
        ["correlation", 1.5, 1.0, 1.0],
        ["correlation", 1.5, 1.0, 1.2],
    ]
    for values in settings[1:]:
        assert {name for name in values if values[name] != settings[0][name]} <= set(switches)
    assert [row.paper["AP"] for row in rows] == [(29.9,), (31.0,), (30.0,), (30.7,), (30.8,), (31.6,), (31.8,)]


def test_rows_that_train_alike_share_a_training(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    trainings = {
        what: {study.run_folder(row, 0) for row in comparison.rows} for what, comparison in COMPARISONS.items()
    }
    assert {what: len(folders) for what, folders in trainings.items()} == {
        "table1": 3,
        "table2": 2,
        "table3": 4,
        "table4": 1,
        "figure4": 1,
    }
    full = study.run_folder(FULL, 0)
    assert full in trainings["table1"] & trainings["table2"] & trainings["table4"] & trainings["figure4"]
    assert len(trainings["table1"] & trainings["table3"]) == 1  # RDSNet-s is row 7
    assert study.run_folder(FULL, 1) != full


def test_a_training_is_known_by_data_and_settings_but_not_by_where_they_lie(tmp_path: Path) -> None:
    def folder(key: str, **data: Any) -> str:
        source = DataSet("", key, {"data": {"train": "a.json", **data}}, "tiny")
        return Study(tmp_path, source, "small", "tiny", {}, (0,), "cpu").run_folder(FULL, 0).name

    assert folder("a") == folder("a", train="elsewhere/a.json", workers=7)
    assert len({folder("a"), folder("b"), folder("a", short_side=99)}) == 3


# What is run


def test_table_4_is_written(output: Path) -> None:
    with (output / "table4.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["row"], row["column"]) for row in rows] == [
        (name, column) for name in ("baseline", "direct", "MBRM") for column in SIZES
    ]
    for row in rows[:2]:  # there are small objects
        assert float(row["mean"]) == pytest.approx((float(row["seed0"]) + float(row["seed1"])) / 2)
    assert rows[3]["mean"] == "" and rows[3]["paper"] == "53.3"  # and no large ones
    assert rows[8]["paper_change"] == "1.3"
    text = (output / "table4.md").read_text()
    for fact in ("cluttered shapes (6 + 4 images of 64 px)", "rdsnet_tiny 2 steps of 2 images", "seeds: 2 (0, 1)"):
        assert fact in text
    assert "(37.2)" in text and "±" in text
    assert np.asarray(Image.open(output / "table4.png").convert("RGB")).std() > 0


def test_finished_work_is_not_repeated(output: Path, no_training: None, monkeypatch: pytest.MonkeyPatch) -> None:
    first = (output / "table4.csv").read_bytes()
    monkeypatch.setattr(Predictor, "evaluate", None)
    reproduce("table4", output, budget="tiny", seeds=2, settings=SETTINGS, device="cpu")
    assert (output / "table4.csv").read_bytes() == first
    assert len(list((output / "runs").glob("*-seed*"))) == 2


SLOW_FIGURES = [pytest.param(name, marks=pytest.mark.slow) for name in ("figure3", "figure5")]


@pytest.mark.parametrize("what", ["figure4", *SLOW_FIGURES])
def test_figures_use_the_same_trainings(output: Path, no_training: None, what: str) -> None:
    result = reproduce(what, output, budget="tiny", seeds=2, settings=SETTINGS, device="cpu")
    assert all(len(line.values) == 2 for line in result.lines)
    assert np.asarray(Image.open(output / f"{what}.png").convert("RGB")).std() > 0
    assert (output / f"{what}.md").read_text() and (output / f"{what}.csv").read_text()
    if what == "figure5":
        # gamma 0 is no refinement, and the model's own gamma and s are MBRM's row of table 4
        table4 = reproduce("table4", output, budget="tiny", seeds=2, settings=SETTINGS, device="cpu")
        found = {line.name: line.values for line in result.lines}
        assert found["gamma = 0"][0]["AP"] == table4.lines[0].values[0]["AP"]
        refined = {column: found["s = 4"][0][column] for column in SIZES}
        assert refined == {column: found["gamma = 0.05"][0][column] for column in SIZES}
        assert refined == pytest.approx({column: table4.lines[2].values[0][column] for column in SIZES})


def test_table_2_measures_speed(output: Path) -> None:
    result = reproduce("table2", output, budget="tiny", seeds=1, settings=SETTINGS, device="cpu")
    speeds = [line.values[0]["images/s"] for line in result.lines]
    assert all(speed is not None and speed > 0 for speed in speeds)
    assert "images/s" not in changes(result)[0].values[0]
    assert len(list((output / "runs").glob("*masks=False*"))) == 1


def test_a_stopped_training_goes_on_and_an_empty_one_begins_anew(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(tmp_path)
    calls = []

    def stopped(config: Any, folder: Path, *, resume: bool, device: str) -> None:
        calls.append((resume, folder.exists()))
        raise KeyboardInterrupt("stopped; continue with `rdsnet train`")

    monkeypatch.setattr(run, "train", stopped)
    folder = study.run_folder(FULL, 0)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("")  # stopped before its first checkpoint
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt, match="the same command"):
            study.train(FULL, 0)
        folder.mkdir(exist_ok=True)
        (folder / "last.ckpt").write_text("")
    assert calls == [(False, False), (True, True)]


def test_command_prints_the_table(output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text(json.dumps(SETTINGS))  # JSON is YAML
    arguments = ["reproduce", "table4", "--budget", "tiny", "--seeds", "2", "--config", str(settings)]
    assert main([*arguments, "--output", str(output), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "MBRM" in printed and "(37.2)" in printed and f"table4.csv, .md and .png: {output}" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table9", "--output", "x"], "table9"),
        (["table4"], "output"),
        (["table4", "--output", "x", "--seeds", "0"], "at least 1 seed"),
        (["table4", "--output", "x", "--data", "nowhere"], "train.json"),
        (["table4", "--output", "x", "--config", "broken.yaml"], "not valid YAML"),
        (["table4", "--output", "x", "--config", "flat.yaml"], "by section"),
        (["table4", "--output", "x", "--budget", "tiny", "--config", "unknown.yaml"], "model.colour"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in (("broken", "a: ]"), ("flat", "seed: 1"), ("unknown", "model: {colour: 1}")):
        Path(f"{name}.yaml").write_text(content)
    assert main(["reproduce", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("rdsnet: error:") and message in error and "\n" not in error


def test_folders_are_recognised(shapes_folder: Path, tmp_path: Path) -> None:
    source = find_data(str(shapes_folder), tmp_path, "small")
    assert source.family == "tiny" and source.changes["data"]["val"] == str(shapes_folder / "val.json")
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / "annotations" / f"instances_{split}2017.json").write_text("{}")
    source = find_data(str(tmp_path), tmp_path, "small")
    assert source.family == "full" and source.changes["data"]["train_images"] == str(tmp_path / "train2017")


# What is reported


def made_result() -> Result:
    lines = [
        Line("plain", [{"AP": 10.0, "APl": None}, {"AP": 20.0, "APl": None}], {"AP": (35.9,)}),
        Line("better", [{"AP": 11.0, "APl": None}, {"AP": 22.0, "APl": None}], {"AP": (37.2,)}),
    ]
    return Result("Table", ["AP", "APl"], lines, "plain", "COCO", {"data": "made"})


def test_changes_are_paired_by_seed() -> None:
    (change,) = changes(made_result())
    assert change.name == "better"
    assert spread(change.values, "AP") == (1.5, pytest.approx(0.5**0.5))  # of 1 and 2: not of 16.5 - 15
    assert spread(change.values, "APl") == (None, None)
    assert change.paper["AP"] == (pytest.approx(1.3),)


def test_report_has_the_paper_beside() -> None:
    text = markdown(made_result())
    assert "| better | 16.5 ± 7.8 (37.2) | - |" in text
    assert "| better | +1.5 ± 0.7 (+1.3) | - |" in text
    rows = list(csv.DictReader(comma_separated(made_result()).splitlines()))
    assert rows[2] | {"change_std": ""} == {
        "row": "better",
        "column": "AP",
        "mean": "16.5",
        "std": rows[2]["std"],
        "paper": "37.2",
        "change": "1.5",
        "change_std": "",
        "paper_change": "1.3",
        "seed0": "11.0",
        "seed1": "22.0",
    }


# Figures 3 and 5


def test_a_longer_kernel_with_zeros_refines_alike() -> None:
    mbrm = MBRM()
    generator = torch.Generator().manual_seed(0)
    columns, rows = torch.rand(5, 60, generator=generator), torch.rand(5, 50, generator=generator)
    boxes = torch.tensor([[10.0, 8.0, 40.0, 35.0]]).repeat(5, 1)
    longer, shorter = with_kernel(mbrm, 6), with_kernel(mbrm, 1)
    assert torch.equal(longer(columns, rows, boxes).boxes, mbrm(columns, rows, boxes).boxes)
    assert torch.equal(shorter.weight, mbrm.weight[3:6]) and len(longer.weight) == 13


def test_scenes_have_the_objects_under_their_pixels(output: Path) -> None:
    source = find_data("shapes", output, "tiny")
    study = Study(output, source, "tiny", "tiny", SETTINGS, (0, 1), "cpu")
    for scene in scenes(study.predictor(Row("RDSNet"), 0), study.val()):
        assert scene.pixels.shape[1:] == scene.owner.shape == (32, 32)
        assert len(scene.boxes) == len(scene.foreground) == len(scene.background)
        inside = sum(mask[1::2, 1::2].sum() for mask in masks_of(scene.record))  # cell centres are odd pixels
        assert (scene.owner != -1).sum() == inside
        pixels, foreground, _ = on_the_sphere(scene)
        assert np.allclose(np.linalg.norm(pixels, axis=2), 1, atol=1e-5)
        assert np.allclose(np.linalg.norm(foreground, axis=1), 1, atol=1e-5)


def masks_of(record: Any) -> list[np.ndarray]:
    size = (record.height, record.width)
    return [rasterise(a.rle, (0, 0, size[1], size[0]), size) for a in record.annotations]
