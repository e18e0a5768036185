"""Writing files whole or not at all, and reading those that users give."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """The content of a JSON file; a FileNotFoundError or ValueError names it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: file not found")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None


def require_folder(path: Path) -> None:
    """Raise a ValueError where a folder is wanted and a file stands."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"expected a folder for the output, but {path} is a file")


def make_folder(path: Path) -> None:
    require_folder(path)
    path.mkdir(parents=True, exist_ok=True)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, then put it in its place: no reader ever meets half of it."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8", newline=""))
