"""Objects and ground truth over their image: masks, boxes before and after refinement, how sure each edge is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import cv2
import numpy as np
import supervision as sv
from PIL import Image

from rdsnet.results.exchange import to_detections
from rdsnet.rle import mask_crop
from rdsnet.structures import Objects
from rdsnet.visualize.sheet import font_size

PALETTE = sv.ColorPalette.from_hex(
    ["#ff4d4d", "#2fd66b", "#4d8bff", "#ffd21f", "#d65cff", "#1fd9e0", "#ff8c1a", "#b6f03c", "#ff6fb5", "#9a8cff"]
)
COLOURS = np.array([colour.as_rgb() for colour in PALETTE.colors])
CROWD = (160, 160, 160)

LEGIBLE = 40  # more labels than this hide the picture
SIDE = 800  # pixels; pictures of smaller images are enlarged to about this, 4 times at most
TINT = 0.35  # opacity of masks
BAND = 0.5  # opacity of the bands around uncertain edges

Colour: TypeAlias = tuple[int, int, int]

Crop: TypeAlias = tuple[np.ndarray, Sequence[int]]
"""a mask, bool (h, w), and the x and y where it begins; more numbers, such as a window's end, are passed over"""


def draw_objects(
    image: np.ndarray,
    objects: Objects | sv.Detections,
    class_names: Sequence[str],
    *,
    regressed: bool = True,
    masks: bool = True,
    labels: bool = True,
    uncertainty: bool = False,
    scale: int | None = None,
) -> np.ndarray:
    """Objects over their image: tinted masks with contours, refined boxes solid, regressed boxes dashed.

    Args:
        image: uint8 RGB (H, W, 3); it is left as it is.
        objects: found in it, in its pixels.
        class_names: by label.
        regressed: draw the boxes before refinement, where they differ by half a pixel or more.
        masks: draw the masks, where there are any.
        labels: write class and score, up to 40 objects.
        uncertainty: a translucent band around each refined edge, one standard deviation (`edge_std`) to either side.
        scale: times that the picture is enlarged; default: 1 to 4, by the size of the image.

    Returns:
        uint8 RGB (H * scale, W * scale, 3).

    Raises:
        ValueError: not such an image, masks of another size, or no standard deviations to show.
    """
    detections = to_detections(objects, class_names) if isinstance(objects, Objects) else objects
    names = None
    if labels and detections.class_id is not None:
        names = [class_names[id] for id in detections.class_id]
        if detections.confidence is not None:
            names = [f"{name} {score:.2f}".strip() for name, score in zip(names, detections.confidence, strict=True)]
    shown = detections.mask if masks else None
    if shown is not None and tuple(shown.shape[1:]) != image.shape[:2]:
        raise ValueError(f"expected masks of the image's size {image.shape[:2]}, got {tuple(shown.shape[1:])}")
    before = np.asarray(detections.data.get("regressed_xyxy", detections.xyxy))
    return _draw(
        image,
        detections.xyxy,
        # by the boxes before refinement, so that no object changes its colour with it
        COLOURS[distinct_colours(before)],
        crops=_crops(shown),
        names=names,
        scale=scale,
        before=before if regressed else None,
        spread=_edge_std(detections) if uncertainty else None,
    )


def draw_truth(image: np.ndarray, record: Any, class_names: Sequence[str], *, scale: int | None = None) -> np.ndarray:
    """The annotations of an image over it, in the manner of `draw_objects`; crowds are grey.

    Args:
        image: uint8 RGB (H, W, 3) of the record's height and width.
        record: a `rdsnet.data.ImageRecord`.
        class_names: by label.
        scale: as for `draw_objects`.
    """
    require_size(image, (record.height, record.width), "record's")
    annotations = record.annotations
    boxes = np.array([annotation.box for annotation in annotations], np.float64).reshape(-1, 4)
    colours = COLOURS[distinct_colours(boxes)]
    colours[[annotation.crowd for annotation in annotations]] = CROWD
    nothing = np.zeros((0, 0), bool), (0, 0)
    return _draw(
        image,
        boxes,
        colours,
        crops=[nothing if a.rle is None else mask_crop(a.rle) for a in annotations],
        names=[(class_names[a.label] + (" (crowd)" if a.crowd else "")).strip() for a in annotations],
        scale=scale,
    )


def distinct_colours(boxes: np.ndarray) -> np.ndarray:
    """An index into the palette for each box (N, 4), other than its neighbours' as far as the colours go.

    Neighbours are boxes that overlap after each has grown by half of its size.
    """
    reach = (boxes[:, 2:] - boxes[:, :2]) / 4
    near = ((boxes[:, :2] - reach)[:, None] < (boxes[:, 2:] + reach)[None]).all(-1)
    near &= near.T
    chosen = np.zeros(len(boxes), np.int64)
    used = np.zeros(len(PALETTE.colors), np.int64)
    for i in range(len(boxes)):
        taken = np.bincount(chosen[:i][near[i, :i]], minlength=len(used))
        chosen[i] = np.lexsort((used, taken))[0]  # fewest neighbours first, then the least used
        used[chosen[i]] += 1
    return chosen


def require_image(image: np.ndarray) -> None:
    """Raise a ValueError where an array is not a uint8 RGB image."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected a uint8 image of shape (H, W, 3), got {image.dtype} {image.shape}")


def require_size(image: np.ndarray, size: tuple[int, ...], whose: str) -> None:
    """Raise a ValueError where an image is not of this (H, W)."""
    if tuple(size) != image.shape[:2]:
        raise ValueError(f"expected an image of the {whose} (height, width) {tuple(size)}, got {image.shape[:2]}")


def legible_scale(image: np.ndarray, side: int = SIDE) -> int:
    """How often an image is enlarged, 1 to 4, for its longer side to have about `side` pixels."""
    return int(np.clip(np.ceil(side / max(image.shape[:2])), 1, 4))


def enlarged(image: np.ndarray, times: int) -> np.ndarray:
    """A copy, `times` as wide and as high."""
    if times == 1:
        return np.array(image, order="C")
    return cv2.resize(np.ascontiguousarray(image), None, fx=times, fy=times, interpolation=cv2.INTER_CUBIC)


def stretched(image: np.ndarray) -> np.ndarray:
    """An image with its darkest pixels black and its brightest white, where dark ones would show nothing."""
    low, high = np.percentile(image, (0.5, 99.5))
    least = 32  # grey values that differ: stretched by more, noise would be all there is
    low = min(low, 255 - least)
    bright = (image - low) / max(high - low, least)
    return (255 * bright.clip(0, 1)).round().astype(np.uint8)


def _edge_std(detections: sv.Detections) -> np.ndarray:
    spread = detections.data.get("edge_std")
    if len(detections) and (spread is None or np.isnan(np.asarray(spread)).any()):
        raise ValueError("expected edge_std of every object, got none: these objects were not refined by MBRM")
    return np.zeros((0, 4)) if spread is None else np.asarray(spread, np.float64)


def _crops(masks: sv.CompactMask | np.ndarray | None) -> list[Crop]:
    if isinstance(masks, sv.CompactMask):
        return [(masks.crop(i), masks.offsets[i].tolist()) for i in range(len(masks))]
    return [] if masks is None else [(mask, (0, 0)) for mask in masks]


def _draw(
    image: np.ndarray,
    boxes: np.ndarray,
    colours: np.ndarray,
    *,
    crops: Sequence[Crop],
    names: Sequence[str] | None,
    scale: int | None,
    before: np.ndarray | None = None,
    spread: np.ndarray | None = None,
) -> np.ndarray:
    require_image(image)
    times = scale or legible_scale(image)
    picture = enlarged(image, times)
    thickness = max(1, round(max(picture.shape[:2]) / 600))
    boxes = boxes.astype(np.float64)
    # the largest first, so that the small ones lie on top
    order = np.argsort(-((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])), kind="stable")
    for i in order if crops else ():
        crop = enlarged_crop(crops[i], times)
        inside, under = crop[0], under_crop(picture, crop)
        under[inside] = ((1 - TINT) * under[inside] + TINT * colours[i]).astype(np.uint8)
        outline(picture, crop, colours[i].tolist(), 1)
    if spread is not None:
        for i in order:
            _paint_band(picture, boxes[i] * times, spread[i] * times, colours[i])
    for i in order:
        colour = colours[i].tolist()
        if before is not None and np.abs(before[i] - boxes[i]).max() >= 0.5:
            _dashed_rectangle(picture, before[i].astype(np.float64) * times, colour, max(1, thickness // 2))
        rectangle(picture, boxes[i] * times, colour, thickness)
    named = [i for i, name in enumerate(names or ()) if name]
    if names is not None and 0 < len(named) <= LEGIBLE:
        picture = _write(picture, boxes[named] * times, [names[i] for i in named], colours[named])
    return picture


def enlarged_crop(crop: Crop, times: int) -> Crop:
    """A crop of an image in pixels of its enlarged picture."""
    mask, corner = crop
    return mask.repeat(times, axis=0).repeat(times, axis=1), (corner[0] * times, corner[1] * times)


def under_crop(picture: np.ndarray, crop: Crop) -> np.ndarray:
    """The part of the picture that a crop covers, a view."""
    mask, (x, y) = crop
    return picture[y : y + mask.shape[0], x : x + mask.shape[1]]


def outline(picture: np.ndarray, crop: Crop, colour: Sequence[int], thickness: int) -> None:
    mask, corner = crop
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(picture, contours, -1, colour, thickness, offset=corner)


def _paint_band(picture: np.ndarray, box: np.ndarray, spread: np.ndarray, colour: np.ndarray) -> None:
    """The frame between the box with its edges moved outwards, and inwards, by `spread`; to fractions of a pixel."""
    outwards = np.array([-1, -1, 1, 1])
    outer, inner = box + outwards * spread, box - outwards * spread
    height, width = picture.shape[:2]
    x0, y0 = (max(int(np.floor(edge)), 0) for edge in outer[:2])
    x1, y1 = min(int(np.ceil(outer[2])), width), min(int(np.ceil(outer[3])), height)
    covered = [
        np.outer(_coverage(edges[1], edges[3], y0, y1), _coverage(edges[0], edges[2], x0, x1))
        for edges in (outer, inner)
    ]
    opacity = BAND * (covered[0] - covered[1])[:, :, None]
    under = picture[y0:y1, x0:x1]
    under[:] = ((1 - opacity) * under + opacity * colour).round().astype(np.uint8)


def _coverage(low: float, high: float, start: int, stop: int) -> np.ndarray:
    """The share of each pixel start..stop that lies between low and high."""
    pixel = np.arange(start, stop)
    return (np.minimum(pixel + 1, high) - np.maximum(pixel, low)).clip(0, 1)


def _pixels(box: np.ndarray) -> tuple[int, int, int, int]:
    """First and last pixel, in x and y, of a half-open box."""
    x1, y1, x2, y2 = (int(edge) for edge in np.floor(box + 0.5))
    return x1, y1, max(x2 - 1, x1), max(y2 - 1, y1)


def rectangle(picture: np.ndarray, box: np.ndarray, colour: Sequence[int], thickness: int) -> None:
    x1, y1, x2, y2 = _pixels(box)
    for i in range(min(thickness, (x2 - x1) // 2 + 1, (y2 - y1) // 2 + 1)):
        cv2.rectangle(picture, (x1 + i, y1 + i), (x2 - i, y2 - i), colour, 1)


def _dashed_rectangle(picture: np.ndarray, box: np.ndarray, colour: Sequence[int], thickness: int) -> None:
    x1, y1, x2, y2 = _pixels(box)
    dash = 4 + 3 * thickness
    for start in range(x1, x2 + 1, 2 * dash):
        for y in (y1, y2):
            cv2.line(picture, (start, y), (min(start + dash - 1, x2), y), colour, thickness)
    for start in range(y1, y2 + 1, 2 * dash):
        for x in (x1, x2):
            cv2.line(picture, (x, start), (x, min(start + dash - 1, y2)), colour, thickness)


def _write(picture: np.ndarray, boxes: np.ndarray, names: list[str], colours: np.ndarray) -> np.ndarray:
    """Names above the upper left corners of boxes, moved apart and into the picture."""
    annotator = sv.RichLabelAnnotator(
        color=sv.ColorPalette([sv.Color(*colour) for colour in colours.tolist()]),
        text_color=sv.Color.BLACK,
        font_size=font_size(picture),
        text_padding=max(2, font_size(picture) // 5),
        smart_position=True,
    )
    detections = sv.Detections(xyxy=boxes)
    written = annotator.annotate(Image.fromarray(picture), detections, names, np.arange(len(names)))
    return np.array(written)
