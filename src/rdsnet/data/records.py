"""What a data set is made of, whatever format it came in: images, their objects, and what is wrong with them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from rdsnet.rle import Rle

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a data set.

    severity  "error": training refuses; "warning": it is mended
    where     the file: the JSON or an image
    id        of the image, annotation or category; None for the file as a whole
    what      what is wrong
    action    what is done about it
    """

    severity: Literal["error", "warning"]
    where: str
    id: object
    what: str
    action: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.where}: {self.what} ({self.action})"


@dataclass(frozen=True, slots=True)
class Annotation:
    """One object of an image, in pixels of the image.

    id     as in the JSON (a new one where it was missing or taken)
    label  0..C-1
    box    x1, y1, x2, y2, continuous and half-open, inside the image, x2 > x1 and y2 > y1
    rle    compressed COCO RLE, or None where there is only a box
    area   pixels, as in the JSON; where that has none, of the mask or box
    crowd  a region of many objects (iscrowd)
    given  x, y, width, height as in the JSON, where the box is not exactly this
    """

    id: int | str
    label: int
    box: Box
    rle: Rle | None
    area: float
    crowd: bool
    given: Box | None = None

    @property
    def bbox(self) -> Box:
        """x, y, width, height: what COCO's metrics compare with, to the last digit."""
        x1, y1, x2, y2 = self.box
        return self.given or (x1, y1, x2 - x1, y2 - y1)


@dataclass
class ImageRecord:
    """An image and its objects.

    height, width  as the JSON has them
    annotations    in the order of the JSON
    unusable       annotations without a mask whose box is empty or outside of the image: nothing can be learnt from
                   them, but COCO's metrics count them as objects
    entry          the image in the JSON, with whatever else that says of it
    """

    id: int | str
    path: Path
    height: int
    width: int
    annotations: list[Annotation] = field(default_factory=list)
    unusable: list[Annotation] = field(default_factory=list)
    entry: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.height, self.width

    def objects(self, *, masks: bool = False) -> list[Annotation]:
        """The annotations without crowds; `masks`: and without those that are only boxes."""
        return [a for a in self.annotations if not (a.crowd or (masks and a.rle is None))]

    def truth(self, *, masks: bool = False) -> tuple[Tensor, Tensor]:
        """Boxes (K, 4) float32 xyxy and labels (K,) int64 of `objects`."""
        objects = self.objects(masks=masks)
        boxes = torch.tensor([a.box for a in objects], dtype=torch.float32).view(-1, 4)
        return boxes, torch.tensor([a.label for a in objects], dtype=torch.int64)

    @cached_property
    def apply_exif(self) -> bool:
        """False where height and width match only the stored orientation; reads the image's header when first asked.

        Raises:
            FileNotFoundError: no such image.
            ValueError: not an image, or of another size.
        """
        stored, upright = image_sizes(self.path)
        if (self.height, self.width) == upright:
            return True
        if (self.height, self.width) == stored:
            return False
        height, width = upright
        raise ValueError(
            f"{self.path}: image {self.id!r} is {width} x {height} pixels; the JSON says {self.width} x {self.height}"
        )

    def read(self) -> np.ndarray:
        """uint8 RGB (height, width, 3), turned as its annotations are; raises as `apply_exif`."""
        return read_image(self.path, apply_exif=self.apply_exif)


# What Pillow's decoders raise on files that are broken or of another kind (UnidentifiedImageError is an OSError).
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)

_EXIF_ORIENTATION = 0x0112


def read_image(path: str | Path, apply_exif: bool = True) -> np.ndarray:
    """The image of a file.

    Greyscale is repeated in the three channels, 16-bit values keep their high byte, transparency is dropped. Pillow
    and not OpenCV, because OpenCV fills what is missing of a truncated JPEG with grey and says nothing.

    Args:
        path: any format of Pillow; the first frame of an animation.
        apply_exif: turn the image as its EXIF orientation says; False gives it as it is stored.

    Returns:
        uint8 RGB (H, W, 3).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not an image, is damaged, or holds floating-point values.
    """
    with _opened(path) as image:
        return np.array(_to_rgb(ImageOps.exif_transpose(image) if apply_exif else image))


def image_sizes(path: str | Path) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) as stored and after the EXIF orientation, from the header alone; raises as `read_image`."""
    with _opened(path) as image:
        width, height = image.size
        turned = image.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
    return (height, width), (width, height) if turned else (height, width)


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """A file's image; what goes wrong while it is read is told as `read_image` says."""
    if not Path(path).is_file():
        what = "a folder, expected an image file" if Path(path).is_dir() else "image file not found"
        raise FileNotFoundError(f"{path}: {what}")
    try:
        with Image.open(path) as image:
            yield image
    except _BROKEN as error:
        raise ValueError(f"{path}: cannot be read as an image: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers; expected 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits, which `convert` would clip to 255
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P":  # by way of RGBA, where a palette has transparent entries
        image = image.convert("RGBA")
    return image.convert("RGB")
