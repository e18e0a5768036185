"""All settings and their defaults, which are those of `rdsnet_r50`: the paper's RDSNet on ResNet-50."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from rdsnet.presets import PRESETS
from rdsnet.settings import Setting, read_yaml, settings


@dataclass
class ModelConfig:
    """The network (Figure 2)."""

    stream: Literal["retinanet", "yolact", "fcos"] = "retinanet"
    """object stream; the section of its name has its own settings"""
    trunk: str = "resnet50.tv_in1k"
    """any timm model with feature maps by stage"""
    pretrained: str = "imagenet"
    """trunk weights: imagenet, none, or a file (.safetensors, .pth)"""
    trunk_norm: Literal["frozen", "batch"] = "frozen"
    """batch norm of the trunk: frozen statistics, or live (for training from scratch)"""
    frozen_stages: int = 2
    """leading stages of the trunk that are not trained: 1 the stem, 2 with the first stage"""
    trunk_levels: tuple[int, ...] = (3, 4, 5)
    """levels taken from the trunk; level l has stride 2**l"""
    levels: tuple[int, ...] = (3, 4, 5, 6, 7)
    """pyramid levels of the object stream: the trunk's, then stride-2 convolutions"""
    extra_from: Literal["trunk", "pyramid"] = "trunk"
    """what the first of these convolutions reads: the last map of the trunk (C5) or of the pyramid (P5)"""
    extra_relu: bool = False
    """a ReLU between these convolutions (torchvision)"""
    top_down: Literal["nearest", "bilinear"] = "nearest"
    """how a coarser map of the pyramid is brought to the size of the next finer one"""
    pyramid_relu: bool = False
    """a ReLU after the maps of the pyramid that come from the trunk (YOLACT)"""
    channels: int = 256
    """channels of pyramid, head towers and pixel stream"""
    norm: Literal["group", "batch", "none"] = "group"
    """norm of head towers and pixel stream"""
    inclusive: bool = False
    """boxes end with their last pixel where that matters: in clipping, in resizing, in sigma (the release)"""
    masks: bool = True
    """False: the plain detector, without pixel stream, masks and refinement"""
    representation: int = 32
    """D, numbers of a representation (for foreground and for background each)"""
    assembly: Literal["correlation", "linear"] = "correlation"
    """how representations make a mask: Eq. 1, or YOLACT's linear combination (tanh coefficients, ReLU prototypes)"""
    mask_rules: Literal["rdsnet", "yolact"] = "rdsnet"
    """crop, loss and thresholding of masks: section 3.2, or YOLACT's, which crop on the grid"""
    pixel_stream: Literal["panoptic", "protonet"] = "panoptic"
    """Panoptic FPN's semantic branch, or YOLACT's on one level"""
    pixel_levels: tuple[int, ...] = (3, 4, 5)
    """pyramid levels of the pixel stream; they are merged at the finest"""
    mask_stride: int = 4
    """input pixels a cell of the mask grid"""
    align_corners: bool = False
    """corners aligned in the pixel stream's upsampling (the release's are)"""
    image_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    """RGB, 0..255"""
    image_std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    """RGB, 0..255"""


@dataclass
class RetinaNetConfig:
    """RetinaNet as object stream: anchors, three towers, focal loss."""

    tower_depth: int = 4
    """3x3 convolutions in each head tower"""
    representation_tower: bool = True
    """representations have a tower of their own; false: they read the box tower, which costs less"""
    anchor_size: float = 4.0
    """smallest anchor of a level, in strides"""
    anchor_scales: int = 3
    """anchor scales an octave"""
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """anchor shapes, height / width"""
    anchor_rounding: bool = False
    """round anchor corners to whole pixels (the release and torchvision)"""
    anchor_grid: Literal["cells", "torchvision"] = "cells"
    """anchors centred on their cells, or whole-sided ones centred at multiples of floor(input / cells)"""
    positive_iou: float = 0.5
    """anchors from this IoU on learn an object"""
    negative_iou: float = 0.4
    """anchors below this IoU learn the background"""
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    box_beta: float = 0.11
    """smooth L1 below this, 0 for L1"""


@dataclass
class YolactConfig:
    """YOLACT's detector as object stream: priors, one shared convolution, softmax with hard negatives."""

    prior_sizes: tuple[float, ...] = (24.0, 48.0, 96.0, 192.0, 384.0)
    """side of the priors of each level, pixels of the network input"""
    prior_ratios: tuple[float, ...] = (1.0, 0.5, 2.0)
    """width / height; the area stays"""
    square_priors: bool = True
    """height is set to the width, whatever the ratio: an old slip that YOLACT's weights were trained with"""
    positive_iou: float = 0.5
    """priors from this IoU on learn an object"""
    negative_iou: float = 0.4
    """priors below this IoU learn the background"""
    crowd_iou: float = 0.7
    """priors that lie in a crowd by more than this share learn nothing"""
    negative_ratio: float = 3.0
    """hardest background priors for each positive one"""


@dataclass
class FCOSConfig:
    """FCOS as object stream: one point a location, distances to the four sides, centerness."""

    tower_depth: int = 4
    """3x3 convolutions in each head tower"""
    ranges: tuple[float, ...] = (64.0, 128.0, 256.0, 512.0)
    """largest distance to a side, in pixels, that each level but the last learns"""
    centre_radius: float = 1.5
    """only points this near to the centre of an object learn it, in strides"""
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0


@dataclass
class LossConfig:
    """Eq. 8 and its parts."""

    box_weight: float = 1.0
    """lambda_r"""
    mask_weight: float = 1.0
    """lambda_m"""
    semantic_weight: float = 0.0
    """of the loss of a semantic segmentation that only training has (YOLACT); 0: none"""
    crop_expand: float = 1.5
    """ground-truth box times this is the crop of the mask loss (1: no expansion)"""
    crop_rule: Literal["centre", "truncate"] = "centre"
    """pixels of a fractional crop: those whose centre lies inside, or corners truncated (the release)"""
    ohem_ratio: float | None = 1.0
    """hardest background pixels kept for each foreground pixel; null: all"""
    max_masks: int = 100
    """mask instances an image, at most"""
    spread_masks: bool = True
    """every object gets its first mask instance before any gets its second; false: drawn at random (the release)"""
    min_mask_area: float = 0.0
    """objects whose mask is not larger (pixels) make no mask loss (the release: 100)"""


@dataclass
class DetectConfig:
    """Inference (3.4)."""

    score_threshold: float = 0.05
    pre_nms: int | None = 1000
    """anchors kept of each level, by their best class; null: all above the threshold"""
    pre_nms_pairs: bool = False
    """of these keep as many (anchor, class) pairs only (torchvision)"""
    keep_empty: bool = False
    """keep boxes that have no width or height in the image (torchvision)"""
    whole_boxes: bool = False
    """boxes are clipped after NMS and masks only, and end as whole pixels, truncated (YOLACT)"""
    nms: Literal["greedy", "fast", "traditional"] = "greedy"
    """within each class: greedy; YOLACT's fast one, where a box that was dropped still drops others; YOLACT's greedy"""
    nms_iou: float = 0.5
    max_detections: int = 100
    """objects an image, for detector and metric together"""
    crop_expand: float = 1.2
    """regressed box times this is the crop of the mask (1: no expansion)"""
    crop_rule: Literal["centre", "truncate"] = "centre"
    mask_threshold: float = 0.4
    two_steps: bool = False
    """logits reach the image through the network's size, corners aligned in the second step (the release)"""
    one_scale: bool = False
    """boxes reach the image by the one factor that its size was multiplied by, whatever rounding did (the release)"""
    refine: Literal["argmax", "mean", "direct", "off"] = "argmax"
    """boxes: MBRM's most likely pixel, its mean (sub-pixel), the mask's rectangle, or as regressed"""
    gamma: float = 0.05
    """width of MBRM's prior, times the size of the box; 0 turns refinement off"""
    prior_cut: float | None = None
    """values of MBRM's prior up to this share of its peak become 0 (the release: 0.0044); null: none"""
    keep_without_evidence: bool = True
    """an edge that the mask says nothing of keeps its regressed value; false: the prior decides (the release)"""


@dataclass
class DataConfig:
    """Where the images are, and how they are brought to the network."""

    train: str | None = None
    """COCO JSON"""
    val: str | None = None
    """COCO JSON"""
    train_images: str | None = None
    """folder; default: images/ beside the JSON, else the JSON's own folder"""
    val_images: str | None = None
    """folder; default: as for training"""
    short_side: int | None = 800
    """pixels of the shorter side; images are scaled to it, aspect kept (null: by `scale`)"""
    scale: float = 1.0
    """with short_side null: images get their own size times this, which suits images of one physical scale"""
    long_side: int = 1333
    """pixels of the longer side, at most"""
    square: int | None = None
    """images are squashed to this many pixels on both sides instead, and not padded (YOLACT)"""
    antialias: bool = True
    """images that shrink are smoothed first"""
    train_short_side: tuple[int, int] | None = None
    """training: shorter side drawn between these; default: short_side"""
    train_crop: int | None = None
    """training: random square window of this many network pixels (images are padded to it); default: none"""
    train_zoom: tuple[float, float] | None = None
    """training: what is seen has the image's sides times a number between these, drawn log-uniformly: below 1 a random
    window of the image, above 1 the image at a random place on a grey canvas"""
    train_aspect: float = 1.0
    """training: what is seen has the image's width / height times a number between 1 / this and this, likewise"""
    horizontal_flip: float = 0.5
    """probability"""
    vertical_flip: float = 0.0
    """probability"""
    rotate90: bool = False
    """rotations by multiples of 90 degrees"""
    colour: float = 0.0
    """probability of a change of brightness, contrast, saturation and hue"""
    workers: int = 2
    """processes that load images"""


@dataclass
class TrainConfig:
    """The recipe (4.1)."""

    epochs: int = 12
    max_steps: int | None = None
    """optimizer steps in place of epochs"""
    batch_size: int = 8
    """images a step on each device"""
    accumulate: int = 1
    """batches a step"""
    checkpoint_activations: bool = False
    """recompute the trunk's stages in the backward pass: less memory, about a quarter more time for the trunk"""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.005
    """at 8 images a step; scaled linearly with images a step"""
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: Literal["step", "cosine"] = "step"
    """divide by 10 at the milestones, or cosine to zero"""
    milestones: tuple[float, ...] = (2 / 3, 11 / 12)
    """shares of the training: after 8 and 11 of 12 epochs"""
    warmup_steps: int = 500
    clip_norm: float = 35.0
    """largest norm of the gradient"""
    ema: float = 0.0
    """the weights that are kept are a moving average of those of the steps, which decays by this a step; 0: the last"""
    precision: Literal["32", "bf16", "16"] = "32"
    devices: int = 1
    nodes: int = 1
    val_epochs: int = 1
    """epochs between validations"""
    checkpoint_steps: int = 500
    """steps between checkpoints within an epoch"""


@dataclass
class Config:
    """Everything that a run needs, and that is stored with it."""

    model: ModelConfig = field(default_factory=ModelConfig)
    retinanet: RetinaNetConfig = field(default_factory=RetinaNetConfig)
    yolact: YolactConfig = field(default_factory=YolactConfig)
    fcos: FCOSConfig = field(default_factory=FCOSConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    detect: DetectConfig = field(default_factory=DetectConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    seed: int = 0
    """of everything random"""


SETTINGS: dict[str, Setting] = settings(Config)
"""Every setting by its dotted name, as on the command line."""


def get_config(preset: str, changes: Mapping[str, Any] | None = None) -> Config:
    """The configuration of a preset, with changes over it.

    Args:
        preset: one of `PRESETS`.
        changes: nested mapping such as `{"train": {"epochs": 2}}`.

    Raises:
        ValueError: unknown preset (the valid names are listed), unknown setting (named), or a value out of range.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; the presets are {', '.join(PRESETS)}")
    config = Config()
    _update(config, PRESETS[preset], "")
    _update(config, changes or {}, "")
    validate(config)
    return config


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """A configuration with changes over it; errors as of `get_config`."""
    config = copy.deepcopy(config)
    _update(config, changes, "")
    for name, value in flat_settings(config).items():
        SETTINGS[name].read(value)
    validate(config)
    return config


def config_from_file(path: Path, base: Config | None = None) -> Config:
    """The settings of a YAML file over others (default: the defaults); errors name the file."""
    try:
        return changed(base or Config(), read_yaml(path.read_text(encoding="utf-8")) or {})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """The inverse of `config_to_dict`."""
    config = Config()
    _update(config, values, "")
    validate(config)
    return config


def config_to_dict(config: Config) -> dict[str, Any]:
    return asdict(config)


_COUNTS = """model.channels model.representation model.mask_stride retinanet.tower_depth retinanet.anchor_scales
    fcos.tower_depth loss.max_masks detect.pre_nms detect.max_detections data.short_side data.long_side
    data.square data.train_crop data.train_aspect train.epochs train.max_steps train.batch_size train.accumulate
    train.devices train.nodes train.val_epochs train.checkpoint_steps"""
_AMOUNTS = """model.frozen_stages retinanet.box_beta yolact.negative_ratio fcos.centre_radius loss.box_weight
    loss.mask_weight loss.semantic_weight loss.ohem_ratio loss.min_mask_area detect.gamma data.workers train.lr
    train.weight_decay train.warmup_steps train.clip_norm seed"""
_SHARES = """retinanet.focal_alpha retinanet.positive_iou retinanet.negative_iou yolact.positive_iou
    yolact.negative_iou yolact.crowd_iou fcos.focal_alpha detect.score_threshold detect.nms_iou detect.mask_threshold
    data.horizontal_flip data.vertical_flip data.colour train.momentum train.ema"""
_RANGES = {
    **dict.fromkeys(_COUNTS.split(), (1, math.inf)),
    **dict.fromkeys(_AMOUNTS.split(), (0, math.inf)),
    **dict.fromkeys(_SHARES.split(), (0, 1)),
    "data.scale": (0.1, 10),
}


def validate(config: Config) -> None:
    """Raise a ValueError that names every number out of its range and every contradiction."""
    values = flat_settings(config)
    wrong = [
        f"{name} is {values[name]}, expected " + (f"{low} or more" if high == math.inf else f"{low} to {high}")
        for name, (low, high) in _RANGES.items()
        if values[name] is not None and not low <= values[name] <= high
    ]
    data = config.data
    if data.train_zoom is not None and not 0.1 <= data.train_zoom[0] <= data.train_zoom[1] <= 10:
        wrong.append(f"data.train_zoom is {data.train_zoom}, expected two numbers of 0.1 to 10, the smaller first")
    if data.square is not None and not (data.train_crop is None and data.train_short_side is None):
        wrong.append("data.square gives every image one size: data.train_crop and data.train_short_side must be null")
    if not all(0 <= share <= 1 for share in config.train.milestones):
        wrong.append(f"train.milestones is {config.train.milestones}, expected shares of the training, 0 to 1")
    if wrong:
        raise ValueError("; ".join(wrong))


def flat_settings(config: Config) -> dict[str, Any]:
    """Every setting by its dotted name, as on the command line."""

    def flatten(node: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for key, value in node.items():
            flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
        return flat

    return flatten(asdict(config), "")


def _update(node: Any, changes: Mapping[str, Any], path: str) -> None:
    valid = [f.name for f in fields(node)]
    for key, value in changes.items():
        if key not in valid:
            raise ValueError(f"unknown setting {path + key!r}; there are {', '.join(path + v for v in valid)}")
        if is_dataclass(getattr(node, key)):
            if not isinstance(value, Mapping):
                raise ValueError(f"expected settings under {path + key!r}, got {value!r}")
            _update(getattr(node, key), value, f"{path}{key}.")
        else:
            # JSON and YAML have lists where the settings are tuples
            setattr(node, key, tuple(value) if isinstance(value, list) else value)
