"""Pages of pictures: rows and columns, captions above, legends below."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP = 8  # pixels between pictures


def contact_sheet(pictures: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Pictures in rows of `columns`, on white; each row is as high, each column as wide as its largest picture.

    Raises:
        ValueError: no pictures, or less than one column.
    """
    if not pictures or columns < 1:
        raise ValueError(f"expected pictures and at least 1 column, got {len(pictures)} and {columns}")
    heights = [max(p.shape[0] for p in pictures[i : i + columns]) for i in range(0, len(pictures), columns)]
    widths = [max(p.shape[1] for p in pictures[i::columns]) for i in range(min(columns, len(pictures)))]
    tops = np.cumsum([0, *(height + GAP for height in heights)])
    lefts = np.cumsum([0, *(width + GAP for width in widths)])
    sheet = np.full((tops[-1] - GAP, lefts[-1] - GAP, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = tops[i // columns], lefts[i % columns]
        sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return sheet


def captioned(picture: np.ndarray, caption: str, *, size: int | None = None) -> np.ndarray:
    """A picture with a line of text above it, or several where it is narrow.

    Args:
        picture: uint8 RGB (H, W, 3).
        size: of the font, pixels; default: by the size of the picture.
    """
    return captioned_row([picture], [caption], size=size)[0]


def captioned_row(
    pictures: Sequence[np.ndarray], captions: Sequence[str], *, size: int | None = None
) -> list[np.ndarray]:
    """Pictures of one row with text above them, which takes as many lines above each."""
    sizes = [size or font_size(picture) for picture in pictures]
    wrapped = [
        _wrap(caption, ImageFont.load_default(size), picture.shape[1] - size)
        for picture, caption, size in zip(pictures, captions, sizes, strict=True)
    ]
    lines = max(len(text) for text in wrapped)
    result = []
    for picture, text, height in zip(pictures, wrapped, sizes, strict=True):
        bar = Image.new("RGB", (picture.shape[1], 2 * height + (lines - 1) * _line(height)), "white")
        draw = ImageDraw.Draw(bar)
        for i, words in enumerate(text):
            place = (height // 2, height + i * _line(height))
            draw.text(place, words, "black", ImageFont.load_default(height), anchor="lm")
        result.append(np.concatenate((np.asarray(bar), picture)))
    return result


def legend(entries: Sequence[tuple[tuple[int, int, int], str]], width: int, *, size: int) -> np.ndarray:
    """Patches of colour with their meanings, in as many rows as they need.

    Args:
        entries: RGB and text.
        width: of the result, pixels.
        size: of the font, pixels.

    Returns:
        uint8 RGB (H, width, 3), on white.
    """
    font = ImageFont.load_default(size)
    places, x, y = [], size // 2, 0
    for _, text in entries:
        needed = round(1.5 * size + font.getlength(text))
        if x > size // 2 and x + needed > width:
            x, y = size // 2, y + 1
        places.append((x, y))
        x += needed + size
    bar = Image.new("RGB", (width, 2 * size + y * _line(size)), "white")
    draw = ImageDraw.Draw(bar)
    for (colour, text), (x, row) in zip(entries, places, strict=True):
        middle = size + row * _line(size)
        draw.rectangle((x, middle - size // 2, x + size - 1, middle + size // 2), colour, (128, 128, 128))
        draw.text((x + 1.4 * size, middle), text, "black", font, anchor="lm")
    return np.asarray(bar)


def font_size(picture: np.ndarray) -> int:
    """Pixels, for text on a picture of this size."""
    return max(12, round(max(picture.shape[:2]) / 65))


def _line(size: int) -> int:
    return round(1.3 * size)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".lstrip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
