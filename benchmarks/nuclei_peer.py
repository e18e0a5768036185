"""torchvision's Mask R-CNN on the trunk and pyramid of one of our configurations, from scratch on the same images.

The batches are those that `rdsnet train` would draw: the same seed, order, crops and augmentation, with masks at the
network's resolution. Optimizer, schedule, average and precision are the configuration's. Anchors have its
sizes; detections go up to its `max_detections`. Repeated, a training goes on from its last checkpoint.

    python benchmarks/nuclei_peer.py --config benchmarks/nuclei.yaml --data nuclei --steps 1000 --output runs/peer

With `--refine` it measures, once trained, what `rdsnet.refine_boxes` makes of its boxes and soft masks, at each IoU.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import BatchSampler
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from rdsnet.config import Config, config_from_file, get_config
from rdsnet.data.coco import CocoFolder
from rdsnet.data.loading import EpochOrder, TrainDataset, collate
from rdsnet.data.records import ImageRecord
from rdsnet.device import choose_precision
from rdsnet.files import make_folder, replace_file, write_text
from rdsnet.model.backbone import Backbone
from rdsnet.refine.boxes import fit_refiner, refine_boxes
from rdsnet.results.exchange import Results
from rdsnet.results.metrics import CocoEvaluator, box_ap
from rdsnet.structures import MaskGrid, Objects, Targets
from rdsnet.terminal import progress_bar
from rdsnet.train.module import build_optimizer, learning_rate
from refine_boxes import print_table

SAVE_STEPS = 200


class Maps(nn.Module):
    """Our trunk and pyramid, with its levels named as torchvision wants them."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        model = config.model
        self.out_channels = model.channels
        self.backbone = Backbone(
            trunk=model.trunk,
            trunk_levels=model.trunk_levels,
            levels=model.levels,
            channels=model.channels,
            pretrained=model.pretrained,
            norm=model.trunk_norm,
            frozen_stages=model.frozen_stages,
            extra_from=model.extra_from,
            extra_relu=model.extra_relu,
            top_down=model.top_down,
            relu=model.pyramid_relu,
            checkpoint_activations=config.train.checkpoint_activations,
        )

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        return OrderedDict((str(i), level) for i, level in enumerate(self.backbone(images)))


def build_peer(config: Config, classes: int, width: int) -> MaskRCNN:
    """Mask R-CNN at the images' own size; `width` is that of the two layers of its box head (torchvision: 1024)."""
    channels, levels = config.model.channels, config.model.levels
    sizes = tuple((int(config.retinanet.anchor_size * 2**level),) for level in levels)
    return MaskRCNN(
        Maps(config),
        image_mean=[value / 255 for value in config.model.image_mean],
        image_std=[value / 255 for value in config.model.image_std],
        rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(levels)),
        box_roi_pool=MultiScaleRoIAlign([str(i) for i in range(len(levels))], 7, 2),
        box_head=TwoMLPHead(channels * 49, width),
        box_predictor=FastRCNNPredictor(width, classes + 1),
        mask_roi_pool=MultiScaleRoIAlign([str(i) for i in range(len(levels))], 14, 2),
        mask_head=MaskRCNNHeads(channels, (channels,) * 4, 1),
        mask_predictor=MaskRCNNPredictor(channels, channels, classes + 1),
        box_detections_per_img=config.detect.max_detections,
        _skip_resize=True,
    )


def as_target(target: Targets) -> dict[str, Tensor]:
    return {"boxes": target.boxes, "labels": target.labels + 1, "masks": target.masks.to(torch.uint8)}


class Training:
    """A training that can be stopped and continued; its state is in OUTPUT/last.pt."""

    def __init__(self, config: Config, folder: CocoFolder, steps: int, output: Path, width: int) -> None:
        self.config, self.steps, self.output = config, steps, output
        # masks at full resolution: torchvision resamples them itself
        self.data = TrainDataset(folder, config.data, MaskGrid(1, 1), config.seed)
        self.order = EpochOrder(len(folder), config.train.batch_size, config.seed)
        self.batches = BatchSampler(self.order, config.train.batch_size, drop_last=False)
        torch.manual_seed(config.seed)
        self.model = build_peer(config, len(folder.class_names), width)
        self.optimizer = build_optimizer(self.model, config.train)
        self.average = ModelEmaV3(self.model, decay=config.train.ema, use_warmup=True)
        self.step, self.seconds = 0, 0.0
        if (output / "last.pt").exists():
            state = torch.load(output / "last.pt", weights_only=True)
            self.model.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]

    def run(self) -> None:
        self.model.train()
        began = time.process_time() - self.seconds
        bar = progress_bar("training", total=self.steps, initial=self.step)
        while self.step < self.steps:
            self.order.set_epoch(self.step // len(self.batches))
            for index in list(self.batches)[self.step % len(self.batches) :]:
                losses = self._step(*collate([self.data[i] for i in index]))
                self.step += 1
                self.seconds = time.process_time() - began
                bar.set_postfix({name[5:]: f"{value:.3f}" for name, value in losses.items()}, refresh=False)
                bar.update()
                if self.step % SAVE_STEPS == 0 or self.step == self.steps:
                    self._save()
                if self.step == self.steps:
                    break
        bar.close()

    def _step(self, images: Tensor, targets: list[Targets]) -> dict[str, float]:
        recipe = self.config.train
        torch.manual_seed(self.config.seed + self.step)  # torchvision samples proposals
        lr = learning_rate(self.step, total_steps=self.steps, images_per_step=recipe.batch_size, recipe=recipe)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        bf16 = choose_precision(recipe.precision, torch.device("cpu")) == "bf16"
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            losses = self.model(list(images.float() / 255), [as_target(target) for target in targets])
        self.optimizer.zero_grad()
        torch.stack([loss.float() for loss in losses.values()]).sum().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_norm)
        self.optimizer.step()
        self.average.update(self.model, self.step)
        return {name: loss.item() for name, loss in losses.items()}

    def _save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        replace_file(self.output / "last.pt", lambda partial: torch.save(state, partial))


def as_objects(found: dict[str, Tensor], size: tuple[int, int]) -> Objects:
    """torchvision's output of one image; its boxes are both the regressed and the refined ones."""
    masks = found["masks"][:, 0] > 0.5
    count = len(masks)
    direct = found["boxes"].clone()
    windows = torch.zeros(count, 4, dtype=torch.int64)
    for i, mask in enumerate(masks):
        columns, rows = mask.any(0).nonzero()[:, 0], mask.any(1).nonzero()[:, 0]
        if len(columns):
            windows[i] = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            direct[i] = windows[i].float()
    return Objects(
        boxes=found["boxes"],
        regressed_boxes=found["boxes"],
        direct_boxes=direct,
        scores=found["scores"],
        labels=found["labels"] - 1,
        edge_std=torch.full((count, 4), torch.nan),
        interval=torch.full((count, 4, 2), torch.nan),
        masks=[mask[y0:y1, x0:x1] for mask, (x0, y0, x1, y1) in zip(masks, windows.tolist(), strict=True)],
        windows=windows,
        anchors=torch.zeros(count, dtype=torch.int64),
        image_size=size,
    )


@torch.inference_mode()
def detect(model: MaskRCNN, image: Any) -> dict[str, Tensor]:
    """torchvision's output for a uint8 RGB array (H, W, 3)."""
    model.eval()
    found: dict[str, Tensor] = model([torch.from_numpy(image).permute(2, 0, 1) / 255])[0]
    return found


def evaluate(model: MaskRCNN, folder: CocoFolder, max_detections: int) -> dict[str, Any]:
    evaluator = CocoEvaluator(folder, max_detections)
    for record in progress_bar("evaluating", folder.images):
        evaluator.add(record.id, as_objects(detect(model, record.read()), record.size))
    return evaluator.summarize(boundary=True)


def predict(model: MaskRCNN, record: ImageRecord) -> dict[str, Any]:
    """What `refine_boxes` and `fit_refiner` take: soft masks as crops, which end where torchvision's masks end."""
    found = {name: values.numpy() for name, values in detect(model, record.read()).items()}
    height, width = record.height, record.width
    outer = np.concatenate([np.floor(found["boxes"][:, :2]) - 1, np.ceil(found["boxes"][:, 2:]) + 1], axis=1)
    windows = outer.clip(0, [width, height, width, height]).astype(int)
    masks = [mask[0, y0:y1, x0:x1] for mask, (x0, y0, x1, y1) in zip(found["masks"], windows.tolist(), strict=True)]
    return found | {"masks": masks, "origins": windows[:, :2], "image_size": (height, width)}


def refine(model: MaskRCNN, train: CocoFolder, val: CocoFolder) -> None:
    """Print box AP as given, with the default numbers, and with numbers fitted to 100 training images."""
    some = [train.images[i] for i in np.random.default_rng(0).permutation(len(train))[:100]]
    truths = (record.truth()[0] for record in some)
    fitted = fit_refiner((predict(model, record) for record in progress_bar("fitting", some)), truths)
    print(fitted)
    variants: dict[str, Callable[[dict[str, Any]], np.ndarray]] = {
        "as given": lambda found: found["boxes"],
        "refined, default numbers": lambda found: refine_boxes(found).xyxy,
        "refined, fitted": lambda found: refine_boxes(found, refiner=fitted).xyxy,
        "refined, fitted, mean": lambda found: refine_boxes(found, refiner=fitted, decision="mean").xyxy,
    }
    boxes: dict[str, list[np.ndarray]] = {name: [] for name in variants}
    results = Results(val.json_path, [], [], {}, [])
    for record in progress_bar("refining", val.images):
        found = predict(model, record)
        begin = len(results.entries)
        results.entries += [{"score": score} for score in found["scores"].tolist()]
        results.labels += [0] * len(found["scores"])
        results.by_image[record.id] = list(range(begin, len(results.entries)))
        for name, find in variants.items():
            boxes[name].append(find(found))
    print_table({name: box_ap(val, results, np.concatenate(parts)) for name, parts in boxes.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="rdsnet_tiny")
    parser.add_argument("--config", type=Path, required=True, help="YAML settings over the preset")
    parser.add_argument("--data", type=Path, required=True, help="folder with train.json and val.json")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--lr", type=float, default=None, help="default: the configuration's")
    parser.add_argument("--width", type=int, default=256, help="of the box head's two layers")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--refine", action="store_true", help="measure refine_boxes on it instead")
    options = parser.parse_args()
    config = config_from_file(options.config, get_config(options.preset))
    if options.lr is not None:
        config.train.lr = options.lr
    make_folder(options.output)
    training = Training(config, CocoFolder(options.data / "train.json"), options.steps, options.output, options.width)
    training.run()
    if options.refine:
        refine(training.average.module, training.data.folder, CocoFolder(options.data / "val.json"))
        return
    metrics = evaluate(training.average.module, CocoFolder(options.data / "val.json"), config.detect.max_detections)
    metrics |= {"images": options.steps * config.train.batch_size, "processor_minutes": training.seconds / 60}
    metrics |= {"parameters": sum(p.numel() for p in training.model.parameters()), "lr": config.train.lr}
    write_text(options.output / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    print(f"box AP {metrics['box']['regressed']['AP']:.3f}, mask AP {metrics['mask']['AP']:.3f}: {options.output}")


if __name__ == "__main__":
    main()
