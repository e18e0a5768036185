"""What tests are made of: modules from the settings' defaults, networks, truth and results, and data sets."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from rdsnet.config import Config, get_config
from rdsnet.model.backbone import Backbone
from rdsnet.model.build import build_model
from rdsnet.model.correlation import correlate
from rdsnet.model.mask_rules import MaskRules, RDSNetMasks
from rdsnet.model.masks import Frame, PastedMasks
from rdsnet.model.mbrm import MBRM, PUBLISHED
from rdsnet.model.object_stream.dense import Common, Raw
from rdsnet.model.object_stream.fcos import FCOSStream
from rdsnet.model.object_stream.retinanet import RetinaNetStream
from rdsnet.model.object_stream.yolact import YolactStream
from rdsnet.model.rdsnet import RDSNet
from rdsnet.settings import Rules
from rdsnet.structures import Objects, Targets
from rdsnet.weights import checkpoint

# --- modules ---

RULES = {field.name for field in fields(Rules)}


def _take(names: set[str], changes: dict[str, Any]) -> dict[str, Any]:
    """The changes of these names, taken out."""
    return {name: changes.pop(name) for name in names & set(changes)}


def common(**changes: Any) -> Common:
    """What every object stream is told: levels of stride 8 and 16, 3 classes; rules by their names."""
    config = Config()
    rules = Rules(**_take(RULES, changes))
    arguments = {
        "num_classes": 3,
        "strides": (8, 16),
        "channels": config.model.channels,
        "norm": config.model.norm,
        "representation": (2, config.model.representation),
        "score_threshold": config.detect.score_threshold,
        "pre_nms": config.detect.pre_nms,
        "nms": config.detect.nms,
        "nms_iou": config.detect.nms_iou,
        "max_detections": config.detect.max_detections,
    }
    return Common(**(arguments | changes), rules=rules)


def _stream(kind: Any, settings: Any, changes: dict[str, Any]) -> Any:
    own = asdict(settings)
    own |= _take(set(own), changes)
    return kind(common(**changes), **own)


def retinanet(**changes: Any) -> RetinaNetStream:
    stream: RetinaNetStream = _stream(RetinaNetStream, Config().retinanet, changes)
    return stream


def fcos(**changes: Any) -> FCOSStream:
    stream: FCOSStream = _stream(FCOSStream, Config().fcos, changes)
    return stream


def yolact(**changes: Any) -> YolactStream:
    """With the square priors of its presets."""
    stream: YolactStream = _stream(YolactStream, Config().yolact, {"square_priors": True, **changes})
    return stream


def backbone(**changes: Any) -> Backbone:
    config = Config()
    arguments = {
        "trunk": config.model.trunk,
        "trunk_levels": config.model.trunk_levels,
        "levels": config.model.levels,
        "extra_from": config.model.extra_from,
        "extra_relu": config.model.extra_relu,
        "top_down": config.model.top_down,
        "relu": config.model.pyramid_relu,
        "channels": config.model.channels,
        "pretrained": "none",
        "norm": config.model.trunk_norm,
        "frozen_stages": config.model.frozen_stages,
        "checkpoint_activations": config.train.checkpoint_activations,
    }
    return Backbone(**(arguments | changes))


def mbrm(**changes: Any) -> MBRM:
    """Rules and numbers by their names; otherwise the published numbers."""
    rules = Rules(**_take(RULES, changes))
    return MBRM(replace(PUBLISHED, **changes), rules=rules)


def raw(map_sizes: Sequence[tuple[int, int]], size: tuple[int, int] = (0, 0)) -> Raw:
    """Of a stream's output the sizes only: (h, w) of each level, (H, W) of the input."""
    return Raw(size=size, logits=[torch.empty(1, 0, h, w) for h, w in map_sizes], deltas=[], features=[])


def masks(**changes: Any) -> RDSNetMasks:
    """The paper's rules of masks; rules of other projects by their names."""
    loss, detect = Config().loss, Config().detect
    rules = Rules(**_take(RULES, changes))
    arguments = {
        "max_instances": loss.max_masks,
        "train_expand": loss.crop_expand,
        "ohem_ratio": loss.ohem_ratio,
        "expand": detect.crop_expand,
        "threshold": detect.mask_threshold,
    }
    return RDSNetMasks(**(arguments | changes), rules=rules)


def paste(
    rules: MaskRules,
    vectors: Tensor,
    pixels: Tensor,
    boxes: Tensor,
    *,
    size: tuple[int, int],
    output_size: tuple[int, int],
    step: tuple[float, float],
) -> PastedMasks:
    """As RDSNet has masks pasted; the arguments are those of `correlate` and of `Frame`."""
    frame = Frame(size, output_size, (pixels.shape[1], pixels.shape[2]), step)
    return rules.paste(partial(correlate, vectors, pixels), boxes, frame, pixels.device)


def mask_loss(
    rules: MaskRules,
    vectors: Tensor,
    pixels: Tensor,
    objects: Tensor,
    targets: Targets,
    *,
    step: tuple[float, float],
    positives: int | None = None,
) -> Tensor:
    """The sum over an image's instances, as RDSNet adds them up; `objects` are those of the vectors."""
    ordered = vectors[objects.argsort(stable=True)]
    crops = rules.crops(pixels, objects, targets, step=step, positives=positives or len(objects))
    terms = [crop.loss(correlate(ordered, crop.pixels, crop.instances)) for crop in crops]
    return torch.cat([vectors.new_zeros(1), *terms]).sum()


def detector(preset: str, changes: dict[str, Any] | None = None, num_classes: int = 3) -> RDSNet:
    """A preset at half its width."""
    narrow = {"channels": 32, "representation": 8}
    config = get_config(preset, {"model": narrow, "retinanet": {"tower_depth": 1}, "fcos": {"tower_depth": 1}})
    for section, values in (changes or {}).items():
        setattr(config, section, replace(getattr(config, section), **values))
    torch.manual_seed(0)
    return build_model(config, num_classes=num_classes)


def lively(preset: str, changes: dict[str, Any] | None = None) -> RDSNet:
    """An untrained model that finds objects with scores well apart and masks with structure, in evaluation mode."""
    model = detector(preset, changes)
    layers = ("classify", "represent") if model.pixel_stream is not None else ("classify",)
    for layer in map(model.object_stream.get_submodule, layers):
        nn.init.normal_(layer.get_parameter("weight"), std=0.3)
        nn.init.zeros_(layer.get_parameter("bias"))
    return model.eval()


def save_weights(file: Path, *, seed: int = 0, sure: bool = False, **sections: dict[str, Any]) -> Path:
    """An untrained network for images of 64 pixels that finds cats and dogs everywhere; `sure`: with scores of 0.67."""
    changes: dict[str, dict[str, Any]] = {"model": {"channels": 32}, "data": {"short_side": 64}}
    for section, values in sections.items():
        changes[section] = {**changes.get(section, {}), **values}
    torch.manual_seed(seed)
    config = get_config("rdsnet_tiny", changes)
    model = build_model(config, num_classes=2)
    if sure:
        nn.init.normal_(model.object_stream.classify.weight, std=0.02)
        nn.init.zeros_(model.object_stream.classify.bias)
    checkpoint.save(file, model, config, ["cat", "dog"], [3, 7])
    return file


# --- what goes in and what comes out ---


def images(*sizes: tuple[int, int], padded: tuple[int, int], seed: int = 0) -> Tensor:
    """Noise in each image's (h, w), zeros beside it."""
    generator = torch.Generator().manual_seed(seed)
    batch = torch.zeros(len(sizes), 3, *padded, dtype=torch.uint8)
    for image, (h, w) in zip(batch, sizes, strict=True):
        image[:, :h, :w] = torch.randint(0, 256, (3, h, w), generator=generator, dtype=torch.uint8)
    return batch


def targets(boxes: Any, *, size: tuple[int, int], **fields: Any) -> Targets:
    """Objects of class 0 without masks, or with those of `masks`; other fields by their names."""
    corners = torch.as_tensor(boxes, dtype=torch.float32).view(-1, 4)
    n = len(corners)
    defaults = {
        "boxes": corners,
        "labels": torch.zeros(n, dtype=torch.int64),
        "masks": torch.zeros(n, 8, 8, dtype=torch.bool),
        "has_mask": torch.full((n,), "masks" in fields),
        "areas": torch.zeros(n),
    }
    return Targets(**(defaults | fields), image_size=size)


def objects(boxes: Any, *, size: tuple[int, int], **fields: Any) -> Objects:
    """Found with masks that fill their boxes to whole pixels, and certain edges; other fields by their names."""
    xyxy = torch.as_tensor(boxes, dtype=torch.float32).view(-1, 4)
    n, (height, width) = len(xyxy), size
    windows = torch.minimum(xyxy.round().long().clamp(min=0), torch.tensor([width, height, width, height]))
    defaults = {
        "boxes": xyxy,
        "regressed_boxes": xyxy,
        "direct_boxes": xyxy,
        "scores": torch.linspace(0.9, 0.6, n),
        "labels": torch.zeros(n, dtype=torch.int64),
        "edge_std": torch.zeros(n, 4),
        "interval": torch.zeros(n, 4, 2),
        "masks": [torch.ones(y1 - y0, x1 - x0, dtype=torch.bool) for x0, y0, x1, y1 in windows.tolist()],
        "windows": windows,
        "anchors": torch.arange(n),
    }
    return Objects(**(defaults | fields), image_size=size)


# --- data sets ---


def coco() -> dict[str, Any]:
    """Three images and five objects, with every form of annotation that COCO has.

    Image 0 (60 wide, 40 high): a cat, two rectangles as polygons in columns 10..20 and 30..40 of rows 5..15, and a dog,
    columns 20..50 of rows 20..35 as uncompressed RLE. Image 5 (47 x 33): a dog as a box only, a crowd of cats and
    a cat of one polygon. Image 7 (32 x 32): nothing.
    """
    dog = np.zeros((40, 60), np.uint8)
    dog[20:35, 20:50] = 1
    crowd = np.zeros((33, 47), np.uint8)
    crowd[0:10, 0:47] = 1
    return {
        "images": [
            {"id": 0, "file_name": "a.png", "width": 60, "height": 40},
            {"id": 5, "file_name": "b.png", "width": 47, "height": 33},
            {"id": 7, "file_name": "c.png", "width": 32, "height": 32},
        ],
        "categories": [{"id": 9, "name": "dog"}, {"id": 2, "name": "cat"}],
        "annotations": [
            {
                "id": 0,
                "image_id": 0,
                "category_id": 2,
                "bbox": [10, 5, 30, 10],
                "area": 200,
                "iscrowd": 0,
                "segmentation": [[10, 5, 20, 5, 20, 15, 10, 15], [30, 5, 40, 5, 40, 15, 30, 15]],
            },
            {
                "id": 1,
                "image_id": 0,
                "category_id": 9,
                "bbox": [20, 20, 30, 15],
                "area": 450,
                "iscrowd": 0,
                "segmentation": {"size": [40, 60], "counts": uncompressed(dog)},
            },
            {"id": 2, "image_id": 5, "category_id": 9, "bbox": [3.5, 12, 20, 10.5], "area": 210, "iscrowd": 0},
            {
                "id": 3,
                "image_id": 5,
                "category_id": 2,
                "bbox": [0, 0, 47, 10],
                "area": 470,
                "iscrowd": 1,
                "segmentation": {"size": [33, 47], "counts": uncompressed(crowd)},
            },
            {
                "id": 4,
                "image_id": 5,
                "category_id": 2,
                "bbox": [28, 14, 16, 16],
                "area": 256,
                "iscrowd": 0,
                "segmentation": [[28, 14, 44, 14, 44, 30, 28, 30]],
            },
        ],
    }


def uncompressed(mask: np.ndarray) -> list[int]:
    """The runs of a mask, column by column, background first."""
    flat = mask.T.ravel().astype(np.int8)
    changes = np.flatnonzero(np.diff(flat, prepend=0))
    return np.diff(np.concatenate(([0], changes, [flat.size]))).tolist()


def write_coco(folder: Path, content: dict[str, Any], name: str = "train.json") -> Path:
    """The JSON, and a noise image for each entry whose file is not there."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for entry in content["images"]:
        path = folder / "images" / entry["file_name"]
        if not path.exists():
            rng = np.random.default_rng(entry["id"])
            pixels = rng.integers(0, 256, (entry["height"], entry["width"], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    (folder / name).write_text(json.dumps(content))
    return folder / name


# --- the machine ---


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
