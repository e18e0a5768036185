"""Pixel representations as colours (figure 3): pixels of one object look alike, and unlike those of its neighbours."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rdsnet.data.loading import pad_images
from rdsnet.data.transforms import padding_multiple
from rdsnet.visualize.overlay import enlarged, legible_scale, require_image
from rdsnet.visualize.sheet import captioned_row, contact_sheet

if TYPE_CHECKING:
    from rdsnet.predict.predictor import Predictor


def to_sphere(vectors: Tensor) -> Tensor:
    """Representations (M, D) reduced to three numbers and brought to length 1: (M, 3).

    The three directions hold most of the representations' directions. They pass through the origin, as the inner
    products of Eq. 1 do.
    """
    directions = F.normalize(vectors, dim=1)
    _, _, axes = torch.linalg.svd(directions, full_matrices=False)
    return F.normalize(directions @ axes[:3].T, dim=1)


@torch.inference_mode()
def pixel_colours(predictor: Predictor, image: np.ndarray) -> np.ndarray:
    """The pixel representations of an image as colours, in its size: uint8 RGB (H, W, 3).

    Raises:
        ValueError: the model has no pixel stream.
    """
    model, resized = predictor.model, predictor.resize(image)
    height, width = resized.shape[1:]
    batch = pad_images([resized], padding_multiple(predictor.config.data)).to(predictor.device)
    _, pixels = model(model.normalise(batch, [(height, width)]))
    if pixels is None:
        raise ValueError("this model has no pixel stream: it finds boxes without masks")
    # the image ends inside the grid: the cells of the padding are no part of the picture
    cells = [-(-side * pixels.shape[2 + axis] // batch.shape[2 + axis]) for axis, side in enumerate((height, width))]
    grid = pixels[0, :, : cells[0], : cells[1]].float().cpu()
    reduced = to_sphere(grid.flatten(1).T)
    # an axis may point either way: what is rarer, the objects more often than not, becomes bright
    reduced = reduced * torch.where((reduced - reduced.mean(dim=0)).pow(3).sum(dim=0) < 0, -1, 1)
    colours = (reduced.reshape(*cells, 3).numpy() + 1) / 2
    step = [batch.shape[2 + axis] / pixels.shape[2 + axis] for axis in (0, 1)]
    to_network = cv2.resize(colours, (round(cells[1] * step[1]), round(cells[0] * step[0])))[:height, :width]
    shown = cv2.resize(to_network, (image.shape[1], image.shape[0]), interpolation=cv2.INTER_AREA)
    return (255 * shown).round().clip(0, 255).astype(np.uint8)


def draw_representations(predictor: Predictor, image: np.ndarray, *, scale: int | None = None) -> np.ndarray:
    """An image, and its pixel representations as colours beside it.

    Representations are reduced to the three directions that hold most of them, which become red, green and blue:
    the colours mean nothing by themselves, pixels of one colour look alike to the objects' representations.

    Args:
        predictor: from `rdsnet.load`.
        image: uint8 RGB (H, W, 3).
        scale: times that each picture is enlarged; default: 1 to 4, by the size of the image.

    Returns:
        uint8 RGB, both with captions.

    Raises:
        ValueError: not such an image, or a model without masks.
    """
    require_image(image)
    times = scale or legible_scale(image)
    pictures = [enlarged(image, times), enlarged(pixel_colours(predictor, image), times)]
    size = predictor.config.model.representation
    captions = ["image", f"pixel representations: {size} numbers a pixel, reduced to three, as colours"]
    return contact_sheet(captioned_row(pictures, captions), columns=2)
