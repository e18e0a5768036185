"""`build_model`: the one place where settings become modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

import torch
from torch import nn

from rdsnet.config import Config, flat_settings, get_config, register_settings
from rdsnet.model.backbone import Backbone
from rdsnet.model.mask_rules import MaskRules, RDSNetMasks, YolactMasks
from rdsnet.model.mbrm import MBRM, PUBLISHED
from rdsnet.model.object_stream.dense import Common, DenseStream
from rdsnet.model.object_stream.fcos import FCOSStream
from rdsnet.model.object_stream.retinanet import RetinaNetStream
from rdsnet.model.object_stream.yolact import YolactStream
from rdsnet.model.pixel_stream import PixelStream, Protonet, SemanticBranch
from rdsnet.model.rdsnet import RDSNet


def build_model(config: Config | str, *, num_classes: int, pretrained: bool = True) -> RDSNet:
    """An untrained model in training mode (its trunk pretrained where the configuration says so).

    Args:
        config: a configuration, or the name of a preset.
        num_classes: C, at least 1.
        pretrained: False: all weights will come from a file, so none are fetched, whatever the configuration says.

    Raises:
        ValueError: an unknown preset, stream or trunk, or settings that contradict each other; says which are valid.
    """
    if isinstance(config, str):
        config = get_config(config)
    if num_classes < 1:
        raise ValueError(f"expected at least 1 class, got {num_classes}")
    m, loss = config.model, config.loss
    backbone = Backbone(
        trunk=m.trunk,
        trunk_levels=m.trunk_levels,
        levels=m.levels,
        extra_from=m.extra_from,
        extra_relu=m.extra_relu,
        top_down=m.top_down,
        relu=m.pyramid_relu,
        channels=m.channels,
        pretrained=m.pretrained if pretrained else "none",
        norm=m.trunk_norm,
        frozen_stages=m.frozen_stages,
        checkpoint_activations=config.train.checkpoint_activations,
    )
    model = RDSNet(
        backbone=backbone,
        object_stream=_object_stream(config, num_classes),
        pixel_stream=PIXEL_STREAMS[m.pixel_stream](config) if m.masks else None,
        pixel_levels=m.pixel_levels,
        assembly=m.assembly,
        masks=MASK_RULES[m.mask_rules](config),
        mbrm=_mbrm(config),
        refine=config.detect.refine,
        semantic=SemanticBranch(channels=m.channels, num_classes=num_classes) if loss.semantic_weight else None,
        loss_weights={"box": loss.box_weight, "mask": loss.mask_weight, "semantic": loss.semantic_weight},
        image_mean=m.image_mean,
        image_std=m.image_std,
    )
    # Channels last: the layout that convolutions are fastest in, on CPUs and GPUs alike
    return model.train().to(memory_format=torch.channels_last)


STREAMS: dict[str, Callable[..., DenseStream]] = {
    "retinanet": RetinaNetStream,
    "yolact": YolactStream,
    "fcos": FCOSStream,
}
"""Object streams by the name of their section of the configuration, whose settings are their arguments."""


def register_stream(name: str, stream: Callable[..., DenseStream], settings: type) -> None:
    """Enter an object stream: `model.stream` takes its name.

    Args:
        stream: called with a `Common` and with the fields of its settings by name.
        settings: a dataclass with a default for each field, whose annotations say what the field takes (`rdsnet.config`
            has examples).
    """
    STREAMS[name] = stream
    register_settings(name, settings)


def _object_stream(config: Config, num_classes: int) -> DenseStream:
    m, detect = config.model, config.detect
    if m.stream not in STREAMS:
        raise ValueError(f"unknown model.stream {m.stream!r}; valid are {', '.join(STREAMS)}")
    halves = 2 if m.assembly == "correlation" else 1
    common = Common(
        num_classes=num_classes,
        strides=[2**level for level in m.levels],
        channels=m.channels,
        norm=m.norm,
        representation=(halves, m.representation) if m.masks else None,
        score_threshold=detect.score_threshold,
        pre_nms=detect.pre_nms,
        nms=detect.nms,
        nms_iou=detect.nms_iou,
        max_detections=detect.max_detections,
        rules=config.rules,
    )
    return STREAMS[m.stream](common, **asdict(config.streams[m.stream]))


def _panoptic(config: Config) -> PixelStream:
    m = config.model
    return PixelStream(
        levels=m.pixel_levels,
        channels=m.channels,
        representation=m.representation,
        mask_stride=m.mask_stride,
        norm=m.norm,
        rules=config.rules,
    )


def _protonet(config: Config) -> Protonet:
    m = config.model
    if len(m.pixel_levels) != 1:
        raise ValueError(f"a protonet reads one level, got pixel_levels {m.pixel_levels}")
    return Protonet(
        level=m.pixel_levels[0],
        channels=m.channels,
        representation=m.representation,
        mask_stride=m.mask_stride,
        norm=m.norm,
    )


PIXEL_STREAMS: dict[str, Callable[[Config], nn.Module]] = {"panoptic": _panoptic, "protonet": _protonet}


def _rdsnet_masks(config: Config) -> RDSNetMasks:
    loss, detect = config.loss, config.detect
    return RDSNetMasks(
        max_instances=loss.max_masks,
        train_expand=loss.crop_expand,
        ohem_ratio=loss.ohem_ratio,
        expand=detect.crop_expand,
        threshold=detect.mask_threshold,
        rules=config.rules,
    )


def _yolact_masks(config: Config) -> YolactMasks:
    ours = {"loss.crop_expand": 1.0, "loss.ohem_ratio": None, "detect.crop_expand": 1.0}
    values = flat_settings(config)
    ignored = [f"{name} {values[name]}" for name, only in ours.items() if values[name] != only]
    if ignored:
        raise ValueError(f"model.mask_rules yolact crops with plain boxes and without OHEM, got {', '.join(ignored)}")
    return YolactMasks(max_instances=config.loss.max_masks, threshold=config.detect.mask_threshold)


MASK_RULES: dict[str, Callable[[Config], MaskRules]] = {"rdsnet": _rdsnet_masks, "yolact": _yolact_masks}


def _mbrm(config: Config) -> MBRM:
    numbers = replace(PUBLISHED, gamma=config.detect.gamma, mask_threshold=config.detect.mask_threshold)
    return MBRM(numbers, rules=config.rules)
