"""Modules for tests, made from the settings' defaults with changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rdsnet.config import Config
from rdsnet.model.backbone import Backbone
from rdsnet.model.correlation import correlate
from rdsnet.model.mask_rules import MaskRules, RDSNetMasks
from rdsnet.model.masks import Frame, PastedMasks
from rdsnet.model.mbrm import MBRM, PUBLISHED
from rdsnet.model.object_stream.dense import Common, Raw
from rdsnet.model.object_stream.fcos import FCOSStream
from rdsnet.model.object_stream.retinanet import RetinaNetStream
from rdsnet.model.object_stream.yolact import YolactStream
from rdsnet.settings import Rules
from rdsnet.structures import Targets

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
