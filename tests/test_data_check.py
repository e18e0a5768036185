"""Every problem is listed with file, id and what is done about it, and loading does what the list says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import make
from rdsnet.data.coco import CocoFolder, check_dataset
from rdsnet.data.records import Problem

Content = dict[str, Any]


def test_sound_data_has_no_problems(coco_folder: Path) -> None:
    assert check_dataset(coco_folder / "train.json") == []


def change(part: str, index: int, **values: Any) -> Callable[[Content], None]:
    return lambda content: content[part][index].update(values)


def repeat(part: str, **values: Any) -> Callable[[Content], None]:
    return lambda content: content[part].append({**content[part][0], **values})


# What is broken, the id that is named, and words of the message.
ERRORS: list[tuple[Callable[[Content], None], object, str]] = [
    (change("images", 1, file_name="absent.png"), 5, r"absent\.png not found"),
    (change("images", 1, width=0), 5, "not positive"),
    (change("annotations", 2, category_id=4), 2, "unknown category id 4"),
    (repeat("images"), 0, "image id 0 is there twice"),
    (repeat("categories", name="cow"), 9, "category id 9 is there twice"),
    (change("annotations", 1, segmentation={"size": [60, 40], "counts": [2400]}), 1, "for an image of"),
    (change("annotations", 1, segmentation={"size": [40, 60], "counts": [2399]}), 1, "do not add up"),
    (change("annotations", 1, segmentation={"size": [40, 60], "counts": "~~~"}), 1, "do not add up"),
    (change("annotations", 1, segmentation="mask.png"), 1, "neither polygons nor RLE"),
    (lambda content: content["annotations"][0].pop("image_id"), 0, "needs 'image_id'"),
    (lambda content: content["categories"][0].pop("name"), 9, "needs an integer 'id' and a 'name'"),
    (lambda content: content["images"][0].pop("file_name"), 0, "needs 'id' and 'file_name'"),
    (lambda content: content["annotations"].clear(), None, "nothing to learn"),
    (lambda content: content.pop("categories"), None, "no list 'categories'"),
]


@pytest.mark.parametrize(("damage", "id", "words"), ERRORS)
def test_what_cannot_be_mended_is_an_error_and_loading_refuses(
    tmp_path: Path, damage: Callable[[Content], None], id: object, words: str
) -> None:
    coco_content = make.coco()
    make.write_coco(tmp_path, make.coco())  # the images
    damage(coco_content)
    json_path = tmp_path / "broken.json"
    json_path.write_text(json.dumps(coco_content))
    errors = [p for p in check_dataset(json_path) if p.severity == "error"]
    assert errors and errors[0].id == id and errors[0].where == str(json_path)
    with pytest.raises(ValueError, match=words) as raised:
        CocoFolder(json_path)
    assert str(json_path) in str(raised.value)


# What is broken, the annotation's id, words of the message and the action, then the box and whether there is a mask
# (None: the annotation is left out).
WARNINGS: list[tuple[Callable[[Content], None], str, str, tuple[float, ...] | None, bool]] = [
    (change("annotations", 4, bbox=[28, 14, 0, 16]), "without width", "from its mask", (28, 14, 44, 30), True),
    (change("annotations", 4, bbox=[28, 14]), "not four numbers", "from its mask", (28, 14, 44, 30), True),
    (change("annotations", 4, bbox=[1, 14, 16, 16]), "contradicts its mask", "from its mask", (28, 14, 44, 30), True),
    (change("annotations", 4, bbox=[100, 1, 5, 5]), "lies outside", "from its mask", (28, 14, 44, 30), True),
    (change("annotations", 4, segmentation=[[28, 14, 30, 14]]), "without 3 points", "box", (28, 14, 44, 30), False),
    (change("annotations", 4, segmentation=[[1e12, 1, 5, 5, 1, 5]]), "far outside", "box", (28, 14, 44, 30), False),
    (change("annotations", 4, segmentation=[[3, 3, 3, 3, 3, 3]]), "without a pixel", "box", (28, 14, 44, 30), False),
    (change("annotations", 4, bbox=[28, 14, -1, 2], segmentation=[]), "without width", "left out", None, False),
    (change("annotations", 4, bbox=[40, 20, 10, 20], segmentation=[]), "out of", "clipped", (40, 20, 47, 33), False),
    (change("annotations", 4, bbox=[float("nan"), 2, 3, 4]), "not four", "from its mask", (28, 14, 44, 30), True),
    (change("annotations", 4, image_id=99), "unknown image id", "left out", None, False),
]


@pytest.mark.parametrize(("damage", "words", "action", "box", "has_mask"), WARNINGS)
def test_what_can_be_mended_is_a_warning_and_loading_mends_it(
    tmp_path: Path,
    damage: Callable[[Content], None],
    words: str,
    action: str,
    box: tuple[float, ...] | None,
    has_mask: bool,
) -> None:
    coco_content = make.coco()
    damage(coco_content)
    json_path = make.write_coco(tmp_path, coco_content)
    problems = check_dataset(json_path)
    assert [(p.severity, p.where) for p in problems] == [("warning", str(json_path))] * len(problems)
    assert problems[-1].id == 4
    assert any(words in p.what and action in p.action for p in problems)
    annotations = CocoFolder(json_path).images[1].annotations
    if box is None:
        assert [a.id for a in annotations] == [2, 3]
    else:
        assert annotations[2].box == box
        assert (annotations[2].rle is not None) == has_mask


def test_box_a_little_over_the_edge_is_clipped_without_a_word(coco_content: Content, tmp_path: Path) -> None:
    change("annotations", 2, bbox=[40.2, 12, 7, 5])(coco_content)
    json_path = make.write_coco(tmp_path, coco_content)
    assert check_dataset(json_path) == []
    assert CocoFolder(json_path).images[1].annotations[0].box == (40.2, 12, 47, 17)


def test_repeated_and_missing_annotation_ids_get_new_ones(coco_content: Content, tmp_path: Path) -> None:
    coco_content["annotations"][1]["id"] = 0
    del coco_content["annotations"][2]["id"]
    json_path = make.write_coco(tmp_path, coco_content)
    assert [(p.severity, p.action) for p in check_dataset(json_path)] == [
        ("warning", "gets the id 5"),
        ("warning", "gets the id 6"),
    ]
    assert [a.id for r in CocoFolder(json_path).images for a in r.annotations] == [0, 5, 6, 3, 4]


def test_missing_size_comes_from_the_file(coco_content: Content, tmp_path: Path) -> None:
    make.write_coco(tmp_path, make.coco())
    del coco_content["images"][0]["height"]
    json_path = make.write_coco(tmp_path, coco_content)
    assert [p.action for p in check_dataset(json_path)] == ["taken from the file"]
    record = CocoFolder(json_path).images[0]
    assert (record.height, record.width) == (40, 60)


def test_image_files_are_opened(coco_content: Content, tmp_path: Path) -> None:
    json_path = make.write_coco(tmp_path, coco_content)
    images = tmp_path / "images"
    (images / "a.png").write_bytes((images / "a.png").read_bytes()[:2000])
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", (47, 33)).save(images / "b.png", exif=exif)
    Image.new("RGB", (30, 32)).save(images / "c.png")
    a, b, c = check_dataset(json_path)
    assert (a.severity, a.where, a.id) == ("error", str(images / "a.png"), 0)
    assert "cannot be read" in a.what
    assert (b.severity, b.id, b.action) == ("warning", 5, "used as stored, not turned")
    assert (c.severity, c.id) == ("error", 7)
    assert "30 x 32 pixels; the JSON says 32 x 32" in c.what


def test_every_problem_is_listed_not_only_the_first(coco_content: Content, tmp_path: Path) -> None:
    for annotation in coco_content["annotations"]:
        annotation["category_id"] = 77
    problems = check_dataset(make.write_coco(tmp_path, coco_content))
    assert [p.id for p in problems] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("text", ["{", "[]", "", "\x00\x01"])
def test_text_that_is_no_coco_json_is_one_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    problems = check_dataset(tmp_path / "a.json")
    assert [(p.severity, p.id) for p in problems] == [("error", None)]


def test_missing_json_is_an_error(tmp_path: Path) -> None:
    assert check_dataset(tmp_path / "a.json") == [
        Problem("error", str(tmp_path / "a.json"), None, "file not found", "training refuses")
    ]
