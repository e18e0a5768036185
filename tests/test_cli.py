"""The command line as a user meets it: the main job end to end, and what bad input is answered with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from rdsnet.cli.main import main


@pytest.fixture(scope="module")
def run(shapes_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps: enough to have weights, not to find much."""
    output = tmp_path_factory.mktemp("cli") / "run"
    arguments = ["train", "--preset", "rdsnet_tiny", "--output", str(output), "--device", "cpu"]
    arguments += ["--data.train", str(shapes_folder / "train.json"), "--data.val", str(shapes_folder / "val.json")]
    arguments += ["--data.short_side", "96", "--data.workers", "0", "--train.max_steps", "2", "--train.batch_size", "2"]
    # A threshold that an untrained network passes, so that there is something to count
    assert main([*arguments, "--model.channels", "32", "--detect.score_threshold", "0.001"]) == 0
    return output


def test_a_run_folder_holds_what_the_readme_says(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "best.safetensors", "last.ckpt", "metrics.csv", "metrics.json", "predictions"} <= names
    metrics = json.loads((run / "metrics.json").read_text())
    assert {"regressed", "direct", "refined"} == set(metrics["box"])


def test_evaluate_writes_metrics_and_results(
    run: Path, shapes_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", str(run), "--data.val", str(shapes_folder / "val.json"), "--output", str(tmp_path / "e")]
    assert main([*arguments, "--max_detections", "7"]) == 0
    assert json.loads((tmp_path / "e" / "metrics.json").read_text())["max_detections"] == 7
    assert "mask" in capsys.readouterr().out
    results = json.loads((tmp_path / "e" / "results.json").read_text())
    counts: dict[int, int] = {}
    for entry in results:
        counts[entry["image_id"]] = counts.get(entry["image_id"], 0) + 1
    assert max(counts.values()) <= 7


def test_predict_writes_a_picture_of_each_image_and_a_coco_json(run: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (70, 50), "white").save(photos / "a.jpg")
    Image.new("L", (50, 90), 128).save(photos / "a.png")
    assert (
        main(["predict", str(photos), "--weights", str(run), "--output", str(tmp_path / "out"), "--threshold", "0"])
        == 0
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.jpg.png", "a.png.png", "predictions.json"}
    content = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [(i["file_name"], i["width"], i["height"]) for i in content["images"]] == [
        ("a.jpg", 70, 50),
        ("a.png", 50, 90),
    ]


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["train", "--preset", "nope"], "unknown preset 'nope'; the presets are rdsnet_r50"),
        (["train", "--train.epoch", "3"], "unknown setting 'train.epoch'; did you mean train.epochs?"),
        (["train", "--model.inclusive", "1"], "unknown setting 'model.inclusive'; did you mean rules.inclusive?"),
        (["train", "--output", "x"], "data.train is not set"),
        (
            ["train", "--output", "x", "--data.short_side", "0"],
            "short_side is 0, expected a whole number, 1 or more",
        ),
        (["train", "--output", "x", "--train.lr", "-1"], "train.lr is -1, expected a number, 0 or more"),
        (
            ["train", "--output", "x", "--data.horizontal_flip", "7"],
            "horizontal_flip is 7, expected a number, 0 to 1",
        ),
        (["train", "--resume", "nowhere"], "nowhere holds no run to resume"),
        (["evaluate", "nowhere", "--data.val", "v.json"], "nothing at nowhere"),
        (["predict", "nowhere", "--weights", "w", "--output", "o"], "no such file or folder: nowhere"),
        (["check", "nowhere.json"], "nowhere.json"),
        (["predict", "p.jpg", "--weights", "w", "--output", "o", "--threshold", "high"], "threshold"),
        ([], "command"),
    ],
)
def test_bad_input_is_answered_in_one_line_with_status_2(
    arguments: list[str],
    answer: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("rdsnet: error: ") and error.count("\n") == 1
    assert answer in error
    assert list(tmp_path.iterdir()) == []


def test_an_unreadable_image_does_not_cost_the_other_predictions(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (70, 50)).save(photos / "a.jpg")
    (photos / "b.jpg").write_bytes(b"not an image")
    Image.new("RGB", (70, 50)).save(photos / "c.jpg")
    assert main(["predict", str(photos), "--weights", str(run), "--output", str(tmp_path / "out")]) == 2
    assert "rdsnet: error: 1 of 3 files left out: " in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.png", "c.png", "predictions.json"}


@pytest.mark.parametrize("command", ["train", "evaluate", "predict"])
def test_an_output_that_is_a_file_is_refused_at_once(
    command: str, run: Path, shapes_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").write_text("mine")
    data = ["--data.val", str(shapes_folder / "val.json")]
    arguments = {
        "train": ["train", "--data.train", str(shapes_folder / "train.json")],
        "evaluate": ["evaluate", str(run), *data],
        "predict": ["predict", str(shapes_folder / "images"), "--weights", str(run)],
    }[command]
    assert main([*arguments, "--output", str(tmp_path / "taken")]) == 2
    assert "taken is a file" in capsys.readouterr().err
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize("command", ["train", "evaluate", "predict", "check", "shapes"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert "usage" in capsys.readouterr().out
