"""Prediction through the public interface."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import supervision as sv
import torch
from PIL import Image

import rdsnet
from rdsnet import checkpoint
from rdsnet.predict import Predictor, as_array, list_images, picture_names, save_video


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    """An untrained network that finds something everywhere."""
    torch.manual_seed(0)
    config = rdsnet.get_config(
        "rdsnet_tiny", {"model": {"channels": 32}, "data": {"short_side": 64}, "detect": {"score_threshold": 0.005}}
    )
    file = tmp_path_factory.mktemp("weights") / "m.safetensors"
    model = rdsnet.build_model(config, num_classes=2)
    checkpoint.save(file, model, config, ["cat", "dog"], [3, 7])
    return rdsnet.load(file, device="cpu")


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


def test_what_is_not_a_video_is_refused(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"clip\.mp4 cannot be read as a video"):
        save_video(predictor, tmp_path / "clip.mp4", tmp_path / "out")
