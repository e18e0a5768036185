"""What is wrong with what was found: missed objects, false detections, and where masks differ from the truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np

from rdsnet.results.matching import Matches, match_truth
from rdsnet.rle import mask_crop
from rdsnet.structures import Objects
from rdsnet.visualize.overlay import (
    draw_objects,
    draw_truth,
    enlarged,
    legible_scale,
    rectangle,
    require_image,
    stretched,
)
from rdsnet.visualize.sheet import captioned_row, contact_sheet, font_size, legend

SIDE = 600  # pixels; panels of smaller images are enlarged to about this

Colour = tuple[int, int, int]

# Blue for what is lacking, orange for what is too much (Okabe and Ito's colours, which the colour-blind tell apart)
MISSED = (0, 114, 178)

LACKING = (86, 180, 233)

FALSE = (213, 94, 0)

EXCESS = (240, 228, 66)

FOUND = (255, 255, 255)

WRONG = 0.6  # opacity of missed objects and false detections


def draw_errors(
    image: np.ndarray, objects: Objects, record: Any, matches: Matches, *, scale: int | None = None
) -> np.ndarray:
    """Errors in colour over the image in grey; what is right stays grey, with a thin white outline.

    Missed objects are blue, false detections orange; of objects that were found, pixels that the mask lacks are light
    blue, those that it has too many yellow. Objects without masks are boxes.

    Args:
        image: uint8 RGB (H, W, 3).
        objects: found in it, on the CPU.
        record: a `rdsnet.data.ImageRecord`, the truth.
        matches: `match_truth(objects, record)`.
        scale: times that the picture is enlarged; default: 1 to 4, by the size of the image.

    Returns:
        uint8 RGB (H * scale, W * scale, 3).

    Raises:
        ValueError: not such an image, or of another size than the record or the objects.
    """
    require_image(image)
    for whose, size in (("record's", (record.height, record.width)), ("objects'", tuple(objects.image_size))):
        if size != image.shape[:2]:
            raise ValueError(f"expected an image of the {whose} (height, width) {size}, got {image.shape[:2]}")
    times = scale or legible_scale(image)
    grey = stretched(cv2.cvtColor(enlarged(image, times), cv2.COLOR_RGB2GRAY))
    # neither black nor white: each colour differs from every grey that is left
    picture = np.repeat((50 + 0.5 * grey[:, :, None]).astype(np.uint8), 3, axis=2)
    masks = bool(objects.masks) or not len(objects)
    wrong = [(MISSED, _true_shape(record, i, masks)) for i in matches.missed]
    wrong += [(FALSE, _found_shape(objects, i)) for i in matches.false]
    for colour, shape in wrong:
        _paint(picture, shape, times, colour, WRONG)
    for detection, annotation, _ in matches.pairs:
        found, true = _found_shape(objects, detection), _true_shape(record, annotation, masks)
        _outline(picture, found, times, FOUND, 1)
        if found.mask is not None and true.mask is not None:
            _paint(picture, _difference(true, found), times, LACKING, 1.0)
            _paint(picture, _difference(found, true), times, EXCESS, 1.0)
    for colour, shape in wrong:
        _outline(picture, shape, times, colour, 2)
    return picture


class _Shape(NamedTuple):
    """An object: xyxy box, and its mask (None where there is only a box), the inside of a window of the image."""

    box: np.ndarray
    mask: np.ndarray | None
    window: tuple[int, int, int, int]


def _found_shape(objects: Objects, index: int) -> _Shape:
    x0, y0, x1, y1 = objects.windows[index].tolist()
    mask = objects.masks[index].numpy() if objects.masks else None
    return _Shape(objects.boxes[index].numpy().astype(np.float64), mask, (x0, y0, x1, y1))


def _true_shape(record: Any, index: int, masks: bool) -> _Shape:
    annotation = record.annotations[index]
    box = np.array(annotation.box, np.float64)
    if annotation.rle is None or not masks:
        return _Shape(box, None, (0, 0, 0, 0))
    return _Shape(box, *mask_crop(annotation.rle))


def _difference(shape: _Shape, other: _Shape) -> _Shape:
    """The pixels of one mask that are not in the other."""
    assert shape.mask is not None and other.mask is not None
    rest = shape.mask.copy()
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = shape.window, other.window
    x0, y0, x1, y1 = max(ax0, bx0), max(ay0, by0), min(ax1, bx1), min(ay1, by1)
    if x1 > x0 and y1 > y0:
        rest[y0 - ay0 : y1 - ay0, x0 - ax0 : x1 - ax0] &= ~other.mask[y0 - by0 : y1 - by0, x0 - bx0 : x1 - bx0]
    return shape._replace(mask=rest)


def _paint(picture: np.ndarray, shape: _Shape, times: int, colour: Colour, opacity: float) -> None:
    if shape.mask is None:
        return
    x0, y0, x1, y1 = (edge * times for edge in shape.window)
    under = picture[y0:y1, x0:x1]
    inside = shape.mask.repeat(times, axis=0).repeat(times, axis=1)
    under[inside] = ((1 - opacity) * under[inside] + opacity * np.array(colour)).round().astype(np.uint8)


def _outline(picture: np.ndarray, shape: _Shape, times: int, colour: Colour, thickness: int) -> None:
    if shape.mask is None:
        rectangle(picture, shape.box * times, colour, thickness)
        return
    inside = shape.mask.repeat(times, axis=0).repeat(times, axis=1).astype(np.uint8)
    contours, _ = cv2.findContours(inside, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    corner = shape.window[0] * times, shape.window[1] * times
    cv2.drawContours(picture, contours, -1, colour, thickness, offset=corner)


def comparison(
    image: np.ndarray,
    objects: Objects,
    record: Any,
    class_names: Sequence[str],
    *,
    threshold: float = 0.5,
    scale: int | None = None,
) -> np.ndarray:
    """Ground truth, what was found (with a score of at least `threshold`) and its errors, side by side, with captions.

    Args:
        image: uint8 RGB (H, W, 3) of the record's height and width.
        objects: found in it, on the CPU.
        record: a `rdsnet.data.ImageRecord`.
        class_names: by label; written where there are several.
        scale: times that each panel is enlarged; default: 1 to 4, by the size of the image.

    Returns:
        uint8 RGB; the legend of the errors (`draw_errors`) is below them.
    """
    found = objects.select((objects.scores >= threshold).nonzero()[:, 0])
    times = scale or legible_scale(image, SIDE)
    names = class_names if len(class_names) > 1 else [""]
    matches = match_truth(found, record)
    panels = [
        draw_truth(image, record, names, scale=times),
        draw_objects(image, found, names, scale=times),
        draw_errors(image, found, record, matches, scale=times),
    ]
    objects_known = sum(not annotation.crowd for annotation in record.annotations)
    captions = [
        f"truth: {counted(objects_known)}",
        f"found: {counted(len(found))} with a score of at least {threshold:g}",
        f"errors: {len(matches.missed)} missed, {len(matches.false)} false; {_right(matches, found, record)}",
    ]
    size = round(1.5 * font_size(panels[0]))  # the page is three panels wide, and shown smaller
    row = captioned_row(panels, captions, size=size)
    meanings = [(FOUND, "right"), (MISSED, "missed"), (FALSE, "false")]
    if found.masks:
        meanings += [(LACKING, "missing pixels"), (EXCESS, "excess pixels")]
    row[2] = np.concatenate((row[2], legend(meanings, row[2].shape[1], size=size)))
    return contact_sheet(row, columns=3)


def _right(matches: Matches, found: Objects, record: Any) -> str:
    """How many objects were found, and how well."""
    if not matches.pairs:
        return "none right"
    mean = np.mean([iou for _, _, iou in matches.pairs])
    masks = found.masks and all(record.annotations[annotation].rle is not None for _, annotation, _ in matches.pairs)
    return f"{len(matches.pairs)} right, {'mask' if masks else 'box'} IoU {mean:.2f} on average"


def counted(objects: int) -> str:
    """As words: 1 object, 2 objects."""
    return f"{objects} object{'' if objects == 1 else 's'}"
