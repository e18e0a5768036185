"""`rdsnet demo` without a browser: what the page shows of an image, and what its events do."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import make
import rdsnet
from rdsnet.cli.predict import demo
from rdsnet.data.coco import CocoFolder
from rdsnet.predict.predictor import Predictor
from rdsnet.rle import rasterise
from rdsnet.serve import session as session_module
from rdsnet.serve.address import is_this_machine, require_free
from rdsnet.serve.session import (
    HEADERS,
    Controls,
    Detected,
    Models,
    detect,
    picture,
    read_upload,
    rows_of,
    save_json,
    save_overlay,
    summarise,
)
from rdsnet.structures import Objects, above
from rdsnet.visualize.overlay import draw_objects

ALL = Controls(threshold=0.0, refinement=1.0, masks=True, uncertainty=False, names=False)
SURE: dict[str, Any] = {"sure": True, "detect": {"max_detections": 20}}  # 20 things, whose boxes move


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make.save_weights(tmp_path_factory.mktemp("weights") / "m.safetensors", **SURE)


@pytest.fixture(scope="module")
def predictor(weights: Path) -> Predictor:
    return rdsnet.load(weights, device="cpu")


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def found(predictor: Predictor, photo: np.ndarray) -> Detected:
    return detect(predictor, photo, name="photo.jpg", weights="runs/mine")


def middle_score(found: Detected) -> float:
    """A threshold that about half of the objects reach."""
    return float(found.objects.scores.median())


@pytest.mark.parametrize(("name", "message"), [("note.txt", "note.txt: cannot be read"), ("none.png", "none.png: ")])
def test_what_is_not_an_image_is_named_without_its_folder(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "note.txt").write_text("no image")
    with pytest.raises(ValueError, match=message) as error:
        read_upload(tmp_path / name)
    assert str(tmp_path) not in str(error.value)


def test_an_image_of_too_many_pixels_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (2000, 1500)).save(tmp_path / "large.png")
    assert read_upload(tmp_path / "large.png").shape == (1500, 2000, 3)
    monkeypatch.setattr(session_module, "MAX_PIXELS", 2_000_000)
    monkeypatch.delattr(session_module, "read_image")
    with pytest.raises(ValueError, match=r"large.png: 2000 x 1500 pixels .*\(at most 2 million\)"):
        read_upload(tmp_path / "large.png")


def test_the_slider_goes_from_regressed_to_refined_boxes(found: Detected, photo: np.ndarray) -> None:
    def drawn(boxes: torch.Tensor) -> np.ndarray:
        return draw_objects(
            photo, replace(found.objects, boxes=boxes), found.class_names, regressed=False, labels=False
        )

    first, last = found.objects.regressed_boxes, found.objects.boxes
    assert (first - last).abs().max() > 1
    for refinement, boxes in ((0.0, first), (1.0, last), (0.5, (first + last) / 2)):
        assert (picture(found, replace(ALL, refinement=refinement)) == drawn(boxes)).all()


def test_each_switch_changes_the_picture_and_uncertainty_only_that_of_refined_boxes(found: Detected) -> None:
    plain = picture(found, ALL)
    for change in ({"masks": False}, {"names": True}, {"uncertainty": True}, {"threshold": middle_score(found)}):
        assert (picture(found, replace(ALL, **change)) != plain).any()
    half = replace(ALL, refinement=0.5)
    assert (picture(found, replace(half, uncertainty=True)) == picture(found, half)).all()
    assert "move the slider to 1" in summarise(found, replace(half, uncertainty=True))


def test_a_large_image_is_shown_reduced_and_saved_whole(
    predictor: Predictor, photo: np.ndarray, found: Detected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "VIEW_SIDE", 40)
    large = detect(predictor, photo, name="photo.jpg", weights="m")
    assert large.view.shape == (25, 40, 3) and large.view_objects.image_size == (25, 40)
    torch.testing.assert_close(large.view_objects.boxes * 2, large.objects.boxes)
    torch.testing.assert_close(large.view_objects.edge_std * 2, large.objects.edge_std)
    for small, (x0, y0, _, _), whole in zip(
        large.view_objects.masks, large.view_objects.windows.tolist(), large.objects.masks, strict=True
    ):
        assert y0 + small.shape[0] <= 25 and x0 + small.shape[1] <= 40
        assert abs(4 * int(small.sum()) - int(whole.sum())) <= 4 * sum(small.shape)  # half a pixel along the border
    assert picture(large, ALL).shape == (100, 160, 3)  # four times the view
    assert "reduced" in summarise(large, ALL) and "reduced" not in summarise(found, ALL)
    with Image.open(save_overlay(large, ALL, tmp_path)) as saved:
        assert saved.filename.endswith("photo_objects.png")
        assert (np.asarray(saved) == picture(found, ALL)).all()


def test_the_table_has_a_row_for_each_object_that_scores_enough(found: Detected) -> None:
    threshold = middle_score(found)
    rows = rows_of(found, threshold)
    assert len(rows) == int((found.objects.scores >= threshold).sum()) < len(rows_of(found, 0.0)) == 20
    row = dict(zip(HEADERS, rows[0], strict=True))
    assert row["#"] == 1 and row["class"] == found.class_names[found.objects.labels[0]]
    assert row["score"] == pytest.approx(float(found.objects.scores[0]), abs=1e-3)
    for column, values in (("regressed box", found.objects.regressed_boxes), ("refined box", found.objects.boxes)):
        assert [float(text) for text in row[column].split()] == pytest.approx(values[0].tolist(), abs=0.051)
    assert [float(x) for x in row["edge std"].split()] == pytest.approx(found.objects.edge_std[0].tolist(), abs=0.0051)
    assert row["area"] == int(found.objects.masks[0].sum())


def test_the_summary_counts_what_scores_enough(found: Detected) -> None:
    threshold = middle_score(found)
    count = len(rows_of(found, threshold))
    text = summarise(found, replace(ALL, threshold=threshold))
    assert f"photo.jpg, 80 x 50 pixels · {count} of 20 objects" in text and "with mine" in text


def test_nothing_found_is_shown_as_nothing(found: Detected, tmp_path: Path) -> None:
    none = replace(ALL, threshold=1.0, uncertainty=True, names=True)
    assert picture(found, none).shape == (200, 320, 3)
    assert rows_of(found, 1.0) == [] and "0 of 20 objects" in summarise(found, none)
    assert json.loads(save_json(found, 1.0, tmp_path).read_text())["annotations"] == []


def test_weights_that_do_not_refine_say_so(tmp_path: Path, photo: np.ndarray) -> None:
    plain = rdsnet.load(
        make.save_weights(tmp_path / "off.safetensors", sure=True, detect={"refine": "off"}),
        device="cpu",
    )
    found = detect(plain, photo, name="photo.jpg", weights="off")
    controls = replace(ALL, uncertainty=True)
    assert "do not refine" in summarise(found, controls) and rows_of(found, 0)[0][5] == "–  –  –  –"
    assert picture(found, controls).shape == (200, 320, 3)


def test_the_json_is_a_coco_data_set_of_the_objects(found: Detected, photo: np.ndarray, tmp_path: Path) -> None:
    threshold = middle_score(found)
    Image.fromarray(photo).save(tmp_path / "photo.jpg")
    path = save_json(found, threshold, tmp_path)
    assert path.name == "photo.json"
    objects = above(found.objects, threshold)
    x1, y1, x2, y2 = objects.boxes[0].tolist()
    assert json.loads(path.read_text())["annotations"][0]["bbox"] == pytest.approx([x1, y1, x2 - x1, y2 - y1])
    record = CocoFolder(path, tmp_path).images[0]
    assert (record.width, record.height) == (80, 50) and len(record.annotations) == len(objects)
    names = CocoFolder(path, tmp_path).class_names
    for i, annotation in enumerate(record.annotations):
        assert names[annotation.label] == found.class_names[objects.labels[i]]
        window = tuple(objects.windows[i].tolist())
        assert (rasterise(annotation.rle, window, (50, 80)) == objects.masks[i].numpy()).all()


def test_weights_are_read_once_until_their_file_changes(tmp_path: Path) -> None:
    file = make.save_weights(tmp_path / "m.safetensors", **SURE)
    models = Models("cpu")
    first = models.predictor(f" {file} ")
    assert models.predictor(str(file)) is first
    make.save_weights(file, seed=1, **SURE)
    os.utime(file, ns=(1, 1))
    assert models.predictor(str(file)) is not first
    with pytest.raises(FileNotFoundError, match="found nothing at"):
        models.predictor(str(tmp_path / "none"))


class Page:
    """A page's events, called as Gradio calls them; `messages` are those that the user gets."""

    def __init__(self, weights: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        gradio = pytest.importorskip("gradio")
        from rdsnet.serve.page import Handlers

        self.messages: list[str] = []
        monkeypatch.setattr(gradio, "Warning", lambda message, **_: self.messages.append(message))
        self.weights = str(weights)
        self.sample = folder / "sample.png"
        Image.fromarray(np.full((40, 30, 3), 90, np.uint8)).save(self.sample)
        self.handlers = Handlers(Models("cpu"), [self.sample], folder)


@pytest.fixture
def page(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Page:
    return Page(weights, tmp_path, monkeypatch)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """One entry for every time that a network detects."""
    calls: list[int] = []
    detect = Predictor.detect

    def counted(self: Predictor, images: Sequence[np.ndarray]) -> list[Objects]:
        calls.append(len(images))
        return detect(self, images)

    monkeypatch.setattr(Predictor, "detect", counted)
    yield calls


CONTROLS = (0.0, 1.0, True, False, False)


def test_the_network_runs_once_however_often_the_controls_move(page: Page, runs: list[int], tmp_path: Path) -> None:
    found = page.handlers.detect_in_sample(0, page.weights, None)
    for refinement in (0.0, 0.5, 1.0):
        path, rows, text = page.handlers.redraw(found, 0.0, refinement, True, True, True)
        assert Image.open(path).size == (120, 160) and len(rows) == 20 and "sample.png, 30 x 40" in text
    assert Image.open(page.handlers.overlay(found, *CONTROLS)).format == "PNG"
    assert json.loads(Path(page.handlers.coco_json(found, *CONTROLS)).read_text())["images"][0]["width"] == 30
    assert runs == [1]


def test_other_weights_look_at_the_same_image_again(page: Page, runs: list[int], tmp_path: Path) -> None:
    assert page.handlers.detect_again(page.weights, None) is None and runs == []
    found = page.handlers.detect_in_sample(0, page.weights, None)
    other = page.handlers.detect_again(str(make.save_weights(tmp_path / "other.safetensors", seed=1, **SURE)), found)
    assert other.image is found.image and not torch.equal(other.objects.scores, found.objects.scores)
    assert page.handlers.detect_again(other.weights, other) is other
    assert runs == [1, 1]


def test_what_cannot_be_read_is_a_message_and_what_was_shown_stays(page: Page, tmp_path: Path) -> None:
    found, emptied = page.handlers.detect_in_upload(str(page.sample), page.weights, None)
    assert found is not None and emptied is None and page.messages == []
    bad = tmp_path / "<b>bad.png"
    bad.write_bytes(b"\x89PNG no more")
    assert page.handlers.detect_in_upload(str(bad), page.weights, found) == (found, None)
    assert "&lt;b&gt;bad.png: cannot be read as an image" in page.messages[-1]
    for weights, message in ((bad, "not a safetensors file"), (tmp_path / "none", "found nothing"), ("", "")):
        assert page.handlers.detect_again(str(weights), found) is found
        assert message in page.messages[-1]
    assert len(page.messages) == 4


def test_before_the_first_image_the_page_says_what_to_do(page: Page) -> None:
    assert page.handlers.redraw(None, *CONTROLS) == (None, [], "Drop an image, or pick a sample.")
    assert page.handlers.overlay(None, *CONTROLS) is page.handlers.coco_json(None, *CONTROLS) is None


def test_a_page_for_others_takes_no_weights_but_those_it_names(page: Page) -> None:
    import gradio

    from rdsnet.serve.page import build_page

    for host, expected in (("127.0.0.1", True), ("localhost", True), ("0.0.0.0", False), ("127.example.org", False)):
        assert is_this_machine(host) is expected
    blocks = build_page(page.handlers, weights=page.weights, any_weights=False)
    (box,) = (block for block in blocks.blocks.values() if isinstance(block, gradio.Dropdown))
    assert box.preprocess(page.weights) == page.weights and box.preprocess("nuclei") == "nuclei"
    with pytest.raises(gradio.Error):
        box.preprocess(str(page.sample))


def test_a_busy_port_is_an_error_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        with pytest.raises(ValueError, match=rf"127.0.0.1:{port} .*: choose another with --port"):
            require_free("127.0.0.1", port)
    require_free("127.0.0.1", port)
    with pytest.raises(ValueError, match="port of 1 to 65535, got 0"):
        require_free("127.0.0.1", 0)


def test_without_gradio_one_line_says_what_to_install(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "rdsnet.serve.page", raising=False)
    with pytest.raises(ValueError, match=r"pip install 'rdsnet\[demo\]'"):
        demo(str(weights), port=make.free_port(), device="cpu")
