"""Can RDSNet learn a few images by heart? A wrong sign, shift or target shows here first.

Trains on the images of a COCO JSON with the lowest ids and evaluates on the same. Beside the mask AP stands that of an
oracle: the ground truth passed through binary masks on the mask grid, which is what a perfect network would be taught.

    python benchmarks/overfit.py coco-mini/train.json --output runs/overfit
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from rdsnet.config import Config, get_config
from rdsnet.data.coco import CocoFolder
from rdsnet.data.transforms import View, eval_size, padding_multiple, view_objects
from rdsnet.model.build import build_model
from rdsnet.model.correlation import correlate
from rdsnet.model.mask_rules import RDSNetMasks
from rdsnet.model.masks import Frame
from rdsnet.results.metrics import CocoEvaluator
from rdsnet.structures import MaskGrid, Objects
from rdsnet.train.run import train
from rdsnet.train.run_folder import read_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, help="COCO JSON; images/ lies beside it")
    parser.add_argument("--output", type=Path, required=True, help="run folder; an interrupted run is continued")
    parser.add_argument("--preset", default="rdsnet_tiny", help="rdsnet_s_tiny and rdsnet_fcos_tiny: the other streams")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--side", type=int, default=256, help="pixels of the shorter side")
    arguments = parser.parse_args()

    subset = arguments.output.with_name(arguments.output.name + ".json")
    subset.parent.mkdir(parents=True, exist_ok=True)
    write_subset(arguments.json, subset, arguments.images)
    if arguments.output.exists():
        config = read_config(arguments.output)
        train(None, arguments.output, resume=True)
    else:
        config = overfit_config(
            arguments.preset, subset, arguments.json.parent / "images", arguments.side, arguments.steps
        )
        train(config, arguments.output)
    metrics = json.loads((arguments.output / "metrics.json").read_text())
    oracle = oracle_mask_ap(CocoFolder(subset, arguments.json.parent / "images"), config)
    box, mask = metrics["box"], metrics["mask"]["AP"]
    print(f"shorter side {arguments.side}, mask stride {config.model.mask_stride}, {arguments.steps} steps")
    print(f"box AP: regressed {box['regressed']['AP']:.3f}, refined {box['refined']['AP']:.3f}")
    print(f"mask AP {mask:.3f}, of the oracle {oracle:.3f}: {mask / oracle:.3f}")


def write_subset(source: Path, target: Path, count: int) -> None:
    """The `count` images with the lowest ids, their annotations, and the categories that occur."""
    content = json.loads(source.read_text())
    images = sorted(content["images"], key=lambda image: image["id"])[:count]
    ids = {image["id"] for image in images}
    annotations = [a for a in content["annotations"] if a["image_id"] in ids]
    used = {a["category_id"] for a in annotations}
    categories = [c for c in content["categories"] if c["id"] in used]
    target.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def overfit_config(preset: str, subset: Path, images: Path, side: int, steps: int) -> Config:
    data = {"train": str(subset), "val": str(subset), "train_images": str(images), "val_images": str(images)}
    return get_config(
        preset,
        {
            "model": {"mask_stride": 4},  # the paper's grid
            "data": {**data, "short_side": side, "long_side": 2 * side, "horizontal_flip": 0.0},
            "train": {
                "max_steps": steps,
                "batch_size": 4,
                "lr": 4e-3,
                "weight_decay": 0.0,
                "val_epochs": steps,
                "checkpoint_steps": 50,
            },
        },
    )


def oracle_mask_ap(folder: CocoFolder, config: Config) -> float:
    """Mask AP of the training targets themselves, brought to the image as predictions are."""
    evaluator = CocoEvaluator(folder, config.detect.max_detections)
    grid = MaskGrid(2 ** min(config.model.pixel_levels), config.model.mask_stride)
    masks = build_model(config, num_classes=1, pretrained=False).masks
    assert isinstance(masks, RDSNetMasks)
    masks = replace(masks, threshold=0.5)
    for record in folder.images:
        original = (record.height, record.width)
        size = eval_size(*original, config.data)
        multiple = padding_multiple(config.data)
        view = View(original=original, size=size, window=(0, 0, size[1], size[0]), multiple=multiple)
        targets = view_objects(record.annotations, view, grid)
        n = len(targets)
        boxes = targets.boxes * torch.tensor([original[1] / size[1], original[0] / size[0]]).repeat(2)
        logits = targets.masks.float() * 20 - 10  # as sure as a network can be
        step = (view.padded[0] / logits.shape[1], view.padded[1] / logits.shape[2])
        frame = Frame(size, original, (logits.shape[1], logits.shape[2]), step)
        maps = partial(correlate, torch.eye(n), logits)  # object i is pixel channel i
        pasted = masks.paste(maps, boxes, frame, logits.device)
        found = Objects(
            boxes=boxes,
            regressed_boxes=boxes,
            direct_boxes=boxes,
            scores=torch.ones(n),
            labels=targets.labels,
            edge_std=torch.zeros(n, 4),
            interval=torch.zeros(n, 4, 2),
            masks=pasted.masks,
            windows=pasted.windows,
            anchors=torch.arange(n),
            image_size=original,
        )
        evaluator.add(record.id, found)
    return evaluator.summarize(boundary=False)["mask"]["AP"]


if __name__ == "__main__":
    main()
