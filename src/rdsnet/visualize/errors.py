"""What is wrong with what was found: missed objects, false detections, and where masks differ from the truth."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import Any, NamedTuple

import cv2
import numpy as np

from rdsnet.results.exchange import pack
from rdsnet.results.matching import Matches, match_truth
from rdsnet.rle import Rle, mask_crop, rasterise
from rdsnet.structures import Objects, above
from rdsnet.visualize.overlay import (
    Colour,
    Crop,
    draw_objects,
    draw_truth,
    enlarged,
    enlarged_crop,
    legible_scale,
    outline,
    rectangle,
    require_image,
    require_size,
    stretched,
    under_crop,
)
from rdsnet.visualize.sheet import captioned_row, contact_sheet, font_size, legend

SIDE = 600  # pixels; panels of smaller images are enlarged to about this

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
    require_size(image, (record.height, record.width), "record's")
    require_size(image, objects.image_size, "objects'")
    times = scale or legible_scale(image)
    grey = stretched(cv2.cvtColor(enlarged(image, times), cv2.COLOR_RGB2GRAY))
    # neither black nor white: each colour differs from every grey that is left
    picture = np.repeat((50 + 0.5 * grey[:, :, None]).astype(np.uint8), 3, axis=2)
    packed = pack(objects)
    masks = packed.rles is not None
    found = [_Shape(*shape) for shape in zip(packed.boxes["refined"], packed.rles or repeat(None), strict=False)]
    true = [_Shape(np.array(a.box), a.rle if masks else None) for a in record.annotations]
    wrong = [(MISSED, true[i]) for i in matches.missed] + [(FALSE, found[i]) for i in matches.false]
    for colour, shape in wrong:
        if shape.rle is not None:
            _paint(picture, enlarged_crop(mask_crop(shape.rle), times), colour, WRONG)
    for detection, annotation, _ in matches.pairs:
        ours, theirs = found[detection], true[annotation]
        _outline(picture, ours, times, FOUND, 1)
        if ours.rle is not None and theirs.rle is not None:
            _paint(picture, enlarged_crop(_difference(theirs.rle, ours.rle), times), LACKING, 1.0)
            _paint(picture, enlarged_crop(_difference(ours.rle, theirs.rle), times), EXCESS, 1.0)
    for colour, shape in wrong:
        _outline(picture, shape, times, colour, 2)
    return picture


class _Shape(NamedTuple):
    """An object: xyxy box, and its mask; None where there is only a box."""

    box: np.ndarray
    rle: Rle | None


def _difference(mask: Rle, other: Rle) -> Crop:
    """The pixels of one mask that are not in the other."""
    inside, window = mask_crop(mask)
    return inside & ~rasterise(other, window, (mask["size"][0], mask["size"][1])), window


def _paint(picture: np.ndarray, crop: Crop, colour: Colour, opacity: float) -> None:
    inside, under = crop[0], under_crop(picture, crop)
    under[inside] = ((1 - opacity) * under[inside] + opacity * np.array(colour)).round().astype(np.uint8)


def _outline(picture: np.ndarray, shape: _Shape, times: int, colour: Colour, thickness: int) -> None:
    if shape.rle is None:
        rectangle(picture, shape.box.astype(np.float64) * times, colour, thickness)
    else:
        outline(picture, enlarged_crop(mask_crop(shape.rle), times), colour, thickness)


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
    found = above(objects, threshold)
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
