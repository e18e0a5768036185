"""The command line as a user meets it: the main job end to end, and what bad input is answered with."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import yaml
from PIL import Image

from rdsnet.cli.main import COMMANDS, main
from rdsnet.cli.options import Name, Share, options_of
from rdsnet.config import SETTINGS

ROOT = Path(__file__).parents[1]


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
        (["train", "--train.epoch", "3"], "unknown option --train.epoch; did you mean --train.epochs?"),
        (["train", "--model.inclusive", "1"], "unknown option --model.inclusive; did you mean --rules.inclusive?"),
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


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith(f"usage: rdsnet {command} ")
    options = [option for option in options_of(COMMANDS[command]) if option.name not in SETTINGS or command != "train"]
    assert options and all(option.help and f"--{option.name}" in " ".join(rest) for option in options)


def test_the_overview_has_a_line_for_each_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for command in COMMANDS:
        (line,) = (line for line in lines if line.startswith(f"  {command} "))
        assert line.endswith(".") and len(line) < 80


def test_the_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"rdsnet {version('rdsnet')}\n"


def named_options(text: str) -> list[str]:
    return [line.split()[0][2:] for line in text.splitlines() if line.startswith("  --")]


def test_help_of_training_shows_fifteen_options_and_all_settings_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    few = capsys.readouterr().out
    assert len(named_options(few)) == 15 and "--help_all" in few
    assert main(["train", "--help_all"]) == 0
    everything = capsys.readouterr().out
    assert {option.name for option in options_of(COMMANDS["train"])} == set(named_options(everything))
    assert "\ntrain: The recipe (4.1).\n" in everything


def test_help_says_types_in_words_and_defaults_of_the_preset(capsys: pytest.CaptureFixture[str]) -> None:
    def text(*arguments: str) -> str:
        assert main([*arguments]) == 0
        return " ".join(capsys.readouterr().out.split())

    assert "--threshold smallest score [number, 0 to 1; default: 0.5]" in text("predict", "--help")
    assert "[one of pictures, json, both; default: both]" in text("predict", "--help")
    assert "[one of sgd, adamw; default: sgd]" in text("train", "--help_all")
    assert "[one of sgd, adamw; default: adamw]" in text("train", "--preset", "rdsnet_tiny", "--help_all")


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        ("trian", "unknown command 'trian'; did you mean train?"),
        ("train --epochs 3", "unknown option --epochs; did you mean --train.epochs?"),
        ("train --batch 3", "did you mean --train.batch_size?"),
        ("train --imgsz 640", "did you mean --data.short_side?"),
        ("train --data a.json", "did you mean --data.train?"),
        ("train --lr 0.1", "did you mean --train.lr?"),
        ("train --model.chanels 64", "did you mean --model.channels?"),
        ("train --preset rdsnet_r5", "unknown preset 'rdsnet_r5'; did you mean rdsnet_r50?"),
        ("train --train.optimizer adam", "expected one of sgd, adamw; did you mean adamw?"),
        ("predict p.jpg nuclei --output o --conf 0.3", "unknown option --conf; did you mean --threshold?"),
        ("predict p.jpg nuclei -o out", "unknown option -o; did you mean --output?"),
        ("visualize p.jpg nuclei --output o --what overlays", "did you mean overlay?"),
        ("predict --output o", "rdsnet predict needs --source, --weights"),
        ("evaluate nuclei", "rdsnet evaluate needs --data.val"),
        ("predict p.jpg nuclei --output", "--output needs a value: folder"),
        ("predict p.jpg nuclei more --output o", "unexpected 'more'"),
        ("benchmark --size 480 --output o", "--size needs a value: 2, each whole number"),
        ("predict p.jpg nuclei --output o --compile=perhaps", "--compile is 'perhaps', expected true or false"),
    ],
)
def test_what_was_meant_is_suggested(arguments: str, answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("rdsnet: error: ") and error.count("\n") == 1
    assert answer in error


@pytest.mark.parametrize(
    "arguments",
    [
        "predict nowhere.jpg nuclei --output o",
        "predict photo.jpg nuclei --output o --threshold 50",
        "predict photo.jpg nuclear --output o",
        "predict photo.jpg nuclei --output photo.jpg",
        "evaluate nuclei --data.val nowhere.json",
        "visualize photo.jpg nuclei --output o --truth nowhere.json",
        "check nowhere.json",
        "fit-refiner nowhere.json --truth photo.jpg --output o.json",
        "convert release nowhere.pth --output o.safetensors",
        "benchmark --preset nope",
        "train",
        "train --preset nope",
        "train --output o",
        "train --output photo.jpg",
        "train --output o --data.train nowhere.json",
        "train --output o --init nowhere.safetensors",
        "train --output o --config nowhere.yaml",
        "train --resume nowhere",
        "train --output o --train.epochs many",
    ],
)
def test_simple_mistakes_do_not_wait_for_torch(arguments: str, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()
    code = "import sys; from rdsnet.cli.main import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    command = [sys.executable, "-c", code, *arguments.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"] and done.stderr.startswith("rdsnet: error: ")


def test_a_command_is_a_function_and_an_entry(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[dict[str, Any]] = []

    def mix_paint(
        first: str, second: str | None, *, parts: tuple[int, ...] = (1, 1), at: Annotated[Share, Name("room.at")] = 0.5,
        limits: tuple[float, float] | None = None, stir: bool = False,
    ) -> None:  # fmt: skip
        """Mix paint.

        Args:
            first: colour
            second: colour, which is
                explained in two lines
            parts: of each
            at: place
            limits: of brightness
            stir: well
        """
        calls.append({"first": first, "second": second, "parts": parts, "at": at, "limits": limits, "stir": stir})

    monkeypatch.setitem(COMMANDS, "mix-paint", mix_paint)
    assert (
        main(["mix-paint", "red", "--parts", "1", "2", "3", "--room.at=0.25", "--stir", "--limits", "-1", "1e-3"]) == 0
    )
    assert main(["mix-paint", "--second", "null", "--first", "blue", "--parts", "4"]) == 0
    assert main(["mix_paint", "red", "blue", "--room.at", "1", "--room.at", "0"]) == 0
    usual = {"second": None, "parts": (1, 1), "at": 0.5, "limits": None, "stir": False}
    assert calls == [
        usual | {"first": "red", "parts": (1, 2, 3), "at": 0.25, "limits": (-1.0, 0.001), "stir": True},
        usual | {"first": "blue", "parts": (4,)},
        usual | {"first": "red", "second": "blue", "at": 0.0},
    ]
    assert main(["mix-paint", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("usage: rdsnet mix-paint FIRST [SECOND] [options] Mix paint.")
    assert "SECOND, --second colour, which is explained in two lines [text]" in text
    assert "--parts of each [one or more, each whole number; default: 1 1]" in text


def test_an_error_of_the_user_is_a_line_and_a_bug_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*, how: str) -> None:
        """Fail.

        Args:
            how: kind of failure
        """
        raise {"memory": torch.OutOfMemoryError("CUDA out of memory.\nTried"), "bug": TypeError("bug")}[how]

    monkeypatch.setitem(COMMANDS, "fail", fail)
    assert main(["fail", "--how", "memory"]) == 2
    assert capsys.readouterr().err == "rdsnet: error: CUDA out of memory. Tried\n"
    with pytest.raises(TypeError):
        main(["fail", "--how", "bug"])


def test_dashes_stand_for_underscores(shapes_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--preset", "rdsnet_tiny", "--train.max-steps", "7", "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["train"]["max_steps"] == 7


def test_settings_come_from_preset_then_files_then_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def printed(*arguments: str) -> dict[str, Any]:
        assert main(["train", "--preset", "rdsnet_tiny", *arguments, "--print_config"]) == 0
        text = capsys.readouterr().out
        (tmp_path / "printed.yaml").write_text(text)
        content: dict[str, Any] = yaml.safe_load(text)
        return content

    (tmp_path / "a.yaml").write_text("train: {lr: 1e-2, epochs: 5}\ndata: {train_crop: 64}\n")
    (tmp_path / "b.yaml").write_text("train: {epochs: 6}\nseed: 4\n")
    files = ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")]
    settings = printed("--train.warmup_steps", "9", *files, "--data.train_crop", "null", "--model.levels", "[2, 3, 4]")
    assert settings["train"]["optimizer"] == "adamw"
    assert (settings["train"]["lr"], settings["train"]["epochs"], settings["train"]["warmup_steps"]) == (0.01, 6, 9)
    assert settings["data"]["train_crop"] is None and settings["model"]["levels"] == [2, 3, 4]
    assert settings["seed"] == 4
    assert printed("--config", str(tmp_path / "printed.yaml")) == settings
    (tmp_path / "c.yaml").write_text("train: {epoch: 6}\n")
    assert main(["train", "--config", str(tmp_path / "c.yaml"), "--print_config"]) == 2
    error = capsys.readouterr().err
    assert "c.yaml" in error and "train.epoch" in error


DOCUMENTS = sorted(
    path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile", *ROOT.glob("docs/*.md"))
)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_and_options_in_the_documents_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8").replace("\\\n", " ")
    text = re.sub(r"(python3? -m|python|pip|pytest|ruff).*", "", text)  # options of others
    options = {name: {option.name for option in options_of(command)} for name, command in COMMANDS.items()}
    common = {"help", "help_all", "version"}
    for name, rest in re.findall(r"(?:`|^ +|\$\(BIN\)/)rdsnet ([a-z-]+)([^`\n#]*)", text, re.MULTILINE):
        assert name in COMMANDS
        assert set(re.findall(r"--([a-z][\w.]*)", rest)) <= options[name] | common, f"rdsnet {name}"
    assert set(re.findall(r"(?<![\w-])--([a-z][\w.]*)", text)) <= common.union(*options.values())
    sections = "|".join({name.partition(".")[0] for name in SETTINGS if "." in name})
    files = ("json", "py", "yaml")
    named = re.findall(rf"`((?:{sections})\.(?!{'|'.join(files)})\w+)", text)
    assert set(named) <= SETTINGS.keys()
