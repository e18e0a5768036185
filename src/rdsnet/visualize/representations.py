"""Pixel representations as colours (figure 3): pixels of one object look alike, and unlike those of its neighbours."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rdsnet.structures import PixelRepresentations
from rdsnet.visualize.overlay import enlarged, legible_scale, require_image
from rdsnet.visualize.sheet import captioned_row, contact_sheet


def to_sphere(vectors: Tensor) -> Tensor:
    """Representations (M, D) reduced to three numbers and brought to length 1: (M, 3).

    The three directions hold most of the representations' directions. They pass through the origin, as the inner
    products of Eq. 1 do.
    """
    directions = F.normalize(vectors, dim=1)
    _, _, axes = torch.linalg.svd(directions, full_matrices=False)
    return F.normalize(directions @ axes[:3].T, dim=1)


def pixel_colours(grid: PixelRepresentations, image_size: tuple[int, int]) -> np.ndarray:
    """The pixel representations of an image of (H, W) as colours, in its size: uint8 RGB (H, W, 3)."""
    reduced = to_sphere(grid.values.flatten(1).T)
    # an axis may point either way: what is rarer, the objects more often than not, becomes bright
    reduced = reduced * torch.where((reduced - reduced.mean(dim=0)).pow(3).sum(dim=0) < 0, -1, 1)
    rows, columns = grid.values.shape[1:]
    colours = (reduced.reshape(rows, columns, 3).numpy() + 1) / 2
    height, width = grid.size
    covered = cv2.resize(colours, (round(columns * grid.step[1]), round(rows * grid.step[0])))[:height, :width]
    shown = cv2.resize(covered, image_size[::-1], interpolation=cv2.INTER_AREA)
    return (255 * shown).round().clip(0, 255).astype(np.uint8)


def draw_representations(
    represent: Callable[[np.ndarray], PixelRepresentations], image: np.ndarray, *, scale: int | None = None
) -> np.ndarray:
    """An image, and its pixel representations as colours beside it.

    Representations are reduced to the three directions that hold most of them, which become red, green and blue:
    the colours mean nothing by themselves, pixels of one colour look alike to the objects' representations.

    Args:
        represent: gives the representations of an image, as `rdsnet.load(...).pixel_representations` does.
        image: uint8 RGB (H, W, 3).
        scale: times that each picture is enlarged; default: 1 to 4, by the size of the image.

    Returns:
        uint8 RGB, both with captions.

    Raises:
        ValueError: not such an image, or a model without masks.
    """
    require_image(image)
    times = scale or legible_scale(image)
    grid = represent(image)
    colours = pixel_colours(grid, (image.shape[0], image.shape[1]))
    captions = ["image", f"pixel representations: {len(grid.values)} numbers a pixel, reduced to three, as colours"]
    return contact_sheet(captioned_row([enlarged(image, times), enlarged(colours, times)], captions), columns=2)
