"""Prediction through the public interface."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import supervision as sv
import torch
from PIL import Image
from torch import Tensor, nn

import make
import rdsnet
from rdsnet.cli.pictures import save_predictions, save_video
from rdsnet.data.coco import CocoFolder
from rdsnet.data.transforms import View, view_objects
from rdsnet.model.rdsnet import RDSNet
from rdsnet.predict.predictor import Predictor
from rdsnet.predict.sources import as_array, list_images, picture_names, read_ahead
from rdsnet.structures import MaskGrid, Objects, Targets
from rdsnet.weights import checkpoint


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    """An untrained network that finds something everywhere."""
    file = tmp_path_factory.mktemp("weights") / "m.safetensors"
    return rdsnet.load(make.save_weights(file, detect={"score_threshold": 0.005}), device="cpu")


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8)


def same(a: sv.Detections, b: sv.Detections) -> bool:
    return bool(
        np.allclose(a.xyxy, b.xyxy, atol=1e-3)
        and np.allclose(a.confidence, b.confidence, atol=1e-5)
        and (np.asarray(a.mask) == np.asarray(b.mask)).mean() > 0.999
    )


def test_detections_are_in_pixels_of_the_image(predictor: Predictor, photo: np.ndarray) -> None:
    found = predictor.predict(photo, threshold=0.0)
    assert len(found) > 0
    assert isinstance(found.mask, sv.CompactMask) and found.mask.image_shape == (50, 80)
    assert found.xyxy.min() >= 0 and found.xyxy[:, 2].max() <= 80 and found.xyxy[:, 3].max() <= 50
    assert set(found.data["class_name"]) <= {"cat", "dog"}
    assert found.data["regressed_xyxy"].shape == found.data["edge_std"].shape == (len(found), 4)


def test_a_model_that_is_still_trained_stays_as_it_is(photo: np.ndarray) -> None:
    config = rdsnet.get_config("rdsnet_tiny", {"model": {"channels": 32}, "detect": {"score_threshold": 0.005}})
    model = rdsnet.build_model(config, num_classes=2).train()
    parts = [type(module) for module in model.modules()]
    before = {name: (value, value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    live = Predictor(model, checkpoint.Checkpoint(config, ["cat", "dog"], [3, 7]))
    live.predict(photo)
    assert [type(module) for module in model.modules()] == parts and not model.training
    for name, value in model.state_dict(keep_vars=True).items():
        own, copy = before[name]
        assert value is own and value.dtype == copy.dtype and torch.equal(value, copy)


def test_threshold_is_the_smallest_score(predictor: Predictor, photo: np.ndarray) -> None:
    scores = predictor.predict(photo, threshold=0.0).confidence
    cut = float(np.median(scores))
    assert len(predictor.predict(photo, threshold=cut)) == (scores >= cut).sum()


def test_path_image_and_array_give_the_same(predictor: Predictor, photo: np.ndarray, tmp_path: Path) -> None:
    file = tmp_path / "photo.png"
    Image.fromarray(photo).save(file)
    from_array, from_path, from_image = predictor.predict([photo, file, Image.fromarray(photo)], threshold=0.0)
    assert same(from_array, from_path) and same(from_array, from_image)


def test_batches_change_nothing_and_keep_the_order(predictor: Predictor, photo: np.ndarray) -> None:
    images = [photo, photo[:, :40].copy(), photo[::-1].copy(), np.zeros((30, 90, 3), np.uint8)]
    together = predictor.predict(images, threshold=0.0, batch_size=4)
    alone = [predictor.predict(image, threshold=0.0) for image in images]
    assert all(same(a, b) for a, b in zip(together, alone, strict=True))


def test_exif_rotation_is_applied_once(tmp_path: Path, photo: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    Image.fromarray(photo).save(tmp_path / "turned.jpg", exif=exif)
    upright = as_array(tmp_path / "turned.jpg")
    assert upright.shape == (80, 50, 3)
    with Image.open(tmp_path / "turned.jpg") as image:
        assert (as_array(image) == upright).all()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), "expected a uint8 array .* got float32"),
        (np.zeros((4, 4, 4), np.uint8), r"got uint8 \(4, 4, 4\)"),
        (np.zeros((0, 4, 3), np.uint8), r"\(0, 4, 3\)"),
        (7, "expected a path, a PIL image or an array, got int"),
    ],
)
def test_what_is_not_an_image_is_refused(predictor: Predictor, image: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predictor.predict(image)  # type: ignore[call-overload]


def test_arrays_may_run_backwards(predictor: Predictor, photo: np.ndarray) -> None:
    straight = predictor.detect([photo[:, ::-1, ::-1].copy()])[0]
    assert torch.equal(predictor.detect([as_array(photo.copy()[:, ::-1, ::-1])])[0].scores, straight.scores)


def test_grey_arrays_are_images_too() -> None:
    assert as_array(np.full((3, 5), 7, np.uint8)).tolist() == np.full((3, 5, 3), 7).tolist()


def test_a_missing_file_or_an_empty_folder_is_named(predictor: Predictor, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.jpg"):
        predictor.predict(tmp_path / "none.jpg")
    with pytest.raises(FileNotFoundError, match="holds no image"):
        list_images(tmp_path)


def test_max_detections_limits_the_detector(predictor: Predictor, photo: np.ndarray) -> None:
    before = predictor.config.detect.max_detections
    predictor.set_max_detections(3)
    try:
        assert len(predictor.predict(photo, threshold=0.0)) == 3
    finally:
        predictor.set_max_detections(before)


def test_pictures_of_files_with_one_stem_do_not_overwrite_each_other() -> None:
    names = picture_names([Path("a.jpg"), Path("a.png"), Path("b.jpg")])
    assert list(names.values()) == ["a.jpg.png", "a.png.png", "b.png"]


def test_a_video_keeps_its_size_and_its_frames(predictor: Predictor, photo: np.ndarray, tmp_path: Path) -> None:
    source = tmp_path / "clip.mp4"
    with sv.VideoSink(str(source), sv.VideoInfo(width=80, height=50, fps=5)) as sink:
        for shift in range(4):
            sink.write_frame(np.roll(photo, shift, axis=1))
    target = save_video(predictor, source, tmp_path / "out", threshold=0.0)
    info = sv.VideoInfo.from_video_path(str(target))
    assert (info.width, info.height, info.total_frames) == (80, 50, 4)
    assert [path.name for path in target.parent.iterdir()] == ["clip.mp4"]


@pytest.fixture
def photos(photo: np.ndarray, tmp_path: Path) -> list[Path]:
    """Five images of different contents and sizes."""
    (tmp_path / "photos").mkdir()
    files = [tmp_path / "photos" / f"{i}.png" for i in range(5)]
    for i, file in enumerate(files):
        Image.fromarray(np.ascontiguousarray(np.roll(photo, i, axis=1)[: 50 - i])).save(file)
    return files


def test_a_folder_gives_what_its_images_give_one_by_one(
    predictor: Predictor, photos: list[Path], tmp_path: Path
) -> None:
    count = save_predictions(predictor, photos, tmp_path / "out", threshold=0.0)
    content = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [(entry["file_name"], entry["height"]) for entry in content["images"]] == [
        (f"{i}.png", 50 - i) for i in range(5)
    ]
    expected = [predictor.predict(file, threshold=0.0) for file in photos]
    assert count == sum(len(found) for found in expected)
    for image_id, found in enumerate(expected, start=1):
        scores = [entry["score"] for entry in content["annotations"] if entry["image_id"] == image_id]
        np.testing.assert_allclose(scores, found.confidence, atol=1e-5)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"{i}.png" for i in range(5)} | {"predictions.json"}


def test_images_are_read_two_ahead_and_not_more(photos: list[Path]) -> None:
    begun: list[int] = []
    third = threading.Event()

    def resize(image: np.ndarray) -> Tensor:
        begun.append(len(image))
        if len(begun) == 3:
            third.set()
        return torch.zeros(3, *image.shape[:2])

    ahead = read_ahead(photos, resize)
    assert next(ahead)[0] == photos[0]
    assert third.wait(10)  # beside the caller, who asks for nothing
    assert [file for file, _ in ahead] == photos[1:]
    assert begun == [50, 49, 48, 47, 46]

    begun.clear()
    ahead = read_ahead(photos, resize)
    next(ahead)
    ahead.close()  # waits for what is being read
    assert len(begun) <= 3


def test_stopped_half_way_what_was_done_is_kept(
    predictor: Predictor, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detect = predictor.detect_resized

    def stopped(resized: Sequence[Tensor], originals: Sequence[tuple[int, int]]) -> list[Objects]:
        if originals[0][0] == 47:  # the fourth
            raise KeyboardInterrupt
        return detect(resized, originals)

    monkeypatch.setattr(predictor, "detect_resized", stopped)
    with pytest.raises(KeyboardInterrupt):
        save_predictions(predictor, photos, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"0.png", "1.png", "2.png", "predictions.json"}
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())["images"]) == 3


def test_a_picture_that_cannot_be_written_is_an_error(predictor: Predictor, photos: list[Path], tmp_path: Path) -> None:
    (tmp_path / "out" / "4.png").mkdir(parents=True)  # where the last one should go
    with pytest.raises(OSError, match=r"4\.png"):
        save_predictions(predictor, photos, tmp_path / "out")
    assert (tmp_path / "out" / "predictions.json").exists()


def test_what_is_not_a_video_is_refused(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"clip\.mp4 cannot be read as a video"):
        save_video(predictor, tmp_path / "clip.mp4", tmp_path / "out")


SHAPES = [(40, 60), (60, 40), (32, 100), (120, 120)]


def parts_of(height: int, width: int) -> list[list[float]]:
    """Boxes of two objects that fill the same parts of every image: once squashed, all images look alike."""
    return [[width / 4, height / 4, width * 3 / 4, height / 2], [0, height / 2, width / 4, height]]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> CocoFolder:
    """An image of each of SHAPES, and the two objects in it as rectangular masks."""
    images, annotations = [], []
    for i, (height, width) in enumerate(SHAPES):
        images.append({"id": i, "file_name": f"{i}.png", "height": height, "width": width})
        for k, (x1, y1, x2, y2) in enumerate(parts_of(height, width)):
            entry = {"id": 2 * i + k, "image_id": i, "category_id": 3 + k, "iscrowd": 0, "area": (x2 - x1) * (y2 - y1)}
            entry |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]]}
            annotations.append(entry)
    categories = [{"id": 3, "name": "cat"}, {"id": 4, "name": "dog"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    return CocoFolder(make.write_coco(tmp_path_factory.mktemp("parts"), content))


class Drawn(nn.Module):
    """In place of a pixel stream: channel i is the mask of object i, on the grid that the stream itself makes."""

    def __init__(self, stream: nn.Module, targets: Targets) -> None:
        super().__init__()
        self.stream, self.targets = stream, targets

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        grid = self.stream(levels)
        assert grid.shape[2:] == self.targets.masks.shape[1:]
        return (self.targets.masks * 20.0 - 10).expand(len(grid), -1, -1, -1)  # as sure as a network can be


@pytest.fixture(params=[96, 90])  # of cells of whole pixels, and of 90 / 46 pixels
def squashing(request: pytest.FixtureRequest, parts: CocoFolder) -> Predictor:
    """A network that squashes its images and answers what training would teach it of `parts`."""
    square = request.param
    config = rdsnet.get_config(
        "rdsnet_tiny",
        {
            "model": {"channels": 32, "pixel_levels": (2,)},
            "data": {"square": square, "workers": 0},
            "detect": {"refine": "off"},
        },
    )
    model: RDSNet = rdsnet.build_model(config, num_classes=2)
    record = parts.images[0]
    view = View((record.height, record.width), (square, square), (0, 0, square, square), multiple=1)
    targets = view_objects(record.annotations, view, MaskGrid(4, 2))
    scores = torch.eye(2) * 0.9
    stream = model.object_stream
    stream.candidates = lambda raw, image, level: (torch.arange(2), scores * (level == 0))  # type: ignore[method-assign]
    stream.decode = lambda raw, image, level, index: targets.boxes[index]  # type: ignore[method-assign]
    vectors = torch.stack([torch.zeros(2, 2), torch.eye(2)], dim=1)  # background and foreground halves
    stream.representations = lambda raw, image, anchor: vectors[anchor]  # type: ignore[method-assign]
    assert model.pixel_stream is not None
    model.pixel_stream = Drawn(model.pixel_stream, targets)  # type: ignore[assignment]
    checkpoint_ = checkpoint.Checkpoint(config=config, class_names=["cat", "dog"], category_ids=[3, 4])
    return Predictor(model, checkpoint_)


def test_squashed_images_are_answered_in_their_own_pixels(squashing: Predictor) -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in SHAPES]
    for batch_size in (1, 3):
        for (height, width), found in zip(SHAPES, squashing.predict(list(images), batch_size=batch_size), strict=True):
            order = found.class_id.argsort()
            expected = parts_of(height, width)
            np.testing.assert_allclose(found.xyxy[order], expected, atol=1e-3)
            for mask, (x1, y1, x2, y2) in zip(np.asarray(found.mask)[order], expected, strict=True):
                assert mask.shape == (height, width)
                rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
                edges = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
                cell = 2 * max(width, height) / squashing.config.data.square
                np.testing.assert_allclose(edges, [x1, y1, x2, y2], atol=1 + cell / 2)


def test_predictions_of_squashed_images_are_a_coco_data_set_in_their_pixels(
    squashing: Predictor, parts: CocoFolder, tmp_path: Path
) -> None:
    files = [record.path for record in parts.images]
    assert save_predictions(squashing, files, tmp_path, pictures=False) == 2 * len(SHAPES)
    content = json.loads((tmp_path / "predictions.json").read_text())
    for entry in content["annotations"]:
        height, width = SHAPES[entry["image_id"] - 1]
        x1, y1, x2, y2 = parts_of(height, width)[entry["category_id"] - 3]
        assert entry["bbox"] == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=1e-3)
        assert entry["segmentation"]["size"] == [height, width]


def test_evaluation_of_squashed_images_is_in_their_pixels(squashing: Predictor, parts: CocoFolder) -> None:
    metrics = squashing.evaluate(parts, batch_size=3).summarize(boundary=False)
    assert metrics["box"]["regressed"]["AP"] == pytest.approx(1.0)
    assert metrics["mask"]["AP"] > 0.9  # edges of objects are not edges of cells
