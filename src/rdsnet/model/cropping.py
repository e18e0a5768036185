"""Cropping with expanded boxes (3.2): one function for training and inference."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rdsnet.device import to_device

CropRule = Literal["centre", "truncate"]


def expand_boxes(boxes: Tensor, expand: float) -> Tensor:
    """Scale (N, 4) xyxy boxes about their centres, `expand` times in width and height (1.5 or 1.2 in the paper)."""
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2 * expand
    return torch.cat([centre - half, centre + half], dim=1)


def resize_boxes(boxes: Tensor, scale: tuple[float, float], *, inclusive: bool = False) -> Tensor:
    """Multiply (N, 4) xyxy boxes by (x, y) scales; `inclusive` scales the last pixel as the release does."""
    x, y = boxes[:, 0::2], boxes[:, 1::2]  # low and high of each axis
    if inclusive:
        last = torch.arange(2, device=boxes.device)  # a high corner of the release's is ours less one
        sides = [(x - last) * scale[0] + last, (y - last) * scale[1] + last]
    else:
        sides = [x * scale[0], y * scale[1]]
    return torch.stack(sides, dim=2).flatten(1)


def clip_boxes(boxes: Tensor, size: tuple[int, int], *, inclusive: bool = False) -> Tensor:
    """(N, 4) xyxy boxes within an image of (H, W); `inclusive` leaves at least one pixel, as the release does."""
    height, width = size
    reach = int(inclusive)
    x1, y1, x2, y2 = boxes.unbind(1)
    low = [x1.clamp(0, width - reach), y1.clamp(0, height - reach)]
    return torch.stack([*low, x2.clamp(reach, width), y2.clamp(reach, height)], dim=1)


def crop_windows(
    boxes: Tensor,
    size: tuple[int, int],
    *,
    expand: float,
    rule: CropRule = "centre",
    step: tuple[float, float] = (1, 1),
) -> Tensor:
    """The cells of a map that lie in the expanded boxes.

    Args:
        boxes: (N, 4) float xyxy in pixels.
        size: (h, w) of the map.
        step: (y, x) pixels a cell of the map.
        expand: factor on width and height, 1 for the box itself.
        rule: "centre" takes the cells whose centre lies inside; "truncate" is the release's rule: at least one cell
            is added on each side (unless expand is 1), corners are truncated in its inclusive coordinates
            and the last column and row are left out.

    Returns:
        (N, 4) int64 x0, y0, x1, y1, half-open and inside the map; a crop without cells is (0, 0, 0, 0).
    """
    boxes = resize_boxes(boxes, (1 / step[1], 1 / step[0]), inclusive=rule == "truncate")
    if rule == "centre":
        corners = (expand_boxes(boxes, expand) - 0.5).ceil()
    elif rule == "truncate":
        corners = _release_corners(boxes, size, (expand - 1) / 2)
    else:
        raise ValueError(f"unknown crop rule {rule!r}; valid are centre, truncate")
    height, width = size
    windows = torch.empty_like(corners)
    windows[:, 0::2] = corners[:, 0::2].clamp(0, width)
    windows[:, 1::2] = corners[:, 1::2].clamp(0, height)
    windows = torch.where((windows[:, 2:] > windows[:, :2]).all(dim=1, keepdim=True), windows, 0)
    return windows.long()


def _release_corners(boxes: Tensor, size: tuple[int, int], padding: float) -> Tensor:
    low = torch.minimum(boxes[:, :2], boxes[:, 2:] - 1)
    high = torch.maximum(boxes[:, :2], boxes[:, 2:] - 1)  # the release's inclusive x2 is ours less one
    if padding > 0:
        margin = (padding * (high - low + 1)).clamp(min=1)
        limit = to_device(torch.tensor([size[1], size[0]], dtype=boxes.dtype), boxes.device)
        low, high = (low - margin).clamp(min=0), torch.minimum(high + margin, limit)
    return torch.cat([low, high], dim=1).trunc()
