"""The benchmark: what it counts can be worked out, what it times is a real prediction, and nothing stays behind."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from rdsnet.benchmark.probes import (
    DENSE,
    NETWORK,
    STAGES,
    Convolution,
    Stopwatch,
    alternate,
    count_macs,
    draw_boxes,
    forced_objects,
    machine,
    memory_gauge,
    steer_candidates,
    watch,
)
from rdsnet.benchmark.run import benchmark
from rdsnet.benchmark.run import speed_table as format_table
from rdsnet.cli.main import main
from rdsnet.config import get_config
from rdsnet.model.build import build_model
from rdsnet.model.object_stream.dense import Raw
from rdsnet.model.object_stream.suppression import Found
from rdsnet.predict.predictor import Predictor, untrained
from rdsnet.weights import checkpoint

SMALL = {"model": {"channels": 32, "representation": 4}, "data": {"short_side": 64, "long_side": 96}}
UNCOMPILED = [stage for stage in STAGES if stage != NETWORK]
SIZE = (48, 64)  # of the image: 64 x 85 pixels of the network, padded to 64 x 96

NEEDS_PEAKS = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of this system's memory cannot be restarted"
)


def small(preset: str = "rdsnet_tiny", **model: Any) -> Predictor:
    config = get_config(preset, {**SMALL, "model": {**SMALL["model"], **model}})
    return untrained(config, num_classes=3, device="cpu")


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return benchmark(small(), size=SIZE, objects=7, candidates=50, batch_sizes=(1, 3), rounds=3)


def test_all_stages_are_there_in_their_order_and_add_up(result: dict[str, Any]) -> None:
    assert list(result["stages"]) == UNCOMPILED
    assert all(stage["ms"] > 0 for stage in result["stages"].values())
    assert sum(stage["ms"] for stage in result["stages"].values()) == pytest.approx(result["sum_ms"])
    assert sum(stage["share"] for stage in result["stages"].values()) == pytest.approx(1)
    parts = [result["stages"][name]["share"] for name in ("load", "resize")]
    assert sum(parts) + result["network"]["share"] + result["after_network"]["share"] == pytest.approx(1)


def test_a_stage_lasts_until_the_next_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 5.0, 6.0, 8.0])
    monkeypatch.setattr("rdsnet.benchmark.probes.perf_counter", lambda: next(times))
    stopwatch = Stopwatch()
    for stage in ("a", "b", "a", "c", "end"):
        stopwatch(stage)
    assert stopwatch.seconds == {"a": 2.0, "b": 4.0, "c": 2.0}


def test_the_stages_of_a_prediction_follow_each_other(tmp_path: Path) -> None:
    file = tmp_path / "photo.png"
    Image.new("RGB", (50, 40), "white").save(file)
    predictor = small()
    marks: list[str] = []
    predictor.find = forced_objects(predictor.model.object_stream, draw_boxes(3, (40, 50)))
    watch(predictor, file, marks.append)
    entered = [stage for stage, before in zip(marks, [None, *marks[:-1]], strict=True) if stage != before]
    assert entered == [*UNCOMPILED, "end"]
    marks.clear()
    predictor.predict(file)
    assert marks == []  # nothing of the probes stays


def test_the_numbers_are_those_of_the_input(result: dict[str, Any]) -> None:
    facts = result["input"]
    assert (facts["image"], facts["size"], facts["network_size"]) == ("made", [48, 64], [64, 96])
    assert (facts["objects"], facts["forced"], facts["candidates"], facts["rounds"]) == (7, True, 50, 3)
    boxes = draw_boxes(7, SIZE)
    assert facts["mean_box_area"] == pytest.approx(float((boxes[:, 2:] - boxes[:, :2]).prod(dim=1).mean()))
    assert len(result["complete_rounds_ms"]) == 3
    assert set(result["throughput"]) == {"1", "3"}
    assert result["network"]["convolution"]["size"] == [16, 24]  # of stride 4, this preset's finest level


def test_macs_of_the_network_are_those_of_its_stages(result: dict[str, Any]) -> None:
    network, stages = result["network"], result["stages"]
    assert {name for name, stage in stages.items() if stage["macs"] is not None} == set(DENSE)
    assert network["macs"] == sum(stages[name]["macs"] for name in DENSE)
    assert network["macs_per_second"] == pytest.approx(1000 * network["macs"] / network["ms"])
    rate = network["convolution"]["macs_per_second"]
    assert network["of_convolution"] == pytest.approx(network["macs_per_second"] / rate)
    trunk = stages["trunk"]
    assert trunk["of_convolution"] == pytest.approx(1000 * trunk["macs"] / trunk["ms"] / rate)


def test_rates_follow_from_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    def half_a_second(functions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
        for function in functions.values():
            function()
        return {name: [0.5] * rounds for name in functions}

    monkeypatch.setattr("rdsnet.benchmark.run.alternate", half_a_second)
    result = benchmark(small(), size=SIZE, objects=2, batch_sizes=(1, 3), rounds=1)
    assert result["complete_ms"] == 500
    assert result["throughput"] == {"1": 2, "3": 6}
    assert result["network"]["convolution"]["macs_per_second"] == 2 * 5 * 16 * 24 * 32 * 32 * 9  # 5 layers a call


def test_the_warm_up_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow_at_first(functions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
        with monkeypatch.context() as context:
            context.setattr("rdsnet.benchmark.probes.perf_counter", partial(next, count(0.0, 1000.0)))
            functions["stages"]()
        functions["stages"]()
        return {name: [1.0] for name in functions}

    monkeypatch.setattr("rdsnet.benchmark.run.alternate", slow_at_first)
    result = benchmark(small(), size=SIZE, objects=2, batch_sizes=(1,), rounds=1)
    assert result["sum_ms"] < 500_000


def test_memory_of_a_stage_and_after_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rising:
        """100 more bytes in use at every mark, and 50 more than these at the peak."""

        bytes = 0

        def restart(self) -> None:
            self.bytes += 100

        def level(self) -> int:
            return self.bytes

        def peak(self) -> int:
            return self.bytes + 50

    monkeypatch.setattr("rdsnet.benchmark.run.memory_gauge", lambda device: Rising())
    result = benchmark(small(), size=SIZE, objects=2, batch_sizes=(1,), rounds=1)
    memory = {name: stage["memory"] for name, stage in result["stages"].items()}
    assert memory["load"] == 50 and all(own % 100 == 50 for own in memory.values())
    assert list(memory.values()) == sorted(set(memory.values()))
    assert result["memory"]["peak"] == memory["RLE"]
    assert result["after_network"]["memory"] == memory["RLE"] - (memory["NMS"] - 50)


@NEEDS_PEAKS
def test_memory_is_over_what_was_in_use_before(result: dict[str, Any]) -> None:
    memory, stages = result["memory"], result["stages"]
    stored = sum(t.nbytes for t in small().model.state_dict().values())
    assert memory["model"] == stored + 2 * 3 * 4  # mean and standard deviation of the channels, which are not
    assert memory["peak"] == max(stage["memory"] for stage in stages.values())
    assert isinstance(result["after_network"]["memory"], int)


def test_the_tables_show_the_numbers(result: dict[str, Any]) -> None:
    console = Console(width=120, file=io.StringIO())
    console.print(format_table(result))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "image 48x64, network 64x96, 7 boxes drawn" in text
    for number in (f"{result['network']['share']:.1%}", f"{result['sum_ms']:.2f}", f"{result['throughput']['3']:.3g}"):
        assert number in text


def test_macs_of_a_convolution_and_of_a_linear_layer_are_counted() -> None:
    layers = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.Flatten(), nn.Linear(6 * 5 * 7, 10))
    with torch.inference_mode():
        counts = count_macs(lambda: layers(torch.zeros(2, 4, 5, 7)))
    convolution, linear = 2 * 5 * 7 * 6 * 4 * 9, 2 * 210 * 10
    assert (counts["Sequential.0"], counts["Sequential.2"]) == (convolution, linear)
    assert counts[""] == convolution + linear


def test_macs_of_the_measured_convolution_are_those_that_it_does() -> None:
    layer = Convolution(8, (5, 7), device=torch.device("cpu"), dtype=torch.float32, repeats=3)
    assert layer.macs == count_macs(layer)[""] == 3 * 5 * 7 * 8 * 8 * 9


def test_forced_objects_come_out_of_every_image_and_only_while_they_are_wanted() -> None:
    predictor = small()
    image = torch.zeros(*SIZE, 3, dtype=torch.uint8).numpy()
    before = len(predictor.predict(image))
    boxes = draw_boxes(9, SIZE)
    predictor.find = forced_objects(predictor.model.object_stream, boxes)
    for found in predictor.predict([image, image], batch_size=2):
        assert torch.equal(torch.from_numpy(found.data["regressed_xyxy"]), boxes)
        assert found.mask is not None and len(found.mask) == 9
    predictor.find = None
    assert len(predictor.predict(image)) == before


def test_as_many_candidates_pass_as_are_asked_for() -> None:
    predictor = small()
    stream = predictor.model.object_stream
    image = torch.zeros(*SIZE, 3, dtype=torch.uint8).numpy()
    image[10:30, 20:50] = 200
    steer_candidates(predictor, image, 40)
    above: list[int] = []

    def counting(raw: Raw, *where: Any) -> Found:
        for level in range(len(raw.map_sizes)):
            above.append(int((stream.candidates(raw, 0, level)[1] > stream.score_threshold).sum()))
        return stream.detect(raw, *where)

    predictor.find = counting
    predictor.predict(image)
    assert sum(above) == 40


def test_a_measured_predictor_stays_as_it_was() -> None:
    predictor = small()
    stream = predictor.model.object_stream
    threshold, image = stream.score_threshold, torch.zeros(*SIZE, 3, dtype=torch.uint8).numpy()
    before = len(predictor.predict(image))
    benchmark(predictor, size=SIZE, objects=4, candidates=50, batch_sizes=(1,), rounds=1)
    assert stream.score_threshold == threshold and len(predictor.predict(image)) == before


@pytest.mark.parametrize("preset", ["rdsnet_fcos_tiny", "rdsnet_s_tiny", "yolact_tiny"])
def test_every_stream_is_measured(preset: str) -> None:
    result = benchmark(small(preset), size=SIZE, objects=4, candidates=50, batch_sizes=(2,), rounds=1)
    missing = {"MBRM"} if preset == "yolact_tiny" else set()  # which refines nothing
    assert set(result["stages"]) == set(UNCOMPILED) - missing
    assert result["input"]["objects"] == 4


def test_a_detector_without_masks_has_no_stages_of_masks() -> None:
    result = benchmark(small(masks=False), size=SIZE, objects=4, batch_sizes=(1,), rounds=1)
    assert set(result["stages"]) == set(UNCOMPILED) - {"pixel stream", "masks", "MBRM"}
    assert result["input"]["objects"] == 4


def test_a_compiled_network_is_one_stage() -> None:
    predictor = small()
    separate = benchmark(predictor, size=SIZE, objects=4, batch_sizes=(1,), rounds=1)
    predictor.model.compile(backend="eager")  # traced as ever, without the code that takes a minute to make
    predictor.compiled = True
    result = benchmark(predictor, size=SIZE, objects=4, batch_sizes=(1,), rounds=1)
    assert result["model"]["compiled"] and not separate["model"]["compiled"]
    assert list(result["stages"]) == [stage for stage in STAGES if stage not in DENSE]
    assert result["stages"]["network"]["macs"] == separate["network"]["macs"]


def test_the_convolution_is_in_the_precision_of_the_network() -> None:
    config = get_config("rdsnet_tiny", SMALL)
    predictor = untrained(config, num_classes=3, device="cpu", precision="bf16-forced")
    result = benchmark(predictor, size=SIZE, objects=4, batch_sizes=(1,), rounds=1)
    assert result["model"]["dtype"] == result["network"]["convolution"]["dtype"] == "bfloat16"


def test_own_detections_count_where_none_are_drawn(tmp_path: Path) -> None:
    file = tmp_path / "photo.png"
    Image.new("RGB", (50, 40), "white").save(file)
    predictor = small()
    predictor.model.object_stream.score_threshold = 0.0
    result = benchmark(predictor, file, objects=None, batch_sizes=(1,), rounds=1)
    assert result["input"]["image"] == str(file) and result["input"]["size"] == [40, 50]
    assert not result["input"]["forced"]
    assert result["input"]["objects"] == predictor.model.object_stream.max_detections


def test_drawn_boxes_lie_in_the_image_and_follow_the_seed() -> None:
    boxes = draw_boxes(500, (100, 400))
    size = boxes[:, 2:] - boxes[:, :2]
    assert boxes.min() >= 0 and (boxes[:, 2:] <= torch.tensor([400.0, 100.0])).all()
    assert size.min() >= 15.99
    # log-uniform: half of the widths lie below the geometric mean of 16 and 400
    assert 0.42 < float((size[:, 0] < 80).float().mean()) < 0.58
    assert torch.equal(boxes, draw_boxes(500, (100, 400))) and not torch.equal(boxes, draw_boxes(500, (100, 400), 1))
    assert (draw_boxes(3, (10, 400))[:, 3] - draw_boxes(3, (10, 400))[:, 1] == 10).all()


def test_functions_are_timed_in_turn_after_one_call_to_warm_up() -> None:
    calls: list[str] = []
    seconds = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert "".join(calls) == "ababab"
    assert [len(seconds[name]) for name in "ab"] == [2, 2]
    with pytest.raises(ValueError, match="at least 1 round, got 0"):
        alternate({}, 0)


@NEEDS_PEAKS
def test_the_gauge_sees_memory_that_was_used_and_freed() -> None:
    gauge = memory_gauge(torch.device("cpu"))
    assert gauge is not None
    level = gauge.level()
    torch.ones(64, 2**20, dtype=torch.uint8).sum()
    assert gauge.peak() - level > 56 * 2**20
    gauge.restart()
    assert gauge.peak() - level < 32 * 2**20


def test_the_machine_is_described_in_json() -> None:
    described = json.loads(json.dumps(machine()))
    assert described["torch"] == torch.__version__.split("+")[0]
    assert described["threads"] == torch.get_num_threads() and described["cores"] >= 1 and described["cpu"]


def test_the_command_prints_tables_and_writes_the_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "speed.json"
    predictor = small()
    weights = tmp_path / "m.safetensors"
    model = build_model(predictor.config, num_classes=len(predictor.class_names))
    checkpoint.save(weights, model, predictor.config, predictor.class_names, predictor.category_ids)
    arguments = ["benchmark", str(weights), "--device", "cpu", "--size", "48", "64", "--objects", "5"]
    assert main([*arguments, "--rounds", "1", "--batch_sizes", "1", "2", "--output", str(output)]) == 0
    numbers = json.loads(output.read_text())
    assert numbers["source"] == str(weights)
    assert numbers["input"]["objects"] == 5 and numbers["input"]["candidates"] is None
    assert set(numbers["throughput"]) == {"1", "2"}
    printed = capsys.readouterr().out
    assert all(word in printed for word in (*UNCOMPILED, "after the network", "images/s", "GMAC/s", "torch"))
    assert printed.splitlines()[-1] == f"numbers: {output}"


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["nowhere.safetensors"], "found nothing at nowhere.safetensors"),
        (["--preset", "nope"], "unknown preset 'nope'"),
        (["nuclei", "--preset", "rdsnet_tiny"], "expected weights or a preset, got both"),
        (["--preset", "rdsnet_tiny", "--image", "nowhere.jpg"], "nowhere.jpg: file not found"),
        (["--image", __file__, "--size", "3", "4"], "expected --image or --size"),
        (["--preset", "rdsnet_tiny", "--objects", "0"], "expected objects of at least 1, got 0"),
        (["--preset", "rdsnet_tiny", "--classes", "0"], "expected at least 1 class, got 0"),
        (["--preset", "rdsnet_tiny", "--rounds", "0"], "expected rounds of at least 1, got 0"),
        (["--preset", "rdsnet_tiny", "--batch_sizes", "2", "0"], "expected batch_sizes of at least 1, got 0"),
        (["--preset", "rdsnet_tiny", "--threads", "0"], "expected at least 1 thread, got 0"),
        (["--preset", "rdsnet_tiny", "--output", "."], "but . is a folder"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "--device", "cpu", *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("rdsnet: error: ") and answer in line
