"""Watching and steering a real prediction from outside, so that exactly what users run is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from rdsnet import predict
from rdsnet.benchmark.measure import Gauge, synchronise
from rdsnet.model.object_stream import Found, Raw
from rdsnet.predict import ImageSource, Predictor

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


@contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """Another attribute for a while: of a module of Python or of a network, or of any instance, frozen ones too."""
    own = vars(owner)
    before = own.get(name)
    present = name in own
    own[name] = value
    try:
        yield
    finally:
        if present:
            own[name] = before
        else:
            del own[name]


@contextmanager
def probed(predictor: Predictor, mark: Callable[[str], None]) -> Iterator[None]:
    """While it lasts, `mark` is called with the name of each stage that `predictor.predict` enters.

    A stage lasts until the next begins, so that the stages add up to the whole. A compiled network is one stage: it
    does not call its parts one by one.
    """
    model = predictor.model
    # owner, function, the stage that it is, and the stage that what follows it belongs to
    calls: list[tuple[object, str, str, str]] = [
        (predict, "as_array", "load", "resize"),
        (model, "normalise", "resize", NETWORK if predictor.compiled else DENSE[0]),
        (model.object_stream, "detect", "NMS", "results" if model.pixel_stream is None else "masks"),
        (model.masks, "paste", "masks", "results"),
        (model.mbrm, "forward", "MBRM", "results"),
        (predict, "to_detections", "RLE", "RLE"),
    ]
    if not predictor.compiled:
        parts = (model.backbone.trunk, model.backbone.fpn, model.object_stream, model.pixel_stream)
        calls += [(part, "forward", own, own) for part, own in zip(parts, DENSE, strict=True) if part is not None]
    with ExitStack() as stack:
        for owner, name, stage, following in calls:
            stack.enter_context(replaced(owner, name, _marked(getattr(owner, name), mark, stage, following)))
        yield


def _marked(
    function: Callable[..., Any], mark: Callable[[str], None], stage: str, following: str
) -> Callable[..., Any]:
    @wraps(function)
    def marked(*arguments: Any, **named: Any) -> Any:
        mark(stage)
        result = function(*arguments, **named)
        if following != stage:
            mark(following)
        return result

    return marked


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
    """One prediction from its first stage to its end."""
    with probed(predictor, mark):
        mark("load")
        predictor.predict(image)
        mark("end")


@contextmanager
def forced_objects(predictor: Predictor, boxes: Tensor, seed: int = 0) -> Iterator[None]:
    """While it lasts, these are the boxes found in every image, whatever the network says.

    Candidates and NMS do their work, then their result is replaced. Labels and the anchors that give the
    representations are drawn; scores are 0.9 and more, so that all pass the threshold.

    Args:
        boxes: (N, 4) xyxy in pixels of the images, all of one size.
    """
    stream = predictor.model.object_stream
    detect = stream.detect
    generator = torch.Generator().manual_seed(seed)
    count = len(boxes)
    own = Found(
        boxes=boxes,
        scores=torch.linspace(1.0, 0.9, count),
        labels=torch.randint(stream.num_classes, (count,), generator=generator),
        anchors=torch.zeros(count, dtype=torch.int64),
    )
    place = torch.rand(count, generator=generator, dtype=torch.float64)
    anchors: dict[int, Tensor] = {}  # by the number of all anchors, which the size of the input decides

    def replacement(raw: Raw, *arguments: Any, **named: Any) -> Found:
        detect(raw, *arguments, **named)
        total = stream.anchors_per_location * sum(h * w for h, w in raw.map_sizes)
        if total not in anchors:
            anchors[total] = (place * total).long()
        return own._replace(anchors=anchors[total])

    with replaced(stream, "detect", replacement):
        yield


@contextmanager
def steered_candidates(predictor: Predictor, image: ImageSource, count: int) -> Iterator[None]:
    """While it lasts, the score threshold is such that in this image `count` pairs of anchor and class lie above it.

    Where the image has fewer, all do. Weights that were never trained give NMS its work so.
    """
    stream = predictor.model.object_stream
    detect = stream.detect

    def steering(raw: Raw, *arguments: Any, **named: Any) -> Found:
        scores = torch.cat([stream.candidates(raw, 0, level)[1].flatten() for level in range(len(raw.map_sizes))])
        if len(scores) > count:
            stream.score_threshold = float(scores.topk(count + 1).values[-1])
        return detect(raw, *arguments, **named)

    with replaced(stream, "score_threshold", 0.0):
        with replaced(stream, "detect", steering):
            predictor.predict(image)
        yield
