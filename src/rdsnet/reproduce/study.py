"""Trains what a comparison needs and evaluates it; what is finished already is read from its files.

DIR/data/...                            the synthetic images, if they are the data
DIR/runs/PRESET-CHANGES-KEY-seedK/      a training; comparisons in the same DIR share it
    evaluation-KEY.json                 one for each setting of inference
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from rdsnet.benchmark.probes import alternate
from rdsnet.config import Config, flat_settings, get_config
from rdsnet.data.coco import CocoFolder
from rdsnet.data.loading import eval_batches
from rdsnet.data.shapes import make_shapes
from rdsnet.device import Device, choose_device
from rdsnet.files import write_text
from rdsnet.predict.predictor import Predictor
from rdsnet.presets import Changes, together
from rdsnet.reproduce.plan import AP, BUDGETS, FAMILIES, SPEED, Comparison, Row
from rdsnet.train.run import train
from rdsnet.weights import checkpoint

logger = logging.getLogger(__name__)

Numbers = dict[str, float | None]
"""by column; AP in percent, None where the data has no object of that size"""

# Where data lies, and how it is loaded: the same training all the same
_ELSEWHERE = {"data.train", "data.val", "data.train_images", "data.val_images", "data.workers"}


@dataclass(frozen=True)
class DataSet:
    """A data set.

    title    for readers
    key      tells it from others
    changes  its settings
    family   the presets that suit it
    """

    title: str
    key: str
    changes: Changes
    family: str


@dataclass(frozen=True)
class Study:
    """Everything that comparisons in one folder have in common.

    folder    where everything is written
    data      what is trained and evaluated on
    budget    a key of `BUDGETS`
    family    a key of `FAMILIES`
    settings  changes over every preset
    """

    folder: Path
    data: DataSet
    budget: str
    family: str
    settings: Changes
    seeds: tuple[int, ...]
    device: Device

    def config(self, row: Row, seed: int) -> Config:
        """The settings of a row: preset, data and budget, the user's settings, the row's changes; later ones win."""
        changes = together({"train": BUDGETS[self.budget].train}, self.data.changes, self.settings, row.changes)
        config = get_config(FAMILIES[self.family][row.preset], changes)
        config.seed = seed
        return config

    def training_config(self, row: Row, seed: int) -> Config:
        """What a row's training depends on: everything but its changes of inference.

        There is no validation: the last weights count, none is chosen by the images that are evaluated.
        """
        changes = {section: values for section, values in row.changes.items() if section != "detect"}
        config = self.config(replace(row, changes=changes), seed)
        config.data.val = config.data.val_images = None
        return config

    def run_folder(self, row: Row, seed: int) -> Path:
        """Of the row's training; rows that train alike have the same."""
        config = self.training_config(row, seed)
        plain = self.training_config(replace(row, changes={}), seed)
        own = [f"{name.split('.')[1]}={value}" for name, value in _differences(config, plain).items()]
        # Only what is not a default counts, so that a new setting leaves what is there already alone
        key = _digest({"data": self.data.key, **_differences(config, Config())})
        name = "-".join([FAMILIES[self.family][row.preset], *own, key, f"seed{seed}"])
        return self.folder / "runs" / name

    def train(self, row: Row, seed: int) -> Path:
        """The finished run folder of a row's training."""
        folder = self.run_folder(row, seed)
        if (folder / "metrics.json").exists():
            return folder
        logger.info("training %s", folder.name)
        started = (folder / "last.ckpt").exists()
        if folder.exists() and not started:  # stopped before its first checkpoint
            shutil.rmtree(folder)
        try:
            train(self.training_config(row, seed), folder, resume=started, device=self.device)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; the same command goes on from here") from None
        return folder

    def predictor(self, row: Row, seed: int) -> Predictor:
        """The trained model of a row, with the row's settings of inference, on the device."""
        model, stored = checkpoint.load(self.train(row, seed), self.config(row, seed))
        return Predictor(model.to(choose_device(self.device)), stored)

    def evaluate(self, row: Row, seed: int) -> dict[str, Any]:
        """The metrics of a row (`CocoEvaluator.summarize`) on the validation images."""
        config = self.config(row, seed)
        settings = {name: value for name, value in _differences(config, Config()).items() if name.startswith("detect.")}
        path = self.train(row, seed) / f"evaluation-{_digest(settings)}.json"

        def measure() -> dict[str, Any]:
            evaluator = self.predictor(row, seed).evaluate(self.val(), batch_size=config.train.batch_size)
            return {"detect": settings, **evaluator.summarize(boundary=False)}

        return stored(path, measure)

    def train_images(self) -> CocoFolder:
        data = self.data.changes["data"]
        return CocoFolder(data["train"], data.get("train_images"))

    def val(self) -> CocoFolder:
        data = self.data.changes["data"]
        return CocoFolder(data["val"], data.get("val_images"))


def find_data(data: str, folder: Path, budget: str) -> DataSet:
    """The data set of `--data`: "shapes", which is made here, or a folder with COCO JSONs.

    Raises:
        FileNotFoundError: no such folder, or not the files that it should hold.
    """
    if data == "shapes":
        made = BUDGETS[budget]
        place = folder / "data" / f"shapes-{budget}"
        if not (place / "val.json").exists():  # written last
            logger.info("making %d images: %s", made.images + made.val_images, place)
            make_shapes(
                place, images=made.images, val_images=made.val_images, size=made.size, style="cluttered", seed=0
            )
        title = f"cluttered shapes ({made.images} + {made.val_images} images of {made.size} px)"
        sizes = {"short_side": made.short_side, "long_side": 2 * made.short_side}
        return DataSet(title, title, {"data": {**_files(place, "{}.json"), **sizes}}, "tiny")
    place = Path(data)
    key = str(place.resolve())
    coco = _files(place, "annotations/instances_{}2017.json")
    if all(Path(file).is_file() for file in coco.values()):
        images = {f"{split}_images": folder for split, folder in _files(place, "{}2017").items()}
        return DataSet("COCO", key, {"data": {**coco, **images}}, "full")
    files = _files(place, "{}.json")
    if missing := [file for file in files.values() if not Path(file).is_file()]:
        raise FileNotFoundError(
            "expected --data shapes, or a folder with train.json and val.json, or with COCO's annotations/; "
            f"missing: {', '.join(missing)}"
        )
    return DataSet(place.resolve().name, key, {"data": files}, "tiny")


def _files(folder: Path, pattern: str) -> dict[str, str]:
    return {split: str(folder / pattern.format(split)) for split in ("train", "val")}


def measure_rows(study: Study, comparison: Comparison) -> dict[str, list[Numbers]]:
    """The numbers of a comparison's rows, one entry a seed."""
    measured: dict[str, list[Numbers]] = {row.name: [] for row in comparison.rows}
    for seed in study.seeds:
        for row in comparison.rows:
            measured[row.name].append(_numbers(study.evaluate(row, seed), row))
        if SPEED in comparison.columns:
            for name, speed in measure_speed(study, comparison, seed).items():
                measured[name][-1][SPEED] = speed
    return measured


def _numbers(metrics: Mapping[str, Any], row: Row) -> Numbers:
    values = metrics["mask"] if row.metric == "mask" else metrics["box"].get(row.metric, metrics["box"]["regressed"])
    return percent(values)


def percent(values: Mapping[str, float | None]) -> Numbers:
    return {name: None if (value := values[name]) is None else 100 * value for name in AP}


def measure_speed(study: Study, comparison: Comparison, seed: int) -> dict[str, float]:
    """Images a second of each row, one image at a time, from the resized image to boxes and masks in its pixels.

    The rows take turns, so that a disturbance of the machine meets all of them; the median of their turns counts.
    """
    compared = _digest([(row.name, study.run_folder(row, seed).name) for row in comparison.rows])
    path = study.folder / "runs" / f"speed-{compared}-seed{seed}.json"

    def measure() -> dict[str, float]:
        budget, val = BUDGETS[study.budget], study.val()
        folder = val.subset(val.images[: budget.speed_images])
        detectors = {row.name: _detector(study, row, seed, folder) for row in comparison.rows}
        seconds = alternate(detectors, budget.speed_rounds)
        return {name: len(folder) / median(values) for name, values in seconds.items()}

    return stored(path, measure)


def _detector(study: Study, row: Row, seed: int, folder: CocoFolder) -> Callable[[], None]:
    predictor = study.predictor(row, seed)
    inputs = list(eval_batches(folder, predictor.config.data, 1, 0))

    def detect_all() -> None:
        for images, sizes, records in inputs:
            predictor.detect_batch(images, sizes, [record.size for record in records])

    return detect_all


def stored(path: Path, measure: Callable[[], Any]) -> Any:
    """What the JSON file holds; measured and written if it is not there."""
    if not path.exists():
        write_text(path, json.dumps(measure(), indent=1))
    return json.loads(path.read_text(encoding="utf-8"))


def _differences(config: Config, other: Config) -> dict[str, Any]:
    """Settings that differ and that a training depends on or a user named, by dotted name; the seed is not one."""
    before, after = flat_settings(other), flat_settings(config)
    return {n: v for n, v in after.items() if v != before[n] and n not in _ELSEWHERE and n != "seed"}


def _digest(content: object) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
