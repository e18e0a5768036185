"""Which objects learn a mask, by which loss, and how masks reach the image: section 3.2's rules, and YOLACT's.

What differs from the paper's rules is kept as it is in the authors' code (github.com/dbolya/yolact), where it matters
to trained weights; docs/fidelity.md lists it.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rdsnet.device import to_device
from rdsnet.model.correlation import CropPixels, draw_instances, mask_terms, pixels_within
from rdsnet.model.cropping import crop_windows, resize_boxes
from rdsnet.model.masks import (
    TILE,
    Frame,
    Layout,
    PastedMasks,
    axis_matrix,
    axis_tiles,
    cells_read,
    extent,
    inside,
    lift,
)
from rdsnet.settings import Rules
from rdsnet.structures import Targets

PADDING = 1  # cells by which YOLACT's crop is wider than its box on each side
OUTSIDE = 100.0  # loss of an object's cell outside YOLACT's crop: the logarithm of 0 counts as -100

Maps = Callable[..., Tensor]
"""`correlate` of an image: the logits of chosen objects, in chosen rows and columns of the grid"""


class Crop(NamedTuple):
    """Where an object's instances learn its mask.

    instances  those of the image lie in order of their objects; these are the object's
    pixels     (D, h, w) pixel representations inside
    loss       logits (M, h, w) -> (M,) terms of L_mask (Eq. 8)
    """

    instances: slice
    pixels: Tensor
    loss: Callable[[Tensor], Tensor]


class MaskRules(Protocol):
    """What RDSNet asks of either set of rules. `step` is the (y, x) input pixels of a cell of the mask grid."""

    def choose(self, objects: Tensor, targets: Targets, generator: torch.Generator | None) -> Tensor:
        """Which of an image's positive anchors make masks.

        Args:
            objects: (M,) int64, the object of each positive anchor, on the CPU like `targets.has_mask` and `.areas`.

        Returns:
            int64 indices into it.
        """

    def crops(
        self, pixels: Tensor, objects: Tensor, targets: Targets, *, step: tuple[float, float], positives: int
    ) -> list[Crop]:
        """Of an image, one for each object that makes masks.

        Args:
            pixels: (D, Hm, Wm).
            objects: (M,) int64, the object of each instance, on the CPU.
            positives: anchors that `choose` had to choose from.
        """

    def divisor(self, positives: Tensor, instances: Tensor) -> Tensor:
        """What a batch's sum of terms is divided by: from its numbers of positive anchors and instances."""

    def paste(self, maps: Maps, boxes: Tensor, frame: Frame, device: torch.device) -> PastedMasks:
        """Masks at full resolution, each within its crop.

        Args:
            boxes: (N, 4) xyxy in pixels of the output, on the CPU.
            device: where the maps are computed.
        """


def _instances(objects: Tensor, count: int) -> list[slice]:
    """Those of each of an image's objects, when instances lie in order of their objects."""
    ends = torch.bincount(objects, minlength=count).cumsum(0).tolist()
    return [slice(start, end) for start, end in pairwise([0, *ends])]


@dataclass(frozen=True, kw_only=True)
class RDSNetMasks:
    """The paper's rules (3.2, 3.4), and the release's where they differ.

    Args:
        max_instances: masks an image in training, at most.
        train_expand: of the crop of the loss, from the ground-truth box.
        ohem_ratio: background pixels kept for each foreground pixel; None: all.
        expand: of the crop of the result, from the regressed box.
        threshold: a pixel is foreground above this probability, 0..1.
        rules: what differs between projects. With `two_steps` logits are resized as the release does, first to the
            network input (half-pixel), then to the image (corners aligned): the product of two matrices does both.
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

    def crops(
        self, pixels: Tensor, objects: Tensor, targets: Targets, *, step: tuple[float, float], positives: int
    ) -> list[Crop]:
        grid = (targets.masks.shape[1], targets.masks.shape[2])
        windows = crop_windows(targets.boxes, grid, expand=self.train_expand, rule=self.rules.crop_rule, step=step)
        # What the host must know comes in one transfer an image, not in several an object
        table = torch.cat([windows, pixels_within(targets.masks, windows)[:, None]], dim=1).tolist()
        instances = _instances(objects, len(targets))
        used = [i for i, own in enumerate(instances) if own.stop > own.start and table[i][2] > 0]
        if not used:
            return []
        return [
            Crop(
                instances[i],
                inside,
                partial(
                    mask_terms,
                    target=targets.masks[i, table[i][1] : table[i][3], table[i][0] : table[i][2]],
                    ohem_ratio=self.ohem_ratio,
                    foreground=table[i][4],
                ),
            )
            for i, inside in zip(used, CropPixels.apply(pixels, [table[i][:4] for i in used]), strict=True)
        ]

    def divisor(self, positives: Tensor, instances: Tensor) -> Tensor:
        return instances + 1

    def paste(self, maps: Maps, boxes: Tensor, frame: Frame, device: torch.device) -> PastedMasks:
        height, width = frame.output_size
        two_steps = self.rules.two_steps
        across = axis_tiles(width, frame.size[1], frame.grid[1], frame.step[1], two_steps, device)
        down = axis_tiles(height, frame.size[0], frame.grid[0], frame.step[0], two_steps, device)
        pattern = across.reach()[:, None] + down.reach() * frame.grid[1]  # cells that a tile reads, from its first
        windows = crop_windows(boxes, frame.output_size, expand=self.expand, rule=self.rules.crop_rule)
        layout = Layout(windows, device)
        bits = torch.empty(layout.total * TILE, TILE, dtype=torch.bool, device=device)
        columns = torch.full((len(boxes), len(across.first), TILE), -math.inf, device=device)
        rows = torch.full((len(boxes), len(down.first), TILE), -math.inf, device=device)
        # the sigmoid is monotone: logits are thresholded, not probabilities
        cut = math.log(self.threshold / (1 - self.threshold))
        for objects in layout.groups():
            grids = maps(objects)
            for t in layout.tiles(objects):
                row = (t.object - objects.start) * frame.grid[0] + down.first[t.y]
                first = row * frame.grid[1] + across.first[t.x]
                cells = grids.flatten().take(first[:, None, None] + pattern)  # (t, across, down)
                strips = torch.bmm(cells, down.pixels(t.y, t.y0, t.y1).transpose(1, 2))
                logits = torch.bmm(across.pixels(t.x, t.x0, t.x1), strips)  # (t, TILE across, TILE down)
                bits.view(torch.int64).index_copy_(0, t.lines(), (logits > cut).flatten(0, 1).view(torch.int64))
                lift(columns, t.object, t.x, logits.amax(dim=2))
                lift(rows, t.object, t.y, logits.amax(dim=1))
        low, high = layout.windows.view(-1, 2, 2).unbind(1)
        columns, rows = (
            inside(profiles.flatten(1)[:, :length], low[:, axis], high[:, axis])
            for axis, (profiles, length) in enumerate(((columns, width), (rows, height)))
        )
        direct = torch.stack([extent(columns > cut), extent(rows > cut)], dim=2).flatten(1)
        # Only the profiles are squashed; outside the window they become exactly 0
        return PastedMasks(layout.crops(bits), windows, columns.sigmoid(), rows.sigmoid(), direct)


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

    def crops(
        self, pixels: Tensor, objects: Tensor, targets: Targets, *, step: tuple[float, float], positives: int
    ) -> list[Crop]:
        boxes = in_cells(targets.boxes, step)
        windows = padded_windows(boxes, (targets.masks.shape[1], targets.masks.shape[2])).tolist()
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
        # Where instances were drawn they stand for all positives
        share = positives / len(objects) if len(objects) == self.max_instances else 1.0
        crops = []
        for i, instances in enumerate(_instances(objects, len(targets))):
            if instances.stop > instances.start:
                x0, y0, x1, y1 = windows[i]
                loss = partial(yolact_terms, mask=targets.masks[i], window=windows[i], area=areas[i], share=share)
                crops.append(Crop(instances, pixels[:, y0:y1, x0:x1], loss))
        return crops

    def divisor(self, positives: Tensor, instances: Tensor) -> Tensor:
        return positives.clamp(min=1)

    def paste(self, maps: Maps, boxes: Tensor, frame: Frame, device: torch.device) -> PastedMasks:
        """Masks of what is within the boxes, at most two cells wider than these."""
        (height, width), step = frame.output_size, frame.step
        to_columns = axis_matrix(width, frame.size[1], frame.grid[1], step[1], False)
        to_rows = axis_matrix(height, frame.size[0], frame.grid[0], step[0], False)
        column_cells, row_cells = cells_read(to_columns), cells_read(to_rows)
        to_columns, to_rows = to_device(to_columns, device), to_device(to_rows, device)
        crops = padded_windows(
            in_cells(boxes, (step[0] * height / frame.size[0], step[1] * width / frame.size[1])), frame.grid
        )
        windows = torch.zeros(len(boxes), 4, dtype=torch.int64)
        masks: list[Tensor] = []
        columns = torch.zeros(len(boxes), width, device=device)
        rows = torch.zeros(len(boxes), height, device=device)
        for n, (left, top, right, bottom) in enumerate(crops.tolist()):
            (x0, x1), (y0, y1) = _reading(column_cells, left, right), _reading(row_cells, top, bottom)
            if x0 >= x1 or y0 >= y1:
                masks.append(torch.zeros(0, 0, dtype=torch.bool, device=device))
                continue
            windows[n] = torch.tensor([x0, y0, x1, y1])
            grid = maps(slice(n, n + 1), slice(top, bottom), slice(left, right))[0].sigmoid()
            probabilities = to_rows[y0:y1, top:bottom] @ grid @ to_columns[x0:x1, left:right].t()
            masks.append(probabilities > self.threshold)
            columns[n, x0:x1] = probabilities.amax(dim=0)
            rows[n, y0:y1] = probabilities.amax(dim=1)
        direct = torch.stack([extent(columns > self.threshold), extent(rows > self.threshold)], dim=2).flatten(1)
        return PastedMasks(masks, windows, columns, rows, direct)


def yolact_terms(logits: Tensor, *, mask: Tensor, window: Sequence[int], area: Tensor, share: float) -> Tensor:
    """(M,) binary cross entropy of an object's instances, each divided by the area of its box in cells.

    Args:
        logits: (M, h, w) inside the window x0, y0, x1, y1 of the object's mask (Hm, Wm).
        share: what each counts for.
    """
    x0, y0, x1, y1 = window
    target = mask[y0:y1, x0:x1].to(logits.dtype)
    # Of probabilities and not of logits: where these round to 0 or 1 the loss is 100 and has no gradient
    inside = F.binary_cross_entropy(logits.sigmoid(), target.expand_as(logits), reduction="none").sum(dim=(1, 2))
    return (inside + OUTSIDE * (mask.sum() - target.sum())) / area * share


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
