"""Prediction: images of any kind in, `sv.Detections` out."""

from __future__ import annotations

import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, overload

import cv2
import numpy as np
import supervision as sv
import torch
from PIL import Image, ImageOps
from torch import Tensor

from rdsnet.checkpoint import Checkpoint
from rdsnet.checkpoint import load as load_checkpoint
from rdsnet.data import CocoFolder, eval_size, read_image
from rdsnet.data.loading import equal_shape_batches, pad_images
from rdsnet.data.transforms import eval_image, padding_multiple
from rdsnet.detections import to_detections
from rdsnet.evaluation import coco_dataset, coco_results
from rdsnet.files import make_folder, write_text
from rdsnet.inference import detect, progress_bar
from rdsnet.model import RDSNet
from rdsnet.model.fusion import fuse_norms
from rdsnet.structures import Objects
from rdsnet.visualize import draw_objects

ImageSource = str | Path | Image.Image | np.ndarray
Device = Literal["cpu", "cuda", "auto"]
Precision = Literal["32", "bf16"]

IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
VIDEO_SUFFIXES = {".avi", ".mkv", ".mov", ".mp4", ".webm"}

AHEAD = 2  # images that are read before, or written after, the network has its turn with them


class Predictor:
    """A trained model, ready for images.

    Args:
        model: from `rdsnet.checkpoint.load` or training; changed in place.
        checkpoint: what is stored with it.
        device: where it runs.
        precision: of the network; "bf16" halves its memory and is faster on CPUs and GPUs that know bfloat16. Boxes,
            masks and their refinement are computed from its maps in float32 either way.
        compile: compile the network (`torch.compile`, which needs a C++ compiler for the CPU). The first image then
            takes a minute or so, and so do the first few of other sizes, until what is compiled serves all sizes.

    Attributes:
        class_names: by `class_id`.
        compiled: whether the network was.

    Raises:
        ValueError: an unknown precision, or nothing can be compiled here; says why.
    """

    def __init__(
        self,
        model: RDSNet,
        checkpoint: Checkpoint,
        device: torch.device,
        *,
        precision: Precision = "32",
        compile: bool = False,
    ) -> None:
        if precision not in ("32", "bf16"):
            raise ValueError(f"unknown precision {precision!r}; valid are '32' and 'bf16'")
        self.model = model.to(device).to(memory_format=torch.channels_last).eval()
        if precision == "bf16":
            for part in (model.backbone, model.object_stream, model.pixel_stream):
                if part is not None:
                    part.bfloat16()
        if compile:
            _require_compiler(device)
            self.model.compile()
        self.compiled = compile
        self.config = checkpoint.config
        self.class_names = checkpoint.class_names
        self.category_ids = checkpoint.category_ids
        self.device = device

    @overload
    def predict(self, source: ImageSource, *, threshold: float = ..., batch_size: int = ...) -> sv.Detections: ...

    @overload
    def predict(
        self, source: list[ImageSource], *, threshold: float = ..., batch_size: int = ...
    ) -> list[sv.Detections]: ...

    def predict(
        self, source: ImageSource | list[ImageSource], *, threshold: float = 0.5, batch_size: int = 1
    ) -> sv.Detections | list[sv.Detections]:
        """Find the objects of an image, or of each image of a list.

        Args:
            source: a file, a PIL image, an array (uint8 RGB (H, W, 3) or grey (H, W)), or a list of these.
            threshold: objects score at least this, 0..1; scores below the configuration's `score_threshold` (0.05)
                are never there.
            batch_size: images that the network takes at once; it does not change the results.

        Returns:
            `sv.Detections` in pixels of the image: `xyxy` (refined boxes), `mask` (`sv.CompactMask`), `confidence`,
            `class_id`; in `data` `class_name`, `regressed_xyxy` (before refinement) and `edge_std` (standard deviation
            of left, top, right and bottom edge, pixels). A list of them for a list.

        Raises:
            FileNotFoundError, ValueError: a file is missing or not an image, an array of another form.
        """
        if isinstance(source, list):
            found = self.find([as_array(image) for image in source], batch_size=batch_size)
            return [to_detections(above(objects, threshold), self.class_names) for objects in found]
        return to_detections(above(self.find([as_array(source)])[0], threshold), self.class_names)

    def find(self, images: Sequence[np.ndarray], *, batch_size: int = 1) -> list[Objects]:
        """The objects of uint8 RGB arrays (H, W, 3), on the CPU, with everything that the model knows of them."""
        sizes = [eval_size(image.shape[0], image.shape[1], self.config.data) for image in images]
        found: dict[int, Objects] = {}
        for chosen in equal_shape_batches(sizes, batch_size):
            resized = [self.resize(images[i]) for i in chosen]
            objects = self.find_resized(resized, [images[i].shape[:2] for i in chosen])
            found.update(zip(chosen, objects, strict=True))
        return [found[i] for i in range(len(images))]

    def resize(self, image: np.ndarray) -> Tensor:
        """What the network is given of a uint8 RGB array (H, W, 3): uint8 (3, h, w), before padding."""
        return eval_image(image, self.config.data)

    def find_resized(self, resized: Sequence[Tensor], originals: Sequence[tuple[int, int]]) -> list[Objects]:
        """As `find`, in one batch, of images that `resize` has made from originals of (H, W)."""
        batch = pad_images(resized, padding_multiple(self.config.data))
        sizes = [(image.shape[1], image.shape[2]) for image in resized]
        return detect(self.model, batch, sizes, originals, self.config)

    def set_max_detections(self, count: int) -> None:
        """Objects an image, at most: for detector and metric together."""
        if count < 1:
            raise ValueError(f"expected max_detections of at least 1, got {count}")
        self.config.detect.max_detections = self.model.object_stream.max_detections = count

    def require_classes(self, folder: CocoFolder) -> None:
        """Raise a ValueError where a data set's classes are not the model's, in the same order."""
        if folder.class_names != self.class_names:
            raise ValueError(
                f"the model knows the classes {', '.join(self.class_names)}; "
                f"{folder.json_path} has {', '.join(folder.class_names)}"
            )


def load(
    source: str | Path, *, device: Device = "auto", precision: Precision = "32", compile: bool = False
) -> Predictor:
    """A predictor from bundled weights, a run folder or a .safetensors file, its batch norms folded into convolutions.

    Args:
        source: "nuclei" (docs/nuclei.md), or what `rdsnet train` or `rdsnet convert` wrote.
        device: "cpu", "cuda", or "auto" for a GPU where there is one.
        precision, compile: as of `Predictor`.

    Raises:
        FileNotFoundError, ValueError: no such weights, or they do not fit; says what is wrong.
    """
    model, checkpoint = load_checkpoint(source)
    model = fuse_norms(model.eval())
    return Predictor(model, checkpoint, choose_device(device), precision=precision, compile=compile)


def choose_device(device: Device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but torch finds no GPU")
    return torch.device(device)


def _require_compiler(device: torch.device) -> None:
    """Compile next to nothing, so that what is missing is said at once, and in one line."""
    try:
        torch.compile(torch.relu)(torch.zeros(2, device=device))
    except Exception as error:  # no C++ compiler, no Triton, a Python that is too new: each has an error of its own
        reason = str(error).partition("\n")[0]
        raise ValueError(f"torch.compile does not work on this machine: {reason}") from error


def as_array(image: ImageSource) -> np.ndarray:
    """Any single image as uint8 RGB (H, W, 3); EXIF rotation is applied to files and PIL images."""
    if isinstance(image, (str, Path)):
        return read_image(image)
    if isinstance(image, Image.Image):
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    if not isinstance(image, np.ndarray):
        raise ValueError(f"expected a path, a PIL image or an array, got {type(image).__name__}")
    if image.ndim == 2:
        image = np.repeat(image[:, :, None], 3, axis=2)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"expected a uint8 array (H, W, 3) or (H, W), got {image.dtype} {image.shape}")
    # torch takes no view that runs backwards, as of OpenCV's colours, and warns of what it could not write to
    return np.require(image, requirements=["C", "W"])


def list_images(source: str | Path) -> list[Path]:
    """A file, or the images of a folder by name.

    Raises:
        FileNotFoundError: nothing there, or a folder without images.
    """
    path = Path(source)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"no such file or folder: {path}")
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise FileNotFoundError(f"folder {path} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return files


def require_threshold(threshold: float) -> None:
    if not 0 <= threshold <= 1:
        raise ValueError(f"expected a threshold between 0 and 1, got {threshold}")


def above(objects: Objects, threshold: float) -> Objects:
    """The objects that score at least `threshold`, 0..1."""
    require_threshold(threshold)
    return objects.select((objects.scores >= threshold).nonzero()[:, 0])


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
        drawn = draw_objects(image, objects, predictor.class_names)
        # Level 1 is four times as fast as the default 6, for files that are an eighth larger
        Image.fromarray(drawn).save(output / names[file], compress_level=1)

    try:
        with ThreadPoolExecutor(1) as writer:
            drawings: deque[Future[None]] = deque()
            ahead = progress_bar("predicting", read_ahead(files, predictor.resize), total=len(files))
            for image_id, (file, read) in enumerate(ahead, start=1):
                if isinstance(read, ValueError):
                    unreadable.append(str(read))
                    continue
                image, resized = read
                objects = above(predictor.find_resized([resized], [image.shape[:2]])[0], threshold)
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


Read = tuple[np.ndarray, Tensor] | ValueError


def read_ahead(files: Iterable[Path], resize: Callable[[np.ndarray], Tensor]) -> Iterator[tuple[Path, Read]]:
    """Each file, its image and what `resize` makes of it, in order, read while the caller is busy with those before.

    A file that cannot be read comes with the error that says so. At most `AHEAD` images wait.
    """

    def read(file: Path) -> Read:
        try:
            image = read_image(file)
        except ValueError as error:
            return error
        return image, resize(image)

    with ThreadPoolExecutor(1) as reader:
        waiting: deque[tuple[Path, Future[Read]]] = deque()
        for file in files:
            waiting.append((file, reader.submit(read, file)))
            if len(waiting) > AHEAD:
                first, image = waiting.popleft()
                yield first, image.result()
        for file, image in waiting:
            yield file, image.result()


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

    def draw(frame: np.ndarray, index: int) -> np.ndarray:
        image = np.ascontiguousarray(frame[:, :, ::-1])  # OpenCV's frames are BGR
        objects = above(predictor.find([image])[0], threshold)
        return np.ascontiguousarray(draw_objects(image, objects, predictor.class_names, scale=1)[:, :, ::-1])

    target = output / f"{source.stem}.mp4"
    partial = output / f".{source.stem}.partial.mp4"
    try:
        sv.process_video(str(source), str(partial), draw, show_progress=True, progress_message="predicting")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def picture_names(files: Sequence[Path]) -> dict[Path, str]:
    """NAME.png for each file; with its suffix where a.jpg and a.png would both become a.png."""
    stems = Counter(file.stem for file in files)
    return {file: f"{file.stem if stems[file.stem] == 1 else file.name}.png" for file in files}
