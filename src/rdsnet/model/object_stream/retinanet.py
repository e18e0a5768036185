"""The object stream of the paper's RDSNet: RetinaNet, with a third branch for object representations (3.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdsnet.device import mean_over_ranks, to_device
from rdsnet.model.layers import conv_norm_relu, initialise, small
from rdsnet.model.object_stream.dense import (
    BACKGROUND,
    IGNORED,
    Common,
    DenseStream,
    Positives,
    Raw,
    flatten_levels,
    focal_loss,
    object_starts,
)
from rdsnet.structures import Targets

MAX_LOG_RATIO = math.log(1000 / 16)  # a box is at most 62.5 times its anchor, so that exp stays finite


class RetinaNetStream(DenseStream):
    """Anchors, focal loss and smooth L1 over three towers that all levels share.

    `Rules.anchor_grid` "cells" centres anchors on the cells; "torchvision" at multiples of floor(input / cells), and
    truncates their sides to whole pixels before these are shaped.

    Args:
        common: what every stream is told; the towers have the channels of the pyramid.
        tower_depth: 3x3 convolutions a tower.
        representation_tower: representations have a tower of their own; otherwise they read that of the boxes.
        anchor_size: smallest anchor of a level, in strides.
        anchor_scales: scales an octave.
        anchor_ratios: height / width.
        positive_iou, negative_iou: anchors at or above the first learn an object, below the second the background,
            those between learn nothing. The best anchors of every object learn it in any case.
        focal_alpha, focal_gamma, box_beta: of the losses.
    """

    def __init__(
        self,
        common: Common,
        *,
        tower_depth: int,
        representation_tower: bool,
        anchor_size: float,
        anchor_scales: int,
        anchor_ratios: Sequence[float],
        positive_iou: float,
        negative_iou: float,
        focal_alpha: float,
        focal_gamma: float,
        box_beta: float,
    ) -> None:
        kinds = anchor_scales * len(anchor_ratios)
        super().__init__(common, anchors_per_location=kinds)
        offset = 0.5 if self.rules.anchor_grid == "cells" else 0.0
        bases = []
        for stride in self.strides:
            whole = None if self.rules.anchor_grid == "cells" else stride
            shapes = anchor_shapes(anchor_size, anchor_scales, anchor_ratios, whole=whole)
            bases.append(base_anchors(stride, shapes, self.rules.anchor_rounding, offset))
        self._bases = {torch.device("cpu"): bases}
        self.positive_iou, self.negative_iou = positive_iou, negative_iou
        self.focal_alpha, self.focal_gamma, self.box_beta = focal_alpha, focal_gamma, box_beta

        channels = common.channels

        def tower() -> nn.Sequential:
            return nn.Sequential(*(conv_norm_relu(channels, channels, common.norm) for _ in range(tower_depth)))

        self.class_tower, self.box_tower = tower(), tower()
        self.representation_tower = tower() if common.representation is not None and representation_tower else None
        # Every anchor begins with a score of 0.01, or the many background anchors would swamp the first steps
        rare = -math.log(0.99 / 0.01)
        self.classify = initialise(nn.Conv2d(channels, kinds * common.num_classes, 3, padding=1), small, rare)
        self.regress = initialise(nn.Conv2d(channels, kinds * 4, 3, padding=1), small)

    def forward(self, levels: Sequence[Tensor], size: tuple[int, int]) -> Raw:
        of_boxes = [self.box_tower(x) for x in levels]
        features: list[Tensor] = []
        if self.representation is not None:
            tower = self.representation_tower
            features = of_boxes if tower is None else [tower(x) for x in levels]
        return Raw(
            size=size,
            logits=[self.classify(self.class_tower(x)) for x in levels],
            deltas=[self.regress(x) for x in of_boxes],
            features=features,
        )

    def losses(self, raw: Raw, targets: Sequence[Targets]) -> tuple[dict[str, Tensor], Positives]:
        anchors = torch.cat(self.anchors(raw))
        logits = flatten_levels(raw.logits, self.num_classes)  # (B, R, C)
        deltas = flatten_levels(raw.deltas, 4)
        assigned = torch.stack([self.assign(raw.map_sizes, t) for t in targets])  # (B, R)
        image, anchor = (assigned >= 0).nonzero().unbind(1)
        positives = Positives(image, anchor, assigned[image, anchor])
        counts = (assigned >= 0).sum(dim=1).clamp(min=1).sum()
        divisor = mean_over_ranks(counts.float())

        objects = positives.object + object_starts(targets, image.device)[image]
        labels = torch.cat([t.labels for t in targets])[objects]
        boxes = torch.cat([t.boxes for t in targets])[objects]
        label_index = (image, anchor, labels)
        classification = focal_loss(logits, assigned != IGNORED, label_index, self.focal_alpha, self.focal_gamma)
        wanted = encode(anchors[anchor], boxes)
        regression = F.smooth_l1_loss(deltas[image, anchor], wanted, reduction="sum", beta=self.box_beta)
        return {"cls": classification / divisor, "box": regression / divisor}, positives

    def anchors(self, raw: Raw) -> list[Tensor]:
        """(h * w * A, 4) anchors of each level in input pixels."""
        return [
            place_anchors(base, size, step)
            for base, size, step in zip(
                self.bases(raw.logits[0].device), raw.map_sizes, self._steps(raw.map_sizes), strict=True
            )
        ]

    def bases(self, device: torch.device) -> list[Tensor]:
        """(A, 4) anchors of the first location of each level, in input pixels; moved to a device once."""
        if device not in self._bases:
            self._bases[device] = [to_device(base, device) for base in self._bases[torch.device("cpu")]]
        return self._bases[device]

    def _steps(self, map_sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """(y, x) input pixels between the locations of each level."""
        if self.rules.anchor_grid == "cells":
            return [(stride, stride) for stride in self.strides]
        height, width = (side * self.strides[0] for side in map_sizes[0])  # the input is a multiple of 32
        return [(height // h, width // w) for h, w in map_sizes]

    def assign(self, map_sizes: Sequence[tuple[int, int]], targets: Targets) -> Tensor:
        """What each of the R anchors learns: (R,) an object's index, or BACKGROUND, or IGNORED.

        Anchors beyond the image's own padding to a multiple of 32 (there are some in a batch of several sizes) learn
        nothing.
        """
        valid = self.valid(map_sizes, targets.image_size)
        everywhere = bool(valid.all())
        valid = to_device(valid, targets.boxes.device)
        iou = targets.boxes.new_empty(len(targets), len(valid))
        start = 0
        for base, (h, w), step in zip(self.bases(iou.device), map_sizes, self._steps(map_sizes), strict=True):
            end = start + h * w * len(base)
            grid_iou(targets.boxes, base, step, iou[:, start:end].view(-1, h, w, len(base)))
            start = end
        if not everywhere:
            iou.masked_fill_(~valid, 0)
        assigned = assign_anchors(iou, self.positive_iou, self.negative_iou)
        return assigned if everywhere else assigned.masked_fill_(~valid, IGNORED)

    def candidates(self, raw: Raw, image: int, level: int) -> tuple[Tensor, Tensor]:
        # Maps lie channels last, so that an anchor's classes are neighbours: this is a view
        logits = raw.logits[level][image].permute(1, 2, 0).reshape(-1, self.num_classes)
        best = logits.amax(dim=1)  # the sigmoid is monotone: logits choose as well as scores
        index = best.topk(min(self.pre_nms or len(best), len(best))).indices
        return index, logits[index].float().sigmoid()

    def decode(self, raw: Raw, image: int, level: int, index: Tensor) -> Tensor:
        kind, cell = index % self.anchors_per_location, index // self.anchors_per_location
        deltas = raw.deltas[level][image].float().view(self.anchors_per_location, 4, -1)[kind, :, cell]
        width = raw.deltas[level].shape[3]
        step_y, step_x = self._steps(raw.map_sizes)[level]
        corner = torch.stack([cell % width * step_x, cell // width * step_y], dim=1)
        return decode(self.bases(index.device)[level][kind] + corner.repeat(1, 2), deltas)


def anchor_shapes(size: float, scales: int, ratios: Sequence[float], *, whole: int | None = None) -> Tensor:
    """(A, 2) float64 width and height in strides, scales running fastest within each height / width ratio.

    `whole` names the stride of a level whose squares have sides truncated to whole pixels.
    """
    side = size * 2 ** (torch.arange(scales, dtype=torch.float64) / scales)
    if whole is not None:
        side = (side * whole).floor() / whole
    root = torch.tensor(list(ratios), dtype=torch.float64).sqrt()[:, None]
    return torch.stack([side / root, side * root], dim=2).flatten(0, 1)


def base_anchors(stride: int, shapes: Tensor, rounding: bool, offset: float = 0.5) -> Tensor:
    """(A, 4) float32 anchors of the location at the map's top left, in input pixels.

    They are centred `offset` strides from the corner; rounding takes halves to even.
    """
    size = shapes * stride
    low, high = offset * stride - size / 2, offset * stride + size / 2
    if rounding:
        low, high = low.round(), high.round()
    return torch.cat([low, high], dim=1).float()


def place_anchors(base: Tensor, map_size: tuple[int, int], step: tuple[int, int]) -> Tensor:
    """(h * w * A, 4) the (A, 4) anchors of the first location at every one, (y, x) pixels apart."""
    y, x = (torch.arange(cells, device=base.device) * pixels for cells, pixels in zip(map_size, step, strict=True))
    y, x = torch.meshgrid(y, x, indexing="ij")
    corner = torch.stack([x, y, x, y], dim=2)[:, :, None]  # (h, w, 1, 4)
    return (base + corner).flatten(0, 2)


def encode(anchors: Tensor, boxes: Tensor) -> Tensor:
    """(K, 4) deltas dx, dy, dw, dh that take anchors to boxes (both (K, 4) xyxy)."""
    size, box_size = anchors[:, 2:] - anchors[:, :2], boxes[:, 2:] - boxes[:, :2]
    shift = (boxes[:, :2] + boxes[:, 2:] - anchors[:, :2] - anchors[:, 2:]) / 2
    return torch.cat([shift / size, (box_size / size).log()], dim=1)


def decode(anchors: Tensor, deltas: Tensor) -> Tensor:
    """The inverse of `encode`; dw and dh are clamped to +-log(1000 / 16)."""
    size = anchors[:, 2:] - anchors[:, :2]
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2 + deltas[:, :2] * size
    half = size * deltas[:, 2:].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() / 2
    return torch.cat([centre - half, centre + half], dim=1)


def grid_iou(boxes: Tensor, base: Tensor, step: tuple[float, float], out: Tensor) -> None:
    """IoU of objects with all anchors of a level.

    Anchors on a grid overlap a box by a width that depends on the column alone, times a height that depends on the
    row: the large tensor is touched three times, where comparing boxes one by one takes a dozen passes.

    Args:
        boxes: (N, 4) xyxy.
        base: (A, 4) anchors of the first location.
        step: (y, x) pixels between locations.
        out: (N, h, w, A), written.
    """
    overlaps = []
    for axis, cells, pixels in ((1, out.shape[1], step[0]), (0, out.shape[2], step[1])):
        shift = torch.arange(cells, device=base.device)[:, None] * pixels
        low = torch.maximum(base[:, axis] + shift, boxes[:, axis, None, None])
        high = torch.minimum(base[:, axis + 2] + shift, boxes[:, axis + 2, None, None])
        overlaps.append((high - low).clamp(min=0))
    torch.mul(overlaps[0][:, :, None], overlaps[1][:, None], out=out)
    areas = (base[:, 2:] - base[:, :2]).prod(dim=1) + (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)[:, None]
    out.div_(areas[:, None, None] - out)  # areas (N, 1, 1, A): the union is the sum of both areas less the overlap


def assign_anchors(iou: Tensor, positive_iou: float, negative_iou: float) -> Tensor:
    """(R,) the object that each anchor learns, BACKGROUND or IGNORED, from the (N, R) IoU.

    An anchor takes the object it overlaps most. Then every object takes all anchors that overlap it as much as any
    does, whatever their overlap and whomever they belonged to; later objects win.
    """
    if len(iou) == 0:
        return torch.full((iou.shape[1],), BACKGROUND, device=iou.device)
    best, assigned = iou.max(dim=0)
    assigned.masked_fill_(best < positive_iou, IGNORED)
    assigned.masked_fill_(best < negative_iou, BACKGROUND)
    best_of_object = iou.amax(dim=1, keepdim=True)
    objects, anchors = ((iou == best_of_object) & (best_of_object > 0)).nonzero().unbind(1)
    forced = torch.full_like(assigned, -1).scatter_reduce(0, anchors, objects, "amax")
    return torch.where(forced >= 0, forced, assigned)
