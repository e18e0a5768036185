"""Synthetic shapes: exact visible masks, tight boxes, the settings and the seed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rdsnet.data.coco import CocoFolder, check_dataset
from rdsnet.data.shapes import make_shapes
from rdsnet.rle import rasterise


def masks_of(folder: CocoFolder, image: int) -> np.ndarray:
    record = folder.images[image]
    size = (record.height, record.width)
    return np.stack([rasterise(a.rle, (0, 0, size[1], size[0]), size) for a in record.annotations if a.rle])


def test_written_folder_is_sound(shapes_folder: Path) -> None:
    assert check_dataset(shapes_folder / "train.json") == []
    assert check_dataset(shapes_folder / "val.json") == []
    folder = CocoFolder(shapes_folder / "train.json")
    assert len(folder) == 8
    assert folder.class_names == ["ellipse", "bar", "triangle", "star", "ring"]
    assert folder.images[0].read().shape == (64, 64, 3)


def test_masks_are_visible_parts_and_boxes_are_tight(shapes_folder: Path) -> None:
    folder = CocoFolder(shapes_folder / "train.json")
    for image, record in enumerate(folder.images):
        masks = masks_of(folder, image)
        assert masks.sum(0).max() <= 1  # no pixel belongs to two
        for mask, annotation in zip(masks, record.annotations, strict=True):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert annotation.box == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            assert annotation.area == mask.sum()


def test_masks_lie_where_the_picture_changes(tmp_path: Path) -> None:
    # Colours differ more across the outline of a mask than across the outline of the mask shifted by a few pixels.
    make_shapes(tmp_path, images=12, val_images=1, size=96, objects=(2, 5), object_size=(0.2, 0.5))
    folder = CocoFolder(tmp_path / "train.json")
    steps: dict[int, list[float]] = {-4: [], 0: [], 4: []}
    for image, record in enumerate(folder.images):
        pixels = record.read().astype(float)
        for mask in masks_of(folder, image):
            for shift, found in steps.items():
                moved = np.roll(mask, shift, axis=1)
                edge = np.flatnonzero((moved[:, 1:] != moved[:, :-1]).ravel())
                found.extend(np.abs(np.diff(pixels, axis=1)).sum(2).ravel()[edge])
    means = {shift: np.mean(found) for shift, found in steps.items()}
    assert means[0] > 2 * means[-4] and means[0] > 2 * means[4]


def test_settings_are_kept(tmp_path: Path) -> None:
    make_shapes(tmp_path, images=6, val_images=2, size=80, objects=(4, 6), object_size=(0.15, 0.3), overlap=0)
    folder = CocoFolder(tmp_path / "train.json")
    assert (len(folder), len(CocoFolder(tmp_path / "val.json"))) == (6, 2)
    for record in folder.images:
        assert (record.height, record.width) == (80, 80)
        assert 4 <= len(record.annotations) <= 6
        for annotation in record.annotations:
            x1, y1, x2, y2 = annotation.box
            assert max(x2 - x1, y2 - y1) <= 0.3 * 80 + 2


def test_same_seed_gives_the_same_files(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        make_shapes(tmp_path / name, images=2, size=48, seed=seed)
    a, b, c = ([path.read_bytes() for path in sorted((tmp_path / name).rglob("*.*"))] for name in "abc")
    assert a == b
    assert a != c


def test_plain_images_stay_as_they_were(tmp_path: Path) -> None:
    # as first released: numbers in the documents were measured on such data
    make_shapes(tmp_path, images=2, val_images=1, size=48, seed=5)
    annotations = json.loads((tmp_path / "train.json").read_text())["annotations"]
    first, last = annotations[0]["bbox"], annotations[-1]["bbox"]
    assert (len(annotations), first, last) == (20, [36, 8, 6, 6], [14, 41, 6, 7])
    pixels = CocoFolder(tmp_path / "train.json").images[0].read()
    assert int(pixels.sum()) == pytest.approx(1032325, abs=100)  # the last digit of interpolation is the machine's


def test_cluttered_masks_are_exact_and_of_all_sizes(tmp_path: Path) -> None:
    make_shapes(tmp_path, images=40, val_images=1, size=256, style="cluttered")
    assert check_dataset(tmp_path / "train.json") == []
    folder = CocoFolder(tmp_path / "train.json")
    assert folder.class_names == ["ellipse", "bar", "triangle", "star", "ring", "cross", "branch"]
    areas = []
    for image, record in enumerate(folder.images):
        masks = masks_of(folder, image)
        assert masks.sum(0).max() <= 1
        for mask, annotation in zip(masks, record.annotations, strict=True):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert annotation.box == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            areas.append(annotation.area)
    small, large = np.mean(np.array(areas) < 32**2), np.mean(np.array(areas) > 96**2)
    assert 0.3 < small < 0.6 and large > 0.01


def test_marks_of_no_class_lie_in_cluttered_images(tmp_path: Path) -> None:
    # There are 10 shapes in each image, or fewer where no place is left; a mark is not annotated.
    make_shapes(tmp_path, images=20, val_images=1, size=128, style="cluttered", objects=(10, 10), overlap=0)
    folder = CocoFolder(tmp_path / "train.json")
    annotated = sum(len(record.annotations) for record in folder.images) / 20
    assert 6.5 < annotated < 9.5  # 85 of 100 shapes are of a class, on the average of images


def test_splits_differ(shapes_folder: Path) -> None:
    train = json.loads((shapes_folder / "train.json").read_text())
    val = json.loads((shapes_folder / "val.json").read_text())
    assert train["annotations"][0]["segmentation"] != val["annotations"][0]["segmentation"]


@pytest.mark.parametrize(
    "wrong", [{"images": 0}, {"objects": (5, 2)}, {"object_size": (0.0, 0.5)}, {"overlap": 2.0}, {"style": "x"}]
)
def test_settings_out_of_range_are_refused(tmp_path: Path, wrong: dict) -> None:
    with pytest.raises(ValueError, match="expected"):
        make_shapes(tmp_path, **wrong)
