"""A COCO folder: a JSON and its images."""

from __future__ import annotations

from pathlib import Path

from rdsnet.data.images import read_image
from rdsnet.data.parsing import Annotation, ImageRecord, parse
from rdsnet.data.rle import rasterise

__all__ = ["Annotation", "CocoFolder", "ImageRecord", "rasterise", "read_image"]


class CocoFolder:
    """The images, objects and classes of a COCO JSON (polygons, RLE or boxes only; crowds).

    What can be mended is mended as `check_dataset` says; the images are not opened.

    Args:
        json_path: the file.
        images: folder of the images; default: images/ beside the JSON if there is one, else the JSON's own folder.

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

    def __init__(self, json_path: str | Path, images: str | Path | None = None) -> None:
        if not Path(json_path).is_file():
            raise FileNotFoundError(f"{json_path}: file not found")
        parsed = parse(json_path, images)
        errors = [problem for problem in parsed.problems if problem.severity == "error"]
        if errors:
            more = f" (and {len(errors) - 1} more errors: rdsnet check lists them)" if len(errors) > 1 else ""
            raise ValueError(f"{errors[0].where}: {errors[0].what}{more}")
        self.json_path = parsed.json_path
        self.images_dir = parsed.images_dir
        self.images: list[ImageRecord] = parsed.images
        self.class_names: list[str] = parsed.class_names
        self.category_ids: list[int] = parsed.category_ids
        self.problems = parsed.problems

    def __len__(self) -> int:
        return len(self.images)
