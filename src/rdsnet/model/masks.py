"""From the mask grid to the image (3.2, 3.4): crop, upsample, threshold, and the profiles that MBRM reads.

A mask lives in its expanded box, and only that is ever computed: memory grows with the area of the crops, not with
N x H x W. Bilinear resizing is one small matrix an axis, and its rows have few entries that are not zero, so a crop of
the resized map is a few small products.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rdsnet.model.correlation import correlate
from rdsnet.model.cropping import CropRule, crop_windows

BLOCK = 32  # pixels of an axis that are resized by one product
OBJECTS = 16  # whose maps on the grid are made at once


class PastedMasks(NamedTuple):
    """Masks of N objects in an image of size (H, W).

    masks         N bool tensors (h, w), the inside of each window, stored column by column as run-length codes read
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
    to_columns = axis_resizing(output_size[1], size[1], pixels.shape[2], step[1], two_steps, pixels.device)
    to_rows = axis_resizing(output_size[0], size[0], pixels.shape[1], step[0], two_steps, pixels.device)
    windows = crop_windows(boxes, output_size, expand=expand, rule=crop_rule)
    cut = math.log(threshold / (1 - threshold))  # the sigmoid is monotone: logits are thresholded, not probabilities
    masks: list[Tensor] = []
    columns = pixels.new_full((len(boxes), output_size[1]), -math.inf)
    rows = pixels.new_full((len(boxes), output_size[0]), -math.inf)
    for n, (x0, y0, x1, y1) in enumerate(windows.tolist()):
        if n % OBJECTS == 0:  # cutting the crops out of the representations would cost more than whole maps do
            grids = correlate(vectors[n : n + OBJECTS], pixels)
        if x1 == x0:
            masks.append(torch.zeros(0, 0, dtype=torch.bool, device=pixels.device))
            continue
        left, right = to_columns.span(x0, x1)
        part = to_rows.resize(grids[n % OBJECTS, :, left:right], y0, y1)
        logits = to_columns.resize(part.t().contiguous(), x0, x1, left)  # (w, h)
        masks.append((logits > cut).t())
        columns[n, x0:x1] = logits.amax(dim=1)
        rows[n, y0:y1] = logits.amax(dim=0)
    direct = torch.stack([*extent(columns > cut), *extent(rows > cut)], dim=1)[:, [0, 2, 1, 3]]
    # Only the profiles are squashed; outside the window they become exactly 0
    return PastedMasks(masks, windows, columns.sigmoid(), rows.sigmoid(), direct)


class AxisResizing(NamedTuple):
    """An `axis_matrix` in blocks of `BLOCK` of its rows, each with the few columns that it reads.

    cells    (T, K) int64, the cells that a block reads
    weights  (T, BLOCK, K)
    first    first cell of each block
    """

    cells: Tensor
    weights: Tensor
    first: list[int]

    def span(self, low: int, high: int) -> tuple[int, int]:
        """First and one past the last cell that `resize` reads for pixels low..high-1."""
        return self.first[low // BLOCK], self.first[(high - 1) // BLOCK] + self.cells.shape[1]

    def resize(self, cells: Tensor, low: int, high: int, first: int = 0) -> Tensor:
        """Rows low..high-1 of the matrix times a part of its operand: (cells, m) -> (high - low, m).

        `first` is the cell that the part begins with.
        """
        blocks = slice(low // BLOCK, (high - 1) // BLOCK + 1)
        pixels = torch.bmm(self.weights[blocks], cells[self.cells[blocks] - first]).flatten(0, 1)
        skipped = blocks.start * BLOCK
        return pixels[low - skipped : high - skipped]


@lru_cache(maxsize=64)  # images of a data set share a few sizes
@torch.inference_mode(False)
def axis_resizing(
    out_size: int, size: int, cells: int, step: float, two_steps: bool, device: torch.device
) -> AxisResizing:
    """`axis_matrix` of these arguments in blocks."""
    matrix = axis_matrix(out_size, size, cells, step, two_steps)
    blocks = F.pad(matrix, (0, 0, 0, -out_size % BLOCK)).unflatten(0, (-1, BLOCK))
    first, last = cells_read(blocks.amax(dim=1))  # the weights are not negative
    reach = max(end - start for start, end in zip(first, last, strict=True))
    first = [min(start, cells - reach) for start in first]
    read = torch.tensor(first)[:, None] + torch.arange(reach)
    weights = blocks.gather(2, read[:, None].expand(-1, BLOCK, -1)).contiguous()
    return AxisResizing(read.to(device), weights.to(device), first)


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
