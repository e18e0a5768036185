"""Data sets made in the tests: small enough that a person can work out every number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from parity import COMPARED
from rdsnet.data.shapes import make_shapes


def make_coco() -> dict[str, Any]:
    """Three images and five objects, with every form of annotation that COCO has.

    Image 0 (60 wide, 40 high): a cat, two rectangles as polygons in columns 10..20 and 30..40 of rows 5..15, and a dog,
    columns 20..50 of rows 20..35 as uncompressed RLE. Image 5 (47 x 33): a dog as a box only, a crowd of cats and
    a cat of one polygon. Image 7 (32 x 32): nothing.
    """
    dog = np.zeros((40, 60), np.uint8)
    dog[20:35, 20:50] = 1
    crowd = np.zeros((33, 47), np.uint8)
    crowd[0:10, 0:47] = 1
    return {
        "images": [
            {"id": 0, "file_name": "a.png", "width": 60, "height": 40},
            {"id": 5, "file_name": "b.png", "width": 47, "height": 33},
            {"id": 7, "file_name": "c.png", "width": 32, "height": 32},
        ],
        "categories": [{"id": 9, "name": "dog"}, {"id": 2, "name": "cat"}],
        "annotations": [
            {
                "id": 0,
                "image_id": 0,
                "category_id": 2,
                "bbox": [10, 5, 30, 10],
                "area": 200,
                "iscrowd": 0,
                "segmentation": [[10, 5, 20, 5, 20, 15, 10, 15], [30, 5, 40, 5, 40, 15, 30, 15]],
            },
            {
                "id": 1,
                "image_id": 0,
                "category_id": 9,
                "bbox": [20, 20, 30, 15],
                "area": 450,
                "iscrowd": 0,
                "segmentation": {"size": [40, 60], "counts": uncompressed(dog)},
            },
            {"id": 2, "image_id": 5, "category_id": 9, "bbox": [3.5, 12, 20, 10.5], "area": 210, "iscrowd": 0},
            {
                "id": 3,
                "image_id": 5,
                "category_id": 2,
                "bbox": [0, 0, 47, 10],
                "area": 470,
                "iscrowd": 1,
                "segmentation": {"size": [33, 47], "counts": uncompressed(crowd)},
            },
            {
                "id": 4,
                "image_id": 5,
                "category_id": 2,
                "bbox": [28, 14, 16, 16],
                "area": 256,
                "iscrowd": 0,
                "segmentation": [[28, 14, 44, 14, 44, 30, 28, 30]],
            },
        ],
    }


def uncompressed(mask: np.ndarray) -> list[int]:
    """The runs of a mask, column by column, background first."""
    flat = mask.T.ravel().astype(np.int8)
    changes = np.flatnonzero(np.diff(flat, prepend=0))
    return np.diff(np.concatenate(([0], changes, [flat.size]))).tolist()


def write_coco(folder: Path, content: dict[str, Any], name: str = "train.json") -> Path:
    """The JSON, and a noise image for each entry whose file is not there."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for entry in content["images"]:
        path = folder / "images" / entry["file_name"]
        if not path.exists():
            rng = np.random.default_rng(entry["id"])
            pixels = rng.integers(0, 256, (entry["height"], entry["width"], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    (folder / name).write_text(json.dumps(content))
    return folder / name


@pytest.fixture
def coco_content() -> dict[str, Any]:
    """The content of `coco_folder`'s JSON, to be broken."""
    return make_coco()


@pytest.fixture
def coco_folder(tmp_path: Path) -> Path:
    """A folder with train.json and val.json (the same three images, see `make_coco`) and images/."""
    folder = tmp_path / "coco"
    write_coco(folder, make_coco(), "train.json")
    write_coco(folder, make_coco(), "val.json")
    return folder


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 8 + 4 synthetic images of 64 pixels; do not write into it."""
    folder = tmp_path_factory.mktemp("shapes")
    return make_shapes(folder, images=8, val_images=4, size=64, objects=(2, 4), object_size=(0.2, 0.5))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if COMPARED:
        total = sum(COMPARED.values())
        terminalreporter.write_line(f"{total} recorded vectors compared in {len(COMPARED)} tests")
