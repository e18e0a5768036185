"""What every object stream shares: dense predictions, object representations, candidates and NMS.

A stream is a file of its own beside this one. It says what an anchor (or point) is, how predictions become boxes
and scores, and what the losses are; everything else lives here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdsnet.device import to_device, to_host
from rdsnet.model.cropping import clip_boxes, resize_boxes
from rdsnet.model.layers import Norm, initialise, small
from rdsnet.model.object_stream.suppression import NMS, NO_PAIR, Found, Rule, suppress
from rdsnet.settings import Rules
from rdsnet.structures import Targets, ceil32


@dataclass
class Raw:
    """What a stream's branches say of every anchor; lists run over the L levels.

    size      (H, W) of the network input
    logits    (B, A * C, h, w) class logits, anchor-major; YOLACT's have a row for the background before the C
    deltas    (B, A * 4, h, w)
    features  (B, channels, h, w): what the representation branch's last convolution reads. That convolution runs
              on the few anchors that need it, see `DenseStream.representations`.
    quality   (B, A, h, w) logits of how well a place sees its object (FCOS's centerness); of the other streams empty
    """

    size: tuple[int, int]
    logits: list[Tensor]
    deltas: list[Tensor]
    features: list[Tensor]
    quality: list[Tensor] = field(default_factory=list)

    @property
    def map_sizes(self) -> list[tuple[int, int]]:
        return [(m.shape[2], m.shape[3]) for m in self.logits]


class Positives(NamedTuple):
    """Anchors of a batch that learn an object: (M,) image, flat anchor index and object of that image."""

    image: Tensor
    anchor: Tensor
    object: Tensor


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every object stream is told.

    num_classes      C
    strides          input pixels a cell, for each level
    channels         of the pyramid and of the features that representations are made from
    norm             of the stream's own convolutions
    representation   its shape, (2, D) for background and foreground or (1, D) for the coefficients of a linear
                     combination; None for a stream without representations
    score_threshold  candidates score above this
    pre_nms          anchors kept of each level, by their best class; None: all
    nms              a rule of `suppression.NMS`. For "fast", all classes of an anchor that has one above the score
                     threshold are candidates, as in YOLACT.
    nms_iou          a box that overlaps a better one of its class by more is dropped
    max_detections   objects an image, at most
    rules            what differs between projects. `inclusive` are the release's coordinates, where they differ from
                     ours after its x2 = our x2 - 1: boxes are clipped to 0..W-1 on both corners and resized as corner
                     pixels.
    """

    num_classes: int
    strides: Sequence[int]
    channels: int
    norm: Norm
    representation: tuple[int, int] | None
    score_threshold: float
    pre_nms: int | None
    nms: Rule
    nms_iou: float
    max_detections: int
    rules: Rules


class DenseStream(nn.Module, ABC):
    """Base of the object streams.

    Flat anchor indices run over level, then row, then column, then the A anchors of a location.

    Args:
        common: what every stream is told.
        anchors_per_location: A.
    """

    background_rows = 0
    """rows of `classify` that each anchor has before those of its classes"""

    def __init__(self, common: Common, *, anchors_per_location: int) -> None:
        super().__init__()
        if common.nms not in NMS:
            raise ValueError(f"unknown NMS {common.nms!r}; valid are {', '.join(NMS)}")
        self.num_classes = common.num_classes
        self.strides = tuple(common.strides)
        self.anchors_per_location = anchors_per_location
        self.representation = common.representation
        self.score_threshold = common.score_threshold
        self.pre_nms = common.pre_nms
        self.nms: Rule = common.nms
        self.nms_iou = common.nms_iou
        self.max_detections = common.max_detections
        self.rules = common.rules
        if common.representation is not None:
            numbers = anchors_per_location * common.representation[0] * common.representation[1]
            self.represent = initialise(nn.Conv2d(common.channels, numbers, 3, padding=1), small)

    # A stream defines these four.

    @abstractmethod
    def forward(self, levels: Sequence[Tensor], size: tuple[int, int]) -> Raw:
        """levels: (B, channels, h, w) for each pyramid level, finest first; size: (H, W) of the network input."""

    @abstractmethod
    def losses(self, raw: Raw, targets: Sequence[Targets]) -> tuple[dict[str, Tensor], Positives]:
        """The losses by name ("cls", "box", ...), each already divided, and the anchors that learn an object."""

    @abstractmethod
    def candidates(self, raw: Raw, image: int, level: int) -> tuple[Tensor, Tensor]:
        """The level's best anchors: (K,) their indices in the level and (K, C) their scores in 0..1."""

    @abstractmethod
    def decode(self, raw: Raw, image: int, level: int, index: Tensor) -> Tensor:
        """(K, 4) boxes, in input pixels and not clipped, of the level's anchors `index`."""

    # Everything else is shared.

    def detect(
        self, raw: Raw, image: int, size: tuple[int, int], output_size: tuple[int, int], scale: float | None = None
    ) -> Found:
        """Boxes of one image after score threshold, top-k of each level and NMS within each class (3.4).

        Args:
            image: its index in the batch.
            size: (H, W) of the image in the network input, before padding.
            output_size: (H, W) of the pixels that the boxes are wanted in, usually the original image's.
            scale: network pixels an output pixel, one factor for both axes; default: each axis' own ratio.
        """
        ratio = (output_size[1] / size[1], output_size[0] / size[0]) if scale is None else (1 / scale, 1 / scale)
        pairs = self._pairs(raw, image, size, output_size, ratio)
        found = suppress(*pairs, self.nms, self.nms_iou, self.max_detections)
        if self.rules.whole_boxes:  # YOLACT's NMS is that of the network's pixels, which matters to "traditional"
            found = found._replace(boxes=resize_boxes(found.boxes, ratio, inclusive=self.rules.inclusive))
        return found

    def finish(self, boxes: Tensor, output_size: tuple[int, int]) -> Tensor:
        """Boxes as they are given out, once their masks are cropped."""
        return clip_boxes(boxes, output_size).trunc() if self.rules.whole_boxes else boxes

    def _pairs(
        self, raw: Raw, image: int, size: tuple[int, int], output_size: tuple[int, int], ratio: tuple[float, float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The candidates of all levels: (K, 4) boxes, (K, C) scores, NO_PAIR for what is none, and (K,) flat anchors.

        How many pairs there are is not asked: this and what follows has the same shapes for every image of a size.
        """
        levels = []
        offset = 0
        for level, (h, w) in enumerate(raw.map_sizes):
            index, scores = self.candidates(raw, image, level)
            levels.append((self.decode(raw, image, level, index), scores, self._chosen(scores), index + offset))
            offset += h * w * self.anchors_per_location
        boxes, scores, chosen, anchors = (torch.cat(parts) for parts in zip(*levels, strict=True))
        if not self.rules.whole_boxes:
            boxes = clip_boxes(boxes, size, inclusive=self.rules.inclusive)
            boxes = resize_boxes(boxes, ratio, inclusive=self.rules.inclusive)
            if not self.rules.inclusive:
                boxes = clip_boxes(boxes, output_size)  # rounding can leave it 1e-4 pixel outside
        if not self.rules.keep_empty:  # anchors that lie in the padding leave nothing after the clipping
            chosen = chosen & (boxes[:, 2:] > boxes[:, :2]).all(dim=1, keepdim=True)
        return boxes, scores.masked_fill(~chosen, NO_PAIR), anchors

    def _chosen(self, scores: Tensor) -> Tensor:
        """(K, C) bool: the (anchor, class) pairs of a level's candidates that go on to NMS."""
        above = scores > self.score_threshold
        if self.nms == "fast":
            above = above.any(dim=1, keepdim=True).expand_as(above)
        if self.rules.pre_nms_pairs and self.pre_nms is not None and self.pre_nms < above.numel():
            # The best pairs are of the best anchors: a pair outranks all those of an anchor whose best it outranks
            best = scores.flatten().topk(self.pre_nms).indices
            above = above & torch.zeros_like(above).flatten().index_fill(0, best, True).view_as(above)
        return above

    def valid(self, map_sizes: Sequence[tuple[int, int]], image_size: tuple[int, int]) -> Tensor:
        """(R,) bool: the anchors within the image's own padding to a multiple of 32.

        In a batch of several sizes there are others, which an image alone would not have.
        """
        flags = []
        for (h, w), stride in zip(map_sizes, self.strides, strict=True):
            rows, columns = (math.ceil(ceil32(side) / stride) for side in image_size)
            inside = torch.zeros(h, w, self.anchors_per_location, dtype=torch.bool)
            inside[:rows, :columns] = True
            flags.append(inside.flatten())
        return torch.cat(flags)

    def representations(self, raw: Raw, image: Tensor, anchor: Tensor) -> Tensor:
        """phi(v_o) of chosen anchors: the representation branch's last convolution, only where it is needed.

        Args:
            image, anchor: (K,) image in the batch and flat anchor index.

        Returns:
            (K, 2, D), background then foreground, or (K, 1, D) of a linear combination: equal to gathering from the
            convolution of every location.
        """
        anchor, image = to_host(anchor, image)  # those of objects found are there already
        location, kind = anchor // self.anchors_per_location, anchor % self.anchors_per_location
        level, cells, inside = _surroundings(raw.map_sizes, image, location)
        counts = torch.bincount(level, minlength=len(raw.features)).tolist()
        order = level.argsort()
        pick = order.argsort() * self.anchors_per_location + kind
        parts = (cells[order].flatten(), inside[order].flatten(), pick)
        numbers = to_device(torch.cat(parts), raw.features[0].device)
        cells, inside, pick = numbers.split([len(part) for part in parts])
        patches = torch.cat(
            [
                features.permute(0, 2, 3, 1).flatten(0, 2)[chosen]  # a view: maps lie channels last
                for features, chosen in zip(raw.features, cells.split([9 * count for count in counts]), strict=True)
            ]
        )
        weight, bias = self.represent.weight.permute(0, 2, 3, 1).flatten(1), cast(Tensor, self.represent.bias)
        patches = (patches * inside[:, None]).view(len(pick), weight.shape[1])
        values = F.linear(patches, weight.to(patches.dtype), bias.to(patches.dtype))
        assert self.representation is not None
        return values.view(-1, *self.representation)[pick].float()


def _surroundings(
    map_sizes: Sequence[tuple[int, int]], image: Tensor, location: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Where the 3x3 surroundings of locations lie.

    Args:
        image, location: (K,) image in the batch and location in it, counted through all levels.

    Returns:
        (K,) level; (K, 9) flat indices into the level's (B, h, w) cells, those beyond the border moved onto it; and
        (K, 9) bool, which of them lie inside.
    """
    sizes = torch.tensor(map_sizes)
    cells = sizes.prod(dim=1)
    last = cells.cumsum(0)
    level = torch.bucketize(location, last, right=True)
    h, w = sizes[level][:, :, None, None].unbind(1)
    location = (location - (last - cells)[level])[:, None, None]
    step = torch.arange(-1, 2)
    row, column = location // w + step[:, None], location % w + step  # (K, 3, 1), (K, 1, 3)
    inside = (row >= 0) & (row < h) & (column >= 0) & (column < w)
    row, column = row.clamp(min=0).minimum(h - 1), column.clamp(min=0).minimum(w - 1)
    return level, ((image[:, None, None] * h + row) * w + column).flatten(1), inside.flatten(1)


BACKGROUND, IGNORED = -1, -2  # what an anchor learns that learns no object


def focal_loss(
    logits: Tensor, learns: Tensor, positives: tuple[Tensor, Tensor, Tensor], alpha: float, gamma: float
) -> Tensor:
    """Sum of the sigmoid focal loss (RetinaNet, Eq. 5) over the anchors that learn.

    Every entry is taken as negative first, then the few positive ones are exchanged: no one-hot target of the
    logits' size is made.

    Args:
        logits: (B, R, C).
        learns: (B, R) bool.
        positives: image, anchor and class of each positive entry, (M,) each.
    """
    logits = logits.float()
    negative = ((1 - alpha) * logits.sigmoid() ** gamma * F.softplus(logits)).sum(dim=2)
    chosen = logits[positives]
    right = alpha * (-chosen).sigmoid() ** gamma * F.softplus(-chosen)
    wrong = (1 - alpha) * chosen.sigmoid() ** gamma * F.softplus(chosen)
    return (negative * learns).sum() + (right - wrong).sum()


def flatten_levels(maps: Sequence[Tensor], numbers: int) -> Tensor:
    """Levels of (B, A * numbers, h, w) -> (B, R, numbers) float32, R over level, row, column, anchor."""
    return torch.cat([m.float().unflatten(1, (-1, numbers)).permute(0, 3, 4, 1, 2).flatten(1, 3) for m in maps], dim=1)


def object_starts(targets: Sequence[Targets], device: torch.device) -> Tensor:
    """Where each image's objects begin when all images' are laid end to end."""
    counts = torch.tensor([len(t) for t in targets])
    return to_device(counts.cumsum(0) - counts, device)
