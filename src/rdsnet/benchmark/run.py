"""How fast a model is on this machine, stage by stage, and how much of what the machine can do that is.

What is timed is `Predictor.predict` as users call it; probes around the parts of the model say where the time goes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Group
from rich.table import Table
from rich.text import Text

from rdsnet.benchmark.probes import (
    AFTER_NETWORK,
    DENSE,
    NETWORK,
    STAGES,
    VERSIONS,
    Convolution,
    MemoryWatch,
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
from rdsnet.data.records import read_image
from rdsnet.data.transforms import eval_size, padded_size, padding_multiple
from rdsnet.predict.predictor import Predictor

PHOTO_SIZE = (480, 640)  # height and width of the image that is made

OBJECTS = 100

CANDIDATES = 2864
"""pairs of anchor and class above the score threshold: what the authors' release has with random weights"""


def benchmark(
    predictor: Predictor,
    image: str | Path | None = None,
    *,
    size: tuple[int, int] = PHOTO_SIZE,
    objects: int | None = OBJECTS,
    candidates: int | None = None,
    batch_sizes: Sequence[int] = (1, 2, 4),
    rounds: int = 7,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure a model on one image. Times are medians over rounds, each of which takes everything in turn.

    Args:
        predictor: from `rdsnet.load` or `untrained`.
        image: a file; None: one is made.
        size: (H, W) of the image that is made, in pixels. The network's input follows from the model's settings.
        objects: so many boxes (see `draw_boxes`) take the place of what NMS leaves, and masks, refinement and
            run-length codes are made for them; None: for what the model finds. Masks of untrained weights are ragged,
            which their run-length codes pay for.
        candidates: the score threshold is set so that so many pairs of anchor and class lie above it, which gives NMS
            its work where weights are untrained; None: it stays as it is.
        batch_sizes: whose throughput is measured.
        rounds: of timing, after one to warm up.
        seed: of the made image and of the boxes.

    Returns:
        Ready for JSON:

        model           device, dtype of the network, compiled, classes
        input           image, size (H, W), network_size (H, W), objects, mean_box_area (pixels of the image), forced
                        (whether they were drawn), candidates, rounds
        stages          by name (`probes.STAGES`; those that the model has): ms, share of their sum, memory (bytes at
                        the peak, over what was in use before the prediction); of the network's also macs, and
                        of_convolution, their rate over that of the convolution
        network         the same of the dense part as a whole, without memory, and its macs_per_second; convolution:
                        channels, size, dtype and macs_per_second of a 3x3 convolution of the pyramid's channels at
                        the size of its finest level
        after_network   ms, share, memory: the most that the stages after the network have in use, over what was when
                        the network ended
        sum_ms, complete_ms, complete_rounds_ms   all stages; the whole without probes, and in each round
        throughput      images a second from files to detections, by batch size
        memory          bytes: model, its parameters and buffers; peak, of a prediction over what was in use before
        machine         see `machine`

        Memory that cannot be measured on this system is None.

    Raises:
        FileNotFoundError, ValueError: no such image; a number below 1.
    """
    _check(
        size=min(size), objects=objects, candidates=candidates, batch_sizes=min(batch_sizes, default=1), rounds=rounds
    )
    stream, data = predictor.model.object_stream, predictor.config.data
    threshold = stream.score_threshold
    predictor = copy(predictor)  # whose boxes are found by its own means
    try:
        with nullcontext(Path(image)) if image is not None else _made_image(size, seed) as file:
            pixels = read_image(file)
            photo_size = pixels.shape[0], pixels.shape[1]
            network_size = padded_size(eval_size(*photo_size, data), padding_multiple(data))
            if candidates is not None:
                steer_candidates(predictor, file, candidates)
            if objects is not None:
                predictor.find = forced_objects(stream, draw_boxes(objects, photo_size, seed), seed)
            boxes = predictor.detect([pixels])[0].regressed_boxes
            measured = _measure(predictor, file, network_size, batch_sizes, rounds)
    finally:
        stream.score_threshold = threshold
    facts = {
        "image": "made" if image is None else str(image),
        "size": list(photo_size),
        "network_size": list(network_size),
        "objects": len(boxes),
        "mean_box_area": float((boxes[:, 2:] - boxes[:, :2]).prod(dim=1).mean()) if len(boxes) else None,
        "forced": objects is not None,
        "candidates": candidates,
        "rounds": rounds,
    }
    model = {
        "device": str(predictor.device),
        "dtype": str(_dtype(predictor)).removeprefix("torch."),
        "compiled": predictor.compiled,
        "classes": len(predictor.class_names),
    }
    return {"model": model, "input": facts, **measured, "machine": machine()}


def _check(**numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"expected {name} of at least 1, got {value}")


@contextmanager
def _made_image(size: tuple[int, int], seed: int) -> Iterator[Path]:
    """A JPEG of soft colours and a little noise, for as long as it is needed."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    soft = np.asarray(coarse.resize((size[1], size[0]), Image.Resampling.BICUBIC), dtype=np.float32)
    pixels = (soft + rng.normal(0, 6, soft.shape)).clip(0, 255).astype(np.uint8)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "photo.jpg"
        Image.fromarray(pixels).save(file, quality=90)
        yield file


def _measure(
    predictor: Predictor, file: Path, network_size: tuple[int, int], batch_sizes: Sequence[int], rounds: int
) -> dict[str, Any]:
    """What `benchmark` returns, but for the facts that it knows itself."""
    convolution = _convolution(predictor, network_size)
    watches: list[Stopwatch] = []

    def staged() -> None:
        watches.append(Stopwatch())
        watch(predictor, file, watches[-1])

    functions: dict[str, Callable[[], object]] = {
        "complete": partial(predictor.predict, file),
        "stages": staged,
        "convolution": convolution,
    }
    for count in batch_sizes:
        functions[f"batch {count}"] = partial(predictor.predict, [file] * count, batch_size=count)
    seconds = alternate(functions, rounds)
    macs = _stage_macs(predictor, file)
    rate = convolution.macs / median(seconds["convolution"])
    stages = _stages([own.seconds for own in watches[-rounds:]], macs, rate)
    memory, after_network = _add_memory(predictor, file, stages)
    total = sum(stage["ms"] for stage in stages.values())
    network = {key: sum(stages[stage][key] for stage in macs) for key in ("ms", "share", "macs")}
    macs_per_second = 1000 * network["macs"] / network["ms"]
    return {
        "stages": stages,
        "network": {
            **network,
            "macs_per_second": macs_per_second,
            "of_convolution": macs_per_second / rate,
            "convolution": {**convolution.facts, "macs_per_second": rate},
        },
        "after_network": {
            **{key: sum(stages[stage][key] for stage in AFTER_NETWORK if stage in stages) for key in ("ms", "share")},
            "memory": after_network,
        },
        "sum_ms": total,
        "complete_ms": 1000 * median(seconds["complete"]),
        "complete_rounds_ms": [1000 * value for value in seconds["complete"]],
        "throughput": {str(count): count / median(seconds[f"batch {count}"]) for count in batch_sizes},
        "memory": memory,
    }


def _convolution(predictor: Predictor, network_size: tuple[int, int]) -> Convolution:
    """A layer of the pyramid's channels at the size of its finest level."""
    model = predictor.config.model
    stride = 2 ** min(model.levels)
    size = (math.ceil(network_size[0] / stride), math.ceil(network_size[1] / stride))
    return Convolution(model.channels, size, device=predictor.device, dtype=_dtype(predictor))


def _dtype(predictor: Predictor) -> torch.dtype:
    """Of the network."""
    return next(predictor.model.backbone.parameters()).dtype


def _stages(rounds: Sequence[Mapping[str, float]], macs: Mapping[str, int], rate: float) -> dict[str, dict[str, Any]]:
    """Medians of the stages' seconds, and what follows from them."""
    seconds = {stage: median([own[stage] for own in rounds]) for stage in STAGES if stage in rounds[0]}
    return {
        stage: {
            "ms": 1000 * own,
            "share": own / sum(seconds.values()),
            "macs": macs.get(stage),
            "of_convolution": macs[stage] / own / rate if stage in macs else None,
        }
        for stage, own in seconds.items()
    }


def _stage_macs(predictor: Predictor, file: Path) -> dict[str, int]:
    """Multiply-accumulates of the network's stages for one image."""
    with torch.compiler.set_stance("force_eager"):  # what is compiled is not seen by the counter
        counts = count_macs(partial(predictor.predict, file))
    if predictor.compiled:
        return {NETWORK: counts["RDSNet"]}
    names = ("backbone.trunk", "backbone.fpn", "object_stream", "pixel_stream")
    own = {stage: counts.get(f"RDSNet.{name}") for stage, name in zip(DENSE, names, strict=True)}
    return {stage: count for stage, count in own.items() if count is not None}


def _add_memory(
    predictor: Predictor, file: Path, stages: Mapping[str, dict[str, Any]]
) -> tuple[dict[str, int | None], int | None]:
    """Each stage's peak goes to the stages; returns that of the whole, and what is needed after the network."""
    weights = [*predictor.model.parameters(), *predictor.model.buffers()]
    memory: dict[str, int | None] = {"model": sum(t.nbytes for t in weights), "peak": None}
    gauge = memory_gauge(predictor.device)
    if gauge is None:
        return memory, None
    marks = MemoryWatch(gauge)
    watch(predictor, file, marks)
    before = marks.levels["load"]
    for stage, entry in stages.items():
        entry["memory"] = marks.peaks[stage] - before
    memory["peak"] = max(marks.peaks.values()) - before
    return memory, max(marks.peaks[stage] for stage in AFTER_NETWORK if stage in stages) - marks.levels["NMS"]


MIB = 2**20


def speed_table(result: dict[str, Any]) -> Group:
    """What `rdsnet.benchmark.benchmark` measured, as tables and lines for `rich`; with its "source", if it has one."""
    return Group(_stage_table(result), _throughput_table(result), *(Text(line) for line in _lines(result)))


def _stage_table(result: dict[str, Any]) -> Table:
    facts, network, after = result["input"], result["network"], result["after_network"]
    area = "" if facts["mean_box_area"] is None else f" of {facts['mean_box_area']:.0f} pixels on average"
    model = f"{result.get('source', 'model')}, {result['model']['dtype']}"
    model += ", compiled" if result["model"]["compiled"] else ""
    title = (
        f"{model}; image {_size(facts['size'])}, network {_size(facts['network_size'])}, {facts['objects']} boxes "
        f"{'drawn' if facts['forced'] else 'found'}{area}; medians of {facts['rounds']} rounds"
    )
    table = Table("stage", title=title)
    for heading in ("ms", "share", "GMAC", "of convolution", "MiB"):
        table.add_column(heading, justify="right")
    for name, stage in result["stages"].items():
        table.add_row(name, *_cells(stage))
    table.add_section()
    table.add_row("network, in all", *_cells(network))
    table.add_row("after the network", *_cells({**after, "memory": None}))  # over another level than the others
    table.add_row("sum", *_cells({"ms": result["sum_ms"], "memory": result["memory"]["peak"]}))
    table.add_row("complete, without probes", *_cells({"ms": result["complete_ms"]}))
    return table


def _cells(numbers: dict[str, Any]) -> list[str]:
    """One cell a column; empty for what there is no number of."""
    forms = {"ms": "{:.2f}", "share": "{:.1%}", "macs": "{:.2f}", "of_convolution": "{:.0%}", "memory": "{:.0f}"}
    units = {"macs": 1e9, "memory": MIB}
    return [
        "" if numbers.get(name) is None else form.format(numbers[name] / units.get(name, 1))
        for name, form in forms.items()
    ]


def _throughput_table(result: dict[str, Any]) -> Table:
    table = Table("batch size", *result["throughput"], title="throughput")
    table.add_row("images/s", *(f"{rate:.3g}" for rate in result["throughput"].values()))
    return table


def _lines(result: dict[str, Any]) -> list[str]:
    convolution, memory, machine = result["network"]["convolution"], result["memory"], result["machine"]
    model = f"memory: the model {memory['model'] / MIB:.0f} MiB"
    if memory["peak"] is not None:
        model += (
            f"; a prediction {memory['peak'] / MIB:.0f} MiB more at its peak; after the network, "
            f"{result['after_network']['memory'] / MIB:.0f} MiB over what was in use when that ended"
        )
    versions = ", ".join(f"{name} {machine[name]}" for name in VERSIONS)
    processors = f"{machine['cpu']}, cores: {machine['cores']}, threads: {machine['threads']}"
    return [
        f"convolution: 3x3, {convolution['channels']} channels, {_size(convolution['size'])} cells, "
        f"{convolution['dtype']}: {convolution['macs_per_second'] / 1e9:.1f} GMAC/s",
        model,
        f"machine: {processors if machine['gpu'] is None else machine['gpu'] + '; ' + processors}; {machine['system']}",
        f"versions: Python {machine['python']}, {versions}",
    ]


def _size(size: list[int]) -> str:
    return f"{size[0]}x{size[1]}"
