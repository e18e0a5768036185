"""Writing files whole or not at all, and reading those that users give."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def require_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: file not found")


def read_json(path: Path) -> Any:
    """The content of a JSON file; a FileNotFoundError or ValueError names it."""
    require_file(path)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None


def require_folder(path: Path) -> None:
    """Raise a ValueError where a folder is wanted and a file stands."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"expected a folder for the output, but {path} is a file")


def forbid_folder(path: Path) -> None:
    """Raise a ValueError where a file is wanted and a folder stands."""
    if path.is_dir():
        raise ValueError(f"expected a file for the output, but {path} is a folder")


def make_folder(path: Path) -> None:
    require_folder(path)
    path.mkdir(parents=True, exist_ok=True)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, then put it in its place: no reader ever meets half of it."""
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")  # formats are known by the suffix
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8", newline=""))


def write_image(path: Path, image: np.ndarray) -> None:
    """A picture, uint8 RGB (H, W, 3), as .png or .jpg."""
    from PIL import Image  # not before it is needed: every command imports this module

    # PNG: level 1 is four times as fast as the default 6, for files that are an eighth larger.
    # JPEG: at this quality, and without subsampled colours, thin lines stay sharp.
    options: dict[str, Any] = {"compress_level": 1} if path.suffix == ".png" else {"quality": 92, "subsampling": 0}
    replace_file(path, lambda partial: Image.fromarray(image).save(partial, **options))
