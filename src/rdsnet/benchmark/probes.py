"""Watching and steering a real prediction from outside, so that exactly what users run is measured."""

from __future__ import annotations

import ctypes
import math
import os
import platform
from collections.abc import Callable, Mapping
from copy import copy
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rdsnet.model.object_stream.dense import DenseStream, Raw
from rdsnet.model.object_stream.suppression import Found
from rdsnet.model.rdsnet import Find
from rdsnet.predict.predictor import Predictor
from rdsnet.predict.sources import ImageSource
from rdsnet.terminal import progress_bar

DENSE = ("trunk", "pyramid", "object stream", "pixel stream")

NETWORK = "network"

STAGES = ("load", "resize", *DENSE, NETWORK, "NMS", "masks", "MBRM", "results", "RLE")
"""In the order of a prediction; the network is either four stages or, compiled, one.

load     the file is decoded
resize   scaled, padded, brought to the device, normalised
NMS      candidates, boxes, suppression
masks    object representations, crops at full size, thresholds, profiles
MBRM     refined boxes
results  objects put together, brought to the CPU, and those above the threshold picked
RLE      `sv.Detections` with run-length coded masks
"""

AFTER_NETWORK = ("NMS", "masks", "MBRM", "results", "RLE")

SMALLEST_SIDE = 16.0  # pixels, of a drawn box

VERSIONS = ("rdsnet", "torch", "torchvision", "timm", "supervision", "numpy")


class Stopwatch:
    """Marks of stages as seconds; on a GPU, work that was queued counts for the stage that queued it.

    Attributes:
        seconds: of each stage, added up.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stage, self._since = "", 0.0

    def __call__(self, stage: str) -> None:
        synchronise()
        now = perf_counter()
        if self._stage:
            self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._since
        self._stage, self._since = stage, now


class MemoryWatch:
    """Marks of stages as bytes.

    Attributes:
        peaks: the most in use in each stage.
        levels: what was in use when each first began.
    """

    def __init__(self, gauge: Gauge) -> None:
        self.gauge = gauge
        self.peaks: dict[str, int] = {}
        self.levels: dict[str, int] = {}
        self._stage = ""

    def __call__(self, stage: str) -> None:
        if self._stage:
            self.peaks[self._stage] = max(self.gauge.peak(), self.peaks.get(self._stage, 0))
        self.gauge.restart()
        self.levels.setdefault(stage, self.gauge.level())
        self._stage = stage


def watch(predictor: Predictor, image: ImageSource, mark: Callable[[str], None]) -> None:
    """One prediction, in which `mark` is called with the name of each stage that begins, and with "end".

    A stage lasts until the next begins, so that the stages add up to the whole. A compiled network is one stage: it
    does not call its parts one by one.
    """
    model = predictor.model
    begin: dict[str, nn.Module | None] = {"MBRM": model.mbrm}
    if not predictor.compiled:
        begin |= zip(DENSE[1:], (model.backbone.fpn, model.object_stream, model.pixel_stream), strict=True)
    hooks = [part.register_forward_pre_hook(_marking(mark, stage)) for stage, part in begin.items() if part is not None]
    hooks.append(model.mbrm.register_forward_hook(_marking(mark, "results")))
    first = NETWORK if predictor.compiled else DENSE[0]
    watched = copy(predictor)
    watched.mark = lambda stage: mark(first if stage == NETWORK else stage)
    try:
        watched.predict(image)
        mark("end")
    finally:
        for hook in hooks:
            hook.remove()


def _marking(mark: Callable[[str], None], stage: str) -> Callable[..., None]:
    """As a hook of a module."""
    return lambda *_: mark(stage)


def forced_objects(stream: DenseStream, boxes: Tensor, seed: int = 0) -> Find:
    """What finds these boxes in every image, whatever the network says: for `Predictor.find`.

    Candidates and NMS do their work, then their result is replaced. Labels and the anchors that give the
    representations are drawn; scores are 0.9 and more, so that all pass the threshold.

    Args:
        boxes: (N, 4) xyxy in pixels of the images, all of one size.
    """
    generator = torch.Generator().manual_seed(seed)
    count = len(boxes)
    scores = torch.linspace(1.0, 0.9, count)
    labels = torch.randint(stream.num_classes, (count,), generator=generator)
    place = torch.rand(count, generator=generator, dtype=torch.float64)

    def forced(raw: Raw, *where: Any) -> Found:
        stream.detect(raw, *where)
        total = stream.anchors_per_location * sum(h * w for h, w in raw.map_sizes)
        return Found(boxes, scores, labels, anchors=(place * total).long())

    return forced


def steer_candidates(predictor: Predictor, image: ImageSource, count: int) -> None:
    """Set the score threshold so that in this image `count` pairs of anchor and class lie above it.

    Where the image has fewer, all do. Weights that were never trained give NMS its work so.
    """
    stream = predictor.model.object_stream

    def steering(raw: Raw, *where: Any) -> Found:
        scores = torch.cat([stream.candidates(raw, 0, level)[1].flatten() for level in range(len(raw.map_sizes))])
        if len(scores) > count:
            stream.score_threshold = float(scores.topk(count + 1).values[-1])
        return stream.detect(raw, *where)

    stream.score_threshold = 0.0
    steered = copy(predictor)
    steered.find = steering
    steered.predict(image)


def synchronise() -> None:
    """Wait for the GPU, if this process uses one: until then a clock sees only that work was queued."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def alternate(functions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Time functions in turn, so that what the machine does beside them falls on all alike: compare their medians.

    Every function runs once before the first round, and its time then does not count.

    Args:
        functions: by name.
        rounds: how often each is timed.

    Returns:
        Seconds of each round, by name; the end of all work on the GPU is waited for.

    Raises:
        ValueError: fewer than one round.
    """
    if rounds < 1:
        raise ValueError(f"expected at least 1 round, got {rounds}")
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for count in progress_bar("measuring", range(rounds + 1), leave=False):
        for name, function in functions.items():
            synchronise()
            begin = perf_counter()
            function()
            synchronise()
            if count > 0:
                seconds[name].append(perf_counter() - begin)
    return seconds


def draw_boxes(count: int, image_size: tuple[int, int], seed: int = 0) -> Tensor:
    """Boxes of all sizes and shapes, anywhere in an image; the same for the same seed.

    Width and height are drawn independently, log-uniformly between 16 pixels and the image's own (of a smaller image,
    all have its own), the place uniformly.

    Args:
        count: N, at least 1.
        image_size: (H, W) in pixels.

    Returns:
        (N, 4) float32 xyxy inside the image.

    Raises:
        ValueError: fewer than one box.
    """
    if count < 1:
        raise ValueError(f"expected at least 1 object, got {count}")
    generator = torch.Generator().manual_seed(seed)
    sides = torch.tensor([image_size[1], image_size[0]], dtype=torch.float32)
    shrink = (SMALLEST_SIDE / sides).clamp(max=1) ** torch.rand(count, 2, generator=generator)
    size = sides * shrink
    corner = (sides - size) * torch.rand(count, 2, generator=generator)
    return torch.cat([corner, torch.minimum(corner + size, sides)], dim=1)


def count_macs(run: Callable[[], object]) -> dict[str, int]:
    """Multiply-accumulates of the convolutions and matrix products of a run.

    Returns:
        By the dotted name of each module that ran, which begins with the class of the outermost one; in all as "".
    """
    with FlopCounterMode(display=False) as counter:
        run()
    counts = {name: sum(operations.values()) // 2 for name, operations in counter.get_flop_counts().items()}
    counts[""] = counter.get_total_flops() // 2  # it counts a multiplication and an addition as two
    return counts


class Convolution:
    """The 3x3 convolution that the dense part is measured against: on one image, channels last, without a bias.

    Calling it runs it `repeats` times.

    Attributes:
        macs: multiply-accumulates of a call.
        facts: channels, size and dtype, ready for JSON.
    """

    def __init__(
        self, channels: int, size: tuple[int, int], *, device: torch.device, dtype: torch.dtype, repeats: int = 5
    ) -> None:
        self.repeats = repeats
        self.macs = repeats * 9 * channels**2 * math.prod(size)
        self.facts = {"channels": channels, "size": list(size), "dtype": str(dtype).removeprefix("torch.")}
        layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self._layer = layer.to(device, dtype).to(memory_format=torch.channels_last)
        self._maps = torch.randn(1, channels, *size, device=device, dtype=dtype).to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def __call__(self) -> None:
        for _ in range(self.repeats):
            self._layer(self._maps)


class GPUMemory:
    """Bytes of tensors on the GPU, in use and the most since `restart`; not what torch's allocator holds in reserve."""

    def restart(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

    def level(self) -> int:
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()


class ProcessMemory:
    """The process' resident bytes, as Linux counts them; what the C library keeps of freed memory is given back first.

    Raises:
        OSError: this system has no such count, or does not let its peak be restarted.
    """

    def __init__(self) -> None:
        self._give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        self.restart()

    def restart(self) -> None:
        if self._give_back is not None:
            self._give_back(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now: `man 5 proc`

    def level(self) -> int:
        return self._status("VmRSS")

    def peak(self) -> int:
        return self._status("VmHWM")

    def _status(self, name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


Gauge = GPUMemory | ProcessMemory


def memory_gauge(device: torch.device) -> Gauge | None:
    """A gauge of the device's memory; None where there is none: elsewhere than on Linux, for the CPU."""
    if device.type == "cuda":
        return GPUMemory()
    try:
        return ProcessMemory()
    except (OSError, TypeError):  # TypeError: Windows has no C library by the name of None
        return None


def machine() -> dict[str, Any]:
    """What numbers were measured on: processors, threads, system and versions; ready for JSON."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_name(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "large_pages": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",  # torch's; `rdsnet` asks for them
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in VERSIONS},
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
