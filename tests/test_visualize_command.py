"""`rdsnet visualize`, and pixel representations as colours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import make
import rdsnet
from rdsnet.cli.main import run
from rdsnet.predict.predictor import Predictor
from rdsnet.structures import above
from rdsnet.visualize.refinement import explain_refinement
from rdsnet.visualize.representations import draw_representations, pixel_colours, to_sphere
from rdsnet.weights import checkpoint
from rdsnet.weights.checkpoint import Checkpoint

SETTINGS = {
    "model": {"channels": 32},
    "data": {"short_side": 64},
    "detect": {"score_threshold": 0.0, "max_detections": 6},
}
KINDS = ("overlay", "uncertainty", "comparison", "refinement", "representations")


def save_model(file: Path, classes: list[str], **changes: object) -> Path:
    torch.manual_seed(0)
    settings = {name: {**section, **changes.get(name, {})} for name, section in SETTINGS.items()}  # type: ignore[dict-item]
    config = rdsnet.get_config("rdsnet_tiny", settings)
    checkpoint.save(file, rdsnet.build_model(config, num_classes=len(classes)), config, classes, [2, 9][: len(classes)])
    return file


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained network that finds something everywhere, of the data set's classes."""
    return save_model(tmp_path_factory.mktemp("weights") / "m.safetensors", ["cat", "dog"])


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JSON of three images, which lie in images/ beside it."""
    folder = tmp_path_factory.mktemp("coco")
    return make.write_coco(folder, make.coco(), "truth.json")


def visualize(*arguments: object) -> None:
    run(["visualize", *(str(a) for a in arguments), "--device", "cpu", "--threshold", "0"])


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_every_kind_of_every_image_of_the_truth(weights, truth, tmp_path, capsys):
    visualize("--weights", weights, "--truth", truth, "--output", tmp_path / "out")
    assert names(tmp_path / "out") == {f"{name}_{kind}.png" for name in "abc" for kind in KINDS}
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"15 pictures of 3 images (NAME_KIND.png): {tmp_path / 'out'}"


def test_without_truth_everything_but_the_comparison(weights, truth, tmp_path, capsys):
    visualize(truth.parent / "images" / "a.png", "--weights", weights, "--output", tmp_path)
    assert names(tmp_path) == {f"a_{kind}.png" for kind in KINDS if kind != "comparison"}
    assert capsys.readouterr().out.startswith("no comparison: it needs --truth")


def test_images_are_matched_by_name(weights, truth, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    Image.new("RGB", (60, 40), (0, 0, 200)).save(own / "a.png")
    visualize(own, "--weights", weights, "--truth", truth, "--what", "comparison", "--output", tmp_path / "out")
    assert names(tmp_path / "out") == {"a_comparison.png"}
    page = np.array(Image.open(tmp_path / "out" / "a_comparison.png"))
    assert (page == (0, 0, 200)).all(axis=2).any()  # the image that was named, not that of the truth
    Image.new("RGB", (20, 20)).save(own / "other.png")
    with pytest.raises(ValueError, match=r"1 of 2 images left out: other.png: .* has no images of this name"):
        visualize(own, "--weights", weights, "--truth", truth, "--what", "overlay", "--output", tmp_path / "more")
    assert names(tmp_path / "more") == {"a_overlay.png"}


def test_the_explained_object_is_the_one_that_changed_most_or_the_one_named(weights, truth, tmp_path):
    file = truth.parent / "images" / "a.png"
    predictor = rdsnet.load(weights, device="cpu")
    image = np.array(Image.open(file))
    found = above(predictor.detect([image])[0], 0.0)
    most = int((found.boxes - found.regressed_boxes).abs().amax(1).argmax())
    for options, index in (((), most), (("--object", 0), 0)):
        visualize(file, "--weights", weights, "--what", "refinement", "--output", tmp_path, *options)
        drawn = np.array(Image.open(tmp_path / "a_refinement.png"))
        np.testing.assert_array_equal(drawn, explain_refinement(image, found, index, predictor.model.mbrm))
    with pytest.raises(ValueError, match=r"a.png: expected --object of one of 6 objects .* got 6"):
        visualize(file, "--weights", weights, "--what", "refinement", "--output", tmp_path, "--object", 6)


def test_what_cannot_be_drawn_is_an_error(weights, truth, tmp_path):
    image = truth.parent / "images" / "a.png"
    with pytest.raises(ValueError, match="comparison cannot be drawn: it needs --truth"):
        visualize(image, "--weights", weights, "--what", "comparison", "--output", tmp_path / "out")
    with pytest.raises(ValueError, match="expected an image, a folder of images, or --truth"):
        visualize("--weights", weights, "--output", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no such file"):
        visualize(tmp_path / "none.png", "--weights", weights, "--output", tmp_path / "out")
    one = save_model(tmp_path / "one.safetensors", ["cat"])
    with pytest.raises(ValueError, match="the model knows the classes cat"):
        visualize("--truth", truth, "--weights", one, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_without_refinement_have_no_uncertainty(truth, tmp_path, capsys):
    direct = save_model(tmp_path / "direct.safetensors", ["cat", "dog"], detect={"refine": "direct"})
    image = truth.parent / "images" / "a.png"
    visualize(image, "--weights", direct, "--output", tmp_path / "out")
    assert names(tmp_path / "out") == {"a_overlay.png", "a_representations.png"}
    assert "no refinement: the model does not refine its boxes by MBRM" in capsys.readouterr().out
    with pytest.raises(ValueError, match="uncertainty cannot be drawn: the model does not refine"):
        visualize(image, "--weights", direct, "--what", "uncertainty", "--output", tmp_path / "out")


def test_models_without_masks_have_no_representations(truth, tmp_path):
    plain = save_model(tmp_path / "plain.safetensors", ["cat", "dog"], model={"masks": False})
    visualize("--truth", truth, "--weights", plain, "--output", tmp_path / "out")
    assert names(tmp_path / "out") == {f"{name}_{kind}.png" for name in "abc" for kind in ("overlay", "comparison")}
    with pytest.raises(ValueError, match="no pixel stream"):
        draw_representations(rdsnet.load(plain, device="cpu").pixel_representations, np.zeros((20, 30, 3), np.uint8))


@pytest.fixture(scope="module")
def predictor(weights: Path) -> Predictor:
    return rdsnet.load(weights, device="cpu")


def test_representations_are_shown_beside_the_image(predictor):
    image = np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8)
    page = draw_representations(predictor.pixel_representations, image, scale=2)
    assert page.shape[1] == 2 * 160 + 8 and page.shape[0] > 100
    np.testing.assert_array_equal(page[-100:, 168:][::2, ::2].shape, (50, 80, 3))
    assert page[-100:, 168:].std() > 5
    with pytest.raises(ValueError, match="uint8 image"):
        draw_representations(predictor.pixel_representations, image / 255)


def test_colours_lie_where_the_pixels_are(predictor):
    """A model that knows in which third of a padded image its few cells lie: nothing is shifted by the padding."""

    class Thirds(torch.nn.Module):
        image_mean = torch.zeros(3, 1, 1)

        def forward(self, images):
            assert images.shape[2:] == (64, 96)
            left = torch.tensor([1.0, 1, 1, 1, 0, 0]).expand(4, 6)  # cells of 16 pixels; the last ends in the padding
            return None, torch.stack([left, 1 - left, left])[None]

        def normalise(self, images, sizes):
            return images.float()

    stand_in = Predictor(Thirds(), Checkpoint(predictor.config, ["cat"], [1]))
    grid = stand_in.pixel_representations(np.zeros((128, 180, 3), np.uint8))
    colours = pixel_colours(grid, (128, 180)).astype(int)
    assert colours.shape == (128, 180, 3)
    assert np.abs(colours[:, 0] - colours[:, -1]).max() > 100
    nearer_left = np.abs(colours - colours[:, :1]).sum(2) < np.abs(colours - colours[:, -1:]).sum(2)
    assert np.abs(nearer_left.sum(axis=1) - 128).max() <= 2


def test_on_the_sphere_like_stays_with_like():
    rng = torch.Generator().manual_seed(0)
    kinds = torch.eye(8)[:3].repeat_interleave(20, dim=0)
    inner = to_sphere(5 * kinds + 0.01 * torch.rand(60, 8, generator=rng))
    inner = inner @ inner.T
    same = torch.eye(3).repeat_interleave(20, 0).repeat_interleave(20, 1).bool()
    assert inner[same].min() > 0.99 and inner[~same].abs().max() < 0.05
    anything = to_sphere(torch.randn(60, 8, generator=rng))
    torch.testing.assert_close(anything.norm(dim=1), torch.ones(60))
