"""COCO metrics against pycocotools on random detections, and against numbers that a person can work out."""

import contextlib
import io
import json
import pickle
from pathlib import Path
from typing import Any

import cv2
import faster_coco_eval
import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as faster_mask
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.console import Console

import make
from rdsnet.cli.tables import format_parts, format_table
from rdsnet.data.coco import CocoFolder
from rdsnet.results.exchange import read_results
from rdsnet.results.metrics import COLUMNS, CocoEvaluator, boundary_rle, box_ap
from rdsnet.structures import Objects

HEIGHT, WIDTH = 120, 160


def make_objects(
    boxes: list[list[float]],
    scores: list[float],
    labels: list[int] | None = None,
    *,
    masks: bool = True,
    regressed: list[list[float]] | None = None,
    direct: list[list[float]] | None = None,
) -> Objects:
    """Objects whose masks fill their boxes, to whole pixels."""
    fields: dict[str, Any] = {} if masks else {"masks": []}
    for name, values in (("regressed_boxes", regressed), ("direct_boxes", direct)):
        if values is not None:
            fields[name] = torch.tensor(values)
    if labels is not None:
        fields["labels"] = torch.tensor(labels, dtype=torch.int64)
    return make.objects(boxes, size=(HEIGHT, WIDTH), scores=torch.tensor(scores, dtype=torch.float32), **fields)


def make_image(id: int | str) -> dict[str, Any]:
    return {"id": id, "file_name": f"{id}.jpg", "height": HEIGHT, "width": WIDTH}


def make_annotation(id: int, image_id: int | str, category: int, box: list[float], **more: Any) -> dict[str, Any]:
    """One of a rectangle, x1, y1, x2, y2."""
    x1, y1, x2, y2 = box
    return {
        "id": id,
        "image_id": image_id,
        "category_id": category,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": (x2 - x1) * (y2 - y1),
        "iscrowd": 0,
        "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]],
        **more,
    }


def write(folder: Path, images: list, annotations: list, categories: dict[int, str]) -> Path:
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": id, "name": name} for id, name in categories.items()],
    }
    path = folder / "truth.json"
    path.write_text(json.dumps(content))
    return path


def measure(json_path: Path, max_detections: int) -> CocoEvaluator:
    return CocoEvaluator(CocoFolder(json_path, need_images=False), max_detections)


def perfect(box: list[float]) -> Objects:
    return make_objects([box], [0.9])


# ---------------------------------------------------------------------------------------------- against pycocotools


def random_rectangle(rng: np.random.Generator) -> list[float]:
    """From a few pixels to all of the image, so that there are small, medium and large ones."""
    w, h = np.exp(rng.uniform(np.log(4), np.log((WIDTH, HEIGHT))))
    x, y = rng.uniform(0, WIDTH - w), rng.uniform(0, HEIGHT - h)
    return [float(v) for v in (x, y, x + w, y + h)]


def random_dataset(folder: Path, rng: np.random.Generator, categories: dict[int, str]) -> tuple[Path, dict]:
    """30 images, every fifth of them without annotations, and their rectangles by image."""
    images, annotations, truth = [make_image(id) for id in rng.permutation(1000)[:30].tolist()], [], {}
    for i, image in enumerate(images):
        truth[image["id"]] = []
        for _ in range(0 if i % 5 == 0 else rng.integers(1, 12)):
            box, category = random_rectangle(rng), int(rng.choice(list(categories)))
            annotation = make_annotation(len(annotations) + 1, image["id"], category, box)
            if rng.random() < 0.15:
                counts = coco_mask.decode(
                    coco_mask.frPyObjects(annotation["segmentation"], HEIGHT, WIDTH)
                )[:, :, 0].T.ravel()  # fmt: skip
                ends = np.flatnonzero(np.diff(counts.astype(int), prepend=0))
                runs = np.diff([0, *ends.tolist(), counts.size]).tolist()
                annotation |= {"iscrowd": 1, "segmentation": {"size": [HEIGHT, WIDTH], "counts": runs}}
            annotations.append(annotation)
            truth[image["id"]].append((box, category))
    return write(folder, images, annotations, categories), truth


def random_objects(rng: np.random.Generator, truth: list, ids: list[int], count: int, masks: bool = True) -> Objects:
    """Shifted truth and pure inventions; few different scores, so that there are many ties."""
    boxes, labels = [], []
    for i in range(count):
        if truth and i % 2:
            box, category = truth[rng.integers(len(truth))]
            boxes.append((np.array(box) + rng.normal(0, rng.choice([0.3, 3]), 4)).tolist())
            labels.append(ids.index(category) if rng.random() < 0.9 else int(rng.integers(len(ids))))
        else:
            boxes.append(random_rectangle(rng))
            labels.append(int(rng.integers(len(ids))))
    lows = np.array(boxes).reshape(-1, 4)[:, :2].clip(0, [WIDTH - 2, HEIGHT - 2])
    highs = np.maximum(np.array(boxes).reshape(-1, 4)[:, 2:], lows + 1.5)
    scores = np.sort(rng.integers(1, 40, count) / 40)[::-1]
    return make_objects(np.hstack((lows, highs)).tolist(), scores.tolist(), labels, masks=masks)


def reference(json_path: Path, results: list, kind: str, max_detections: int) -> tuple[dict, np.ndarray]:
    """pycocotools' metrics, and AP by category id in ascending order."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(json_path)
        evaluation = COCOeval(truth, truth.loadRes(json.loads(json.dumps(results))), kind)
        evaluation.params.maxDets = [1, 10, max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., evaluation.params.maxDets.index(max_detections)]

    def mean(values: np.ndarray) -> float | None:
        return values[values > -1].mean() if (values > -1).any() else None

    everything = precision[..., 0]
    values = [everything, everything[0], everything[5], *(precision[..., size] for size in (1, 2, 3))]
    by_class = [mean(everything[:, :, k]) for k in range(precision.shape[2])]
    return {name: mean(value) for name, value in zip(COLUMNS, values, strict=True)}, by_class


@pytest.mark.parametrize(("max_detections", "found"), [(3, 30), (100, 60), (500, 300)])
def test_the_numbers_are_those_of_pycocotools(tmp_path, max_detections, found):
    rng = np.random.default_rng(max_detections)
    categories = {7: "cat", 90: "dog", 13: "cow"}
    json_path, truth = random_dataset(tmp_path, rng, categories)
    ids = sorted(categories)
    evaluator = measure(json_path, max_detections)
    for image_id, known in truth.items():
        # an image where nothing is found, and one with more of a class than the limit
        count = 0 if image_id == next(reversed(truth)) else int(rng.integers(found // 2, found))
        evaluator.add(image_id, random_objects(rng, known, ids, count))
    metrics = evaluator.summarize(boundary=False)

    box, box_by_class = reference(json_path, evaluator.results(), "bbox", max_detections)
    mask, mask_by_class = reference(json_path, evaluator.results(), "segm", max_detections)
    assert 0.01 < mask["AP"] < 0.9  # something to compare
    assert all(value is not None for value in (*box.values(), *mask.values()))
    assert metrics["box"]["refined"] == pytest.approx(box, abs=1e-6)
    assert metrics["mask"] == pytest.approx(mask, abs=1e-6)
    assert [row["box_AP"] for row in metrics["per_class"]] == pytest.approx(box_by_class, abs=1e-6)
    assert [row["mask_AP"] for row in metrics["per_class"]] == pytest.approx(mask_by_class, abs=1e-6)


def test_annotations_that_training_mends_or_leaves_out_count_as_the_json_has_them(tmp_path):
    rng = np.random.default_rng(5)
    categories = {3: "cat", 5: "dog"}
    json_path, truth = random_dataset(tmp_path, rng, categories)
    content = json.loads(json_path.read_text())
    changes: list[Any] = [
        lambda x, y, w, h: {"bbox": [x - 40, y, w + 40, h]},  # contradicts its mask, and may reach out of the image
        lambda x, y, w, h: {"bbox": [x - 40, y - 9.3, w, h], "segmentation": []},  # the same without a mask
        lambda x, y, w, h: {"bbox": [WIDTH + 5.0, y, w, h], "segmentation": []},  # outside
        lambda x, y, w, h: {"bbox": [x, y, 0, h], "segmentation": []},  # empty
        lambda x, y, w, h: {"area": 1 + w * h / 7},
    ]
    for i, annotation in enumerate(content["annotations"]):
        if i % 2 and not annotation["iscrowd"]:
            annotation |= changes[i // 2 % len(changes)](*annotation["bbox"])
    json_path.write_text(json.dumps(content))
    evaluator = measure(json_path, 100)
    for image_id, known in truth.items():
        evaluator.add(image_id, random_objects(rng, known, [3, 5], 40))
    metrics = evaluator.summarize()
    expected, by_class = reference(json_path, evaluator.results(), "bbox", 100)
    assert 0.01 < expected["AP"] < 0.9
    assert metrics["box"]["refined"] == pytest.approx(expected, abs=1e-9)
    assert [row["box_AP"] for row in metrics["per_class"]] == pytest.approx(by_class, abs=1e-9)
    assert metrics["objects"] == sum(not annotation["iscrowd"] for annotation in content["annotations"])


def test_the_box_ap_of_a_results_file_is_that_of_the_objects(tmp_path):
    rng = np.random.default_rng(6)
    json_path, truth = random_dataset(tmp_path, rng, {3: "cat", 5: "dog"})
    evaluator = measure(json_path, 20)
    for image_id, known in truth.items():
        evaluator.add(image_id, random_objects(rng, known, [3, 5], 40))
    (tmp_path / "results.json").write_text(json.dumps(evaluator.results()))
    results = read_results(tmp_path / "results.json", evaluator.folder)
    by_iou = box_ap(evaluator.folder, results, results.boxes(), 20)
    metrics = evaluator.summarize(boundary=False)["box"]["refined"]
    assert [by_iou.mean(), by_iou[0], by_iou[5]] == pytest.approx([metrics[name] for name in ("AP", "AP50", "AP75")])
    assert 0.01 < metrics["AP"] < 0.9


def test_boundary_ap_is_that_of_the_library(tmp_path):
    rng = np.random.default_rng(3)
    json_path, truth = random_dataset(tmp_path, rng, {3: "cat", 5: "dog"})
    evaluator = measure(json_path, 20)
    for id, known in truth.items():
        evaluator.add(id, random_objects(rng, known, [3, 5], 60))
    known = faster_coco_eval.COCO(str(json_path))
    expected = faster_coco_eval.COCOeval_faster(known, known.loadRes(evaluator.results()), iouType="boundary")
    expected.params.maxDets = [20]
    expected.run()
    metrics = evaluator.summarize()["boundary"]
    assert list(metrics.values()) == pytest.approx(expected.stats[:6].tolist(), abs=1e-9)
    assert 0.01 < metrics["AP"] < metrics["AP50"] < 0.9


@pytest.mark.parametrize("kind", ["bumpy", "full image", "empty", "one pixel"])
def test_the_boundary_of_a_mask_is_that_of_the_library(kind):
    mask = np.zeros((90, 140), np.uint8)
    if kind == "bumpy":
        mask[:70, 20:] = cv2.GaussianBlur(np.random.default_rng(0).random((70, 120)), (0, 0), 4) > 0.49
    elif kind == "full image":
        mask[:] = 1
    elif kind == "one pixel":
        mask[89, 139] = 1
    rle = faster_mask.encode(np.asfortranarray(mask))
    expected = faster_mask.rleToBoundary(rle, backend="opencv")
    assert boundary_rle(rle) == {**expected, "counts": expected["counts"].decode()}


# ------------------------------------------------------------------------------------------------- by hand


def test_boxes_are_measured_as_regressed_direct_and_refined(tmp_path):
    box = [10.0, 10.0, 50.0, 50.0]
    json_path = write(tmp_path, [make_image(1)], [make_annotation(1, 1, 1, box)], {1: "cat"})
    evaluator = measure(json_path, 100)
    # refined IoU 1; regressed 40 x 30 of 40 x 40, 0.75: right at 0.5 .. 0.75, 6 of 10; direct 20 x 40, 0.5
    regressed, direct = [[10.0, 10.0, 50.0, 40.0]], [[10.0, 10.0, 30.0, 50.0]]
    evaluator.add(1, make_objects([box], [0.9], regressed=regressed, direct=direct))
    boxes = evaluator.summarize()["box"]
    assert [boxes[kind]["AP"] for kind in ("regressed", "direct", "refined")] == pytest.approx([0.6, 0.1, 1.0])
    assert boxes["regressed"]["AP75"] == 1
    assert boxes["direct"]["AP75"] == 0


def test_sizes_without_objects_are_none(tmp_path):
    box = [10.0, 10.0, 50.0, 50.0]
    json_path = write(tmp_path, [make_image(1)], [make_annotation(1, 1, 1, box)], {1: "cat", 2: "dog"})
    evaluator = measure(json_path, 100)
    evaluator.add(1, perfect(box))
    metrics = json.loads(json.dumps(evaluator.summarize()))
    assert metrics["mask"] == {"AP": 1, "AP50": 1, "AP75": 1, "APs": None, "APm": 1, "APl": None}
    assert metrics["per_class"] == [
        {"class": "cat", "objects": 1, "box_AP": 1, "mask_AP": 1},
        {"class": "dog", "objects": 0, "box_AP": None, "mask_AP": None},
    ]
    assert (metrics["images"], metrics["objects"], metrics["max_detections"]) == (1, 1, 100)


def test_detections_in_images_without_annotations_are_wrong(tmp_path):
    box = [10.0, 10.0, 50.0, 50.0]
    json_path = write(tmp_path, [make_image(1), make_image(2)], [make_annotation(1, 1, 1, box)], {1: "cat"})
    evaluator = measure(json_path, 100)
    evaluator.add(1, make_objects([box], [0.5]))
    evaluator.add(2, make_objects([box], [0.9]))
    assert evaluator.summarize()["box"]["refined"]["AP"] == pytest.approx(0.5)  # the second best is the right one


def test_ids_may_be_text_or_zero(tmp_path):
    # COCO's matching takes an annotation with the id 0 for none
    box = [10.0, 10.0, 50.0, 50.0]
    images = [make_image(0), make_image("0"), make_image("b/7")]
    annotations = [make_annotation(0, image["id"], 0, box) for image in images]
    json_path = write(tmp_path, images, annotations, {0: "cat"})
    evaluator = measure(json_path, 100)
    for image in images:
        evaluator.add(image["id"], perfect(box))
    metrics = evaluator.summarize()
    assert metrics["box"]["refined"]["AP"] == metrics["mask"]["AP"] == metrics["boundary"]["AP"] == 1
    assert {entry["image_id"] for entry in evaluator.results()} == {0, "0", "b/7"}


def test_annotations_of_unknown_images_are_left_out(tmp_path):
    box = [10.0, 10.0, 50.0, 50.0]
    annotations = [make_annotation(i, image_id, 1, box) for i, image_id in enumerate([1, 99, "1"])]
    json_path = write(tmp_path, [make_image(1)], annotations, {1: "cat"})
    evaluator = measure(json_path, 100)
    evaluator.add(1, perfect(box))
    metrics = evaluator.summarize()
    assert metrics["objects"] == 1
    assert metrics["box"]["refined"]["AP"] == 1


def test_area_and_iscrowd_may_be_missing(tmp_path):
    box = [10.0, 10.0, 50.0, 50.0]
    annotation = make_annotation(1, 1, 1, box)
    del annotation["area"], annotation["iscrowd"]
    json_path = write(tmp_path, [make_image(1)], [annotation], {1: "cat"})
    evaluator = measure(json_path, 100)
    evaluator.add(1, perfect(box))
    assert evaluator.summarize()["box"]["refined"]["APm"] == 1  # 1600 pixels


def test_height_and_width_may_be_missing(tmp_path):
    box = [10.0, 10.0, 50.0, 50.0]
    json_path = write(tmp_path, [{"id": 1, "file_name": "1.jpg"}], [make_annotation(1, 1, 1, box)], {1: "cat"})
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "1.jpg")
    evaluator = measure(json_path, 100)
    evaluator.add(1, perfect(box))
    assert evaluator.summarize()["mask"]["AP"] == 1


def test_an_object_with_a_box_alone_counts_for_boxes_and_is_ignored_for_masks(tmp_path):
    with_mask, box_only = [10.0, 10.0, 50.0, 50.0], [60.0, 60.0, 100.0, 100.0]
    annotations = [make_annotation(1, 1, 1, with_mask), make_annotation(2, 1, 1, box_only, segmentation=[])]
    json_path = write(tmp_path, [make_image(1)], annotations, {1: "cat"})
    # a wrong mask on the object without one would halve mask AP if it were counted
    evaluator = measure(json_path, 100)
    evaluator.add(1, make_objects([[60.0, 60.0, 80.0, 100.0], with_mask], [0.9, 0.5]))
    metrics = evaluator.summarize()
    assert metrics["mask"]["AP"] == metrics["boundary"]["AP"] == 1
    assert metrics["objects"] == 2
    # boxes: the first has IoU 0.5, so 1 of the 10 thresholds has both right; the others find 1 of 2 at precision 1/2
    assert metrics["box"]["refined"]["AP50"] == 1
    assert metrics["box"]["refined"]["AP75"] == pytest.approx(0.5 * 51 / 101)


def test_limits_beyond_100_are_applied(tmp_path):
    columns = [[float(x), float(y), x + 8.0, y + 8.0] for x in range(0, 160, 10) for y in range(0, 120, 10)]
    annotations = [make_annotation(i, 1, 1, box) for i, box in enumerate(columns, start=1)]
    json_path = write(tmp_path, [make_image(1)], annotations, {1: "cat"})
    scores = np.linspace(1, 0.1, len(columns)).tolist()
    assert len(columns) == 192
    for limit, expected in ((500, 1.0), (96, 51 / 101), (1, 1 / 101)):
        evaluator = measure(json_path, limit)
        evaluator.add(1, make_objects(columns, scores))
        metrics = evaluator.summarize()
        for values in (metrics["box"]["refined"], metrics["mask"], metrics["boundary"]):
            assert values["AP"] == pytest.approx(expected), limit


def test_boundary_ap_sees_what_mask_ap_forgives(tmp_path):
    # a square of 100 pixels, each side 2 too far in: mask IoU 0.92; boundaries (4 px wide) overlap by less than half
    square = [10.0, 10.0, 110.0, 110.0]
    json_path = write(tmp_path, [make_image(1)], [make_annotation(1, 1, 1, square)], {1: "cat"})
    evaluator = measure(json_path, 100)
    evaluator.add(1, perfect([12.0, 12.0, 108.0, 108.0]))
    metrics = evaluator.summarize()
    assert metrics["mask"]["AP"] == pytest.approx(0.9)
    assert metrics["boundary"]["AP"] == 0
    assert "boundary" not in evaluator.summarize(boundary=False)


def test_a_model_without_masks_has_one_kind_of_boxes(tmp_path):
    box = [10.0, 10.0, 50.0, 50.0]
    json_path = write(tmp_path, [make_image(1), make_image(2)], [make_annotation(1, 1, 1, box)], {1: "cat"})
    evaluator = measure(json_path, 100)
    evaluator.add(1, make_objects([box], [0.9], masks=False))
    evaluator.add(2, make_objects([], []))
    metrics = evaluator.summarize()
    assert list(metrics["box"]) == ["regressed"]
    assert metrics["box"]["regressed"]["AP"] == 1
    assert "mask" not in metrics
    assert metrics["per_class"][0] == {"class": "cat", "objects": 1, "box_AP": 1, "mask_AP": None}
    assert "segmentation" not in evaluator.results()[0]


def test_nothing_found_is_zero(tmp_path):
    json_path = write(tmp_path, [make_image(1)], [make_annotation(1, 1, 1, [10.0, 10.0, 50.0, 50.0])], {1: "cat"})
    evaluator = measure(json_path, 100)
    evaluator.add(1, make_objects([], []))
    metrics = evaluator.summarize()
    assert metrics["box"]["refined"]["AP"] == metrics["mask"]["AP"] == metrics["boundary"]["AP"] == 0
    assert evaluator.results() == []


def test_several_processes_together_are_one(tmp_path):
    rng = np.random.default_rng(1)
    json_path, truth = random_dataset(tmp_path, rng, {3: "cat", 5: "dog"})
    found = {id: random_objects(rng, known, [3, 5], 20) for id, known in truth.items()}
    alone = measure(json_path, 100)
    for id, objects in found.items():
        alone.add(id, objects)
    ids = list(found)
    states = []
    for share in (ids[::2], ids[1::2] + ids[:1]):  # the last process has the first image once more
        evaluator = measure(json_path, 100)
        for id in share:
            evaluator.add(id, found[id])
        states.append(pickle.loads(pickle.dumps(evaluator.state())))
    evaluator.merge(states)
    assert evaluator.summarize() == alone.summarize()
    assert evaluator.results() == alone.results()


def test_measuring_twice_gives_the_same_and_leaves_the_file_alone(tmp_path):
    rng = np.random.default_rng(2)
    json_path, truth = random_dataset(tmp_path, rng, {3: "cat"})
    before = json_path.read_bytes()
    evaluator = measure(json_path, 100)
    for id, known in truth.items():
        evaluator.add(id, random_objects(rng, known, [3], 10))
    assert evaluator.summarize() == evaluator.summarize()
    assert json_path.read_bytes() == before


def test_results_are_those_of_the_coco_server(tmp_path):
    images = [make_image(4), make_image(5)]
    json_path = write(tmp_path, images, [make_annotation(1, 5, 9, [10.0, 10.0, 50.0, 50.0])], {9: "cat"})
    evaluator = measure(json_path, 100)
    evaluator.add(4, perfect([10.0, 20.0, 50.0, 30.0]))
    (entry,) = json.loads(json.dumps(evaluator.results()))
    assert (entry["image_id"], entry["category_id"], entry["bbox"]) == (4, 9, [10, 20, 40, 10])
    assert entry["score"] == pytest.approx(0.9)
    assert entry["segmentation"]["size"] == [HEIGHT, WIDTH]
    mask = coco_mask.decode(entry["segmentation"])
    assert mask.sum() == 400
    assert mask[20:30, 10:50].all()


# ------------------------------------------------------------------------------------------------- errors, tables


def test_parts_of_a_data_set_are_measured_apart(tmp_path):
    images = [make_image(1) | {"stain": "pink"}, make_image(2) | {"stain": "blue"}, make_image(3) | {"stain": "pink"}]
    annotations = [make_annotation(id, id, 1, [10, 10, 20, 20]) for id in (1, 2, 3)]
    evaluator = measure(write(tmp_path, images, annotations, {1: "cell"}), 100)
    for id in (1, 3):
        evaluator.add(id, perfect([10, 10, 20, 20]))
    evaluator.add(2, perfect([1, 1, 5, 5]))
    parts = {name: part.summarize() for name, part in evaluator.by("stain").items()}
    assert [(name, part["images"], part["mask"]["AP"]) for name, part in parts.items()] == [
        ("blue", 1, 0.0),
        ("pink", 2, pytest.approx(1.0)),
    ]
    console = Console(width=120, file=io.StringIO())
    console.print(format_parts(parts, "stain"))
    row = next(line for line in console.file.getvalue().splitlines() if "pink" in line)
    assert row.split() == ["│", "pink", "│", "2", "│", "2", *["│", "100.0"] * 5, "│"]
    with pytest.raises(ValueError, match="expected 'modality' of every image, image 1 has id"):
        evaluator.by("modality")


def test_what_does_not_belong_to_the_data_set_is_an_error(tmp_path):
    images = [make_image(1), {**make_image(2), "height": 50}]
    json_path = write(tmp_path, images, [make_annotation(1, 1, 1, [10.0, 10.0, 50.0, 50.0])], {1: "cat"})
    evaluator = measure(json_path, 100)
    with pytest.raises(ValueError, match="expected the id of an image, got 3"):
        evaluator.add(3, make_objects([], []))
    with pytest.raises(ValueError, match=r"image 2 has .* \(50, 160\), objects are of \(120, 160\)"):
        evaluator.add(2, make_objects([], []))
    with pytest.raises(ValueError, match="expected labels below 1, got 4"):
        evaluator.add(1, make_objects([[1.0, 1.0, 5.0, 5.0]], [0.5], [4]))


def test_bad_files_and_limits_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        measure(tmp_path / "none.json", 100)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        measure(tmp_path / "bad.json", 100)
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match="expected a COCO JSON"):
        measure(tmp_path / "list.json", 100)
    json_path = write(tmp_path, [make_image(1)], [make_annotation(1, 1, 1, [1.0, 1.0, 5.0, 5.0])], {1: "cat"})
    with pytest.raises(ValueError, match="max_detections of at least 1, got 0"):
        measure(json_path, 0)


def test_a_broken_segmentation_is_named(tmp_path):
    broken = make_annotation(17, 1, 1, [1.0, 1.0, 5.0, 5.0], segmentation={"size": [3, 3], "counts": [9]})
    json_path = write(tmp_path, [make_image(1)], [broken], {1: "cat"})
    with pytest.raises(ValueError, match="annotation 17 of image 1"):
        measure(json_path, 100)


def test_the_table_shows_percent_and_classes(tmp_path):
    box = [10.0, 10.0, 50.0, 50.0]
    json_path = write(tmp_path, [make_image(1)], [make_annotation(1, 1, 1, box)], {1: "cat", 2: "dog"})
    evaluator = measure(json_path, 100)
    evaluator.add(1, make_objects([box], [0.9], regressed=[[10.0, 10.0, 50.0, 40.0]]))
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(format_table(evaluator.summarize(), ["Katze", "Hund"]))
    lines = {
        line.split("│")[1].strip(): line.split("│")[2:-1] for line in console.export_text().splitlines() if "│" in line
    }
    assert [cell.strip() for cell in lines["box regressed"]] == ["60.0", "100.0", "100.0", "-", "60.0", "-"]
    assert [cell.strip() for cell in lines["Katze"]] == ["1", "100.0", "100.0"]
    assert [cell.strip() for cell in lines["Hund"]] == ["0", "-", "-"]
    assert set(lines) == {"box regressed", "box direct", "box refined", "mask", "boundary", "Katze", "Hund"}
