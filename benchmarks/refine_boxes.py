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
from collections.abc import Callable, Hashable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import cv2
import numpy as np
import supervision as sv
import torch

from rdsnet.data.coco import CocoFolder
from rdsnet.model.mbrm import BINARY, SOFT
from rdsnet.predict.predictor import detect_folder, load
from rdsnet.refine.boxes import Refiner, fit_refiner, refine_boxes, refine_results
from rdsnet.results.exchange import CocoTruth as Truth
from rdsnet.results.exchange import Results, compact_mask, read_results, read_truth
from rdsnet.results.matching import match_boxes
from rdsnet.results.metrics import IOUS, box_ap
from rdsnet.rle import mask_box, rasterise, read_segmentation
from rdsnet.terminal import progress_bar

Predictions = dict[Hashable, dict[str, Any]]  # by image, as `refine_boxes` takes them

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
    known = read_truth(truth)
    results, predictions = degrade(known, seed=0)
    rows = {"degraded": results.boxes()}
    fitted_to = None if fit is None else read_truth(fit)
    for kind, images in predictions.items():
        rows[f"the {kind} mask's rectangle"] = replaced(results, images, rectangles)
        refiners: dict[str, Refiner | None] = {"": None}
        if fitted_to is not None:
            _, others = degrade(fitted_to, seed=1)
            true = (fitted_to.objects(image) for image in others[kind])
            refiners |= {", fitted": fit_refiner(others[kind].values(), true)}
            print(f"{kind}: {refiners[', fitted']}\n")
        for name, refiner in refiners.items():
            boxes = replaced(results, images, lambda image, refiner=refiner: refine_boxes(image, refiner=refiner).xyxy)
            rows[f"refined by {kind} masks{name}"] = boxes
    print_table({name: box_ap(known, results, boxes) for name, boxes in rows.items()})


def degrade(truth: Truth, seed: int) -> tuple[Results, dict[str, Predictions]]:
    """The objects of a data set as results with wrong boxes, and by kind of mask what `refine_boxes` takes."""
    generator = np.random.default_rng(seed)
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth.dataset["images"]}
    whole = [a for many in truth.annotations.values() for a in many if not a.get("iscrowd") and a.get("segmentation")]
    objects = [_degrade(entry, sizes[entry["image_id"]], generator) for entry in progress_bar("degrading", whole)]
    results = Results(truth.path, [], [entry for entry, _, _ in objects], {}, None)
    for i, (entry, _, _) in enumerate(objects):
        results.by_image.setdefault(entry["image_id"], []).append(i)
    soft = {i: np.clip(mask, 0, 1) for i, (_, mask, _) in enumerate(objects)}
    binary = {i: _rough(mask, generator) for i, mask in soft.items()}
    boxes = results.boxes()
    predictions = {
        kind: {
            image: {
                "boxes": boxes[chosen],
                "masks": [masks[i] for i in chosen],
                "origins": np.array([objects[i][2] for i in chosen]),
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


def _degrade(annotation: dict[str, Any], size: tuple[int, int], generator: np.random.Generator) -> Any:
    """A result with a wrong box, and its blurred mask with the origin of the crop."""
    x, y, width, height = annotation["bbox"]
    errors = generator.normal(0, SHIFT, 4) * [width, height, width, height]
    corners = np.array([x, y, x + width, y + height]) + errors
    rle, _ = read_segmentation(annotation["segmentation"], size)
    margin = int(4 * BLUR)
    x0, y0, x1, y1 = (int(edge) for edge in mask_box(rle)) if rle else (0, 0, 1, 1)
    mask = rasterise(rle, (x0, y0, x1, y1), size) if rle else np.zeros((1, 1), bool)
    soft = cv2.GaussianBlur(np.pad(mask, margin).astype(np.float32), (0, 0), BLUR)
    entry = {**annotation, "bbox": [*corners[:2], *(corners[2:] - corners[:2])], "score": float(generator.random())}
    return entry, soft, (x0 - margin, y0 - margin)


def _rough(soft: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    noise = cv2.GaussianBlur(generator.normal(0, 1, soft.shape).astype(np.float32), (0, 0), 1.0)
    return soft + ROUGHNESS * noise / max(noise.std(), 1e-6) * (soft > 0.05) * (soft < 0.95) > 0.5


def model(results: Path, truth: Path, fit: Path | None, fit_truth: Path | None) -> None:
    known = read_truth(truth)
    found = read_results(results, known)
    rows = {"as given": box_ap(known, found, found.boxes())}
    images = {image: found.prediction(image) for image in found.images}
    rows["the mask's rectangle"] = box_ap(known, found, replaced(found, images, rectangles))
    rows["refined, default numbers"] = box_ap(known, found, refine_results(found, None))
    if fit is not None:
        if fit_truth is None:
            raise SystemExit("--fit needs --fit_truth")
        other = read_truth(fit_truth)
        fitted_to = read_results(fit, other)
        start = perf_counter()
        refiner = fit_refiner(
            (fitted_to.prediction(image) for image in fitted_to.images),
            (other.objects(image) for image in fitted_to.images),
        )
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
    folder.images = [folder.images[i] for i in np.random.default_rng(0).permutation(len(folder))[:IMAGES]]
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
        known = [a for a in record.annotations if not a.crowd and a.rle is not None]
        size = (record.height, record.width)
        masks, origins = [], []
        for annotation in known:
            assert annotation.rle is not None
            x0, y0, x1, y1 = (int(edge) for edge in mask_box(annotation.rle))
            blur = generator.uniform(0.4, 2.5)
            margin = int(3 * blur) + 2
            mask = np.pad(rasterise(annotation.rle, (x0, y0, x1, y1), size), margin).astype(np.float32)
            soft = cv2.GaussianBlur(mask, (0, 0), blur)
            noise = cv2.GaussianBlur(generator.normal(0, 1, soft.shape).astype(np.float32), (0, 0), 1.0)
            masks.append(np.clip(soft + 1.6 * soft * (1 - soft) * noise / noise.std(), 0, 1))
            origins.append((x0 - margin, y0 - margin))
        if known:
            true = np.array([a.box for a in known], np.float32)
            sides = np.tile(true[:, 2:] - true[:, :2], 2)
            wrong = true + generator.normal(0, 1, true.shape) * np.maximum(SOFT.gamma * sides, 0.7)
            wrong[:, 2:] = np.maximum(wrong[:, 2:], wrong[:, :2] + 1)
            crops = {"masks": masks, "origins": np.array(origins), "image_size": size}
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
    for record, objects in progress_bar("detecting", detect_folder(predictor.model, folder, predictor.config)):
        known = [a for a in record.annotations if not a.crowd and a.rle is not None]
        corners = torch.tensor([a.box for a in known]).view(-1, 4)
        labels = torch.tensor([a.label for a in known], dtype=torch.int64)
        index, found = match_boxes(objects.regressed_boxes, objects.labels, corners, labels)
        size = (record.height, record.width)
        rles = [known[i].rle for i in found.tolist()]
        windows = [tuple(int(edge) for edge in mask_box(rle)) for rle in rles if rle is not None]
        true = [rasterise(rle, window, size) for rle, window in zip(rles, windows, strict=True) if rle is not None]
        chosen = objects.select(index)
        own = {"masks": [mask.numpy() for mask in chosen.masks], "origins": chosen.windows[:, :2]}
        exact = {"masks": true, "origins": np.array([window[:2] for window in windows]).reshape(-1, 2)}
        for masks in (own, exact):
            predictions.append({"boxes": chosen.regressed_boxes, "labels": chosen.labels, "image_size": size, **masks})
            boxes.append((corners, labels))
    return predictions, boxes


if __name__ == "__main__":
    main()
