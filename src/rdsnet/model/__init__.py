"""The network. `build_model` is the one place where settings become modules."""

from __future__ import annotations

from collections.abc import Callable

from rdsnet.config import Config, get_config
from rdsnet.model.backbone import Backbone
from rdsnet.model.mbrm import MBRM
from rdsnet.model.object_stream import DenseStream, RetinaNetStream
from rdsnet.model.pixel_stream import PixelStream
from rdsnet.model.rdsnet import MaskSettings, RDSNet

__all__ = ["RDSNet", "build_model"]


def build_model(config: Config | str, *, num_classes: int) -> RDSNet:
    """An untrained model in training mode (its trunk pretrained where the configuration says so).

    Args:
        config: a configuration, or the name of a preset.
        num_classes: C, at least 1.

    Raises:
        ValueError: an unknown preset, stream or trunk, or settings that contradict each other; says which are valid.
    """
    if isinstance(config, str):
        config = get_config(config)
    if num_classes < 1:
        raise ValueError(f"expected at least 1 class, got {num_classes}")
    m = config.model
    if m.stream not in STREAMS:
        raise ValueError(f"unknown stream {m.stream!r}; valid are {', '.join(STREAMS)}")
    backbone = Backbone(
        trunk=m.trunk,
        trunk_levels=m.trunk_levels,
        levels=m.levels,
        extra_from=m.extra_from,
        extra_relu=m.extra_relu,
        channels=m.channels,
        pretrained=m.pretrained,
        norm=m.trunk_norm,
        frozen_stages=m.frozen_stages,
    )
    pixel_stream = PixelStream(
        levels=m.pixel_levels,
        channels=m.channels,
        representation=m.representation,
        mask_stride=m.mask_stride,
        norm=m.norm,
        align_corners=m.align_corners,
    )
    model = RDSNet(
        backbone=backbone,
        object_stream=STREAMS[m.stream](config, num_classes),
        pixel_stream=pixel_stream if m.masks else None,
        pixel_levels=m.pixel_levels,
        mbrm=_mbrm(config),
        masks=_mask_settings(config),
        refine=config.detect.refine,
        box_weight=config.loss.box_weight,
        mask_weight=config.loss.mask_weight,
        image_mean=m.image_mean,
        image_std=m.image_std,
    )
    return model.train()


def _retinanet(config: Config, num_classes: int) -> DenseStream:
    m, loss, detect = config.model, config.loss, config.detect
    return RetinaNetStream(
        num_classes=num_classes,
        strides=[2**level for level in m.levels],
        channels=m.channels,
        depth=m.tower_depth,
        norm=m.norm,
        representation=m.representation if m.masks else 0,
        anchor_size=m.anchor_size,
        anchor_scales=m.anchor_scales,
        anchor_ratios=m.anchor_ratios,
        anchor_rounding=m.anchor_rounding,
        anchor_grid=m.anchor_grid,
        positive_iou=loss.positive_iou,
        negative_iou=loss.negative_iou,
        focal_alpha=loss.focal_alpha,
        focal_gamma=loss.focal_gamma,
        box_beta=loss.box_beta,
        score_threshold=detect.score_threshold,
        pre_nms=detect.pre_nms,
        pre_nms_pairs=detect.pre_nms_pairs,
        nms_iou=detect.nms_iou,
        keep_empty=detect.keep_empty,
        max_detections=detect.max_detections,
        inclusive=m.inclusive,
    )


STREAMS: dict[str, Callable[[Config, int], DenseStream]] = {"retinanet": _retinanet}


def _mbrm(config: Config) -> MBRM:
    return MBRM(
        gamma=config.detect.gamma,
        cut=config.detect.prior_cut,
        inclusive=config.model.inclusive,
        keep_without_evidence=config.detect.keep_without_evidence,
        mask_threshold=config.detect.mask_threshold,
    )


def _mask_settings(config: Config) -> MaskSettings:
    loss, detect = config.loss, config.detect
    return MaskSettings(
        stride=config.model.mask_stride,
        max_instances=loss.max_masks,
        spread=loss.spread_masks,
        min_area=loss.min_mask_area,
        train_expand=loss.crop_expand,
        train_crop_rule=loss.crop_rule,
        ohem_ratio=loss.ohem_ratio,
        expand=detect.crop_expand,
        crop_rule=detect.crop_rule,
        threshold=detect.mask_threshold,
        two_steps=detect.two_steps,
    )
