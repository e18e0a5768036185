"""COCO folders: images upright, boxes half-open, masks of every form, errors with file and id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faster_coco_eval.core import mask as coco_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import make
from rdsnet.data.coco import CocoFolder
from rdsnet.data.records import read_image
from rdsnet.rle import decode_counts, rasterise


def full_mask(folder: CocoFolder, image: int, annotation: int) -> np.ndarray:
    record = folder.images[image]
    rle = record.annotations[annotation].rle
    assert rle is not None
    return rasterise(rle, (0, 0, record.width, record.height), (record.height, record.width))


def test_labels_follow_ascending_category_ids(coco_folder: Path) -> None:
    folder = CocoFolder(coco_folder / "train.json")
    assert folder.category_ids == [2, 9]
    assert folder.class_names == ["cat", "dog"]
    assert [a.label for a in folder.images[0].annotations] == [0, 1]


def test_images_keep_their_order_and_those_without_objects_stay(coco_folder: Path) -> None:
    folder = CocoFolder(coco_folder / "train.json")
    assert [record.id for record in folder.images] == [0, 5, 7]
    assert [len(record.annotations) for record in folder.images] == [2, 3, 0]
    assert folder.images_dir == coco_folder / "images"


def test_boxes_are_half_open_corners(coco_folder: Path) -> None:
    folder = CocoFolder(coco_folder / "train.json")
    assert folder.images[0].annotations[0].box == (10, 5, 40, 15)
    assert folder.images[1].annotations[0].box == (3.5, 12, 23.5, 22.5)
    assert folder.images[1].annotations[0].rle is None


def test_polygon_parts_become_one_mask(coco_folder: Path) -> None:
    mask = full_mask(CocoFolder(coco_folder / "train.json"), 0, 0)
    expected = np.zeros((40, 60), bool)
    expected[5:15, 10:20] = expected[5:15, 30:40] = True
    np.testing.assert_array_equal(mask, expected)


def test_uncompressed_and_compressed_rle_are_the_same_mask(coco_content: dict[str, Any], tmp_path: Path) -> None:
    mask = np.zeros((40, 60), np.uint8)
    mask[20:35, 20:50] = 1
    plain = CocoFolder(make.write_coco(tmp_path / "a", coco_content))
    counts = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
    coco_content["annotations"][1]["segmentation"]["counts"] = counts
    packed = CocoFolder(make.write_coco(tmp_path / "b", coco_content))
    np.testing.assert_array_equal(full_mask(plain, 0, 1), mask)
    assert plain.images[0].annotations[1] == packed.images[0].annotations[1]


def test_crowds_are_marked(coco_folder: Path) -> None:
    annotations = CocoFolder(coco_folder / "train.json").images[1].annotations
    assert [a.crowd for a in annotations] == [False, True, False]


def test_missing_box_comes_from_the_mask(coco_content: dict[str, Any], tmp_path: Path) -> None:
    del coco_content["annotations"][0]["bbox"], coco_content["annotations"][0]["area"]
    annotation = CocoFolder(make.write_coco(tmp_path, coco_content)).images[0].annotations[0]
    assert annotation.box == (10, 5, 40, 15)
    assert annotation.area == 200


def test_images_beside_the_json_are_found_without_a_folder_of_their_own(
    coco_content: dict[str, Any], tmp_path: Path
) -> None:
    json_path = make.write_coco(tmp_path, coco_content)
    (tmp_path / "images").rename(tmp_path / "photos")
    with pytest.raises(ValueError, match=r"image 0: file .*a\.png not found \(and 2 more errors"):
        CocoFolder(json_path)
    assert len(CocoFolder(json_path, tmp_path / "photos")) == 3
    for path in (tmp_path / "photos").iterdir():
        path.rename(tmp_path / path.name)
    assert CocoFolder(json_path).images_dir == tmp_path


def test_where_only_the_json_is_needed_its_images_may_be_missing(coco_folder: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.json"
    alone.write_bytes((coco_folder / "train.json").read_bytes())
    folder = CocoFolder(alone, need_images=False)
    assert folder.images[0].annotations == CocoFolder(coco_folder / "train.json").images[0].annotations
    with pytest.raises(FileNotFoundError, match=r"a\.png"):
        folder.images[0].read()


def test_truth_is_boxes_and_labels_without_crowds(coco_folder: Path) -> None:
    record = CocoFolder(coco_folder / "train.json").images[1]
    boxes, labels = record.truth()
    assert (boxes.tolist(), labels.tolist()) == ([[3.5, 12, 23.5, 22.5], [28, 14, 44, 30]], [1, 0])
    boxes, labels = record.truth(masks=True)
    assert (boxes.tolist(), labels.tolist()) == ([[28, 14, 44, 30]], [0])
    boxes, labels = CocoFolder(coco_folder / "train.json").images[2].truth()
    assert (boxes.shape, labels.shape) == ((0, 4), (0,))


def test_a_subset_is_the_same_data_set_with_fewer_images(coco_folder: Path) -> None:
    folder = CocoFolder(coco_folder / "train.json")
    subset = folder.subset(folder.images[1:])
    assert [record.id for record in subset.images] == [5, 7]
    assert (len(folder), subset.class_names, subset.json_path) == (3, folder.class_names, folder.json_path)


def test_boxes_are_also_kept_as_the_json_has_them(coco_content: dict[str, Any], tmp_path: Path) -> None:
    coco_content["annotations"][2]["bbox"] = [-9.1, 12.3, 20.7, 10.5]  # clipped
    coco_content["annotations"][4]["bbox"] = [1, 14, 16, 16]  # contradicts its mask
    coco_content["annotations"].append({"id": 8, "image_id": 5, "category_id": 9, "bbox": [90, 2, 3.5, 4]})  # outside
    record = CocoFolder(make.write_coco(tmp_path, coco_content)).images[1]
    assert [a.bbox for a in record.annotations] == [(-9.1, 12.3, 20.7, 10.5), (0, 0, 47, 10), (1, 14, 16, 16)]
    assert record.annotations[2].box == (28, 14, 44, 30)
    (outside,) = record.unusable
    assert (outside.bbox, outside.area, outside.rle) == ((90, 2, 3.5, 4), 14, None)


def test_missing_json_is_a_file_not_found_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.json"):
        CocoFolder(tmp_path / "absent.json")


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(0, 10**6))
def test_window_of_a_mask_equals_the_decoded_mask(height: int, width: int, density: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = (rng.random((height, width)) < density).astype(np.uint8)
    code = coco_mask.encode(np.asfortranarray(mask))
    assert decode_counts(code["counts"]).tolist() == make.uncompressed(mask)
    x0, x1 = sorted(rng.integers(0, width + 1, 2).tolist())
    y0, y1 = sorted(rng.integers(0, height + 1, 2).tolist())
    np.testing.assert_array_equal(rasterise(code, (x0, y0, x1, y1), (height, width)), mask[y0:y1, x0:x1])


def test_long_runs_survive_the_code() -> None:
    mask = np.zeros((700, 900), np.uint8)
    mask[5:, 100:880] = 1
    mask[350, 400] = 0
    code = coco_mask.encode(np.asfortranarray(mask))
    assert decode_counts(code["counts"]).tolist() == make.uncompressed(mask)


def test_window_outside_of_the_image_is_refused(coco_folder: Path) -> None:
    rle = CocoFolder(coco_folder / "train.json").images[0].annotations[0].rle
    assert rle is not None
    with pytest.raises(ValueError, match="inside 60 x 40"):
        rasterise(rle, (0, 0, 61, 40), (40, 60))
    with pytest.raises(ValueError, match=r"\[60, 40\]"):
        rasterise(rle, (0, 0, 1, 1), (60, 40))


def turned_photo(path: Path, orientation: int = 6) -> np.ndarray:
    """Stored 20 wide and 10 high with its left half red; orientation 6 turns it clockwise: the top half is red."""
    pixels = np.zeros((10, 20, 3), np.uint8)
    pixels[:, :10, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif)
    return pixels


def test_exif_orientation_is_applied_once(tmp_path: Path) -> None:
    stored = turned_photo(tmp_path / "a.png")
    upright = read_image(tmp_path / "a.png")
    assert upright.shape == (20, 10, 3)
    np.testing.assert_array_equal(upright, np.rot90(stored, -1))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", apply_exif=False), stored)


@pytest.mark.parametrize(("height", "width", "apply_exif"), [(20, 10, True), (10, 20, False)])
def test_record_is_read_as_its_json_means_it(
    coco_content: dict[str, Any], tmp_path: Path, height: int, width: int, apply_exif: bool
) -> None:
    coco_content["images"][2].update(height=height, width=width)
    json_path = make.write_coco(tmp_path, coco_content)
    turned_photo(tmp_path / "images" / "c.png")
    record = CocoFolder(json_path).images[2]
    assert record.apply_exif is apply_exif
    assert record.read().shape == (height, width, 3)


def test_image_of_another_size_is_refused_by_name(coco_content: dict[str, Any], tmp_path: Path) -> None:
    json_path = make.write_coco(tmp_path, coco_content)
    turned_photo(tmp_path / "images" / "c.png")
    with pytest.raises(ValueError, match=r"c\.png: image 7 is 10 x 20 pixels; the JSON says 32 x 32"):
        CocoFolder(json_path).images[2].read()


def test_sixteen_bits_keep_their_high_byte(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 255, 256, 65535]], np.uint16)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png")[0, :, 0].tolist() == [0, 0, 1, 255]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new("RGB", (3, 2), (255, 255, 255)).convert(mode).save(path)
    image = read_image(path)
    assert image.shape == (2, 3, 3)
    assert (image >= 254).all()


def test_truncated_file_is_an_error_not_grey(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"a\.jpg: cannot be read as an image: .*truncated"):
        read_image(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").write_text("not an image")
    with pytest.raises(ValueError, match=r"b\.jpg: cannot be read"):
        read_image(tmp_path / "b.jpg")
    with pytest.raises(FileNotFoundError, match=r"c\.jpg"):
        read_image(tmp_path / "c.jpg")
