"""Pictures as files: what was found in images, folders and videos, and every kind that `rdsnet visualize` draws."""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import cv2
import numpy as np
import supervision as sv

from rdsnet.cli.options import PictureKind
from rdsnet.data.coco import CocoFolder
from rdsnet.data.records import ImageRecord, read_image
from rdsnet.files import make_folder, replace_file, write_image, write_text
from rdsnet.predict.predictor import Predictor
from rdsnet.predict.sources import AHEAD, list_images, picture_names, read_ahead
from rdsnet.results.exchange import coco_dataset, coco_results
from rdsnet.structures import Objects, above
from rdsnet.terminal import progress_bar
from rdsnet.visualize.errors import comparison, counted
from rdsnet.visualize.overlay import draw_objects
from rdsnet.visualize.refinement import explain_refinement
from rdsnet.visualize.representations import draw_representations
from rdsnet.visualize.sheet import captioned


def save_predictions(
    predictor: Predictor,
    files: Sequence[Path],
    output: Path,
    *,
    threshold: float = 0.5,
    pictures: bool = True,
    results: bool = True,
) -> int:
    """Predict images and write overlays (NAME.png), and predictions.json: a COCO data set of what was found.

    Images are handled one at a time, so a folder of any size fits into memory; reading and drawing overlap with the
    network. Stopped half-way, what was done is kept.

    Returns:
        The number of objects.

    Raises:
        ValueError: files that cannot be read, after all others are done; names them.
    """
    make_folder(output)
    images: list[dict[str, object]] = []
    entries: list[dict[str, object]] = []
    names = picture_names(files)
    unreadable: list[str] = []

    def draw(image: np.ndarray, objects: Objects, file: Path) -> None:
        write_image(output / names[file], draw_objects(image, objects, predictor.class_names))

    try:
        with ThreadPoolExecutor(1) as writer:
            drawings: deque[Future[None]] = deque()
            ahead = progress_bar("predicting", read_ahead(files, predictor.resize), total=len(files))
            for image_id, (file, read) in enumerate(ahead, start=1):
                if isinstance(read, ValueError):
                    unreadable.append(str(read))
                    continue
                image, resized = read
                objects = above(predictor.detect_resized([resized], [image.shape[:2]])[0], threshold)
                height, width = image.shape[:2]
                images.append({"id": image_id, "file_name": file.name, "height": height, "width": width})
                entries += coco_results(objects, image_id, predictor.category_ids)
                if pictures:
                    drawings.append(writer.submit(draw, image, objects, file))
                while len(drawings) > AHEAD:
                    drawings.popleft().result()
            for drawing in drawings:
                drawing.result()
    finally:
        if results and images:
            content = coco_dataset(images, entries, predictor.category_ids, predictor.class_names)
            write_text(output / "predictions.json", json.dumps(content))
    if unreadable:
        raise ValueError(
            f"{len(unreadable)} of {len(files)} files left out: {'; '.join(unreadable)}; "
            f"of the others {len(entries)} objects: {output}"
        )
    return len(entries)


def save_video(predictor: Predictor, source: Path, output: Path, *, threshold: float = 0.5) -> Path:
    """Predict a video frame by frame and write it with overlays, as OUTPUT/NAME.mp4; decoding and encoding overlap.

    Raises:
        FileNotFoundError, ValueError: no such file, or not a video that OpenCV reads.
    """
    if not source.is_file():
        raise FileNotFoundError(f"no such file: {source}")
    if not cv2.VideoCapture(str(source)).read()[0]:
        raise ValueError(f"{source} cannot be read as a video")
    make_folder(output)
    target = output / f"{source.stem}.mp4"
    bar = progress_bar("predicting", total=sv.VideoInfo.from_video_path(str(source)).total_frames)

    def draw(frame: np.ndarray, index: int) -> np.ndarray:
        bar.update()
        image = np.ascontiguousarray(frame[:, :, ::-1])  # OpenCV's frames are BGR
        objects = above(predictor.detect([image])[0], threshold)
        return np.ascontiguousarray(draw_objects(image, objects, predictor.class_names, scale=1)[:, :, ::-1])

    with bar:
        replace_file(target, lambda partial: sv.process_video(str(source), str(partial), draw))
    return target


KINDS = tuple(kind for kind in get_args(PictureKind) if kind != "all")


class Drawn(NamedTuple):
    """How many images there were, the pictures, and which kinds are not among them and why."""

    images: int
    pictures: list[Path]
    left_out: dict[str, str]


def save_visualizations(
    predictor: Predictor,
    source: Path | None,
    output: Path,
    *,
    what: Sequence[str] = ("all",),
    truth: Path | None = None,
    images: Path | None = None,
    threshold: float = 0.5,
    object: int | None = None,
) -> Drawn:
    """Draw images, and write OUTPUT/NAME_KIND.png.

    Args:
        source: an image or a folder of images; None: those of `truth`.
        output: folder; made where there is none.
        what: kinds of pictures, see `KINDS`; "all": those that the model and the truth allow.
        truth: COCO JSON; an image's record is found by its file name.
        images: folder of the images that `truth` names; default: images/ beside the JSON, else its own folder.
        threshold: objects score at least this, 0..1.
        object: whose refinement is explained, 0 for the one of the highest score; default: the one whose box changed
            the most.

    Raises:
        FileNotFoundError: no such source or truth.
        ValueError: a kind that the model cannot give, or "comparison" without truth; images without what was asked for,
            after all others are done; names them.
    """
    kinds, left_out = _possible(predictor, what, truth)
    folder = None if truth is None else CocoFolder(truth, images)
    if folder is not None and "comparison" in kinds:
        predictor.require_classes(folder)
    records: dict[str, list[ImageRecord]] = defaultdict(list)  # by the name of the file
    for record in () if folder is None else folder.images:
        records[record.path.name].append(record)
    files = _files(source, folder)
    names = picture_names(files)
    make_folder(output)
    pictures: list[Path] = []
    problems: list[str] = []
    for path in progress_bar("drawing", files):
        try:
            image, truth_of_image = _read(path, folder, records[path.name])
            found = above(predictor.detect([image])[0], threshold)
            for kind in kinds:
                picture = _draw(kind, predictor, image, found, truth_of_image, threshold, object)
                if picture is not None:
                    pictures.append(output / f"{names[path].removesuffix('.png')}_{kind}.png")
                    write_image(pictures[-1], picture)
        except ValueError as error:
            problems.append(f"{path.name}: {error}")
    if problems:
        raise ValueError(f"{len(problems)} of {len(files)} images left out: {'; '.join(problems)}")
    return Drawn(len(files), pictures, left_out)


def _possible(predictor: Predictor, what: Sequence[str], truth: Path | None) -> tuple[list[str], dict[str, str]]:
    """The kinds to draw, and those of "all" that cannot be, with the reason."""
    model, reasons = predictor.model, {}
    if truth is None:
        reasons["comparison"] = "it needs --truth, a COCO JSON"
    if model.pixel_stream is None:
        reasons["representations"] = "the model has no pixel stream"
    if model.pixel_stream is None or model.refine not in ("argmax", "mean") or not model.mbrm.gamma > 0:
        reasons["uncertainty"] = reasons["refinement"] = "the model does not refine its boxes by MBRM"
    unknown = set(what) - {*KINDS, "all"}
    if unknown or not what:
        raise ValueError(f"expected kinds of pictures among {', '.join(KINDS)} and all, got {', '.join(what)}")
    if "all" in what:
        return [kind for kind in KINDS if kind not in reasons], reasons
    for kind in what:
        if kind in reasons:
            raise ValueError(f"{kind} cannot be drawn: {reasons[kind]}")
    return [kind for kind in KINDS if kind in what], {}


def _files(source: Path | None, folder: CocoFolder | None) -> list[Path]:
    if source is not None:
        return list_images(source)
    if folder is None:
        raise ValueError("expected an image, a folder of images, or --truth, a COCO JSON with its images")
    return [record.path for record in folder.images]


def _read(path: Path, folder: CocoFolder | None, same: list[ImageRecord]) -> tuple[np.ndarray, Any]:
    """An image and its truth, among the records of its name; None without a folder."""
    if folder is None:
        return read_image(path), None
    own = [record for record in same if record.path == path] or same
    if len(own) != 1:
        raise ValueError(f"{folder.json_path} has {len(own) or 'no'} images of this name, expected one")
    record = replace(own[0], path=path)
    return record.read(), record


def _draw(
    kind: str,
    predictor: Predictor,
    image: np.ndarray,
    found: Objects,
    record: Any,
    threshold: float,
    object: int | None,
) -> np.ndarray | None:
    """A picture of an image; None where there is no object to explain."""
    names = predictor.class_names
    count = f"{counted(len(found))} with a score of at least {threshold:g}"
    if kind == "overlay":
        return captioned(draw_objects(image, found, names), f"{count}; dashed: boxes before refinement")
    if kind == "uncertainty":
        bands = draw_objects(image, found, names, regressed=False, masks=False, uncertainty=True)
        return captioned(bands, f"{count}; bands: one standard deviation to either side of each edge")
    if kind == "comparison":
        return comparison(image, found, record, names, threshold=threshold)
    if kind == "representations":
        return draw_representations(predictor.pixel_representations, image)
    if object is not None and not 0 <= object < len(found):
        raise ValueError(f"expected --object of one of {count}, got {object}")
    if not len(found):
        return None
    change = (found.boxes - found.regressed_boxes).abs().amax(dim=1)
    return explain_refinement(image, found, int(change.argmax()) if object is None else object, predictor.model.mbrm)
