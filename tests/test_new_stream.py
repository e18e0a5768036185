"""An object stream from outside of the package: a class, a section of settings, and one entry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rdsnet
from rdsnet.config import SETTINGS, changed
from rdsnet.config import STREAMS as SECTIONS
from rdsnet.model.build import STREAMS, register_stream
from rdsnet.model.object_stream.dense import Common, DenseStream, Lesson, Raw
from rdsnet.model.object_stream.learning import BACKGROUND, flatten_levels
from rdsnet.settings import Range
from rdsnet.structures import Targets
from rdsnet.train import train
from tiny_run import make_data, tiny_config


@dataclass
class SquaresConfig:
    """One square a cell."""

    side: Annotated[float, Range(1)] = 3.0
    """of a square, in strides"""


class Squares(DenseStream):
    """Every cell has a square around its centre, which is the box; the cell at an object's centre learns its class."""

    def __init__(self, common: Common, *, side: float) -> None:
        super().__init__(common, anchors_per_location=1)
        self.side = side
        self.classify = nn.Conv2d(common.channels, common.num_classes, 1)

    def forward(self, levels: Sequence[Tensor], size: tuple[int, int]) -> Raw:
        logits = [self.classify(level) for level in levels]
        return Raw(size=size, logits=logits, deltas=[], features=list(levels))

    def assign(self, raw: Raw, targets: Targets) -> Tensor:
        (_, width), stride = raw.map_sizes[0], self.strides[0]
        assigned = torch.full((sum(h * w for h, w in raw.map_sizes),), BACKGROUND)
        x, y = ((targets.boxes[:, :2] + targets.boxes[:, 2:]) / 2 // stride).long().unbind(1)
        assigned[y * width + x] = torch.arange(len(targets))
        return assigned

    def terms(self, raw: Raw, lesson: Lesson) -> dict[str, Tensor]:
        logits = flatten_levels(raw.logits, self.num_classes)
        wanted = torch.zeros_like(logits)
        wanted[(*lesson.places, lesson.labels)] = 1
        return {"cls": nn.functional.binary_cross_entropy_with_logits(logits, wanted)}

    def candidates(self, raw: Raw, image: int, level: int) -> tuple[Tensor, Tensor]:
        scores = raw.logits[level][image].float().flatten(1).sigmoid().t()
        return torch.arange(len(scores)), scores

    def decode(self, raw: Raw, image: int, level: int, index: Tensor) -> Tensor:
        width, stride = raw.map_sizes[level][1], self.strides[level]
        centre = (torch.stack([index % width, index // width], dim=1) + 0.5) * stride
        half = self.side * stride / 2
        return torch.cat([centre - half, centre + half], dim=1)


@pytest.fixture
def squares(monkeypatch: pytest.MonkeyPatch) -> None:
    for table, name in ((SECTIONS, "squares"), (STREAMS, "squares"), (SETTINGS, "squares.side")):
        monkeypatch.setitem(table, name, None)  # type: ignore[arg-type]  # taken out again at the end
    register_stream("squares", Squares, SquaresConfig)


def test_a_stream_from_outside_is_trained_stored_loaded_and_predicts(squares: None, tmp_path: Path) -> None:
    config = tiny_config(make_data(tmp_path / "data"), max_steps=1)
    config = changed(config, {"model": {"stream": "squares"}, "squares": {"side": 4}})
    before = rdsnet.build_model(config, num_classes=3).object_stream.classify.weight
    run = train(config, tmp_path / "run", device="cpu")
    predictor = rdsnet.load(run, device="cpu")
    assert predictor.config.squares.side == 4.0
    assert isinstance(predictor.model.object_stream, Squares)
    assert not torch.equal(predictor.model.object_stream.classify.weight, before)
    found = predictor.predict(np.zeros((64, 64, 3), np.uint8), threshold=0)
    assert len(found) == 5  # as many as are allowed


def test_its_settings_are_checked_like_all_others(squares: None) -> None:
    with pytest.raises(ValueError, match=r"^squares\.side is 0, expected a number, 1 or more$"):
        rdsnet.get_config("rdsnet_tiny", {"model": {"stream": "squares"}, "squares": {"side": 0}})
