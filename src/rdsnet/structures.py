"""What flows between the parts: ground truth of an image, and the objects found in one.

Axis letters used by every docstring and comment of the package:

    B images of a batch          L feature pyramid levels     R anchors (or points) of an image, all levels
    N objects of an image        C classes                    D size of a representation (32)
    H W network input            Hm Wm mask grid (stride 4)

Coordinates are continuous: pixel i covers [i, i+1), boxes are float (x1, y1, x2, y2) and half-open, and resizing
multiplies. Labels are 0-based and contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rdsnet.device import to_host

PADDING = 32  # images are padded to multiples of this, the stride of the trunk's last stage


def ceil32(side: int) -> int:
    """The next multiple of 32 pixels."""
    return -(-side // PADDING) * PADDING


@dataclass(frozen=True)
class MaskGrid:
    """How fine the grid is that masks are learnt and predicted on.

    level_stride  input pixels a cell of the finest pyramid level that the pixel stream reads
    stride        input pixels a cell of the grid, where level_stride divides the input
    """

    level_stride: int
    stride: int

    def cells(self, side: int) -> int:
        """Cells along an axis of the network input: 550 pixels make 69 cells of stride 8, and 138 of the grid."""
        return -(-side // self.level_stride) * (self.level_stride // self.stride)


def _expect(condition: bool, what: str, came: object) -> None:
    if not condition:
        raise ValueError(f"expected {what}, got {came}")


@dataclass
class Targets:
    """Ground truth of one image, in pixels of the network input.

    boxes       (N, 4) float32, xyxy with x2 > x1 and y2 > y1
    labels      (N,) int64, 0..C-1
    masks       (N, Hm, Wm) bool on the mask grid of the padded image; all False where has_mask is False
    has_mask    (N,) bool; objects without a segmentation train the boxes only
    areas       (N,) float32, pixels of the mask at network resolution
    image_size  (H, W) of the image before padding
    crowd_boxes (K, 4) float32, xyxy of crowds: regions that hold objects of which none is known by itself

    The boxes are checked on the CPU, where targets are made: asking a GPU would wait for it.
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor
    has_mask: Tensor
    areas: Tensor
    image_size: tuple[int, int]
    crowd_boxes: Tensor = field(default_factory=lambda: torch.zeros(0, 4))

    def __post_init__(self) -> None:
        n = len(self.labels)
        _expect(self.boxes.shape == (n, 4), f"boxes of shape ({n}, 4)", tuple(self.boxes.shape))
        _expect(self.masks.ndim == 3 and len(self.masks) == n, f"masks of shape ({n}, Hm, Wm)", tuple(self.masks.shape))
        _expect(self.has_mask.shape == (n,), f"has_mask of shape ({n},)", tuple(self.has_mask.shape))
        _expect(self.areas.shape == (n,), f"areas of shape ({n},)", tuple(self.areas.shape))
        k = len(self.crowd_boxes)
        _expect(self.crowd_boxes.shape == (k, 4), "crowd_boxes of shape (K, 4)", tuple(self.crowd_boxes.shape))
        if self.boxes.device.type != "cpu":
            return
        flat = (self.boxes[:, 2:] <= self.boxes[:, :2]).any(dim=1)
        if flat.any():
            i = int(flat.nonzero()[0])
            raise ValueError(f"box {i} has no width or height: {self.boxes[i].tolist()}")

    def __len__(self) -> int:
        return len(self.labels)

    def pin_memory(self) -> Targets:
        """In memory that a GPU copies from while Python runs on; torch's loader asks for it."""
        tensors: dict[str, Any] = {
            name: value.pin_memory() for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **tensors)

    def to(self, device: torch.device | str) -> Targets:
        to_gpu = torch.device(device).type != "cpu"  # what comes from there is checked, and must have arrived

        def move(t: Tensor) -> Tensor:
            return t.to(device, non_blocking=to_gpu)

        return Targets(
            boxes=move(self.boxes),
            labels=move(self.labels),
            masks=move(self.masks),
            has_mask=move(self.has_mask),
            areas=move(self.areas),
            image_size=self.image_size,
            crowd_boxes=move(self.crowd_boxes),
        )


class PixelRepresentations(NamedTuple):
    """What the pixel stream says of an image.

    values  (D, h, w) float32 on the CPU: the cells of the mask grid that the image covers
    step    (y, x) pixels of the network's input a cell
    size    (h, w) of the image in the network's input
    """

    values: Tensor
    step: tuple[float, float]
    size: tuple[int, int]


@dataclass
class Objects:
    """The objects found in one image, in pixels of that image, by descending score.

    boxes            (N, 4) float32 xyxy, refined by MBRM (equal to regressed_boxes where that is off)
    regressed_boxes  (N, 4) float32 xyxy, as the object stream gave them
    direct_boxes     (N, 4) float32 xyxy, the enclosing rectangle of the binary mask (Table 4); the regressed
                     box where the mask is empty
    scores           (N,) float32 in 0..1
    labels           (N,) int64, 0..C-1
    edge_std         (N, 4) float32, standard deviation of the left, top, right and bottom edge in pixels;
                     NaN where MBRM is off
    interval         (N, 4, 2) float32, lowest and highest position of each edge's central 95% credible interval, whole
                     pixels; NaN likewise
    masks            N bool tensors (h, w), each the inside of its window, as a rule views of one tensor, which lives as
                     long as any of them; empty list for a model without masks
    windows          (N, 4) int64 x0, y0, x1, y1 (half-open), where each mask lies in the image; always on the CPU,
                     as they say how large the masks are
    anchors          (N,) int64, flat index of the anchor (or point) that found the object
    image_size       (H, W) of the image
    profiles         highest foreground probability of each column (N, W) and row (N, H), which MBRM reads;
                     None without masks
    """

    boxes: Tensor
    regressed_boxes: Tensor
    direct_boxes: Tensor
    scores: Tensor
    labels: Tensor
    edge_std: Tensor
    interval: Tensor
    masks: Sequence[Tensor]
    windows: Tensor
    anchors: Tensor
    image_size: tuple[int, int]
    profiles: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        n = len(self.scores)
        for name in ("boxes", "regressed_boxes", "direct_boxes", "edge_std", "windows"):
            _expect(getattr(self, name).shape == (n, 4), f"{name} of shape ({n}, 4)", tuple(getattr(self, name).shape))
        _expect(self.interval.shape == (n, 4, 2), f"interval of shape ({n}, 4, 2)", tuple(self.interval.shape))
        _expect(len(self.masks) in (0, n), f"{n} masks or none", len(self.masks))
        for mask, (x0, y0, x1, y1) in zip(self.masks, self.windows.tolist(), strict=False):
            _expect(mask.shape == (y1 - y0, x1 - x0), f"a mask of shape ({y1 - y0}, {x1 - x0})", tuple(mask.shape))

    def __len__(self) -> int:
        return len(self.scores)

    def select(self, index: Tensor) -> Objects:
        """The objects of an int64 index, in its order."""
        host = index.cpu()
        return replace(
            self,
            boxes=self.boxes[index],
            regressed_boxes=self.regressed_boxes[index],
            direct_boxes=self.direct_boxes[index],
            scores=self.scores[index],
            labels=self.labels[index],
            edge_std=self.edge_std[index],
            interval=self.interval[index],
            masks=[self.masks[i] for i in host.tolist()] if self.masks else [],
            windows=self.windows[host],
            anchors=self.anchors[index],
            profiles=None if self.profiles is None else (self.profiles[0][index], self.profiles[1][index]),
        )

    def to(self, device: torch.device | str) -> Objects:
        """The same on another device; a GPU that they come from is waited for once."""
        if self.boxes.device == torch.device(device):
            return self
        names = ("boxes", "regressed_boxes", "direct_boxes", "scores", "labels", "edge_std", "interval", "anchors")
        tensors = [*(getattr(self, name) for name in names), *(self.profiles or ()), *self.masks]
        moved = to_host(*tensors) if torch.device(device).type == "cpu" else [t.to(device) for t in tensors]
        boxes_and_more, rest = moved[: len(names)], moved[len(names) :]
        profiles, masks = (None, rest) if self.profiles is None else ((rest[0], rest[1]), rest[2:])
        return replace(self, **dict(zip(names, boxes_and_more, strict=True)), profiles=profiles, masks=list(masks))


def require_threshold(threshold: float) -> None:
    if not 0 <= threshold <= 1:
        raise ValueError(f"expected a threshold between 0 and 1, got {threshold}")


def above(objects: Objects, threshold: float) -> Objects:
    """The objects that score at least `threshold`, 0..1."""
    require_threshold(threshold)
    return objects.select((objects.scores >= threshold).nonzero()[:, 0])
