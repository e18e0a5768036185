"""From the mask grid to the image (3.2, 3.4): crop, upsample, threshold, and the profiles that MBRM reads.

A mask lives in its expanded box, and only that is ever computed: memory grows with the area of the crops, not with
N x H x W. Bilinear resizing is one small matrix an axis, so a crop of the resized map is a few of its rows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rdsnet.model.correlation import correlate
from rdsnet.model.cropping import CropRule, crop_windows


class PastedMasks(NamedTuple):
    """Masks of N objects in an image of size (H, W).

    masks         N bool tensors (h, w), the inside of each window
    windows       (N, 4) int64 x0, y0, x1, y1
    columns       (N, W) float32, the highest foreground probability of each column; 0 outside the window (Eq. 4's m)
    rows          (N, H) float32, likewise
    direct_boxes  (N, 4) float32 enclosing rectangles of the masks, NaN where a mask is empty
    """

    masks: list[Tensor]
    windows: Tensor
    columns: Tensor
    rows: Tensor
    direct_boxes: Tensor


def paste_masks(
    vectors: Tensor,
    pixels: Tensor,
    boxes: Tensor,
    *,
    size: tuple[int, int],
    output_size: tuple[int, int],
    step: tuple[float, float],
    expand: float,
    crop_rule: CropRule,
    threshold: float,
    two_steps: bool = False,
) -> PastedMasks:
    """Masks at full resolution, each within its expanded box.

    Args:
        vectors: (N, D), as `correlate` takes them.
        pixels: (D, Hm, Wm) of the padded image.
        boxes: (N, 4) xyxy in pixels of the output.
        size: (H, W) of the image in the network input, before padding.
        output_size: (H, W) of the image that the masks are wanted for.
        step: (y, x) network pixels a cell of the grid.
        expand: 1.2 in the paper.
        threshold: a pixel is foreground above this probability.
        two_steps: resize as the release does, first to the network input (half-pixel), then to the image
            (corners aligned). The product of the two matrices does both at once.
    """
    to_columns = axis_matrix(output_size[1], size[1], pixels.shape[2], step[1], two_steps).to(pixels.device)
    to_rows = axis_matrix(output_size[0], size[0], pixels.shape[1], step[0], two_steps).to(pixels.device)
    column_span, row_span = cells_read(to_columns), cells_read(to_rows)
    windows = crop_windows(boxes, output_size, expand=expand, rule=crop_rule)
    cut = math.log(threshold / (1 - threshold))  # the sigmoid is monotone: logits are thresholded, not probabilities
    masks: list[Tensor] = []
    columns = pixels.new_full((len(boxes), output_size[1]), -math.inf)
    rows = pixels.new_full((len(boxes), output_size[0]), -math.inf)
    for n, (x0, y0, x1, y1) in enumerate(windows.tolist()):
        if x1 == x0:
            masks.append(torch.zeros(0, 0, dtype=torch.bool, device=pixels.device))
            continue
        left, right = column_span[0][x0], column_span[1][x1 - 1]
        top, bottom = row_span[0][y0], row_span[1][y1 - 1]
        grid = correlate(vectors[n : n + 1], pixels[:, top:bottom, left:right])[0]
        logits = to_rows[y0:y1, top:bottom] @ grid @ to_columns[x0:x1, left:right].t()
        masks.append(logits > cut)
        columns[n, x0:x1] = logits.amax(dim=0)
        rows[n, y0:y1] = logits.amax(dim=1)
    direct = torch.stack([*extent(columns > cut), *extent(rows > cut)], dim=1)[:, [0, 2, 1, 3]]
    # Only the profiles are squashed; outside the window they become exactly 0
    return PastedMasks(masks, windows, columns.sigmoid(), rows.sigmoid(), direct)


def axis_matrix(out_size: int, size: int, cells: int, step: float, two_steps: bool) -> Tensor:
    """(out_size, cells) float32 matrix that takes one axis of the mask grid to the image, bilinearly.

    Cell j covers network pixels [j * step, (j + 1) * step), of which the first `size` are the image; positions
    are clamped at the border of the grid, so padding is read beside the image as the network wrote it.
    """
    if not two_steps:
        network = (torch.arange(out_size, dtype=torch.float64) + 0.5) * (size / out_size)
        return _bilinear_matrix(network / step - 0.5, cells).float()
    network = (torch.arange(size, dtype=torch.float64) + 0.5) / step - 0.5
    image = torch.arange(out_size, dtype=torch.float64) * ((size - 1) / max(out_size - 1, 1))
    return (_bilinear_matrix(image, size) @ _bilinear_matrix(network, cells)).float()


def _bilinear_matrix(source: Tensor, cells: int) -> Tensor:
    """(len(source), cells): row i interpolates between the two cells around position source[i]."""
    source = source.clamp(0, cells - 1)
    low = source.floor().long().clamp(max=max(cells - 2, 0))
    weight = source - low
    matrix = torch.zeros(len(source), cells, dtype=source.dtype)
    matrix.scatter_(1, low[:, None], (1 - weight)[:, None])
    if cells > 1:
        matrix.scatter_(1, low[:, None] + 1, weight[:, None])
    return matrix


def cells_read(matrix: Tensor) -> tuple[list[int], list[int]]:
    """First and one past the last cell that each row of an interpolation matrix reads."""
    used = (matrix != 0).byte()
    first = used.argmax(dim=1)
    last = matrix.shape[1] - used.flip(1).argmax(dim=1)
    return first.tolist(), last.tolist()


def extent(present: Tensor) -> tuple[Tensor, Tensor]:
    """First and one past the last True of each row of (N, S), as float32; NaN where there is none."""
    first = present.byte().argmax(dim=1)
    last = present.shape[1] - present.flip(1).byte().argmax(dim=1)
    nothing = ~present.any(dim=1)
    return first.float().masked_fill(nothing, math.nan), last.float().masked_fill(nothing, math.nan)
