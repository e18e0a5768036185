"""Which objects learn a mask, by which loss, and how masks reach the image: section 3.2's rules, and YOLACT's.

What differs from the paper's rules is kept as it is in the authors' code (github.com/dbolya/yolact), where it matters
to trained weights; docs/fidelity.md lists it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rdsnet.device import to_device
from rdsnet.model.correlation import correlate, draw_instances, mask_loss
from rdsnet.model.cropping import resize_boxes
from rdsnet.model.masks import PastedMasks, axis_matrix, cells_read, extent, paste_masks
from rdsnet.settings import Rules
from rdsnet.structures import Targets


class MaskRules(Protocol):
    """What RDSNet asks of either set of rules. `step` is the (y, x) input pixels of a cell of the mask grid."""

    def choose(self, objects: Tensor, targets: Targets, generator: torch.Generator | None) -> Tensor:
        """Which of an image's positive anchors make masks.

        Args:
            objects: (M,) int64, the object of each positive anchor, on the CPU like `targets.has_mask` and `.areas`.

        Returns:
            int64 indices into it.
        """

    def loss(
        self,
        vectors: Tensor,
        pixels: Tensor,
        objects: Tensor,
        targets: Targets,
        *,
        step: tuple[float, float],
        positives: int,
    ) -> Tensor:
        """Sum over an image's instances.

        Args:
            vectors: (M, D) of the instances.
            pixels: (D, Hm, Wm).
            objects: (M,) int64, the object of each instance, on the CPU.
            positives: anchors that `choose` had to choose from.
        """

    def divisor(self, positives: Tensor, instances: Tensor) -> Tensor:
        """What a batch's sum of losses is divided by: from its numbers of positive anchors and instances."""

    def paste(
        self,
        vectors: Tensor,
        pixels: Tensor,
        boxes: Tensor,
        *,
        size: tuple[int, int],
        output_size: tuple[int, int],
        step: tuple[float, float],
    ) -> PastedMasks:
        """Masks at full resolution; arguments as of `rdsnet.model.masks.paste_masks`."""


@dataclass(frozen=True, kw_only=True)
class RDSNetMasks:
    """The paper's rules (3.2, 3.4), and the release's where they differ.

    Args:
        max_instances: masks an image in training, at most.
        train_expand: of the crop of the loss, from the ground-truth box.
        ohem_ratio: background pixels kept for each foreground pixel; None: all.
        expand: of the crop of the result, from the regressed box.
        threshold: a pixel is foreground above this probability, 0..1.
        rules: what differs between projects.
    """

    max_instances: int
    train_expand: float
    ohem_ratio: float | None
    expand: float
    threshold: float
    rules: Rules

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(f"expected a mask threshold between 0 and 1, got {self.threshold}")

    def choose(self, objects: Tensor, targets: Targets, generator: torch.Generator | None) -> Tensor:
        eligible = targets.has_mask & (targets.areas > self.rules.min_mask_area)
        index = eligible[objects].nonzero()[:, 0]
        groups = objects[index] if self.rules.spread_masks else torch.zeros_like(index)
        return index[draw_instances(groups, self.max_instances, generator)]

    def loss(
        self,
        vectors: Tensor,
        pixels: Tensor,
        objects: Tensor,
        targets: Targets,
        *,
        step: tuple[float, float],
        positives: int,
    ) -> Tensor:
        return mask_loss(
            vectors,
            pixels,
            objects,
            targets,
            step=step,
            expand=self.train_expand,
            crop_rule=self.rules.crop_rule,
            ohem_ratio=self.ohem_ratio,
        )

    def divisor(self, positives: Tensor, instances: Tensor) -> Tensor:
        return instances + 1

    def paste(
        self,
        vectors: Tensor,
        pixels: Tensor,
        boxes: Tensor,
        *,
        size: tuple[int, int],
        output_size: tuple[int, int],
        step: tuple[float, float],
    ) -> PastedMasks:
        return paste_masks(
            vectors,
            pixels,
            boxes,
            size=size,
            output_size=output_size,
            step=step,
            expand=self.expand,
            crop_rule=self.rules.crop_rule,
            threshold=self.threshold,
            two_steps=self.rules.two_steps,
        )


PADDING = 1  # cells by which a crop is wider than its box on each side

OUTSIDE = 100.0  # loss of an object's cell outside its crop: the logarithm of 0 counts as -100


@dataclass(frozen=True, kw_only=True)
class YolactMasks:
    """YOLACT's rules, as `rdsnet.model.mask_rules.MaskRules` asks for them.

    Args:
        max_instances: masks an image in training, drawn at random.
        threshold: a pixel is foreground above this interpolated probability, 0..1.
    """

    max_instances: int
    threshold: float

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(f"expected a mask threshold between 0 and 1, got {self.threshold}")

    def choose(self, objects: Tensor, targets: Targets, generator: torch.Generator | None) -> Tensor:
        index = targets.has_mask[objects].nonzero()[:, 0]
        return index[draw_instances(torch.zeros_like(index), self.max_instances, generator)]

    def loss(
        self,
        vectors: Tensor,
        pixels: Tensor,
        objects: Tensor,
        targets: Targets,
        *,
        step: tuple[float, float],
        positives: int,
    ) -> Tensor:
        """Sum of the instances' binary cross entropy, each divided by the area of its box in cells.

        Where instances were drawn they stand for all `positives`.
        """
        boxes = in_cells(targets.boxes, step)
        windows = padded_windows(boxes, (targets.masks.shape[1], targets.masks.shape[2])).tolist()
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
        # Instances of one object share window and target
        counts = torch.bincount(objects, minlength=len(targets)).tolist()
        total = vectors.new_zeros(())
        for i, instances in enumerate(vectors[to_device(objects.argsort(stable=True), vectors.device)].split(counts)):
            if len(instances) == 0:
                continue
            x0, y0, x1, y1 = windows[i]
            probabilities = correlate(instances, pixels[:, y0:y1, x0:x1]).sigmoid()
            target = targets.masks[i, y0:y1, x0:x1].to(probabilities.dtype)
            # Of probabilities and not of logits: where these round to 0 or 1 the loss is 100 and has no gradient
            inside = F.binary_cross_entropy(probabilities, target.expand_as(probabilities), reduction="sum")
            outside = OUTSIDE * (targets.masks[i].sum() - target.sum()) * len(instances)
            total = total + (inside + outside) / areas[i]
        return total * (positives / len(objects)) if len(objects) == self.max_instances else total

    def divisor(self, positives: Tensor, instances: Tensor) -> Tensor:
        return positives.clamp(min=1)

    def paste(
        self,
        vectors: Tensor,
        pixels: Tensor,
        boxes: Tensor,
        *,
        size: tuple[int, int],
        output_size: tuple[int, int],
        step: tuple[float, float],
    ) -> PastedMasks:
        """Masks of what is within the boxes, at most two cells wider than these; arguments as of `paste_masks`."""
        to_columns = axis_matrix(output_size[1], size[1], pixels.shape[2], step[1], False)
        to_rows = axis_matrix(output_size[0], size[0], pixels.shape[1], step[0], False)
        column_cells, row_cells = cells_read(to_columns), cells_read(to_rows)
        to_columns, to_rows = to_device(to_columns, pixels.device), to_device(to_rows, pixels.device)
        pixels_a_cell = (step[0] * output_size[0] / size[0], step[1] * output_size[1] / size[1])
        crops = padded_windows(in_cells(boxes, pixels_a_cell), (pixels.shape[1], pixels.shape[2]))
        windows = torch.zeros(len(boxes), 4, dtype=torch.int64)
        masks: list[Tensor] = []
        columns = pixels.new_zeros(len(boxes), output_size[1])
        rows = pixels.new_zeros(len(boxes), output_size[0])
        for n, (left, top, right, bottom) in enumerate(crops.tolist()):
            (x0, x1), (y0, y1) = _reading(column_cells, left, right), _reading(row_cells, top, bottom)
            if x0 >= x1 or y0 >= y1:
                masks.append(torch.zeros(0, 0, dtype=torch.bool, device=pixels.device))
                continue
            windows[n] = torch.tensor([x0, y0, x1, y1])
            grid = correlate(vectors[n : n + 1], pixels[:, top:bottom, left:right])[0].sigmoid()
            probabilities = to_rows[y0:y1, top:bottom] @ grid @ to_columns[x0:x1, left:right].t()
            masks.append(probabilities > self.threshold)
            columns[n, x0:x1] = probabilities.amax(dim=0)
            rows[n, y0:y1] = probabilities.amax(dim=1)
        direct = torch.stack([extent(columns > self.threshold), extent(rows > self.threshold)], dim=2).flatten(1)
        return PastedMasks(masks, windows, columns, rows, direct)


def in_cells(boxes: Tensor, step: tuple[float, float]) -> Tensor:
    """(N, 4) xyxy in cells of (y, x) pixels each; in float64, so that a whole number of cells comes out as one."""
    return resize_boxes(boxes.double(), (1 / step[1], 1 / step[0])).to(boxes.dtype)


def padded_windows(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """The cells of an (h, w) map whose index (not centre) lies in boxes that are a cell wider on each side.

    Args:
        boxes: (N, 4) float xyxy in cells, not clipped.

    Returns:
        (N, 4) int64 x0, y0, x1, y1, half-open and inside the map; a crop without cells is (0, 0, 0, 0).
    """
    limit = to_device(torch.tensor([size[1], size[0]], dtype=boxes.dtype), boxes.device)
    low = (boxes[:, :2] - PADDING).clamp(min=0)
    high = torch.minimum(boxes[:, 2:] + PADDING, limit)
    return torch.where(
        (high.ceil() > low.ceil()).all(dim=1, keepdim=True), torch.cat([low, high], dim=1).ceil(), 0
    ).long()


def _reading(cells: tuple[list[int], list[int]], start: int, end: int) -> tuple[int, int]:
    """The rows of an interpolation matrix, half-open, that read any of the cells start..end-1."""
    first, last = cells
    return bisect_right(last, start), bisect_left(first, end)
