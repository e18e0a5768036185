"""FCOS as object stream: no anchors, every location is one point that may find an object (3.1).

After Tian et al., FCOS (arXiv 1904.01355 and 2006.09214), with the improvements of the authors' release: centre
sampling, GIoU, distances in strides, centerness beside the distances.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss

from rdsnet.device import mean_over_ranks, to_device
from rdsnet.model.layers import initialise, small
from rdsnet.model.object_stream.dense import Common, Lesson, Raw, TowerStream
from rdsnet.model.object_stream.learning import BACKGROUND, IGNORED, flatten_levels, focal_loss
from rdsnet.structures import Targets


class FCOSStream(TowerStream):
    """Points at the centres of the cells, focal loss, GIoU and centerness over three towers that all levels share.

    A point tells the distances from itself to the left, top, right and bottom of its object, in strides:
    relu(scale * x) with a learnt scale for each level, as the release's improved recipe has it in place of its first
    version's exp. The score is sqrt(class * centerness), and it is this score that the threshold applies to, as in
    detectron2 and torchvision (the release applies it to the class alone).

    Args:
        common: what every stream is told; the towers have the channels of the pyramid.
        tower_depth: 3x3 convolutions a tower.
        ranges: the largest distance from a point to a side of its object, in pixels, for each level but the last,
            ascending. A level learns the objects between the range of the level before and its own.
        centre_radius: a point is nearer to the centre of its object than this on both axes, in strides.
        focal_alpha, focal_gamma: of the class loss.

    Raises:
        ValueError: ranges that do not ascend, or not one fewer than levels.
    """

    def __init__(
        self,
        common: Common,
        *,
        tower_depth: int,
        ranges: Sequence[float],
        centre_radius: float,
        focal_alpha: float,
        focal_gamma: float,
    ) -> None:
        bounds, levels = (0.0, *ranges, math.inf), len(common.strides)
        if len(ranges) != levels - 1 or any(low >= high for low, high in pairwise(bounds)):
            raise ValueError(f"expected {levels - 1} ascending ranges for {levels} levels, got {ranges}")
        # Distances begin at one stride: around 0 half of the ReLUs have no gradient, of some sides those of all points
        super().__init__(
            common, anchors_per_location=1, tower_depth=tower_depth, representation_tower=True, first_deltas=1.0
        )
        self._bounds = list(pairwise(bounds))
        self.centre_radius = centre_radius
        self.focal_alpha, self.focal_gamma = focal_alpha, focal_gamma
        self.centerness = initialise(nn.Conv2d(common.channels, 1, 3, padding=1), small)
        self.scales = nn.Parameter(torch.ones(levels))

    def forward(self, levels: Sequence[Tensor], size: tuple[int, int]) -> Raw:
        of_classes, of_boxes, of_representations = self.towers(levels)
        return Raw(
            size=size,
            logits=[self.classify(x) for x in of_classes],
            deltas=[F.relu(self.regress(x) * scale) for x, scale in zip(of_boxes, self.scales, strict=True)],
            features=of_representations,
            quality=[self.centerness(x) for x in of_boxes],
        )

    def terms(self, raw: Raw, lesson: Lesson) -> dict[str, Tensor]:
        """Focal "cls" and "centerness" over the number of positives, GIoU "box" weighted by centerness over its sum."""
        places, strides = self._points(raw.map_sizes, lesson.boxes.device)
        places, strides = places[lesson.positives.anchor], strides[lesson.positives.anchor]
        wanted = centerness(encode(places, lesson.boxes, strides))
        count, weight = mean_over_ranks(torch.stack([wanted.new_full((), len(wanted)), wanted.sum()]))

        logits = flatten_levels(raw.logits, self.num_classes)  # (B, R, C)
        found = decode(places, flatten_levels(raw.deltas, 4)[lesson.places], strides)
        quality = flatten_levels(raw.quality, 1)[lesson.places][:, 0]
        entries = (*lesson.places, lesson.labels)
        classification = focal_loss(logits, lesson.assigned != IGNORED, entries, self.focal_alpha, self.focal_gamma)
        return {
            "cls": classification / count.clamp(min=1),
            "box": (generalized_box_iou_loss(found, lesson.boxes) * wanted).sum() / weight.clamp(min=1e-6),
            "centerness": F.binary_cross_entropy_with_logits(quality, wanted, reduction="sum") / count.clamp(min=1),
        }

    def _points(self, map_sizes: Sequence[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
        """(R, 2) points x, y in input pixels, and the (R, 1) strides of their levels."""
        points, strides = [], []
        for (h, w), stride in zip(map_sizes, self.strides, strict=True):
            cell = torch.arange(h * w, device=device)
            points.append(centres(cell, w, stride))
            strides.append(torch.full((h * w, 1), float(stride), device=device))
        return torch.cat(points), torch.cat(strides)

    def assign(self, raw: Raw, targets: Targets) -> Tensor:
        """As of every stream.

        A point learns the smallest of the objects that it may learn (`learners`). As in the release, an object that is
        left without a point is not learned: one that fits between the points (of every level if it is tiny, of its
        own if it is thin), or whose points all belong to smaller ones. Those are 0.7% of COCO's objects at 800 pixels
        (of a sample of 1350), and 3% of nuclei at 256 pixels and strides from 4. The nearest point of a tiny object
        lies outside of its box and could not tell the sides: distances are not negative.
        """
        areas = (targets.boxes[:, 2:] - targets.boxes[:, :2]).prod(dim=1)
        order = areas.argsort(stable=True)
        boxes = targets.boxes[order]
        levels = []
        for (h, w), stride, bounds in zip(raw.map_sizes, self.strides, self._bounds, strict=True):
            assigned = torch.full((h * w,), BACKGROUND, device=boxes.device)
            if len(boxes) > 0:
                fits = learners(boxes, (h, w), stride, bounds, self.centre_radius).flatten(1)
                any_fits, smallest = fits.byte().max(dim=0)  # the first of those that fit
                assigned = torch.where(any_fits > 0, order[smallest], assigned)
            levels.append(assigned)
        beyond = to_device(~self.valid(raw.map_sizes, targets.image_size), boxes.device)
        return torch.cat(levels).masked_fill_(beyond, IGNORED)

    def candidates(self, raw: Raw, image: int, level: int) -> tuple[Tensor, Tensor]:
        logits = raw.logits[level][image].float().flatten(1)  # (C, h * w)
        quality = raw.quality[level][image].float().flatten().sigmoid()
        best = logits.amax(dim=0).sigmoid() * quality
        index = best.topk(min(self.pre_nms or len(best), len(best))).indices
        return index, (logits[:, index].sigmoid() * quality[index]).sqrt().t()

    def decode(self, raw: Raw, image: int, level: int, index: Tensor) -> Tensor:
        points = centres(index, raw.map_sizes[level][1], self.strides[level])
        return decode(points, self.deltas(raw, image, level, index), self.strides[level])


def centres(cell: Tensor, width: int, stride: int) -> Tensor:
    """(K, 2) x, y in input pixels of cells that are counted row by row in a map `width` cells wide."""
    return (torch.stack([cell % width, cell // width], dim=1) + 0.5) * stride


def encode(points: Tensor, boxes: Tensor, stride: Tensor | float) -> Tensor:
    """(K, 4) distances from points (K, 2) to left, top, right and bottom of boxes (K, 4), in strides."""
    return torch.cat([points - boxes[:, :2], boxes[:, 2:] - points], dim=1) / stride


def decode(points: Tensor, distances: Tensor, stride: Tensor | float) -> Tensor:
    """The inverse of `encode`: (K, 4) boxes xyxy."""
    distances = distances * stride
    return torch.cat([points - distances[:, :2], points + distances[:, 2:]], dim=1)


def centerness(distances: Tensor) -> Tensor:
    """(K,) 1 at the centre of a box, towards 0 at its sides, from the (K, 4) distances to these (FCOS, Eq. 3)."""
    low, high = torch.aminmax(distances.view(-1, 2, 2), dim=1)  # of left and right, of top and bottom
    return (low / high).prod(dim=1).sqrt()


def learners(
    boxes: Tensor, map_size: tuple[int, int], stride: int, bounds: tuple[float, float], centre_radius: float
) -> Tensor:
    """Which points of a level may learn which objects.

    A point may where it lies inside the box, nearer than `centre_radius` strides to its centre on both axes, and the
    farthest of the box' sides is within the bounds (pixels, inclusive).

    Args:
        boxes: (N, 4) xyxy.
        map_size: (h, w) of the level.

    Returns:
        (N, h, w) bool.
    """
    axes = []
    for axis, cells in zip((1, 0), map_size, strict=True):
        point = (torch.arange(cells, device=boxes.device) + 0.5) * stride
        before, after = point - boxes[:, axis, None], boxes[:, axis + 2, None] - point  # (N, cells)
        off_centre = (before - after).abs() / 2
        axes.append(((before > 0) & (after > 0) & (off_centre < centre_radius * stride), torch.maximum(before, after)))
    (near_y, far_y), (near_x, far_x) = axes
    far = torch.maximum(far_y[:, :, None], far_x[:, None])
    return near_y[:, :, None] & near_x[:, None] & (far >= bounds[0]) & (far <= bounds[1])
