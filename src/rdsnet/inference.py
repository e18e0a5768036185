"""Running a trained model over a data set: its objects, and how good they are."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from rdsnet.config import Config
from rdsnet.data import CocoFolder, ImageRecord, eval_batches, eval_scale
from rdsnet.distributed import gather_objects
from rdsnet.evaluation import CocoEvaluator
from rdsnet.model import RDSNet
from rdsnet.structures import Objects
from rdsnet.transfer import to_device


def progress_bar(what: str, items: Iterable[Any] | None = None, **options: Any) -> tqdm[Any]:
    """A bar of steps, drawn often on a terminal and now and then into a file."""
    pause = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(items, desc=what, mininterval=pause, dynamic_ncols=True, **options)


def detect(
    model: RDSNet,
    images: Tensor,
    sizes: Sequence[tuple[int, int]],
    output_sizes: Sequence[tuple[int, int]],
    config: Config,
) -> list[Objects]:
    """`RDSNet.detect` on the model's device, results on the CPU; images have the sizes that `config.data` gives."""
    device = model.image_mean.device
    images = to_device(images, device).contiguous(memory_format=torch.channels_last)
    scales = None
    if config.rules.one_scale and config.data.square is None:  # squashed, each axis has its own factor, and exactly
        scales = [eval_scale(h, w, config.data) for h, w in output_sizes]
    return [objects.to("cpu") for objects in model.detect(images, sizes, output_sizes, scales)]


def detect_folder(
    model: RDSNet, folder: CocoFolder, config: Config, *, batch_size: int = 1, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[ImageRecord, Objects]]:
    """Run a model over the images of a COCO folder, in pixels of the originals; every rank does its share."""
    batches = eval_batches(folder, config.data, batch_size, config.data.workers, rank, world_size)
    for images, sizes, records in batches:
        found = detect(model, images, sizes, [(record.height, record.width) for record in records], config)
        yield from zip(records, found, strict=True)


def evaluate(
    model: RDSNet,
    folder: CocoFolder,
    config: Config,
    *,
    batch_size: int = 1,
    rank: int = 0,
    world_size: int = 1,
    each: Callable[[ImageRecord, Objects], None] | None = None,
) -> CocoEvaluator:
    """Run a model over a data set and collect what it finds, for metrics and results. Leaves it in evaluation mode.

    Args:
        rank, world_size: this process detects on its share; in the end every process has the objects of all.
        each: called with every image of this process.
    """
    model.eval()
    evaluator = CocoEvaluator(folder.json_path, folder.category_ids, config.detect.max_detections)
    found = detect_folder(model, folder, config, batch_size=batch_size, rank=rank, world_size=world_size)
    images = len(folder) // world_size
    for record, objects in progress_bar("evaluating", found, total=images, leave=False, disable=rank > 0):
        evaluator.add(record.id, objects)
        if each is not None:
            each(record, objects)
    if world_size > 1:
        evaluator.merge(gather_objects(evaluator.state()))
    return evaluator
