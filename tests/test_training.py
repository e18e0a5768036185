"""The recipe, the run folder, and what training refuses."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rdsnet.config import TrainConfig, config_to_dict, read_config
from rdsnet.data.loading import TrainDataset
from rdsnet.data.transforms import Sample
from rdsnet.model.rdsnet import RDSNet
from rdsnet.train import run_folder
from rdsnet.train.log import MetricsLog, StepClock
from rdsnet.train.module import build_optimizer, learning_rate
from rdsnet.train.run import train
from rdsnet.weights import checkpoint
from tiny_run import differing, final_state, make_data, read_log, tiny_config


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs of three steps."""
    return train(tiny_config(data), tmp_path_factory.mktemp("runs") / "run", device="cpu")


# 12 epochs of 1000 steps: the warm-up ends at step 500, the rate drops at epochs 8 and 11
@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.005 / 3),
        (250, 0.005 * 2 / 3),
        (500, 0.005),
        (7999, 0.005),
        (8000, 0.0005),
        (10999, 0.0005),
        (11000, 0.00005),
    ],
)
def test_learning_rate_of_the_paper(step: int, expected: float) -> None:
    rate = learning_rate(step, total_steps=12000, images_per_step=8, recipe=TrainConfig())
    assert rate == pytest.approx(expected)


def test_learning_rate_drops_at_each_milestone() -> None:
    recipe = TrainConfig(lr=1.0, warmup_steps=0, milestones=(0.35, 0.75, 0.875, 0.9375))  # YOLACT's
    steps = (279_999, 280_000, 600_000, 700_000, 749_999, 750_000)
    rates = [learning_rate(step, total_steps=800_000, images_per_step=8, recipe=recipe) for step in steps]
    assert rates == pytest.approx([1, 0.1, 0.01, 0.001, 0.001, 0.0001])
    constant = TrainConfig(lr=1.0, warmup_steps=0, milestones=())
    assert learning_rate(99, total_steps=100, images_per_step=8, recipe=constant) == 1.0


def test_rounding_of_a_milestone_does_not_move_its_step() -> None:
    recipe = TrainConfig(lr=1.0, warmup_steps=0, milestones=(0.55,))  # 0.55 * 100 is 55.00000000000001
    rates = [learning_rate(step, total_steps=100, images_per_step=8, recipe=recipe) for step in (54, 55)]
    assert rates == pytest.approx([1, 0.1])


def test_learning_rate_is_linear_in_the_images_of_a_step() -> None:
    recipe = TrainConfig(warmup_steps=0)
    assert learning_rate(0, total_steps=100, images_per_step=16, recipe=recipe) == pytest.approx(0.01)
    assert learning_rate(0, total_steps=100, images_per_step=2, recipe=recipe) == pytest.approx(0.00125)


def test_short_training_warms_up_for_a_tenth_of_it() -> None:
    rates = [learning_rate(s, total_steps=30, images_per_step=8, recipe=TrainConfig()) for s in range(5)]
    assert rates == pytest.approx([0.005 / 3, 0.005 * 5 / 9, 0.005 * 7 / 9, 0.005, 0.005])


def test_cosine_schedule_is_halved_in_the_middle_and_ends_near_zero() -> None:
    recipe = TrainConfig(schedule="cosine", lr=1.0, warmup_steps=0)
    rates = [learning_rate(s, total_steps=100, images_per_step=8, recipe=recipe) for s in (0, 50, 100)]
    assert rates == pytest.approx([1.0, 0.5, 0.0])


def test_adamw_does_not_decay_norms_and_biases() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1).requires_grad_(False))
    decayed, free = build_optimizer(model, TrainConfig(optimizer="adamw", weight_decay=0.05)).param_groups
    assert decayed["weight_decay"] == 0.05 and [p.shape for p in decayed["params"]] == [(4, 3, 3, 3)]
    assert free["weight_decay"] == 0.0 and [p.shape for p in free["params"]] == [(4,), (4,), (4,)]


def test_run_folder_holds_all_that_is_promised(run: Path, data: Path) -> None:
    assert config_to_dict(read_config(run)) == config_to_dict(tiny_config(data))
    assert run_folder.read_progress(run).step == 6
    _, stored = checkpoint.load(run)
    assert stored.class_names == json.loads(
        (run / "config.yaml").read_text().splitlines()[0].removeprefix("# classes: ")
    )
    assert {"box", "mask"} <= json.loads((run / "metrics.json").read_text()).keys()
    assert len(list((run / "predictions").iterdir())) == 2
    assert list(run.glob("events.out.tfevents.*"))
    assert not [file for file in run.iterdir() if file.name.startswith(".") or file.suffix == ".partial"]


def test_log_has_one_row_a_step_and_the_metrics_of_each_epoch(run: Path) -> None:
    rows = read_log(run)
    assert [row["step"] for row in rows] == list("123456")
    assert [row["epoch"] for row in rows] == list("111222")
    assert [bool(row["val/mask_AP"]) for row in rows] == [False, False, True, False, False, True]
    for row in rows:
        parts = sum(float(row[f"loss/{name}"]) for name in ("cls", "box", "mask"))
        assert float(row["loss/total"]) == pytest.approx(parts, rel=1e-4)


def test_max_steps_ends_within_an_epoch_and_validates(data: Path, tmp_path: Path) -> None:
    run = train(tiny_config(data, max_steps=4, val_epochs=5), tmp_path / "run", device="cpu")
    rows = read_log(run)
    assert [row["step"] for row in rows] == list("1234")
    assert [bool(row["val/mask_AP"]) for row in rows] == [False, False, False, True]


def test_training_without_validation_and_without_masks(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, epochs=1)
    config.data.val = None
    config.model.masks = False
    run = train(config, tmp_path / "run", device="cpu")
    assert (run / "best.safetensors").is_file()
    assert json.loads((run / "metrics.json").read_text()) == {}


def test_training_on_squashed_and_zoomed_images(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, max_steps=2)
    config.model.pixel_levels = (2,)
    config.data.square, config.data.antialias = 50, False  # no multiple of any stride
    config.data.train_zoom, config.data.train_aspect = (0.5, 2.0), 1.5
    run = train(config, tmp_path / "run", device="cpu")
    assert read_config(run).data == config.data
    assert json.loads((run / "metrics.json").read_text()).keys() >= {"box", "mask"}


def test_accumulated_batches_are_one_step_of_their_mean(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, batch_size=1, accumulate=4, epochs=1)
    rows = read_log(train(config, tmp_path / "run", device="cpu"))
    assert [row["step"] for row in rows] == ["1", "2"]  # six batches: four, and the two that are left


def test_kept_weights_are_the_moving_average_of_the_steps(data: Path, tmp_path: Path) -> None:
    """Of a decay near 0 only the last step is left, of one near 1 something else."""
    kept, last = {}, {}
    for decay in (1e-9, 0.999):
        config = tiny_config(data, ema=decay)
        config.data.val = None  # the last weights are kept then, not the best ones
        run = train(config, tmp_path / str(decay), device="cpu")
        kept[decay] = checkpoint.read(run)[0]["pixel_stream.project.weight"]
        last[decay] = final_state(run)["model.pixel_stream.project.weight"]
    assert torch.equal(last[1e-9], last[0.999])  # averaging changes no step
    assert torch.allclose(kept[1e-9], last[1e-9], atol=1e-7)
    assert not torch.allclose(kept[0.999], last[0.999], atol=1e-5)


def logged_seconds(run: Path) -> list[tuple[float, float]]:
    """Of each step, waiting for data and in all."""
    with (run / "metrics.csv").open(newline="") as file:
        return [(float(row["seconds/data"]), float(row["seconds/step"])) for row in csv.DictReader(file)]


def test_log_tells_how_long_a_step_took_and_waited(run: Path) -> None:
    seconds = logged_seconds(run)
    assert len(seconds) == 6
    assert all(0 < waited < total for waited, total in seconds)


def test_waiting_for_slow_data_is_counted_and_told(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "rdsnet")
    load = TrainDataset.__getitem__

    def slow(self: TrainDataset, index: tuple[int, int]) -> Sample:
        time.sleep(0.3)
        return load(self, index)

    monkeypatch.setattr(TrainDataset, "__getitem__", slow)
    config = tiny_config(data, batch_size=1, accumulate=2, max_steps=1)
    config.data.val = None
    ((waited, total),) = logged_seconds(train(config, tmp_path / "run", device="cpu"))
    assert total > waited > 0.6  # two images a step
    assert f"waited for data {waited / total:.0%} of the time" in caplog.text


def test_clock_leaves_out_what_lies_between_two_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    # asks at 1, batch at 3, done at 7; what follows takes until 20; asks again, batch at 21, done at 25: one step
    times = iter([0.0, 1, 3, 7, 20, 21, 25])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    clock = StepClock()
    assert clock.share() == "0%"
    for _ in range(2):
        clock.wait()
        clock.batch_came()
        clock.batch_done()
    assert clock.step_done() == {"seconds/data": 3, "seconds/step": 11}
    assert clock.share() == "27%"
    assert clock.step_done() == {"seconds/data": 0, "seconds/step": 0}


def test_run_begun_without_these_columns_is_resumed(data: Path, tmp_path: Path) -> None:
    run = train(tiny_config(data, epochs=1), tmp_path / "run", device="cpu")
    with (run / "metrics.csv").open(newline="") as file:
        rows = [
            {name: value for name, value in row.items() if not name.startswith("seconds/")}
            for row in csv.DictReader(file)
        ]
    with (run / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    train(tiny_config(data, epochs=2), run, resume=True, device="cpu")
    with (run / "metrics.csv").open(newline="") as file:
        assert [bool(row["seconds/step"]) for row in csv.DictReader(file)] == [False] * 3 + [True] * 3


def test_checkpointed_activations_train_the_same_weights(data: Path, tmp_path: Path) -> None:
    """The tiny network's batch norm is live: its statistics are among what is compared."""
    runs = []
    for checkpointed in (False, True):
        config = tiny_config(data, max_steps=2, checkpoint_activations=checkpointed)
        config.data.val = None
        runs.append(train(config, tmp_path / str(checkpointed), device="cpu"))
    assert any("running_mean" in name for name in final_state(runs[0]))
    assert differing(*runs) == []


def test_bf16_trains_on_the_cpu(data: Path, tmp_path: Path) -> None:
    run = train(tiny_config(data, precision="bf16-forced", max_steps=1), tmp_path / "run", device="cpu")
    assert all(value.dtype != torch.bfloat16 for value in final_state(run).values())


def test_bf16_is_refused_where_it_is_emulated_and_auto_is_float32(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rdsnet.device.has_bfloat16", lambda device: False)
    with pytest.raises(ValueError, match=r"^this processor has no instructions for bfloat16[^\n]*bf16-forced[^\n]*$"):
        train(tiny_config(data, precision="bf16"), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
    auto, full = (
        train(tiny_config(data, precision=precision, max_steps=1), tmp_path / precision, device="cpu")
        for precision in ("auto", "32")
    )
    assert differing(auto, full) == []


def test_stored_bf16_goes_on_in_float32_where_it_is_emulated_with_one_warning(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("rdsnet.device.has_bfloat16", lambda device: True)
    config = tiny_config(data, precision="bf16", max_steps=1)
    config.detect.refine = "off"
    train(config, tmp_path / "run", device="cpu")
    monkeypatch.setattr("rdsnet.device.has_bfloat16", lambda device: False)
    config.train.max_steps = 2
    train(config, tmp_path / "run", resume=True, device="cpu")
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "float32 takes the place of the stored precision bf16" in warning
    assert read_config(tmp_path / "run").train.precision == "bf16"


def test_a_folder_in_use_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty.*--resume"):
        train(tiny_config(data), tmp_path, device="cpu")
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_data_with_errors_is_refused_before_anything_is_written(data: Path, tmp_path: Path) -> None:
    content = json.loads((data / "train.json").read_text())
    content["images"][0]["file_name"] = "gone.png"
    content["annotations"][0]["category_id"] = 99
    (tmp_path / "bad.json").write_text(json.dumps(content))
    config = tiny_config(data)
    config.data.train, config.data.train_images = str(tmp_path / "bad.json"), str(data / "images")
    with pytest.raises(ValueError, match=r"errors: 2;.*gone\.png"):
        train(config, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_validation_with_other_classes_is_refused(data: Path, tmp_path: Path) -> None:
    content = json.loads((data / "val.json").read_text())
    content["categories"][0]["name"] = "unheard of"
    (tmp_path / "val.json").write_text(json.dumps(content))
    config = tiny_config(data)
    config.data.val, config.data.val_images = str(tmp_path / "val.json"), str(data / "images")
    with pytest.raises(ValueError, match="unheard of"):
        train(config, tmp_path / "run", device="cpu")


def test_precision_16_is_refused_on_the_cpu(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bf16 and 32 work on the CPU"):
        train(tiny_config(data, precision="16"), tmp_path / "run", device="cpu")


def test_counts_below_one_are_refused(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data)
    config.train.accumulate = config.train.max_steps = 0
    message = (
        r"train\.max_steps is 0, expected a whole number, 1 or more, or null; train\.accumulate is 0, expected a whole"
    )
    with pytest.raises(ValueError, match=message):
        train(config, tmp_path / "run", device="cpu")


def test_divergence_stops_with_the_step_and_keeps_good_weights(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = RDSNet.losses
    calls = []

    def spoilt(self: RDSNet, *arguments: Any) -> dict[str, Tensor]:
        calls.append(1)
        found = losses(self, *arguments)
        return {**found, "box": found["box"] * torch.nan} if len(calls) == 4 else found

    monkeypatch.setattr(RDSNet, "losses", spoilt)
    with pytest.raises(FloatingPointError, match=r"step 4 \(epoch 2, batch 1\).*loss/box nan"):
        train(tiny_config(data), tmp_path / "run", device="cpu")
    state = final_state(tmp_path / "run")
    assert state["step"] == 3
    assert all(value.isfinite().all() for value in state.values())


def test_init_starts_from_the_weights_of_another_run(run: Path, data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, max_steps=1, lr=0.0)
    config.seed = 1
    train(config, tmp_path / "run", init=run, device="cpu")
    weights, _ = checkpoint.read(run)
    trained = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["state_dict"]
    parameters = [name for name in weights if name.endswith(".weight") and "mbrm" not in name]
    assert parameters and all(torch.equal(trained[f"model.{name}"], weights[name]) for name in parameters)


def test_columns_of_the_log_may_appear_later(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log.write(1, {"loss": 2.5})
    log.write(2, {"loss": 1.25})
    log.write(2, {"AP": 0.5})
    log.write(3, {"loss": 1.0})
    log.close()
    assert (tmp_path / "metrics.csv").read_text() == "step,loss,AP\n1,2.5,\n2,1.25,0.5\n3,1,\n"


def test_resumed_log_drops_what_is_trained_again_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,loss\n8,3\n9,2\n10,1\n11,1\n1")  # killed while it wrote row 12
    log = MetricsLog(tmp_path, 9)
    log.write(10, {"loss": 0.5})
    log.close()
    assert (tmp_path / "metrics.csv").read_text() == "step,loss\n8,3\n9,2\n10,0.5\n"


def test_a_run_logs_where_it_is_told(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, max_steps=1, logger=("csv",))
    config.data.val, config.detect.refine = None, "off"
    run = train(config, tmp_path / "run", device="cpu")
    assert (run / "metrics.csv").exists()
    assert not list(run.glob("events*"))


def test_log_that_needs_a_missing_package_is_refused_with_its_name(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^train.logger wandb needs a package: pip install wandb$"):
        train(tiny_config(data, logger=("csv", "wandb")), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_mlflow_keeps_a_run_and_its_resume_as_one(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for epochs in (1, 2):
        config = tiny_config(data, epochs=epochs, logger=("csv", "mlflow"))
        run = train(config, tmp_path / "run", resume=epochs == 2, device="cpu")
    client = mlflow.MlflowClient((run / "mlruns").as_uri())
    (stored,) = client.search_runs([client.get_experiment_by_name("rdsnet").experiment_id])
    logged = client.get_metric_history(stored.info.run_id, "loss/total")
    assert [metric.step for metric in logged] == [1, 2, 3, 4, 5, 6]
    assert [metric.value for metric in logged] == pytest.approx(
        [float(row["loss/total"]) for row in read_log(run)], 1e-5
    )
    assert {"val/mask_AP", "lr"} <= stored.data.metrics.keys()


def test_wandb_keeps_a_run_and_its_resume_under_one_id_offline(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for epochs in (1, 2):
        config = tiny_config(data, epochs=epochs, logger=("csv", "wandb"))
        run = train(config, tmp_path / "run", resume=epochs == 2, device="cpu")
    own = (run / "wandb.id").read_text()
    files = list((run / "wandb").glob(f"offline-run-*-{own}/run-{own}.wandb"))
    assert files and all(b"loss/total" in file.read_bytes() for file in files)
