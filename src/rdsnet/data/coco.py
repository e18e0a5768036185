"""COCO data sets: a JSON and its images, read, mended where that can be, and checked."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rdsnet.data.records import Annotation, Box, ImageRecord, Problem, image_sizes
from rdsnet.files import read_json, require_file
from rdsnet.rle import mask_area, mask_box, read_segmentation

_CLIP_TOLERANCE = 0.5
"""pixels that a box may reach out of its image without a word: rounding in annotation tools"""

_BOX_TOLERANCE = (2.0, 0.1)
"""pixels, and share of the box's side, that an edge may differ from its mask's: rasterising of polygons"""


class Parsed:
    """A COCO JSON as far as it can be read; arguments and attributes as of `CocoFolder`, but all problems.

    Only the images are opened whose width and height the JSON lacks.
    """

    def __init__(self, json_path: str | Path, images: str | Path | None = None, *, need_images: bool = True) -> None:
        self.json_path = Path(json_path)
        folder = self.json_path.parent
        beside = folder / "images"
        self.images_dir = Path(images) if images is not None else beside if beside.is_dir() else folder
        self.need_images = need_images
        self.images: list[ImageRecord] = []
        self.category_ids: list[int] = []
        self.class_names: list[str] = []
        self.problems: list[Problem] = []
        if need_images and not self.images_dir.is_dir():
            self.error(f"image folder {self.images_dir} not found")
        content = _read_content(self)
        if content is not None:
            _read_categories(self, content["categories"])
            seen = _read_images(self, content["images"])
            _read_annotations(self, content["annotations"], seen)

    def error(self, what: str, id: object = None) -> None:
        self.problems.append(Problem("error", str(self.json_path), id, what, "training refuses"))

    def warning(self, what: str, action: str, id: object = None) -> None:
        self.problems.append(Problem("warning", str(self.json_path), id, what, action))


class CocoFolder(Parsed):
    """The images, objects and classes of a COCO JSON (polygons, RLE or boxes only; crowds).

    What can be mended is mended as `check_dataset` says; the images are not opened.

    Args:
        json_path: the file.
        images: folder of the images; default: images/ beside the JSON if there is one, else the JSON's own folder.
        need_images: False where only the JSON is needed: the images may be missing.

    Attributes:
        images: one `ImageRecord` an image in the order of the JSON, also those without annotations.
        class_names: by label, 0..C-1.
        category_ids: the JSON's id of each label, ascending.
        problems: what was mended, as `check_dataset` lists it (without what only the image files show).
        json_path, images_dir: where it was read from.

    Raises:
        FileNotFoundError: no such JSON.
        ValueError: something that cannot be mended, with file and id.
    """

    def __init__(self, json_path: str | Path, images: str | Path | None = None, *, need_images: bool = True) -> None:
        require_file(Path(json_path))
        super().__init__(json_path, images, need_images=need_images)
        errors = [problem for problem in self.problems if problem.severity == "error"]
        if errors:
            more = f" (and {len(errors) - 1} more errors: rdsnet check lists them)" if len(errors) > 1 else ""
            raise ValueError(f"{errors[0].where}: {errors[0].what}{more}")

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, images: Sequence[ImageRecord]) -> CocoFolder:
        """The same data set with only these of its images."""
        folder = copy.copy(self)
        folder.images = list(images)
        return folder


def _read_content(parsed: Parsed) -> dict[str, list[Any]] | None:
    try:
        content = read_json(parsed.json_path)
    except (OSError, ValueError, RecursionError) as error:
        parsed.error(str(error).removeprefix(f"{parsed.json_path}: "))
        return None
    if not isinstance(content, dict):
        what = "expected a COCO JSON, an object with images, annotations and categories"
        parsed.error(f"{what}, got a {type(content).__name__}")
        return None
    missing = [key for key in ("images", "annotations", "categories") if not isinstance(content.get(key), list)]
    for key in missing:
        parsed.error(f"no list {key!r}; a COCO JSON has images, annotations and categories")
    return None if missing else content


def _is_id(value: object) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _read_categories(parsed: Parsed, entries: list[Any]) -> None:
    names: dict[int, str] = {}
    for i, entry in enumerate(entries):
        id, name = (entry.get("id"), entry.get("name")) if isinstance(entry, dict) else (None, None)
        if not isinstance(id, int) or isinstance(id, bool) or not isinstance(name, str):
            parsed.error(f"categories[{i}] needs an integer 'id' and a 'name', got {_short(entry)}", id)
        elif id in names:
            parsed.error(f"category id {id} is there twice: {names[id]!r} and {name!r}", id)
        else:
            if name in names.values():
                parsed.warning(f"category {id} has the name {name!r} of another", "kept apart", id)
            names[id] = name
    if not entries:
        parsed.error("no categories")
    parsed.category_ids = sorted(names)
    parsed.class_names = [names[id] for id in parsed.category_ids]


def _read_images(parsed: Parsed, entries: list[Any]) -> dict[Hashable, ImageRecord | None]:
    """Records by id; None for images that are there but make training refuse."""
    seen: dict[Hashable, ImageRecord | None] = {}
    for i, entry in enumerate(entries):
        id, name = (entry.get("id"), entry.get("file_name")) if isinstance(entry, dict) else (None, None)
        if not _is_id(id) or not isinstance(name, str) or not name:
            parsed.error(f"images[{i}] needs 'id' and 'file_name', got {_short(entry)}", id)
            continue
        if id in seen:
            parsed.error(f"image id {id!r} is there twice", id)
            continue
        seen[id] = record = _read_image(parsed, entry, parsed.images_dir / name)
        if record is not None:
            parsed.images.append(record)
    if not entries:
        parsed.error("no images")
    return seen


def _read_image(parsed: Parsed, entry: dict[str, Any], path: Path) -> ImageRecord | None:
    id, height, width = entry["id"], entry.get("height"), entry.get("width")
    if parsed.need_images and not path.is_file():
        parsed.error(f"image {id!r}: file {path} not found", id)
        return None
    if height is None or width is None:
        try:
            _, (height, width) = image_sizes(path)
        except ValueError as error:
            parsed.error(f"image {id!r}: {error}", id)
            return None
        parsed.warning(f"image {id!r} ({path.name}) has no height or width", "taken from the file", id)
    numbers = _numbers([height, width], 2)
    if numbers is None or min(numbers) < 1 or any(n != int(n) for n in numbers):
        parsed.error(f"image {id!r} ({path.name}): height {height!r} and width {width!r} are not positive integers", id)
        return None
    return ImageRecord(id, path, int(numbers[0]), int(numbers[1]), entry=entry)


def _read_annotations(parsed: Parsed, entries: list[Any], seen: dict[Hashable, ImageRecord | None]) -> None:
    labels = {id: label for label, id in enumerate(parsed.category_ids)}
    taken: set[Hashable] = set()
    numbers = (entry["id"] for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), int))
    free = max(numbers, default=0) + 1
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            parsed.error(f"annotations[{i}] is not an object: {_short(entry)}")
            continue
        id, image_id, category = entry.get("id"), entry.get("image_id"), entry.get("category_id")
        name = f"annotation {id!r} of image {image_id!r}"
        if not _is_id(image_id) or not isinstance(category, int):
            parsed.error(f"annotations[{i}] needs 'image_id' and 'category_id', got {_short(entry)}", id)
            continue
        if not _is_id(id) or id in taken:
            reason = f"annotations[{i}] has no id" if not _is_id(id) else f"annotation id {id!r} is there twice"
            parsed.warning(reason, f"gets the id {free}", id)
            entry = {**entry, "id": free}
            free += 1
        taken.add(entry["id"])
        if category not in labels:
            parsed.error(f"{name}: unknown category id {category!r}", id)
        if image_id not in seen:
            parsed.warning(f"{name}: unknown image id", "left out", id)
        record = seen.get(image_id)
        if record is not None:
            _read_annotation(parsed, record, entry, labels.get(category, 0), name)
    if parsed.images and not any(record.annotations for record in parsed.images):
        parsed.error("not one annotation of use: nothing to learn")


def _read_annotation(parsed: Parsed, record: ImageRecord, entry: dict[str, Any], label: int, name: str) -> None:
    id, bbox = entry["id"], entry.get("bbox")
    try:
        rle, note = read_segmentation(entry.get("segmentation"), record.size)
    except ValueError as error:
        parsed.error(f"{name}: {error}", id)
        return
    if note is not None:
        parsed.warning(f"{name}: {note}", "the rest is used" if rle else "only its box is used", id)
    mask = None if rle is None else mask_box(rle)
    given: Box | None = _numbers(bbox, 4)
    what, box = _visible(bbox, given, record)
    if what:
        action = "clipped" if box else "taken from its mask" if mask else "annotation left out"
        parsed.warning(f"{name}: {what}", action, id)
    if box is not None and mask is not None and _contradicts(box, mask):
        what = f"box {_show(box)} (x1, y1, x2, y2) contradicts its mask, which spans {_show(mask)}"
        parsed.warning(f"{name}: {what}", "box taken from its mask", id)
        box = mask
    usable = box or mask
    if usable is None and given is None:
        return
    x, y, width, height = given or (0.0, 0.0, 0.0, 0.0)
    x1, y1, x2, y2 = corners = usable or (x, y, x + width, y + height)
    (area,) = _numbers([entry.get("area")], 1) or [float(mask_area(rle)) if rle else width * height]
    exact = given is None or given == (x1, y1, x2 - x1, y2 - y1)
    annotation = Annotation(
        id, label, corners, rle, area, bool(entry.get("iscrowd", 0)), given=None if exact else given
    )
    # what training cannot use is an object in COCO's metrics all the same
    (record.unusable if usable is None else record.annotations).append(annotation)


def _visible(bbox: Any, given: Box | None, record: ImageRecord) -> tuple[str, Box | None]:
    """What is wrong with a box (x, y, width, height), and the part of it inside the image (None if there is none)."""
    if bbox is None:
        return "no bbox", None
    if given is None:
        return f"bbox is not four numbers: {_short(bbox)}", None
    x, y, width, height = given
    if width <= 0 or height <= 0:
        return f"bbox without width or height: {_short(bbox)}", None
    box = max(x, 0.0), max(y, 0.0), min(x + width, float(record.width)), min(y + height, float(record.height))
    if box[2] <= box[0] or box[3] <= box[1]:
        return f"bbox {_show(given)} lies outside of the image ({record.width} x {record.height})", None
    reach = max(box[0] - x, box[1] - y, x + width - box[2], y + height - box[3])
    if reach <= _CLIP_TOLERANCE:
        return "", box
    return f"bbox {_show(given)} reaches out of the image ({record.width} x {record.height})", box


def _contradicts(box: Box, mask: Box) -> bool:
    pixels, share = _BOX_TOLERANCE
    sides = (box[2] - box[0], box[3] - box[1]) * 2
    return any(abs(b - m) > pixels + share * side for b, m, side in zip(box, mask, sides, strict=True))


def _numbers(values: Any, count: int) -> Any:
    """So many floats as a tuple; None for anything else."""
    if not isinstance(values, (list, tuple)) or len(values) != count:
        return None
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values):
        return None
    return tuple(float(v) for v in values)


def _show(numbers: Any) -> str:
    return "(" + ", ".join(f"{n:g}" for n in numbers) + ")"


def _short(entry: Any) -> str:
    text = repr(entry)
    return text if len(text) <= 80 else text[:77] + "..."


def check_dataset(json_path: str | Path, images: str | Path | None = None) -> list[Problem]:
    """Reads a COCO JSON and decodes every image.

    Args:
        json_path: the file.
        images: folder of the images; default as in `CocoFolder`.

    Returns:
        All problems, those of the JSON first; empty for a data set without any. Training refuses a data set with an
        "error" and mends a "warning" as its `action` says.
    """
    parsed = Parsed(json_path, images)
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # decoding releases the interpreter lock
        return parsed.problems + [found for found in threads.map(_check_image, parsed.images) if found is not None]


def _check_image(record: ImageRecord) -> Problem | None:
    try:
        record.read()
    except (OSError, ValueError) as error:
        what = str(error).removeprefix(f"{record.path}: ")
        return Problem("error", str(record.path), record.id, what, "training refuses")
    if not record.apply_exif:
        what = "EXIF turns the image, but the JSON's height and width match it as stored"
        return Problem("warning", str(record.path), record.id, what, "used as stored, not turned")
    return None
