"""What is predicted: images of any kind, read one after the other."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from rdsnet.data.records import read_image

ImageSource = str | Path | Image.Image | np.ndarray

IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}

VIDEO_SUFFIXES = {".avi", ".mkv", ".mov", ".mp4", ".webm"}

AHEAD = 2  # images that are read before, or written after, the network has its turn with them


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
    """A file, or the images of a folder by name, without hidden files.

    Raises:
        FileNotFoundError: nothing there, or a folder without images.
    """
    path = Path(source)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"no such file or folder: {path}")
    shown = (file for file in path.iterdir() if not file.name.startswith("."))
    files = sorted(file for file in shown if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise FileNotFoundError(f"folder {path} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return files


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


def picture_names(files: Sequence[Path]) -> dict[Path, str]:
    """NAME.png for each file; with its suffix where a.jpg and a.png would both become a.png."""
    stems = Counter(file.stem for file in files)
    return {file: f"{file.stem if stems[file.stem] == 1 else file.name}.png" for file in files}
