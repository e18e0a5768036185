"""From the mask grid to the image (3.2, 3.4): crop, upsample, threshold, and the profiles that MBRM reads.

A mask lives in its expanded box, and only that is ever computed: memory grows with the area of the crops, not with
N x H x W. Bilinear resizing is one matrix an axis, whose rows have few entries that are not zero. So crops are cut into
tiles, each a small product of the few cells that it reads, and the tiles of many objects are made at once: a small
object costs little, and a GPU is given few, large tasks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rdsnet.device import to_device

TILE = 32  # pixels a side


class PastedMasks(NamedTuple):
    """Masks of N objects in an image of size (H, W).

    masks         N bool tensors (h, w), the inside of each window; those of `paste_masks` are views of one tensor, in
                  which columns lie one after the other as run-length codes read them
    windows       (N, 4) int64 x0, y0, x1, y1, on the CPU
    columns       (N, W) float32, the highest foreground probability of each column; 0 outside the window (Eq. 4's m)
    rows          (N, H) float32, likewise
    direct_boxes  (N, 4) float32 enclosing rectangles of the masks, NaN where a mask is empty
    """

    masks: list[Tensor]
    windows: Tensor
    columns: Tensor
    rows: Tensor
    direct_boxes: Tensor


class Frame(NamedTuple):
    """Where an image lies in the network input, and under the grid of masks.

    size         (H, W) of the image in the network input, before padding
    output_size  (H, W) of the image that masks are wanted for
    grid         (Hm, Wm) cells of the image's own padding
    step         (y, x) network pixels a cell
    """

    size: tuple[int, int]
    output_size: tuple[int, int]
    grid: tuple[int, int]
    step: tuple[float, float]


class Tiles(NamedTuple):
    """Where each of t tiles belongs, (t,) int64.

    object          its index
    x0, y0, x1, y1  the object's window
    x, y            place in the image, in tiles
    line            where its first column of pixels goes
    step            from one column to the next
    """

    object: Tensor
    x0: Tensor
    y0: Tensor
    x1: Tensor
    y1: Tensor
    x: Tensor
    y: Tensor
    line: Tensor
    step: Tensor

    def lines(self) -> Tensor:
        """(t * TILE,) where the columns go."""
        return (self.line[:, None] + torch.arange(TILE, device=self.line.device) * self.step[:, None]).flatten()


class Layout:
    """Windows cut into tiles of the image, which lie one after the other: by object, then across, then down.

    Sizes are worked out on the CPU, where that does not wait for a GPU.

    Args:
        windows: (N, 4) int64 x0, y0, x1, y1, on the CPU.
        device: where the tiles are wanted.
    """

    def __init__(self, windows: Tensor, device: torch.device) -> None:
        self._corners = windows[:, :2] // TILE
        self._spans = -(-windows[:, 2:] // TILE) - self._corners  # tiles across and down
        counts = self._spans.prod(dim=1)
        self._ends = counts.cumsum(0)
        self._starts = self._ends - counts
        self.total = int(counts.sum())
        facts = (self._corners, self._spans[:, 1:], self._starts[:, None], counts[:, None])
        self._table = to_device(torch.cat([windows, *facts], dim=1), device)
        self._windows = windows
        self.windows = self._table[:, :4]
        # A CPU works from its cache, a GPU wants much to do at a time
        self._objects, self._tiles = (16, 512) if device.type == "cpu" else (64, 8192)

    def groups(self) -> Iterator[slice]:
        """Objects whose maps on the grid are made at once."""
        for n in range(0, len(self._starts), self._objects):
            yield slice(n, min(n + self._objects, len(self._starts)))

    def tiles(self, objects: slice) -> Iterator[Tiles]:
        """The tiles of objects, so many at once."""
        begin, end = int(self._starts[objects.start]), int(self._ends[objects.stop - 1])
        device = self._table.device
        index = torch.arange(objects.start, objects.stop, device=device)
        index = index.repeat_interleave(self._table[objects, -1], output_size=end - begin)
        for first in range(begin, end, self._tiles):
            last = min(first + self._tiles, end)
            own = index[first - begin : last - begin]
            x0, y0, x1, y1, x, y, down, start, _ = self._table.index_select(0, own).unbind(1)
            number = torch.arange(first, last, device=device) - start
            column, row = number // down, number % down
            line = (start + column * down) * TILE + row
            yield Tiles(own, x0, y0, x1, y1, x + column, y + row, line, down)

    def crops(self, bits: Tensor) -> list[Tensor]:
        """The windows' insides: N views (h, w), of the lines (total * TILE, TILE)."""
        crops = []
        flat = bits.flatten()
        facts = torch.cat([self._windows, self._corners * TILE, self._spans * TILE, self._starts[:, None] * TILE**2], 1)
        for x0, y0, x1, y1, left, top, across, down, start in facts.tolist():
            whole = flat[start : start + across * down].view(across, down)
            crops.append(whole[x0 - left : x1 - left, y0 - top : y1 - top].t())
        return crops


def lift(profiles: Tensor, index: Tensor, tile: Tensor, values: Tensor) -> None:
    """Raise entries of (N, T, TILE) profiles to at least the values (t, TILE) of some tiles."""
    flat = (index * profiles.shape[1] + tile)[:, None].expand(-1, TILE)
    profiles.view(-1, TILE).scatter_reduce_(0, flat, values, "amax")


def inside(profiles: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """(N, S) with -inf for the entries that are not low..high-1: there a tile repeats the border of its window."""
    place = torch.arange(profiles.shape[1], device=profiles.device)
    return profiles.masked_fill((place < low[:, None]) | (place >= high[:, None]), -math.inf)


class AxisTiles(NamedTuple):
    """An `axis_matrix` in tiles of `TILE` of its rows, each with the few columns that it reads.

    first    (T,) int64, the first cell that each tile reads
    weights  (T * TILE, K) of each pixel for the K cells of its tile
    """

    first: Tensor
    weights: Tensor

    def reach(self) -> Tensor:
        """(K,) from its first cell, those that a tile reads."""
        return torch.arange(self.weights.shape[1], device=self.first.device)

    def pixels(self, tile: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """(t, TILE, K) the weights of tiles' pixels; those beyond low..high-1 are as the nearest within."""
        pixel = tile[:, None] * TILE + torch.arange(TILE, device=tile.device)
        pixel = pixel.clamp(low[:, None], high[:, None] - 1)
        return self.weights.index_select(0, pixel.flatten()).view(*pixel.shape, -1)


@lru_cache(maxsize=64)  # images of a data set share a few sizes
@torch.inference_mode(False)
def axis_tiles(out_size: int, size: int, cells: int, step: float, two_steps: bool, device: torch.device) -> AxisTiles:
    """`axis_matrix` of these arguments in tiles."""
    matrix = axis_matrix(out_size, size, cells, step, two_steps)
    tiles = F.pad(matrix, (0, 0, 0, -out_size % TILE)).unflatten(0, (-1, TILE))
    first, last = (torch.tensor(cell) for cell in cells_read(tiles.amax(dim=1)))  # the weights are not negative
    reach = int((last - first).max())
    first = first.clamp(max=cells - reach)
    read = first[:, None] + torch.arange(reach)
    weights = tiles.gather(2, read[:, None].expand(-1, TILE, -1)).flatten(0, 1)
    return AxisTiles(to_device(first, device), to_device(weights, device))


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


def extent(present: Tensor) -> Tensor:
    """(N, 2) first and one past the last True of each row of (N, S), as float32; NaN where there is none."""
    first = present.byte().argmax(dim=1)
    last = present.shape[1] - present.flip(1).byte().argmax(dim=1)
    return torch.stack([first, last], dim=1).float().masked_fill(~present.any(dim=1, keepdim=True), math.nan)
