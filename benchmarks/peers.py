"""RDSNet beside torchvision's RetinaNet and Mask R-CNN: the same image, trunk, threads and number of objects.

All run in one process, in turn, so that what the machine does beside them falls on all alike; only ratios count.
Weights are random: speed does not depend on them. The number of objects is forced: candidates and NMS do their work,
then their result is replaced by boxes drawn from a COCO JSON, scaled to the image (or by drawn ones without --boxes).

    python benchmarks/peers.py --boxes coco-mini/train.json --output runs/peers [--what inference training ...]

writes OUTPUT/WHAT.json with all times and the machine, prints medians, and draws OUTPUT/cost.png from what is there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.models.detection import maskrcnn_resnet50_fpn, retinanet_resnet50_fpn

from rdsnet.benchmark.probes import alternate, draw_boxes, forced_objects, machine, steer_candidates
from rdsnet.benchmark.run import CANDIDATES
from rdsnet.config import get_config
from rdsnet.device import Precision
from rdsnet.files import replace_file, write_text
from rdsnet.model.build import build_model
from rdsnet.model.correlation import correlate, correlation_vectors
from rdsnet.model.masks import Frame
from rdsnet.model.mbrm import MBRM
from rdsnet.predict.predictor import Predictor, untrained
from rdsnet.results.exchange import compact_mask
from rdsnet.rle import crop_to_rle
from rdsnet.structures import Targets

CLASSES = 80
SIZE = (800, 1067)  # padded to 800 x 1088
OBJECTS = (10, 50, 100, 300)
SIDES = (400, 600, 800, 1000)

OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "RetinaNet, torchvision's heads": ("rdsnet_r50_torchvision", {"model": {"masks": False}}),
    "RetinaNet": ("rdsnet_r50", {"model": {"masks": False}}),
    "+ mask": ("rdsnet_r50", {"detect": {"refine": "off"}}),
    "+ MBRM": ("rdsnet_r50", {}),
    "shared tower, + MBRM": ("rdsnet_r50_shared", {}),
}
PEERS: dict[str, Callable[..., Any]] = {
    "torchvision RetinaNet": partial(retinanet_resnet50_fpn, num_classes=CLASSES),
    "torchvision Mask R-CNN": partial(maskrcnn_resnet50_fpn, num_classes=CLASSES + 1),
}


def ours(name: str, *, side: int = SIZE[0], precision: Precision = "32") -> Predictor:
    preset, changes = OURS[name]
    sizes = {"short_side": side, "long_side": 2 * side}
    detect = {"max_detections": 300, **changes.get("detect", {})}
    config = get_config(preset, {**changes, "data": sizes, "detect": detect})
    return untrained(config, num_classes=CLASSES, precision=precision)


def run_ours(predictor: Predictor, image: np.ndarray, boxes: Tensor) -> Callable[[], object]:
    """A complete prediction: array in, boxes, scores and compact masks out; NMS has the work of the release."""
    steer_candidates(predictor, image, CANDIDATES)
    predictor.find = forced_objects(predictor.model.object_stream, boxes)
    return partial(predictor.predict, image)


def peer(name: str, boxes: Tensor, *, channels_last: bool = False) -> Any:
    """A model of torchvision that ends with these boxes."""
    model = PEERS[name](weights=None, weights_backbone=None).eval()
    if name == "torchvision RetinaNet":
        model.score_thresh, model.detections_per_img = 0.0, len(boxes)
    else:
        own = model.roi_heads.postprocess_detections

        def replaced(*arguments: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
            own(*arguments)
            return [boxes], [torch.linspace(1, 0.9, len(boxes))], [torch.arange(len(boxes)) % CLASSES + 1]

        model.roi_heads.postprocess_detections = replaced
    return model.to(memory_format=torch.channels_last) if channels_last else model


def run_peer(model: Any, image: np.ndarray) -> Callable[[], None]:
    """A complete prediction of torchvision's: array in, boxes, scores and binary masks of the image's size out."""
    side = min(image.shape[:2])
    model.transform.min_size, model.transform.max_size = (side,), 2 * side

    @torch.inference_mode()
    def run() -> None:
        result = model([torch.from_numpy(image).permute(2, 0, 1) / 255])[0]
        if "masks" in result:
            result["masks"] > 0.5  # noqa: B015

    return run


def inference(boxes: Tensor, rounds: int) -> dict[str, Any]:
    """All contestants with 100 objects, and ours where every box is the whole image."""
    image = photo(*SIZE)
    functions = {name: run_peer(peer(name, boxes), image) for name in PEERS}
    functions |= {f"{name}, channels-last": run_peer(peer(name, boxes, channels_last=True), image) for name in PEERS}
    functions |= {name: run_ours(ours(name), image, boxes) for name in OURS}
    functions["+ MBRM, bf16"] = run_ours(ours("+ MBRM", precision="bf16-forced"), image, boxes)
    whole = torch.tensor([[0.0, 0.0, SIZE[1], SIZE[0]]]).repeat(len(boxes), 1)
    functions["+ MBRM, every box the whole image"] = run_ours(ours("+ MBRM"), image, whole)
    return {"seconds": alternate(functions, rounds)}


def after_network(boxes: Tensor, rounds: int) -> dict[str, Any]:
    """Masks, refinement and run-length codes of 100 objects: as here, and as the 2019 release goes about it."""
    generator = torch.Generator().manual_seed(0)
    representations = torch.randn(len(boxes), 2, 32, generator=generator)
    # smooth, so that masks have outlines like those of objects
    pixels = F.interpolate(torch.randn(1, 32, 13, 17, generator=generator), size=(200, 272), mode="bicubic")[0]
    mbrm, masks = MBRM(), build_model("rdsnet_r50", num_classes=1, pretrained=False).masks

    @torch.inference_mode()
    def here() -> None:
        maps = partial(correlate, correlation_vectors(representations), pixels)
        pasted = masks.paste(maps, boxes, Frame(SIZE, SIZE, (200, 272), (4, 4)), pixels.device)
        mbrm(pasted.columns, pasted.rows, boxes)
        compact_mask([mask.numpy() for mask in pasted.masks], pasted.windows.numpy(), SIZE)

    @torch.inference_mode()
    def as_the_release() -> None:
        """Two maps an object, softmax and crop at full size, profiles and codes from full-size masks."""
        maps = correlate(representations.flatten(0, 1), pixels).view(len(boxes), 2, *pixels.shape[1:])
        probability = F.interpolate(maps, scale_factor=4, mode="bilinear").softmax(dim=1)[:, 1, :, : SIZE[1]]
        centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) * 0.6
        x, y = torch.arange(SIZE[1]), torch.arange(SIZE[0])
        low, high = (centre - half)[:, :, None], (centre + half)[:, :, None]
        columns, rows = (x >= low[:, 0]) & (x < high[:, 0]), (y >= low[:, 1]) & (y < high[:, 1])
        probability = probability * (rows[:, :, None] & columns[:, None, :])
        mbrm(probability.amax(dim=1), probability.amax(dim=2), boxes)
        for mask in (probability > 0.4).numpy():
            crop_to_rle(mask, (0, 0, SIZE[1], SIZE[0]), SIZE)

    return {"seconds": alternate({"here": here, "as the release": as_the_release}, rounds)}


def objects(boxes: Tensor, rounds: int) -> dict[str, Any]:
    """Cost over the number of objects."""
    image = photo(*SIZE)
    functions: dict[str, Callable[[], object]] = {}
    for count in OBJECTS:
        own = boxes.repeat(-(-count // len(boxes)), 1)[:count]
        functions[f"+ MBRM|{count}"] = run_ours(ours("+ MBRM"), image, own)
        functions[f"torchvision Mask R-CNN|{count}"] = run_peer(peer("torchvision Mask R-CNN", own), image)
    return {"seconds": alternate(functions, rounds)}


def sizes(boxes: Tensor, rounds: int) -> dict[str, Any]:
    """Cost over the shorter side of the image."""
    functions: dict[str, Callable[[], object]] = {}
    for side in SIDES:
        image, own = photo(side, side * SIZE[1] // SIZE[0]), boxes * side / SIZE[0]
        for name in ("RetinaNet", "+ MBRM"):
            functions[f"{name}|{side}"] = run_ours(ours(name, side=side), image, own)
        for name in PEERS:
            functions[f"{name}|{side}"] = run_peer(peer(name, own), image)
    return {"seconds": alternate(functions, rounds)}


def training(boxes: Tensor, rounds: int) -> dict[str, Any]:
    """A step of one image with 20 objects, whose masks are their boxes: forward, losses, backward; all layers train."""
    boxes = boxes[:20].round()
    boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 8)
    image = torch.zeros(1, 3, 800, 1088, dtype=torch.uint8)
    image[0, :, :, : SIZE[1]] = torch.from_numpy(photo(*SIZE)).permute(2, 0, 1)
    labels = torch.arange(len(boxes)) % CLASSES

    def our_step(name: str) -> Callable[[], None]:
        preset, changes = OURS[name]
        changes = {**changes, "model": {"frozen_stages": 0, **changes.get("model", {})}}
        model = build_model(get_config(preset, changes), num_classes=CLASSES, pretrained=False)
        targets = box_targets(boxes, labels, SIZE, 4, (200, 272))

        def run() -> None:
            model.zero_grad()
            torch.stack(list(model.losses(image, [targets]).values())).sum().backward()

        return run

    def peer_step(name: str) -> Callable[[], None]:
        model = PEERS[name](weights=None, weights_backbone=None).train()
        target = {"boxes": boxes, "labels": labels + 1, "masks": rectangles(boxes, SIZE).byte()}
        picture = image[0, :, :, : SIZE[1]] / 255

        def run() -> None:
            model.zero_grad()
            torch.stack(list(model([picture], [target]).values())).sum().backward()

        return run

    functions = {name: peer_step(name) for name in PEERS}
    functions |= {name: our_step(name) for name in ("RetinaNet, torchvision's heads", "RetinaNet", "+ MBRM")}
    return {"seconds": alternate(functions, rounds)}


def box_targets(boxes: Tensor, labels: Tensor, size: tuple[int, int], stride: int, cells: tuple[int, int]) -> Targets:
    """Objects that fill their boxes, on a mask grid of (h, w) cells."""
    return Targets(
        boxes=boxes,
        labels=labels,
        masks=rectangles(boxes / stride, cells),
        has_mask=torch.ones(len(boxes), dtype=torch.bool),
        areas=(boxes[:, 2:] - boxes[:, :2]).prod(dim=1),
        image_size=size,
    )


def rectangles(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, H, W) bool, True inside each box."""
    y, x = torch.arange(size[0])[:, None] + 0.5, torch.arange(size[1]) + 0.5
    x1, y1, x2, y2 = boxes[:, :, None, None].unbind(1)
    return (x >= x1) & (x < x2) & (y >= y1) & (y < y2)


def photo(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def coco_boxes(path: Path, count: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """(count, 4) ground-truth boxes of a COCO JSON, drawn at random and scaled from their image to `size`."""
    content = json.loads(path.read_text())
    sides = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    annotations = [a for a in content["annotations"] if not a.get("iscrowd") and min(a["bbox"][2:]) > 0]
    chosen = np.random.default_rng(seed).choice(len(annotations), count, replace=False)
    boxes = []
    for annotation in (annotations[i] for i in chosen):
        x, y, w, h = annotation["bbox"]
        scale = np.divide((size[1], size[0]), sides[annotation["image_id"]])
        boxes.append([*(scale * (x, y)), *(scale * (x + w, y + h))])
    return torch.tensor(boxes, dtype=torch.float32)


def draw(folder: Path) -> None:
    """Cost over objects and over size, from what was measured."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    labels = {"objects": "objects", "sizes": "shorter side, pixels"}
    for axis, (what, label) in zip(figure.subplots(1, 2), labels.items(), strict=True):
        file = folder / f"{what}.json"
        if not file.exists():
            continue
        lines: dict[str, list[tuple[int, float]]] = {}
        for name, seconds in json.loads(file.read_text())["seconds"].items():
            contestant, place = name.split("|")
            lines.setdefault(contestant, []).append((int(place), median(seconds)))
        for contestant, points in lines.items():
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=contestant)
        axis.set_ylim(bottom=0)
        axis.set_xlabel(label)
        axis.set_ylabel("seconds an image")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    replace_file(folder / "cost.png", lambda partial: figure.savefig(partial, dpi=120, format="png"))


WHAT = {
    "inference": inference,
    "after_network": after_network,
    "objects": objects,
    "sizes": sizes,
    "training": training,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boxes", type=Path, help="COCO JSON to draw boxes from")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--what", nargs="+", choices=list(WHAT), default=list(WHAT))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    boxes = coco_boxes(arguments.boxes, 100, SIZE) if arguments.boxes else draw_boxes(100, SIZE)
    area = float((boxes[:, 2:] - boxes[:, :2]).prod(dim=1).mean())
    print(f"100 boxes, {area:.0f} pixels on average; {arguments.threads} threads; medians of {arguments.rounds} rounds")
    for what in arguments.what:
        result = {"mean_box_area": area, **WHAT[what](boxes, arguments.rounds), "machine": machine()}
        write_text(arguments.output / f"{what}.json", json.dumps(result, indent=1))
        print(f"\n{what}")
        for name, seconds in result["seconds"].items():
            print(f"  {name:45s} {median(seconds):8.3f} s")
    draw(arguments.output)


if __name__ == "__main__":
    main()
