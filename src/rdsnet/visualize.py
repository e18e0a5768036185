"""Pictures of objects and ground truth: masks, refined boxes, and the boxes before refinement.

Pictures are uint8 RGB arrays (H, W, 3). Small images are enlarged, so that lines do not hide objects. Coordinates are
half-open: a box's line runs inside it, on its first and last pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import supervision as sv
from PIL import Image, ImageDraw, ImageFont

from rdsnet.data.rle import mask_box, rasterise
from rdsnet.detections import compact_mask, to_detections
from rdsnet.structures import Objects

PALETTE = sv.ColorPalette.from_hex(
    ["#ff4d4d", "#2fd66b", "#4d8bff", "#ffd21f", "#d65cff", "#1fd9e0", "#ff8c1a", "#b6f03c", "#ff6fb5", "#9a8cff"]
)
COLOURS = np.array([colour.as_rgb() for colour in PALETTE.colors])
CROWD = (160, 160, 160)

LEGIBLE = 40  # more labels than this hide the picture
SIDE = 800  # pixels; pictures of smaller images are enlarged to about this, 4 times at most
TINT = 0.35  # opacity of masks


def draw_objects(
    image: np.ndarray,
    objects: Objects | sv.Detections,
    class_names: Sequence[str],
    *,
    regressed: bool = True,
    masks: bool = True,
    labels: bool = True,
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
        scale: times that the picture is enlarged; default: 1 to 4, by the size of the image.

    Returns:
        uint8 RGB (H * scale, W * scale, 3).

    Raises:
        ValueError: not such an image, or masks of another size.
    """
    detections = to_detections(objects, class_names) if isinstance(objects, Objects) else objects
    names = None
    if labels and detections.class_id is not None:
        names = [class_names[id] for id in detections.class_id]
        if detections.confidence is not None:
            names = [f"{name} {score:.2f}" for name, score in zip(names, detections.confidence, strict=True)]
    before = detections.data.get("regressed_xyxy") if regressed else None
    return _draw(
        image,
        boxes=np.asarray(detections.xyxy, np.float64),
        before=None if before is None else np.asarray(before, np.float64),
        masks=detections.mask if masks else None,
        names=names,
        colours=COLOURS[distinct_colours(detections.xyxy)],
        scale=scale,
    )


def draw_truth(image: np.ndarray, record: Any, class_names: Sequence[str], *, scale: int | None = None) -> np.ndarray:
    """The annotations of an image over it, in the manner of `draw_objects`; crowds are grey.

    Args:
        image: uint8 RGB (H, W, 3) of the record's height and width.
        record: a `rdsnet.data.ImageRecord`.
        class_names: by label.
        scale: as for `draw_objects`.
    """
    size = (record.height, record.width)
    annotations = record.annotations
    boxes = np.array([annotation.box for annotation in annotations], np.float64).reshape(-1, 4)
    windows = np.array([(0, 0, 0, 0) if a.rle is None else mask_box(a.rle) for a in annotations], int).reshape(-1, 4)
    crops = [
        np.zeros((0, 0), bool) if a.rle is None else rasterise(a.rle, (x0, y0, x1, y1), size)
        for a, (x0, y0, x1, y1) in zip(annotations, windows.tolist(), strict=True)
    ]
    colours = COLOURS[distinct_colours(boxes)]
    colours[[annotation.crowd for annotation in annotations]] = CROWD
    return _draw(
        image,
        boxes=boxes,
        before=None,
        masks=compact_mask(crops, windows, size),
        names=[class_names[a.label] + (" (crowd)" if a.crowd else "") for a in annotations],
        colours=colours,
        scale=scale,
    )


def comparison(
    image: np.ndarray,
    objects: Objects,
    record: Any,
    class_names: Sequence[str],
    *,
    threshold: float = 0.5,
    scale: int | None = None,
) -> np.ndarray:
    """Ground truth on the left, what was found (with a score of at least `threshold`) on the right, with captions."""
    found = objects.select((objects.scores >= threshold).nonzero()[:, 0])
    pictures = (
        draw_truth(image, record, class_names, scale=scale),
        draw_objects(image, found, class_names, scale=scale),
    )
    captions = (
        f"truth: {_count(len(record.annotations))}",
        f"found: {_count(len(found))} with a score of at least {threshold:g}",
    )
    return contact_sheet([captioned(*pair) for pair in zip(pictures, captions, strict=True)], columns=2)


def contact_sheet(pictures: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Pictures in rows of `columns`, on white; each row is as high, each column as wide as its largest picture.

    Raises:
        ValueError: no pictures, or less than one column.
    """
    if not pictures or columns < 1:
        raise ValueError(f"expected pictures and at least 1 column, got {len(pictures)} and {columns}")
    gap = 8
    heights = [max(p.shape[0] for p in pictures[i : i + columns]) for i in range(0, len(pictures), columns)]
    widths = [max(p.shape[1] for p in pictures[i::columns]) for i in range(min(columns, len(pictures)))]
    tops = np.cumsum([0, *(height + gap for height in heights)])
    lefts = np.cumsum([0, *(width + gap for width in widths)])
    sheet = np.full((tops[-1] - gap, lefts[-1] - gap, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = tops[i // columns], lefts[i % columns]
        sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return sheet


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


def _draw(
    image: np.ndarray,
    *,
    boxes: np.ndarray,
    before: np.ndarray | None,
    masks: sv.CompactMask | np.ndarray | None,
    names: list[str] | None,
    colours: np.ndarray,
    scale: int | None,
) -> np.ndarray:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected a uint8 image of shape (H, W, 3), got {image.dtype} {image.shape}")
    if masks is not None and tuple(masks.shape[1:]) != image.shape[:2]:
        raise ValueError(f"expected masks of the image's size {image.shape[:2]}, got {tuple(masks.shape[1:])}")
    times = scale or int(np.clip(np.ceil(SIDE / max(image.shape[:2])), 1, 4))
    picture = np.ascontiguousarray(image)
    if times > 1:
        picture = cv2.resize(picture, None, fx=times, fy=times, interpolation=cv2.INTER_CUBIC)
    else:
        picture = picture.copy()
    thickness = max(1, round(max(picture.shape[:2]) / 600))
    # the largest first, so that the small ones lie on top
    order = np.argsort(-((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])), kind="stable")
    if masks is not None:
        _paint_masks(picture, masks, order, colours, times)
    for i in order:
        colour = tuple(int(c) for c in colours[i])
        if before is not None and np.abs(before[i] - boxes[i]).max() >= 0.5:
            _dashed_rectangle(picture, before[i] * times, colour, max(1, thickness // 2))
        _rectangle(picture, boxes[i] * times, colour, thickness)
    if names and len(names) <= LEGIBLE:
        picture = _write(picture, boxes * times, names, colours)
    return picture


def _paint_masks(
    picture: np.ndarray,
    masks: sv.CompactMask | np.ndarray,
    order: np.ndarray,
    colours: np.ndarray,
    times: int,
) -> None:
    """Tint each mask and draw its contour, in its crop of the picture."""
    for i in order:
        if isinstance(masks, sv.CompactMask):
            crop, (x, y) = masks.crop(i), masks.offsets[i] * times
        else:
            crop, (x, y) = masks[i], (0, 0)
        inside = crop.repeat(times, axis=0).repeat(times, axis=1)
        under = picture[y : y + inside.shape[0], x : x + inside.shape[1]]
        under[inside] = ((1 - TINT) * under[inside] + TINT * colours[i]).astype(np.uint8)
        contours, _ = cv2.findContours(inside.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        colour = tuple(int(c) for c in colours[i])
        cv2.drawContours(picture, contours, -1, colour, 1, offset=(int(x), int(y)))


def _pixels(box: np.ndarray) -> tuple[int, int, int, int]:
    """First and last pixel, in x and y, of a half-open box."""
    x1, y1, x2, y2 = (int(edge) for edge in np.floor(box + 0.5))
    return x1, y1, max(x2 - 1, x1), max(y2 - 1, y1)


def _rectangle(picture: np.ndarray, box: np.ndarray, colour: tuple[int, ...], thickness: int) -> None:
    x1, y1, x2, y2 = _pixels(box)
    for i in range(min(thickness, (x2 - x1) // 2 + 1, (y2 - y1) // 2 + 1)):
        cv2.rectangle(picture, (x1 + i, y1 + i), (x2 - i, y2 - i), colour, 1)


def _dashed_rectangle(picture: np.ndarray, box: np.ndarray, colour: tuple[int, ...], thickness: int) -> None:
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
        color=sv.ColorPalette([sv.Color(*(int(c) for c in colour)) for colour in colours]),
        text_color=sv.Color.BLACK,
        font_size=_font_size(picture),
        text_padding=max(2, _font_size(picture) // 5),
        smart_position=True,
    )
    detections = sv.Detections(xyxy=boxes)
    written = annotator.annotate(Image.fromarray(picture), detections, names, np.arange(len(names)))
    return np.array(written)


def _font_size(picture: np.ndarray) -> int:
    return max(12, round(max(picture.shape[:2]) / 65))


def captioned(picture: np.ndarray, caption: str) -> np.ndarray:
    """A picture with a line of text above it."""
    size = _font_size(picture)
    bar = Image.new("RGB", (picture.shape[1], 2 * size), "white")
    ImageDraw.Draw(bar).text((size // 2, size), caption, "black", ImageFont.load_default(size), anchor="lm")
    return np.concatenate((np.asarray(bar), picture))


def _count(objects: int) -> str:
    return f"{objects} object{'' if objects == 1 else 's'}"
