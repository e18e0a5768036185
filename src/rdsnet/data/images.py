"""Image files as 8-bit RGB arrays, turned upright exactly once."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

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
    try:
        with _open(path) as image:
            upright = ImageOps.exif_transpose(image) if apply_exif else image
            return np.array(_to_rgb(upright))
    except FileNotFoundError:
        raise
    except _BROKEN as error:
        raise ValueError(f"{path}: cannot be read as an image: {error}") from error


def image_sizes(path: str | Path) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) as stored and after the EXIF orientation, from the header alone; raises as `read_image`."""
    try:
        with _open(path) as image:
            width, height = image.size
            turned = image.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
    except FileNotFoundError:
        raise
    except _BROKEN as error:
        raise ValueError(f"{path}: cannot be read as an image: {error}") from error
    return (height, width), (width, height) if turned else (height, width)


def _open(path: str | Path) -> Any:
    if not Path(path).is_file():
        what = "a folder, expected an image file" if Path(path).is_dir() else "image file not found"
        raise FileNotFoundError(f"{path}: {what}")
    return Image.open(path)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers; expected 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits, which `convert` would clip to 255
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P":  # by way of RGBA, where a palette has transparent entries
        image = image.convert("RGBA")
    return image.convert("RGB")
