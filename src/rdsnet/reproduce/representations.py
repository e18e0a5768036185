"""Figure 3: pixel representations as the objects' representations see them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

from rdsnet.config import Config
from rdsnet.data import CocoFolder, ImageRecord, eval_batches, rasterise
from rdsnet.model import RDSNet
from rdsnet.refinement import MATCH_IOU
from rdsnet.reproduce.run import Numbers
from rdsnet.structures import ceil32
from rdsnet.visualize.representations import to_sphere

COLUMNS = ("foreground half", "background half", "probability")
PLACES = ("pixels of the object", "pixels of other objects", "pixels of no object")
MAX_IMAGES = 200


@dataclass(frozen=True)
class Scene:
    """Representations of an image and of the K objects in it that were found.

    record
    pixels      (D, h, w) on the mask grid
    owner       (h, w) int64: the found object that each cell's centre belongs to, -1 for none, -2 for an object that
                was not found
    background  (K, D) half of the objects' representations
    foreground  (K, D)
    boxes       (K, 4) of the truth, in pixels of the image
    """

    record: ImageRecord
    pixels: Tensor
    owner: Tensor
    background: Tensor
    foreground: Tensor
    boxes: Tensor


@torch.inference_mode()
def scenes(model: RDSNet, folder: CocoFolder, config: Config, images: int = MAX_IMAGES) -> Iterator[Scene]:
    """The first images of a folder, each with the best detection of every object that has one."""
    device = model.image_mean.device
    folder = copy.copy(folder)
    folder.images = folder.images[:images]
    for batch, sizes, records in eval_batches(folder, config.data, 1, 0):
        record, size = records[0], sizes[0]
        raw, pixels = model(model.normalise(batch.to(device), sizes))
        assert pixels is not None
        found = model.object_stream.detect(raw, 0, size, (record.height, record.width))
        truth = [a for a in record.annotations if not a.crowd and a.rle is not None]
        boxes = torch.tensor([a.box for a in truth], dtype=torch.float32).view(-1, 4)
        labels = torch.tensor([a.label for a in truth], dtype=torch.int64)
        best = _best(found.boxes, found.labels, boxes, labels)
        anchors = found.anchors[best[best >= 0]]
        halves = model.object_stream.representations(raw, torch.zeros_like(anchors), anchors).cpu()
        step = [raw.size[axis] / pixels.shape[2 + axis] for axis in (0, 1)]
        rows, columns = (round(min(ceil32(size[axis]), raw.size[axis]) / step[axis]) for axis in (0, 1))
        owner = _owners(record, best, (rows, columns), size, step)
        yield Scene(
            record, pixels[0, :, :rows, :columns].float().cpu(), owner, halves[:, 0], halves[:, 1], boxes[best >= 0]
        )


def _best(boxes: Tensor, labels: Tensor, true_boxes: Tensor, true_labels: Tensor) -> Tensor:
    """(K,) the best-scoring detection of each object with an IoU of 0.5 or more, -1 for none."""
    hit = (box_iou(true_boxes, boxes) >= MATCH_IOU) & (true_labels[:, None] == labels)
    if not len(boxes):
        return torch.full((len(true_boxes),), -1)
    return torch.where(hit.any(1), hit.int().argmax(1), -1)  # detections are sorted by score


def _owners(
    record: ImageRecord, best: Tensor, grid: tuple[int, int], size: tuple[int, int], step: list[float]
) -> Tensor:
    """The object at the centre of each cell of the mask grid, numbered over those that were found; see `Scene`."""
    full = (record.height, record.width)
    at = [
        np.minimum((np.arange(grid[axis]) + 0.5) * step[axis] * full[axis] / size[axis], full[axis] - 1).astype(int)
        for axis in (0, 1)
    ]
    owner = np.full(grid, -1)
    numbers = (best >= 0).cumsum(0) - 1
    truth = [a for a in record.annotations if not a.crowd and a.rle is not None]
    for annotation, detection, number in zip(truth, best.tolist(), numbers.tolist(), strict=True):
        assert annotation.rle is not None
        mask = rasterise(annotation.rle, (0, 0, full[1], full[0]), full)
        owner[mask[np.ix_(*at)]] = number if detection >= 0 else -2
    return torch.from_numpy(owner)


def similarities(model: RDSNet, folder: CocoFolder, config: Config) -> dict[str, Numbers]:
    """By kind of pixels (`PLACES`), means over the objects found: cosine between a pixel's representation and each half
    of the object's, and the foreground probability of Eq. 1, without any crop."""
    sums = torch.zeros(len(PLACES), len(COLUMNS), dtype=torch.float64)
    counts = torch.zeros(len(PLACES), 1, dtype=torch.float64)
    for scene in scenes(model, folder, config):
        pixels = scene.pixels.flatten(1)
        owner = scene.owner.flatten()
        values = torch.stack(
            [
                F.normalize(scene.foreground, dim=1) @ F.normalize(pixels, dim=0),
                F.normalize(scene.background, dim=1) @ F.normalize(pixels, dim=0),
                ((scene.foreground - scene.background) @ pixels).sigmoid(),
            ]
        )  # (3, K, h * w)
        for i in range(len(scene.boxes)):
            for place, chosen in enumerate((owner == i, (owner != i) & (owner != -1), owner == -1)):
                if chosen.any():
                    sums[place] += values[:, i, chosen].mean(1)
                    counts[place] += 1
    means = (sums / counts).tolist()
    return {
        place: dict(zip(COLUMNS, row if count else [None] * len(COLUMNS), strict=True))
        for place, row, count in zip(PLACES, means, counts[:, 0].tolist(), strict=True)
    }


def on_the_sphere(scene: Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Representations reduced to three numbers and brought to length 1 (`to_sphere`), as the figure shows them.

    Returns:
        pixels (h, w, 3), foreground halves (K, 3), background halves (K, 3).
    """
    pixels = scene.pixels.flatten(1).T
    reduced = to_sphere(torch.cat([pixels, scene.foreground, scene.background]))
    shown, fore, back = reduced.split([len(pixels), len(scene.foreground), len(scene.background)])
    return shown.reshape(*scene.owner.shape, 3).numpy(), fore.numpy(), back.numpy()
