"""What `rdsnet.refine_boxes` costs, and what it gains on boxes of other makes.

    python benchmarks/refine_boxes.py speed
    python benchmarks/refine_boxes.py degraded nuclei/val.json [--fit nuclei/train.json]
    python benchmarks/refine_boxes.py model RESULTS.json --truth val.json [--fit MORE.json --fit_truth train.json]
    python benchmarks/refine_boxes.py default runs/nuclei nuclei/train.json

`speed` times 100 crops of mean 120 x 120 pixels; `degraded` refines true boxes by true masks, both made worse;
`default` fits the numbers that serve unless others are given (`SOFT` and `BINARY` of `rdsnet.model.mbrm`). `degraded`
and `model` print box AP at each IoU threshold, at most 500 detections, as Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import cv2
import numpy as np
import supervision as sv
import torch

from rdsnet.data.coco import CocoFolder
from rdsnet.data.records import Annotation
from rdsnet.model.mbrm import BINARY, SOFT
from rdsnet.predict.predictor import load
from rdsnet.refine.boxes import Refiner, fit_refiner, refine_boxes, refine_results
from rdsnet.results.exchange import ImageId, Results, compact_mask, read_results
from rdsnet.results.matching import match_boxes
from rdsnet.results.metrics import IOUS, box_ap
from rdsnet.rle import mask_crop
from rdsnet.terminal import progress_bar

Predictions = dict[ImageId, dict[str, Any]]  # by image, as `refine_boxes` takes them

SHIFT = 0.1  # standard deviation of the error of a degraded edge, times the side of its box
IMAGES = 100  # that `default` fits to
BLUR = 2.0  # pixels, of degraded masks
ROUGHNESS = 0.25  # standard deviation of the noise, itself blurred, that moves the boundary of a binary mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("speed")
    command.add_argument("--objects", type=int, default=100)
    command.add_argument("--rounds", type=int, default=50)
    command.add_argument("--device", default="cpu")
    command = commands.add_parser("degraded")
    command.add_argument("truth", type=Path, help="COCO JSON with masks")
    command.add_argument("--fit", type=Path, help="COCO JSON of other images, to fit to")
    command = commands.add_parser("model")
    command.add_argument("results", type=Path, help="COCO results JSON with masks")
    command.add_argument("--truth", type=Path, required=True)
    command.add_argument("--fit", type=Path, help="results of other images, to fit to")
    command.add_argument("--fit_truth", type=Path)
    command = commands.add_parser("default")
    command.add_argument("run", type=Path)
    command.add_argument("truth", type=Path, help="COCO JSON, the training set of the run")
    options = vars(parser.parse_args())
    {"speed": speed, "degraded": degraded, "model": model, "default": default}[options.pop("command")](**options)


# --- speed ---


def speed(objects: int, rounds: int, device: str) -> None:
    """Medians of everything in turn: whatever else runs on the machine falls on all alike."""
    generator = np.random.default_rng(0)
    sides = generator.integers(60, 181, (objects, 2))  # width and height, mean 120
    origins = generator.integers(0, 900, (objects, 2))
    soft = [_disc(width, height) for width, height in sides.tolist()]
    binary = [mask > 0.5 for mask in soft]
    boxes = np.concatenate([origins, origins + sides], axis=1) + generator.normal(0, 3, (objects, 4))
    boxes = boxes.astype(np.float32)
    windows = np.concatenate([origins, origins + sides], axis=1)
    found = sv.Detections(xyxy=boxes, mask=compact_mask(binary, windows, (1080, 1080)))
    crops = {"origins": origins, "image_size": (1080, 1080)}
    tensors = [torch.from_numpy(mask).to(device) for mask in soft]
    corners = torch.from_numpy(boxes).to(device)
    cases = {
        "float crops": lambda: refine_boxes(boxes, soft, **crops),
        "bool crops": lambda: refine_boxes(boxes, binary, **crops),
        "sv.Detections, compact": lambda: refine_boxes(found),
        f"float crops, tensors on {device}": lambda: refine_boxes(corners, tensors, **crops).xyxy.cpu(),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, run in cases.items():
            start, busy = perf_counter(), process_time()
            run()
            times[name].append((1000 * (perf_counter() - start), 1000 * (process_time() - busy)))
    print(f"{objects} objects, mean {sides.mean():.0f} px, {torch.get_num_threads()} threads, {rounds} rounds")
    print("\n| | median ms | fastest | ms of processor time |\n|---|---|---|---|")
    for name, values in times.items():
        (middle, busy), fastest = np.median(values, axis=0), min(values)[0]
        print(f"| {name} | {middle:.1f} | {fastest:.1f} | {busy:.1f} |")


def _disc(width: int, height: int) -> np.ndarray:
    """A soft ellipse that fills its crop up to a tenth of it."""
    x = (np.arange(width) + 0.5) / width * 2 - 1
    y = (np.arange(height) + 0.5) / height * 2 - 1
    distance = np.hypot(x[None], y[:, None])
    return (1 / (1 + np.exp((distance - 0.9) * 30))).astype(np.float32)


# --- box AP ---


def degraded(truth: Path, fit: Path | None) -> None:
    known = CocoFolder(truth, need_images=False)
    results, predictions = degrade(known, seed=0)
    rows = {"degraded": results.boxes()}
    fitted_to = None if fit is None else CocoFolder(fit, need_images=False)
    for kind, images in predictions.items():
        rows[f"the {kind} mask's rectangle"] = replaced(results, images, rectangles)
        refiners: dict[str, Refiner | None] = {"": None}
        if fitted_to is not None:
            _, others = degrade(fitted_to, seed=1)
            refiners |= {", fitted": fit_refiner(others[kind].values(), true_objects(fitted_to, others[kind]))}
            print(f"{kind}: {refiners[', fitted']}\n")
        for name, refiner in refiners.items():
            boxes = replaced(results, images, lambda image, refiner=refiner: refine_boxes(image, refiner=refiner).xyxy)
            rows[f"refined by {kind} masks{name}"] = boxes
    print_table({name: box_ap(known, results, boxes) for name, boxes in rows.items()})


def true_objects(truth: CocoFolder, images: Iterable[ImageId]) -> list[tuple[Any, Any]]:
    """Boxes and labels of each of these images."""
    records = {record.id: record for record in truth.images}
    return [records[image].truth() for image in images]


def degrade(truth: CocoFolder, seed: int) -> tuple[Results, dict[str, Predictions]]:
    """The objects of a data set as results with wrong boxes, and by kind of mask what `refine_boxes` takes."""
    generator = np.random.default_rng(seed)
    results = Results(truth.json_path, [], [], {}, [])
    objects = []
    for record in progress_bar("degrading", truth.images):
        for annotation in record.objects(masks=True):
            entry, *crop = _degrade(annotation, generator)
            results.by_image.setdefault(record.id, []).append(len(objects))
            results.entries.append(entry)
            results.labels.append(annotation.label)
            objects.append(crop)
    soft = [np.clip(mask, 0, 1) for mask, _ in objects]
    binary = [_rough(mask, generator) for mask in soft]
    boxes = results.boxes()
    sizes = {record.id: record.size for record in truth.images}
    predictions = {
        kind: {
            image: {
                "boxes": boxes[chosen],
                "masks": [masks[i] for i in chosen],
                "origins": np.array([objects[i][1] for i in chosen]),
                "image_size": sizes[image],
            }
            for image, chosen in results.by_image.items()
        }
        for kind, masks in (("soft", soft), ("binary", binary))
    }
    return results, predictions


def replaced(results: Results, images: Predictions, find: Callable[[dict[str, Any]], Any]) -> np.ndarray:
    """Boxes by entry, as `find` gives them for an image."""
    boxes = results.boxes()
    for image, prediction in images.items():
        boxes[results.by_image[image]] = find(prediction)
    return boxes


def rectangles(prediction: dict[str, Any]) -> np.ndarray:
    """Tight boxes of masks above 0.5; the given box of an empty one."""
    boxes = prediction["boxes"].copy()
    for i, (mask, (x, y)) in enumerate(zip(prediction["masks"], prediction["origins"], strict=True)):
        rows, columns = np.nonzero(mask > 0.5)
        if len(rows):
            boxes[i] = x + columns.min(), y + rows.min(), x + columns.max() + 1, y + rows.max() + 1
    return boxes


def _degrade(annotation: Annotation, generator: np.random.Generator) -> Any:
    """A result with a wrong box, and its blurred mask with the origin of the crop."""
    x, y, width, height = annotation.bbox
    errors = generator.normal(0, SHIFT, 4) * [width, height, width, height]
    corners = np.array([x, y, x + width, y + height]) + errors
    margin = int(4 * BLUR)
    assert annotation.rle is not None
    mask, (x0, y0, _, _) = mask_crop(annotation.rle)
    soft = cv2.GaussianBlur(np.pad(mask, margin).astype(np.float32), (0, 0), BLUR)
    entry = {"bbox": [*corners[:2], *(corners[2:] - corners[:2])], "score": float(generator.random())}
    return entry, soft, (x0 - margin, y0 - margin)


def _rough(soft: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    noise = cv2.GaussianBlur(generator.normal(0, 1, soft.shape).astype(np.float32), (0, 0), 1.0)
    return soft + ROUGHNESS * noise / max(noise.std(), 1e-6) * (soft > 0.05) * (soft < 0.95) > 0.5


def model(results: Path, truth: Path, fit: Path | None, fit_truth: Path | None) -> None:
    known = CocoFolder(truth, need_images=False)
    found = read_results(results, known)
    rows = {"as given": box_ap(known, found, found.boxes())}
    images = {image: found.prediction(image) for image in found.images}
    rows["the mask's rectangle"] = box_ap(known, found, replaced(found, images, rectangles))
    rows["refined, default numbers"] = box_ap(known, found, refine_results(found, None))
    if fit is not None:
        if fit_truth is None:
            raise SystemExit("--fit needs --fit_truth")
        other = CocoFolder(fit_truth, need_images=False)
        fitted_to = read_results(fit, other)
        start = perf_counter()
        predictions = (fitted_to.prediction(image) for image in fitted_to.images)
        refiner = fit_refiner(predictions, true_objects(other, fitted_to.images))
        print(f"fitted in {perf_counter() - start:.1f} s: {refiner}\n")
        rows["refined, fitted numbers"] = box_ap(known, found, refine_results(found, refiner))
    print_table(rows)


def print_table(rows: dict[str, np.ndarray]) -> None:
    print("| | AP | " + " | ".join(f"{100 * iou:.0f}" for iou in IOUS) + " |")
    print("|---" * (len(IOUS) + 2) + "|")
    for name, values in rows.items():
        print(f"| {name} | " + " | ".join(f"{100 * value:.1f}" for value in (values.mean(), *values)) + " |")


# --- the numbers that serve where no others are given ---


def default(run: Path, truth: Path) -> None:
    """Numbers for masks of any make, fitted with the paper's gamma."""
    folder = CocoFolder(truth)
    folder = folder.subset([folder.images[i] for i in np.random.default_rng(0).permutation(len(folder))[:IMAGES]])
    for kind, (predictions, boxes) in {"SOFT": blurred(folder), "BINARY": found_and_true(run, folder)}.items():
        refiner = fit_refiner(predictions, boxes, gammas=(SOFT.gamma,))
        print(kind, refiner)
        print("weights:", ", ".join(f"{w:.3f}" for w in refiner.weight), f"bias: {refiner.bias:.3f}")
    print("in use:", SOFT, BINARY)


def blurred(folder: CocoFolder) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """True masks, each blurred by 0.4 to 2.5 pixels and with noise where it is neither 0 nor 1, and wrong boxes.

    What a model's own masks would teach besides, where they end too early or too late, is not of other models.
    """
    generator = np.random.default_rng(1)
    predictions: list[dict[str, Any]] = []
    boxes: list[np.ndarray] = []
    for record in progress_bar("blurring", folder.images):
        known = record.objects(masks=True)
        masks, origins = [], []
        for annotation in known:
            assert annotation.rle is not None
            mask, (x0, y0, _, _) = mask_crop(annotation.rle)
            blur = generator.uniform(0.4, 2.5)
            margin = int(3 * blur) + 2
            soft = cv2.GaussianBlur(np.pad(mask, margin).astype(np.float32), (0, 0), blur)
            noise = cv2.GaussianBlur(generator.normal(0, 1, soft.shape).astype(np.float32), (0, 0), 1.0)
            masks.append(np.clip(soft + 1.6 * soft * (1 - soft) * noise / noise.std(), 0, 1))
            origins.append((x0 - margin, y0 - margin))
        if known:
            true = np.array([a.box for a in known], np.float32)
            sides = np.tile(true[:, 2:] - true[:, :2], 2)
            wrong = true + generator.normal(0, 1, true.shape) * np.maximum(SOFT.gamma * sides, 0.7)
            wrong[:, 2:] = np.maximum(wrong[:, 2:], wrong[:, :2] + 1)
            crops = {"masks": masks, "origins": np.array(origins), "image_size": record.size}
            predictions.append({"boxes": wrong.astype(np.float32), **crops})
            boxes.append(true)
    return predictions, boxes


def found_and_true(run: Path, folder: CocoFolder) -> tuple[list[dict[str, Any]], list[tuple[Any, Any]]]:
    """The boxes of what a model finds, paired with its own binary masks and once more with the true ones.

    Fitted to a model's masks alone the numbers would learn where this model's masks end, half a pixel too early or too
    late; a mask without error must get its own edges.
    """
    predictor = load(run, device="cpu")
    predictor.model.refine = "off"
    predictions: list[dict[str, Any]] = []
    boxes: list[tuple[Any, Any]] = []
    for record, objects in progress_bar("detecting", predictor.detect_folder(folder)):
        known = record.objects(masks=True)
        corners, labels = record.truth(masks=True)
        index, found = match_boxes(objects.regressed_boxes, objects.labels, corners, labels)
        true = [mask_crop(known[i].rle) for i in found.tolist()]
        chosen = objects.select(index)
        own = {"masks": [mask.numpy() for mask in chosen.masks], "origins": chosen.windows[:, :2]}
        origins = np.array([window[:2] for _, window in true]).reshape(-1, 2)
        exact = {"masks": [mask for mask, _ in true], "origins": origins}
        common = {"boxes": chosen.regressed_boxes, "labels": chosen.labels, "image_size": record.size}
        for masks in (own, exact):
            predictions.append({**common, **masks})
            boxes.append((corners, labels))
    return predictions, boxes


if __name__ == "__main__":
    main()
