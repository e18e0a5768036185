"""Fitting the refinement to any model's outputs, and the command that does so for COCO results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import supervision as sv
import torch

from rdsnet.cli.main import run as run_command
from rdsnet.data.coco import CocoFolder
from rdsnet.model.mbrm import BINARY, MBRM
from rdsnet.model.mbrm_fit import Pairs, fit
from rdsnet.refine.boxes import Refiner, fit_refiner, refine_boxes
from rdsnet.results.exchange import compact_mask, read_results
from rdsnet.results.metrics import box_ap
from rdsnet.rle import crop_to_rle

W, H = 120, 100
Image = tuple[np.ndarray, np.ndarray, np.ndarray]


def image(seed: int, *, n: int = 8, noise: float = 2.0, grow: int = 0) -> Image:
    """Boxes that are off by `noise` pixels, binary masks that end `grow` pixels outside of the objects, true boxes."""
    generator = np.random.default_rng(seed)
    corner = generator.integers(5, 60, (n, 2))
    true = np.concatenate([corner, corner + generator.integers(20, 31, (n, 2))], axis=1)
    masks = np.zeros((n, H, W), bool)
    for mask, (x1, y1, x2, y2) in zip(masks, true, strict=True):
        wrong = generator.integers(-1, 2, 4) * (generator.random(4) < 0.2)  # so that no numbers are ever sure
        x1, y1, x2, y2 = np.array([x1 - grow, y1 - grow, x2 + grow, y2 + grow]) + wrong
        mask[y1:y2, x1:x2] = True
    boxes = true + generator.normal(0, noise, true.shape)
    return boxes.astype(np.float32), masks, true.astype(np.float32)


def dataset(count: int = 6, **settings: Any) -> tuple[list[Any], list[Any]]:
    """As tuples with a label an object, so that each prediction finds its own."""
    images = [image(seed, **settings) for seed in range(count)]
    return [(b, m, np.arange(len(b))) for b, m, _ in images], [(t, np.arange(len(t))) for _, _, t in images]


def error(refiner: Refiner | None, **settings: Any) -> float:
    """Mean distance of edges from the true ones, pixels, on images that were not fitted to."""
    boxes, masks, true = image(100, n=40, **settings)
    return float(np.abs(refine_boxes(boxes, masks, refiner=refiner).xyxy - true).mean())


def test_a_fit_learns_where_the_masks_of_a_model_end() -> None:
    """Masks 2 pixels larger than their objects on each side: the default numbers believe in the mask's edge."""
    refiner = fit_refiner(*dataset(grow=2))
    assert error(None, grow=2) > 1.3
    assert error(refiner, grow=2) < 0.5
    assert refiner.masks == "binary"
    assert refiner.edges is not None
    assert refiner.edges > 0.9 * 6 * 8 * 4
    assert refiner.before is not None
    assert refiner.after is not None
    assert refiner.after < 0.5 * refiner.before


def test_the_fit_is_that_of_the_models_own_refinement() -> None:
    predictions, truth = dataset(3)
    ours = fit_refiner(predictions, truth, gammas=(0.1,))
    mbrm = MBRM(replace(BINARY, gamma=0.1))
    images = []
    for (boxes, masks, _), (true, _) in zip(predictions, truth, strict=True):
        profiles = torch.from_numpy(masks).float()
        images.append(Pairs(torch.from_numpy(boxes), torch.from_numpy(true), (profiles.amax(1), profiles.amax(2))))
    report = fit(mbrm, images)
    np.testing.assert_allclose(ours.weight, mbrm.weight.tolist(), atol=1e-5)
    assert (ours.edges, ours.before, ours.after) == (report.edges, report.before, report.after)


def test_all_forms_of_predictions_and_truth_give_the_same_fit() -> None:
    predictions, truth = dataset(3)
    expected = fit_refiner(predictions, truth, gammas=(0.1,))
    n = 8
    scores = np.linspace(0.9, 0.5, n)
    windows = np.array([[0, 0, W, H]] * n)
    shuffled = np.random.default_rng(0).permutation(n)
    forms = {
        "dense": [sv.Detections(xyxy=b, mask=m, class_id=c, confidence=scores) for b, m, c in predictions],
        "compact": [
            sv.Detections(xyxy=b, mask=compact_mask(list(m), windows, (H, W)), class_id=c) for b, m, c in predictions
        ],
        "dict, not sorted": [
            {
                "boxes": torch.from_numpy(b[shuffled]),
                "masks": torch.from_numpy(m[shuffled])[:, None],
                "labels": torch.from_numpy(c[shuffled]),
                "scores": torch.from_numpy(scores[shuffled]),
            }
            for b, m, c in predictions
        ],
        "crops": [
            {"boxes": b, "masks": list(m), "origins": [[0, 0]] * n, "image_size": (H, W), "labels": c}
            for b, m, c in predictions
        ],
    }
    for form in forms.values():
        assert fit_refiner(form, truth, gammas=(0.1,)) == expected
    truths: list[list[Any]] = [
        [{"boxes": torch.from_numpy(b), "labels": torch.from_numpy(c)} for b, c in truth],
        [sv.Detections(xyxy=b, class_id=c) for b, c in truth],
    ]
    for other in truths:
        assert fit_refiner(iter(predictions), iter(other), gammas=(0.1,)) == expected


def test_labels_must_agree_only_where_both_sides_have_some() -> None:
    boxes, masks, true = image(0, n=1)
    assert fit_refiner([(boxes, masks)], [true]).edges == 4
    assert fit_refiner([(boxes, masks, np.array([5]))], [true]).edges == 4
    with pytest.raises(ValueError, match="no detection of 1 images finds an object"):
        fit_refiner([(boxes, masks, np.array([5]))], [(true, np.array([6]))])


def test_images_without_objects_or_predictions_are_no_trouble() -> None:
    predictions, truth = dataset(2)
    nothing = np.zeros((0, 4), np.float32)
    predictions += [sv.Detections.empty(), predictions[0]]
    truth += [truth[0], nothing]
    assert fit_refiner(predictions, truth, gammas=(0.1,)) == fit_refiner(predictions[:2], truth[:2], gammas=(0.1,))


def test_soft_masks_are_fitted_as_such() -> None:
    predictions, truth = dataset(2)
    soft = [(b, m * np.float32(0.9), c) for b, m, c in predictions]
    assert fit_refiner(soft, truth).masks == "soft"


def test_of_many_edges_a_sample_is_taken_and_always_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rdsnet.refine.boxes.MAX_EDGES", 100)
    first, second = (fit_refiner(*dataset(), gammas=(0.1,)) for _ in range(2))
    assert first == second
    assert first.edges is not None
    assert 60 < first.edges < 140


@pytest.mark.parametrize(
    ("predictions", "truth", "message"),
    [
        (dataset(2)[0], dataset(1)[1], "more of one than of the other"),
        ([(np.zeros((1, 4)),)], [np.zeros((0, 4))], "image 0: expected a prediction as"),
        ([(np.zeros((1, 5)), np.zeros((1, H, W)))], [np.zeros((0, 4))], r"image 0: expected boxes of shape \(N, 4\)"),
        (dataset(1)[0], ["boxes"], "image 0: expected truth as"),
        (dataset(1)[0], [(np.zeros((1, 4)), np.zeros(2))], r"image 0: expected labels of shape \(1,\), got \(2,\)"),
        (
            [{"boxes": np.zeros((1, 4)), "masks": [np.ones((2, 2))], "origins": [[0, 0]]}],
            [np.zeros((1, 4))],
            "image 0: expected the image_size",
        ),
        ([], [], "no detection of 0 images"),
    ],
)
def test_what_cannot_be_fitted_is_refused(predictions: Any, truth: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_refiner(predictions, truth)


def test_a_gamma_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="gammas above 0"):
        fit_refiner(*dataset(1), gammas=(0.0, 0.1))


# --- the command ---


def write_results(folder: Path, *, count: int = 4) -> tuple[Path, Path, list[dict[str, Any]]]:
    """truth.json, results.json and its content: two classes, and image ids that start with 0."""
    images, annotations, results = [], [], []
    for id in range(count):
        boxes, masks, true = image(id, n=4, grow=2)
        images.append({"id": id, "file_name": f"photos/{id}.jpg", "width": W, "height": H})
        for k, (box, mask, edges) in enumerate(zip(boxes, masks, true, strict=True)):
            category = 3 + 4 * (k % 2)
            rle = crop_to_rle(mask, (0, 0, W, H), (H, W))
            results.append(
                {
                    "image_id": id,
                    "category_id": category,
                    "bbox": xywh(box),
                    "score": 0.9 - 0.1 * k,
                    "segmentation": {"size": [H, W], "counts": rle["counts"]},
                }
            )
            annotations.append({"image_id": id, "category_id": category, "bbox": xywh(edges), "iscrowd": 0})
    for number, annotation in enumerate(annotations):
        annotation["id"] = number
    truth = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
    }
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "results.json").write_text(json.dumps(results))
    return folder / "truth.json", folder / "results.json", results


def xywh(box: np.ndarray) -> list[float]:
    x1, y1, x2, y2 = box.tolist()
    return [x1, y1, x2 - x1, y2 - y1]


def run(*arguments: object) -> None:
    run_command(["fit-refiner", *(str(argument) for argument in arguments)])


def test_the_command_fits_saves_and_applies_a_refiner(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth, file, results = write_results(tmp_path)
    output, applied = tmp_path / "refiner.json", tmp_path / "refined.json"
    run(file, "--truth", truth, "--output", output, "--apply", applied)
    printed = capsys.readouterr().out
    assert "edges of binary masks" in printed
    assert printed.rstrip().endswith(f"refiner: {output}")
    refiner = Refiner.load(output)
    assert refiner.masks == "binary"
    refined = json.loads(applied.read_text())
    assert [{**entry, "bbox": 0} for entry in refined] == [{**entry, "bbox": 0} for entry in results]
    boxes, masks, _ = image(0, n=4, grow=2)
    expected = refine_boxes(boxes, masks, refiner=refiner).xyxy
    np.testing.assert_allclose([entry["bbox"] for entry in refined[:4]], [xywh(box) for box in expected], atol=1e-4)


def test_the_commands_ap_is_that_of_the_boxes(tmp_path: Path) -> None:
    truth_file, file, _ = write_results(tmp_path)
    truth = CocoFolder(truth_file, need_images=False)
    results = read_results(file, truth)
    perfect = np.concatenate([image(id, n=4, grow=2)[2] for id in range(4)])
    np.testing.assert_allclose(box_ap(truth, results, perfect), np.ones(10))
    # a quarter larger in width: IoU 0.8
    wide = perfect.copy()
    wide[:, 2] += 0.25 * (perfect[:, 2] - perfect[:, 0])
    np.testing.assert_allclose(box_ap(truth, results, wide), [1] * 7 + [0] * 3, atol=1e-6)


def test_results_of_unknown_classes_do_not_count(tmp_path: Path) -> None:
    truth_file, file, results = write_results(tmp_path)
    truth = CocoFolder(truth_file, need_images=False)
    perfect = np.concatenate([image(id, n=4, grow=2)[2] for id in range(4)])
    file.write_text(json.dumps([*results, {**results[0], "category_id": 5, "score": 1.0}]))
    found = read_results(file, truth)
    assert found.labels == [0, 1, 0, 1] * 4 + [-1]
    np.testing.assert_allclose(box_ap(truth, found, np.concatenate([perfect, perfect[:1] + 30])), np.ones(10))


def test_predictions_of_ours_are_matched_by_the_names_of_files_and_classes(tmp_path: Path) -> None:
    truth, file, results = write_results(tmp_path)
    run(file, "--truth", truth, "--output", tmp_path / "a.json", "--gammas", 0.1)
    # numbered as `rdsnet predict` does, in another order, and with other category ids
    other = {3: 2, 7: 1}
    content = {
        "images": [{"id": 9 - id, "file_name": f"{id}.jpg", "width": W, "height": H} for id in range(4)],
        "categories": [{"id": 2, "name": "cat"}, {"id": 1, "name": "dog"}],
        "annotations": [
            {**entry, "image_id": 9 - entry["image_id"], "category_id": other[entry["category_id"]]}
            for entry in results
        ],
    }
    (tmp_path / "predictions.json").write_text(json.dumps(content))
    applied = tmp_path / "out.json"
    arguments = ["--truth", truth, "--output", tmp_path / "b.json", "--apply", applied, "--gammas", 0.1]
    run(tmp_path / "predictions.json", *arguments)
    assert Refiner.load(tmp_path / "a.json") == Refiner.load(tmp_path / "b.json")
    written = json.loads(applied.read_text())
    assert written["images"] == content["images"]
    assert len(written["annotations"]) == len(results)


def test_a_refiner_can_be_applied_to_results_of_other_images(tmp_path: Path) -> None:
    truth, file, results = write_results(tmp_path)
    # without a truth of their own, a mask without a pixel among them
    empty = crop_to_rle(np.zeros((H, W), bool), (0, 0, W, H), (H, W))["counts"]
    other = [{**results[0], "image_id": "new"}, {**results[1], "image_id": "new"}]
    other[1] = {**other[1], "segmentation": {"size": [H, W], "counts": empty}}
    (tmp_path / "other.json").write_text(json.dumps(other))
    out = tmp_path / "out.json"
    arguments = ["--truth", truth, "--output", tmp_path / "r.json", "--gammas", 0.1]
    run(file, *arguments, "--apply", out, "--apply_to", tmp_path / "other.json")
    written = json.loads(out.read_text())
    assert [entry["image_id"] for entry in written] == ["new", "new"]
    assert written[0]["bbox"] != other[0]["bbox"]
    np.testing.assert_allclose(written[1]["bbox"], other[1]["bbox"], rtol=1e-5)


def test_the_gammas_are_those_that_were_asked_for(tmp_path: Path) -> None:
    truth, file, _ = write_results(tmp_path)
    run(file, "--truth", truth, "--output", tmp_path / "r.json", "--gammas", 0.07)
    assert Refiner.load(tmp_path / "r.json").gamma == 0.07


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segmentation": [[0, 0, 5, 0, 5, 5]]}, "entry 0 has no mask as run-length code"),
        ({"segmentation": {"size": [H, W], "counts": [5, 5]}}, "entry 0: RLE counts do not add up"),
        ({"segmentation": {"size": [H, W + 1], "counts": [H * (W + 1)]}}, "entry 1 has a mask of"),
        ({"image_id": 77}, "entry 0 is of image 77"),
        ({"bbox": [1, 2, 3]}, "entry 0 needs image_id"),
    ],
)
def test_results_that_cannot_be_read_are_refused_by_name(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    truth, file, results = write_results(tmp_path)
    file.write_text(json.dumps([{**results[0], **change}, *results[1:]]))
    with pytest.raises(ValueError, match=message) as caught:
        run(file, "--truth", truth, "--output", tmp_path / "r.json")
    assert str(file) in str(caught.value)
    assert not (tmp_path / "r.json").exists()


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    truth, file, _ = write_results(tmp_path)
    with pytest.raises(ValueError, match="expected a COCO JSON"):
        run(file, "--truth", file, "--output", tmp_path / "r.json")
    with pytest.raises(ValueError, match="expected COCO results"):
        (tmp_path / "text.json").write_text('"text"')
        run(tmp_path / "text.json", "--truth", truth, "--output", tmp_path / "r.json")
    with pytest.raises(ValueError, match=r"text\.json: images cannot be matched by file_name"):
        (tmp_path / "text.json").write_text(json.dumps({"images": [{"id": 1}], "annotations": [], "categories": []}))
        run(tmp_path / "text.json", "--truth", truth, "--output", tmp_path / "r.json")
    with pytest.raises(FileNotFoundError, match=r"none\.json: file not found"):
        run(tmp_path / "none.json", "--truth", truth, "--output", tmp_path / "r.json")
    with pytest.raises(ValueError, match="--apply_to needs --apply"):
        run(file, "--truth", truth, "--output", tmp_path / "r.json", "--apply_to", file)
