"""A run that is stopped and resumed ends as if it had never been stopped; several processes train like one."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from rdsnet.config import Config, read_config
from rdsnet.predict.predictor import Predictor
from rdsnet.results.metrics import CocoEvaluator
from rdsnet.train import run_folder
from rdsnet.train.module import LitRDSNet
from rdsnet.train.run import train
from tiny_run import differing, final_state, make_data, read_log, tiny_config

# Trains as its arguments say; the process of a rank sends itself a signal when a step begins.
SCRIPT = """
import os, signal, sys
from pathlib import Path
from rdsnet.config import read_config
from rdsnet.train.module import LitRDSNet
from rdsnet.train.run import train

def main(config, output, number, step, rank):
    begin = LitRDSNet.on_train_batch_start
    def signalled(self, batch, batch_idx):
        if self.global_step == step and self.global_rank == rank:
            os.kill(os.getpid(), number)
        begin(self, batch, batch_idx)
    LitRDSNet.on_train_batch_start = signalled
    train(read_config(Path(config)), output, device="cpu")

if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
"""


class Killed(BaseException):
    """Leaves a run as SIGKILL does: nothing is written on the way out."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def start(config: Config, folder: Path, number: int = 0, step: int = -1, rank: int = 0) -> subprocess.Popen[str]:
    """Train into folder/run in a process of its own."""
    run_folder.create(folder / "asked", config, [])
    (folder / "train.py").write_text(SCRIPT)
    command = [sys.executable, "train.py", "asked", "run", str(number), str(step), str(rank)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, stdout=pipe, stderr=pipe, text=True, env=environment())


def environment() -> dict[str, str]:
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": os.pathsep.join(sys.path)}
    return {**os.environ, **threads}


def keep_two_images(path: Path) -> None:
    """The first with its objects, the second without."""
    content = json.loads(path.read_text())
    content["images"] = content["images"][:2]
    first = content["images"][0]["id"]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] == first]
    path.write_text(json.dumps(content))


def kill_in_step(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = LitRDSNet.training_step

    def killed(self: LitRDSNet, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.global_step == step:
            raise Killed
        return begin(self, batch, batch_idx)

    monkeypatch.setattr(LitRDSNet, "training_step", killed)


def test_killed_and_resumed_run_ends_with_the_same_weights(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data)
    config.data.workers = 1
    process = start(config, tmp_path, signal.SIGKILL, 5)  # in the middle of the second epoch
    straight = train(config, tmp_path / "straight", device="cpu")
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    progress = run_folder.read_progress(tmp_path / "run")
    assert (progress.step, progress.mid_epoch) == (4, True)

    resumed = train(config, tmp_path / "run", resume=True, device="cpu")
    assert differing(straight, resumed) == []
    assert read_log(straight) == read_log(resumed)
    assert (straight / "metrics.json").read_text() == (resumed / "metrics.json").read_text()


@pytest.fixture(scope="module")
def straight_run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Config, Path]]:
    """Uninterrupted runs without validation, made when first asked for."""

    @cache
    def run(variant: str) -> tuple[Config, Path]:
        config = tiny_config(data, **{"epochs": 4, **VARIANTS[variant]})
        config.data.val, config.detect.refine = None, "off"
        return config, train(config, tmp_path_factory.mktemp(variant) / "run", device="cpu")

    return run


# Three steps an epoch, two where batches are accumulated; checkpoints after every second step and every epoch.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"batch_size": 1, "accumulate": 4},
    "part of an epoch": {"max_steps": 8},
    "averaged": {"ema": 0.9},
}


@pytest.mark.parametrize(
    ("variant", "killed"),
    [("plain", 3), ("plain", 5), ("accumulated", 3), ("part of an epoch", 7), ("averaged", 5)]
    + [pytest.param("plain", k, marks=pytest.mark.slow) for k in (2, 4, 9)]
    + [pytest.param("accumulated", k, marks=pytest.mark.slow) for k in (2, 7)],
)
def test_resume_is_exact_wherever_the_run_was_stopped(
    variant: str,
    killed: int,
    straight_run: Callable[[str], tuple[Config, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, straight = straight_run(variant)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in_step(killed, patch)
        train(config, tmp_path / "run", device="cpu")
    resumed = train(None, tmp_path / "run", resume=True, device="cpu")
    assert differing(straight, resumed) == []
    assert read_log(straight) == read_log(resumed)


@pytest.mark.parametrize("epoch", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_run_stopped_in_a_validation_repeats_only_that(
    epoch: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = train(tiny_config(data), tmp_path / "straight", device="cpu")
    evaluate, calls = Predictor.evaluate, []

    def killed(*arguments: Any, **options: Any) -> CocoEvaluator:
        calls.append(1)
        if len(calls) == epoch:
            raise Killed
        return evaluate(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Predictor, "evaluate", killed)
        train(tiny_config(data), tmp_path / "run", device="cpu")
    assert run_folder.read_progress(tmp_path / "run").step == 3 * epoch
    resumed = train(None, tmp_path / "run", resume=True, device="cpu")
    assert differing(straight, resumed) == []
    assert read_log(straight) == read_log(resumed)


def test_ctrl_c_writes_a_checkpoint_and_says_how_to_resume(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data)
    process = start(config, tmp_path, signal.SIGINT, 4)
    straight = train(config, tmp_path / "straight", device="cpu")
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGINT, errors
    assert "KeyboardInterrupt: stopped; continue with `rdsnet train --resume run`" in errors
    assert run_folder.read_progress(tmp_path / "run").step == 5  # the step that had begun is done
    assert differing(straight, train(None, tmp_path / "run", resume=True, device="cpu")) == []


def test_killed_loader_process_is_an_error_that_says_how_to_resume(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(data)
    config.data.workers = 1
    begin = LitRDSNet.training_step

    def killing(self: LitRDSNet, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.global_step == 4:
            for process in multiprocessing.active_children():
                process.kill()
        return begin(self, batch, batch_idx)

    monkeypatch.setattr(LitRDSNet, "training_step", killing)
    with pytest.raises(ChildProcessError, match=r"^a process that loads images was killed[^\n]*train --resume [^\n]*$"):
        train(config, tmp_path / "run", device="cpu")
    assert run_folder.read_progress(tmp_path / "run").step == 4


def test_bad_image_is_named_in_one_line_whatever_process_meets_it(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    config = tiny_config(tmp_path / "data")
    config.data.workers = 1
    for image in (tmp_path / "data" / "images").glob("train*"):
        image.write_bytes(image.read_bytes()[:200])  # the header is whole: the check before the training reads no more
    with pytest.raises((OSError, ValueError), match=r"^[^\n]*train_[^\n]*$"):
        train(config, tmp_path / "run", device="cpu")


def test_run_folder_that_is_removed_is_an_error_that_says_so(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = LitRDSNet.training_step

    def removing(self: LitRDSNet, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.global_step == 2:
            shutil.rmtree(tmp_path / "run")
        return begin(self, batch, batch_idx)

    monkeypatch.setattr(LitRDSNet, "training_step", removing)
    with pytest.raises(FileNotFoundError, match=r"^the run folder [^\n]*run is gone [^\n]*--resume[^\n]*$"):
        train(tiny_config(data), tmp_path / "run", device="cpu")


@pytest.mark.parametrize(
    ("rank", "said"),
    [
        pytest.param(0, "the first process of this training is gone", marks=pytest.mark.slow),
        (1, "process 1 of this training was killed by SIGKILL"),
    ],
)
def test_of_two_processes_one_that_is_killed_ends_both_and_the_other_says_how_to_resume(
    rank: int, said: str, data: Path, tmp_path: Path
) -> None:
    config = tiny_config(data, batch_size=1, devices=2)
    config.data.val = None
    process = start(config, tmp_path, signal.SIGKILL, 2, rank)
    _, errors = process.communicate(timeout=120)  # both have ended: each holds the pipe open
    assert process.returncode != 0
    assert f"ChildProcessError: {said}; continue with `rdsnet train --resume run`" in errors
    assert run_folder.read_progress(tmp_path / "run").step == 2


def test_finished_run_is_left_alone(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "rdsnet")
    run = train(tiny_config(data, max_steps=1), tmp_path / "run", device="cpu")
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    assert train(None, run, resume=True, device="cpu") == run
    assert "is finished: 1 steps are done" in caplog.text
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_finished_run_can_be_extended(data: Path, tmp_path: Path) -> None:
    run = train(tiny_config(data, epochs=1), tmp_path / "run", device="cpu")
    train(tiny_config(data, epochs=2), run, resume=True, device="cpu")
    assert [row["step"] for row in read_log(run)] == list("123456")
    assert read_config(run).train.epochs == 2


def test_resume_refuses_settings_that_change_the_result(data: Path, tmp_path: Path) -> None:
    run = train(tiny_config(data, max_steps=1), tmp_path / "run", device="cpu")
    with pytest.raises(ValueError, match=r"train\.lr \(stored: 0\.001, asked: 1\.0\)"):
        train(tiny_config(data, max_steps=2, lr=1.0), run, resume=True, device="cpu")


def test_resume_without_a_run_or_a_checkpoint_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no run to resume"):
        train(None, tmp_path, resume=True, device="cpu")
    run_folder.create(tmp_path / "run", tiny_config(data), ["a"])
    with pytest.raises(FileNotFoundError, match=r"last\.ckpt is missing.*start again"):
        train(None, tmp_path / "run", resume=True, device="cpu")


def test_two_processes_train_like_one_with_a_batch_of_both(tmp_path: Path) -> None:
    """One step; of the two images one has no object, so one process has no positive anchor. Norms are frozen."""
    data = make_data(tmp_path / "data")
    keep_two_images(data / "train.json")
    config = tiny_config(data, optimizer="sgd", max_steps=1, batch_size=2)
    config.model.trunk_norm = "frozen"
    config.loss.max_masks = 100  # none is left out at random
    one = train(config, tmp_path / "one", device="cpu")

    config.train.batch_size, config.train.devices = 1, 2
    process = start(config, tmp_path)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    expected, found = final_state(one), final_state(tmp_path / "run")
    gradients = [name for name in expected if name.endswith("momentum_buffer")]
    assert len(gradients) > 20
    for name in gradients:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
    for (column, value), other in zip(read_log(one)[0].items(), read_log(tmp_path / "run")[0].values(), strict=True):
        assert float(other) == pytest.approx(float(value), rel=1e-4), column
