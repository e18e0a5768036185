"""The object stream of the paper's RDSNet: RetinaNet, with a third branch for object representations (3.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rdsnet.device import mean_over_ranks, to_device
from rdsnet.model.object_stream.dense import MAX_LOG_RATIO, Common, Lesson, Raw, TowerStream
from rdsnet.model.object_stream.learning import BACKGROUND, IGNORED, best_objects, flatten_levels, focal_loss, overlaps
from rdsnet.structures import Targets


class RetinaNetStream(TowerStream):
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
        super().__init__(
            common,
            anchors_per_location=anchor_scales * len(anchor_ratios),
            tower_depth=tower_depth,
            representation_tower=representation_tower,
            first_deltas=0.0,
        )
        offset = 0.5 if self.rules.anchor_grid == "cells" else 0.0
        bases = []
        for stride in self.strides:
            whole = None if self.rules.anchor_grid == "cells" else stride
            shapes = anchor_shapes(anchor_size, anchor_scales, anchor_ratios, whole=whole)
            bases.append(base_anchors(stride, shapes, self.rules.anchor_rounding, offset))
        self._bases = {torch.device("cpu"): bases}
        self.positive_iou, self.negative_iou = positive_iou, negative_iou
        self.focal_alpha, self.focal_gamma, self.box_beta = focal_alpha, focal_gamma, box_beta

    def forward(self, levels: Sequence[Tensor], size: tuple[int, int]) -> Raw:
        of_classes, of_boxes, of_representations = self.towers(levels)
        return Raw(
            size=size,
            logits=[self.classify(x) for x in of_classes],
            deltas=[self.regress(x) for x in of_boxes],
            features=of_representations,
        )

    def terms(self, raw: Raw, lesson: Lesson) -> dict[str, Tensor]:
        """Focal "cls" and smooth L1 "box", over the positives; an image without any counts as one with one."""
        divisor = mean_over_ranks((lesson.assigned >= 0).sum(dim=1).clamp(min=1).sum().float())
        logits = flatten_levels(raw.logits, self.num_classes)  # (B, R, C)
        deltas = flatten_levels(raw.deltas, 4)[lesson.places]
        entries = (*lesson.places, lesson.labels)
        classification = focal_loss(logits, lesson.assigned != IGNORED, entries, self.focal_alpha, self.focal_gamma)
        wanted = encode(torch.cat(self.anchors(raw))[lesson.positives.anchor], lesson.boxes)
        regression = F.smooth_l1_loss(deltas, wanted, reduction="sum", beta=self.box_beta)
        return {"cls": classification / divisor, "box": regression / divisor}

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

    def assign(self, raw: Raw, targets: Targets) -> Tensor:
        device = targets.boxes.device
        iou = overlaps(targets.boxes, self.bases(device), raw.map_sizes, self._steps(raw.map_sizes))
        valid = self.valid(raw.map_sizes, targets.image_size)
        everywhere = bool(valid.all())
        valid = to_device(valid, device)
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
        width = raw.deltas[level].shape[3]
        step_y, step_x = self._steps(raw.map_sizes)[level]
        corner = torch.stack([cell % width * step_x, cell // width * step_y], dim=1)
        anchors = self.bases(index.device)[level][kind] + corner.repeat(1, 2)
        return decode(anchors, self.deltas(raw, image, level, index))


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


def assign_anchors(iou: Tensor, positive_iou: float, negative_iou: float) -> Tensor:
    """(R,) the object that each anchor learns, BACKGROUND or IGNORED, from the (N, R) IoU.

    An anchor takes the object it overlaps most. Then every object takes all anchors that overlap it as much as any
    does, whatever their overlap and whomever they belonged to; later objects win.
    """
    if len(iou) == 0:
        return torch.full((iou.shape[1],), BACKGROUND, device=iou.device)
    assigned = best_objects(iou, positive_iou, negative_iou)
    best_of_object = iou.amax(dim=1, keepdim=True)
    objects, anchors = ((iou == best_of_object) & (best_of_object > 0)).nonzero().unbind(1)
    forced = torch.full_like(assigned, -1).scatter_reduce(0, anchors, objects, "amax")
    return torch.where(forced >= 0, forced, assigned)
