"""Validation within a training: metrics for the log, pictures, and the best weights so far."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from rdsnet.config import Config
from rdsnet.data.coco import CocoFolder
from rdsnet.data.records import ImageRecord
from rdsnet.files import write_image
from rdsnet.model.rdsnet import RDSNet
from rdsnet.predict.predictor import Predictor
from rdsnet.structures import Objects
from rdsnet.train.stop import StopRequest
from rdsnet.visualize.errors import comparison
from rdsnet.weights import checkpoint

PICTURES = 4  # validation images drawn into predictions/


@dataclass
class Validation:
    """Evaluates a model on the validation images, and keeps its weights where they are the best so far.

    output  the run folder
    train   training images, which name the classes
    val     validation images, or None
    stop    asks for an early end
    best    the highest score so far, mask AP or else box AP
    """

    output: Path
    config: Config
    train: CocoFolder
    val: CocoFolder | None
    stop: StopRequest
    best: float = -math.inf

    def run(self, model: RDSNet, trainer: Trainer) -> dict[str, float]:
        """The metrics by name; on all processes, each with its share of the images. The first one has the result.

        Raises:
            KeyboardInterrupt: a stop was asked for.
        """
        if self.val is None:
            return {}
        # Of several processes none may leave before they have exchanged their results
        stop = self.stop if trainer.world_size == 1 else None
        pictures = Pictures(self.output / "predictions", self.train.class_names, stop)
        evaluator = Predictor(model, self._stored).evaluate(
            self.val,
            batch_size=self.config.train.batch_size,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            each=pictures if trainer.is_global_zero else None,
        )
        model.train()
        if not trainer.is_global_zero:
            return {}
        metrics = self._metrics(evaluator.summarize(boundary=False))
        score = metrics.get("val/mask_AP", metrics.get("val/box_AP", 0.0))
        if score > self.best:
            self.best = score
            self.save_weights(model)
        return metrics

    def _metrics(self, summary: dict[str, Any]) -> dict[str, float]:
        box, mask = summary["box"], summary.get("mask")
        metrics = {
            "val/box_AP": box.get("refined", box["regressed"])["AP"],
            "val/box_AP_regressed": box["regressed"]["AP"],
        }
        if self.config.model.masks and mask is not None:
            metrics["val/mask_AP"] = mask["AP"]
        return {name: value for name, value in metrics.items() if value is not None}

    def save_weights(self, model: RDSNet) -> None:
        stored = self._stored
        checkpoint.save(self.output / checkpoint.BEST, model, stored.config, stored.class_names, stored.category_ids)

    @property
    def _stored(self) -> checkpoint.Checkpoint:
        return checkpoint.Checkpoint(self.config, self.train.class_names, self.train.category_ids)


@dataclass
class Pictures:
    """Draws the first images of an evaluation, truth and prediction side by side, into a folder.

    When `stop` was asked for, the next image raises KeyboardInterrupt.
    """

    folder: Path
    class_names: list[str]
    stop: StopRequest | None = None
    left: int = PICTURES

    def __call__(self, record: ImageRecord, objects: Objects) -> None:
        if self.stop is not None and self.stop.asked:
            raise KeyboardInterrupt
        if self.left > 0:
            self.left -= 1
            self.folder.mkdir(exist_ok=True)
            picture = comparison(record.read(), objects, record, self.class_names)
            write_image(self.folder / f"{record.path.stem}.jpg", picture)
