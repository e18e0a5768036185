"""The named presets: what each changes in the defaults of `rdsnet.config`, section by section."""

from __future__ import annotations

from typing import Any

Changes = dict[str, dict[str, Any]]


def together(*parts: Changes) -> Changes:
    """The changes of all parts; later ones win."""
    merged: Changes = {}
    for part in parts:
        for section, values in part.items():
            merged.setdefault(section, {}).update(values)
    return merged


_R101: Changes = {"model": {"trunk": "resnet101.tv_in1k"}}

# What the authors' release does otherwise than the paper; docs/fidelity.md explains each line.
_RELEASE: Changes = {
    "rules": {
        "inclusive": True,
        "anchor_rounding": True,
        "align_corners": True,
        "spread_masks": False,
        "min_mask_area": 100.0,
        "crop_rule": "truncate",
        "two_steps": True,
        "one_scale": True,
        "prior_cut": 0.0044,
        "keep_without_evidence": False,
    },
}

# torchvision's RetinaNet as object stream
_TORCHVISION: Changes = {
    "model": {"extra_relu": True},
    "detect": {"max_detections": 300},
    "rules": {"anchor_rounding": True, "anchor_grid": "torchvision", "pre_nms_pairs": True, "keep_empty": True},
}

_FCOS: Changes = {"model": {"stream": "fcos"}, "detect": {"nms_iou": 0.6}}

# YOLACT's detector with its prototypes, and how its authors train it
_YOLACT_DETECTOR: Changes = {
    "model": {
        "stream": "yolact",
        "frozen_stages": 0,
        "extra_from": "pyramid",
        "top_down": "bilinear",
        "pyramid_relu": True,
        "norm": "none",
        "pixel_stream": "protonet",
        "pixel_levels": (3,),
        "image_mean": (123.68, 116.78, 103.94),
        "image_std": (58.40, 57.12, 57.38),
    },
    "loss": {"box_weight": 1.5, "mask_weight": 6.125, "semantic_weight": 1.0},
    "detect": {"nms": "fast", "pre_nms": None},
    "rules": {"square_priors": True},
}

_YOLACT_RECIPE: Changes = {
    # zoom and aspect have the mean and spread of what SSD's expansion and cropping do to them
    "data": {"square": 550, "antialias": False, "colour": 0.5, "train_zoom": (0.38, 2.8), "train_aspect": 1.7},
    "train": {"lr": 1e-3, "weight_decay": 5e-4, "epochs": 55, "milestones": (0.35, 0.75, 0.875, 0.9375)},
}

# How YOLACT makes its masks and ends its boxes
_YOLACT: Changes = {
    "model": {"assembly": "linear", "mask_rules": "yolact"},
    "loss": {"crop_expand": 1.0, "ohem_ratio": None},
    "detect": {"crop_expand": 1.0, "mask_threshold": 0.5, "refine": "off"},
    "rules": {"keep_empty": True, "whole_boxes": True},
}

# Learns small data from scratch on a CPU: a light trunk with live norms, narrow heads, a level for small objects.
_TINY: Changes = {
    "model": {
        "trunk": "resnet10t",
        "pretrained": "none",
        "trunk_norm": "batch",
        "frozen_stages": 0,
        "trunk_levels": (2, 3, 4),
        "levels": (2, 3, 4, 5),
        "channels": 64,
        "norm": "group",
        "pixel_levels": (2, 3, 4),
        "mask_stride": 2,
    },
    "retinanet": {"tower_depth": 2},
    "yolact": {"prior_sizes": (16.0, 32.0, 64.0, 128.0)},
    "fcos": {"tower_depth": 2, "ranges": (32.0, 64.0, 128.0)},
    "data": {"short_side": 256, "long_side": 512},
    "train": {
        "optimizer": "adamw",
        "lr": 1e-3,
        "weight_decay": 0.05,
        "schedule": "cosine",
        "warmup_steps": 100,
    },
}
_TINY_DETECTOR = together(_YOLACT_DETECTOR, _TINY, {"model": {"pixel_levels": (2,)}})  # YOLACT's on small data

_RDSNET_S_R50 = together(_YOLACT_DETECTOR, _YOLACT_RECIPE)
_YOLACT_R50 = together(_RDSNET_S_R50, _YOLACT)
_YOLACT_BASE = together(_YOLACT_R50, _R101)

PRESETS: dict[str, Changes] = {
    "rdsnet_r50": {},
    "rdsnet_r50_shared": {"retinanet": {"representation_tower": False}},
    "rdsnet_r101": _R101,
    "rdsnet_r101_2x": together(_R101, {"train": {"epochs": 24}, "data": {"train_short_side": (640, 800)}}),
    "rdsnet_s": together(_RDSNET_S_R50, _R101),
    "rdsnet_s_r50": _RDSNET_S_R50,
    "rdsnet_fcos_r50": together(_FCOS, {"model": {"extra_from": "pyramid", "extra_relu": True}}),
    "rdsnet_r50_release": _RELEASE,
    "rdsnet_r101_release": together(_R101, _RELEASE),
    "rdsnet_r50_torchvision": together(_TORCHVISION, {"model": {"norm": "none", "extra_from": "pyramid"}}),
    "rdsnet_r50_torchvision_v2": _TORCHVISION,
    "yolact_r50": _YOLACT_R50,
    "yolact_base": _YOLACT_BASE,
    "yolact_im700": together(
        _YOLACT_BASE, {"yolact": {"prior_sizes": (30.0, 61.0, 122.0, 244.0, 488.0)}, "data": {"square": 700}}
    ),
    "yolact_im400": together(
        _YOLACT_BASE, {"yolact": {"prior_sizes": (17.0, 34.0, 69.0, 139.0, 279.0)}, "data": {"square": 400}}
    ),
    "rdsnet_tiny": _TINY,
    "rdsnet_s_tiny": _TINY_DETECTOR,
    "rdsnet_fcos_tiny": together(_TINY, _FCOS),
    "yolact_tiny": together(_TINY_DETECTOR, _YOLACT),
}
