"""All settings and their defaults, which are those of `rdsnet_r50`: the paper's RDSNet on ResNet-50."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from rdsnet.presets import PRESETS
from rdsnet.settings import Listed, Range, Rules, Setting, over, read_yaml, settings

Count = Annotated[int, Range(1)]
Whole = Annotated[int, Range(0)]
Amount = Annotated[float, Range(0)]
Positive = Annotated[float, Range(above=0)]
Growth = Annotated[float, Range(1)]
Share = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, below=1)]
Zoom = Annotated[float, Range(0.1, 10)]
Grey = Annotated[float, Range(0, 255)]
Levels = Annotated[tuple[Annotated[int, Range(1, 10)], ...], Listed(filled=True, rising=True)]
Shapes = Annotated[tuple[Positive, ...], Listed(filled=True)]


@dataclass
class ModelConfig:
    """The network (Figure 2)."""

    stream: str = "retinanet"
    """object stream; the section of its name has its own settings"""
    trunk: str = "resnet50.tv_in1k"
    """any timm model with feature maps by stage"""
    pretrained: str = "imagenet"
    """trunk weights: imagenet, none, or a file (.safetensors, .pth)"""
    trunk_norm: Literal["frozen", "batch"] = "frozen"
    """batch norm of the trunk: frozen statistics, or live (for training from scratch)"""
    frozen_stages: Whole = 2
    """leading stages of the trunk that are not trained: 1 the stem, 2 with the first stage"""
    trunk_levels: Levels = (3, 4, 5)
    """levels taken from the trunk; level l has stride 2**l"""
    levels: Levels = (3, 4, 5, 6, 7)
    """pyramid levels of the object stream: the trunk's, then stride-2 convolutions"""
    extra_from: Literal["trunk", "pyramid"] = "trunk"
    """what the first of these convolutions reads: the last map of the trunk (C5) or of the pyramid (P5)"""
    extra_relu: bool = False
    """a ReLU between these convolutions (torchvision)"""
    top_down: Literal["nearest", "bilinear"] = "nearest"
    """how a coarser map of the pyramid is brought to the size of the next finer one"""
    pyramid_relu: bool = False
    """a ReLU after the maps of the pyramid that come from the trunk (YOLACT)"""
    channels: Count = 256
    """channels of pyramid, head towers and pixel stream"""
    norm: Literal["group", "batch", "none"] = "group"
    """norm of head towers and pixel stream"""
    masks: bool = True
    """False: the plain detector, without pixel stream, masks and refinement"""
    representation: Count = 32
    """D, numbers of a representation (for foreground and for background each)"""
    assembly: Literal["correlation", "linear"] = "correlation"
    """how representations make a mask: Eq. 1, or YOLACT's linear combination (tanh coefficients, ReLU prototypes)"""
    mask_rules: Literal["rdsnet", "yolact"] = "rdsnet"
    """crop, loss and thresholding of masks: section 3.2, or YOLACT's, which crop on the grid"""
    pixel_stream: Literal["panoptic", "protonet"] = "panoptic"
    """Panoptic FPN's semantic branch, or YOLACT's on one level"""
    pixel_levels: Levels = (3, 4, 5)
    """pyramid levels of the pixel stream; they are merged at the finest"""
    mask_stride: Count = 4
    """input pixels a cell of the mask grid"""
    image_mean: tuple[Grey, Grey, Grey] = (123.675, 116.28, 103.53)
    """RGB, 0..255"""
    image_std: tuple[Positive, Positive, Positive] = (58.395, 57.12, 57.375)
    """RGB, 0..255"""


@dataclass
class RetinaNetConfig:
    """RetinaNet as object stream: anchors, three towers, focal loss."""

    tower_depth: Count = 4
    """3x3 convolutions in each head tower"""
    representation_tower: bool = True
    """representations have a tower of their own; false: they read the box tower, which costs less"""
    anchor_size: Positive = 4.0
    """smallest anchor of a level, in strides"""
    anchor_scales: Count = 3
    """anchor scales an octave"""
    anchor_ratios: Shapes = (0.5, 1.0, 2.0)
    """anchor shapes, height / width"""
    positive_iou: Share = 0.5
    """anchors from this IoU on learn an object"""
    negative_iou: Share = 0.4
    """anchors below this IoU learn the background"""
    focal_alpha: Share = 0.25
    focal_gamma: Amount = 2.0
    box_beta: Amount = 0.11
    """smooth L1 below this, 0 for L1"""


@dataclass
class YolactConfig:
    """YOLACT's detector as object stream: priors, one shared convolution, softmax with hard negatives."""

    prior_sizes: Shapes = (24.0, 48.0, 96.0, 192.0, 384.0)
    """side of the priors of each level, pixels of the network input"""
    prior_ratios: Shapes = (1.0, 0.5, 2.0)
    """width / height; the area stays"""
    positive_iou: Share = 0.5
    """priors from this IoU on learn an object"""
    negative_iou: Share = 0.4
    """priors below this IoU learn the background"""
    crowd_iou: Share = 0.7
    """priors that lie in a crowd by more than this share learn nothing"""
    negative_ratio: Amount = 3.0
    """hardest background priors for each positive one"""


@dataclass
class FCOSConfig:
    """FCOS as object stream: one point a location, distances to the four sides, centerness."""

    tower_depth: Count = 4
    """3x3 convolutions in each head tower"""
    ranges: Annotated[tuple[Positive, ...], Listed(rising=True)] = (64.0, 128.0, 256.0, 512.0)
    """largest distance to a side, in pixels, that each level but the last learns"""
    centre_radius: Positive = 1.5
    """only points this near to the centre of an object learn it, in strides"""
    focal_alpha: Share = 0.25
    focal_gamma: Amount = 2.0


@dataclass
class LossConfig:
    """Eq. 8 and its parts."""

    box_weight: Amount = 1.0
    """lambda_r"""
    mask_weight: Amount = 1.0
    """lambda_m"""
    semantic_weight: Amount = 0.0
    """of the loss of a semantic segmentation that only training has (YOLACT); 0: none"""
    crop_expand: Growth = 1.5
    """ground-truth box times this is the crop of the mask loss (1: no expansion)"""
    ohem_ratio: Amount | None = 1.0
    """hardest background pixels kept for each foreground pixel; null: all"""
    max_masks: Count = 100
    """mask instances an image, at most"""


@dataclass
class DetectConfig:
    """Inference (3.4)."""

    score_threshold: Share = 0.05
    pre_nms: Count | None = 1000
    """anchors kept of each level, by their best class; null: all above the threshold"""
    nms: Literal["greedy", "fast", "traditional"] = "greedy"
    """within each class: greedy; YOLACT's fast one, where a box that was dropped still drops others; YOLACT's greedy"""
    nms_iou: Share = 0.5
    max_detections: Count = 100
    """objects an image, for detector and metric together"""
    crop_expand: Growth = 1.2
    """regressed box times this is the crop of the mask (1: no expansion)"""
    mask_threshold: Annotated[float, Range(above=0, below=1)] = 0.4
    refine: Literal["argmax", "mean", "direct", "off"] = "argmax"
    """boxes: MBRM's most likely pixel, its mean (sub-pixel), the mask's rectangle, or as regressed"""
    gamma: Amount = 0.05
    """width of MBRM's prior, times the size of the box; 0 turns refinement off"""


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
    short_side: Count | None = 800
    """pixels of the shorter side; images are scaled to it, aspect kept (null: by `scale`)"""
    scale: Zoom = 1.0
    """with short_side null: images get their own size times this, which suits images of one physical scale"""
    long_side: Count = 1333
    """pixels of the longer side, at most"""
    square: Count | None = None
    """images are squashed to this many pixels on both sides instead, and not padded (YOLACT)"""
    antialias: bool = True
    """images that shrink are smoothed first"""
    train_short_side: Annotated[tuple[Count, Count], Listed(rising=True)] | None = None
    """training: shorter side drawn between these; default: short_side"""
    train_crop: Count | None = None
    """training: random square window of this many network pixels (images are padded to it); default: none"""
    train_zoom: Annotated[tuple[Zoom, Zoom], Listed(rising=True)] | None = None
    """training: what is seen has the image's sides times a number between these, drawn log-uniformly: below 1 a random
    window of the image, above 1 the image at a random place on a grey canvas"""
    train_aspect: Growth = 1.0
    """training: what is seen has the image's width / height times a number between 1 / this and this, likewise"""
    horizontal_flip: Share = 0.5
    """probability"""
    vertical_flip: Share = 0.0
    """probability"""
    rotate90: bool = False
    """rotations by multiples of 90 degrees"""
    colour: Share = 0.0
    """probability of a change of brightness, contrast, saturation and hue"""
    workers: Whole = 2
    """processes that load images"""


Logger = Literal["csv", "tensorboard", "wandb", "mlflow"]


@dataclass
class TrainConfig:
    """The recipe (4.1)."""

    epochs: Count = 12
    max_steps: Count | None = None
    """optimizer steps in place of epochs"""
    batch_size: Count = 8
    """images a step on each device"""
    accumulate: Count = 1
    """batches a step"""
    checkpoint_activations: bool = False
    """recompute the trunk's stages in the backward pass: less memory, about a quarter more time for the trunk"""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: Amount = 0.005
    """at 8 images a step; scaled linearly with images a step"""
    momentum: Decay = 0.9
    weight_decay: Amount = 1e-4
    schedule: Literal["step", "cosine"] = "step"
    """divide by 10 at the milestones, or cosine to zero"""
    milestones: tuple[Share, ...] = (2 / 3, 11 / 12)
    """shares of the training: after 8 and 11 of 12 epochs"""
    warmup_steps: Whole = 500
    clip_norm: Positive = 35.0
    """largest norm of the gradient"""
    ema: Decay = 0.0
    """the weights that are kept are a moving average of those of the steps, which decays by this a step; 0: the last"""
    precision: Literal["auto", "32", "bf16", "bf16-forced", "16"] = "32"
    """auto: bf16 where the processor or GPU has instructions for it; bf16-forced: anywhere"""
    logger: tuple[Logger, ...] = ("csv", "tensorboard")
    """where losses and metrics are logged"""
    devices: Count = 1
    nodes: Count = 1
    val_epochs: Count = 1
    """epochs between validations"""
    checkpoint_steps: Count = 500
    """steps between checkpoints within an epoch"""


@dataclass
class Config:
    """Everything that a run needs, and that is stored with it."""

    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    detect: DetectConfig = field(default_factory=DetectConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    rules: Rules = field(default_factory=Rules)
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    """of everything random"""

    streams: dict[str, Any] = field(default_factory=lambda: {name: section() for name, section in STREAMS.items()})

    def __getattr__(self, name: str) -> Any:
        """The settings of an object stream, by its name."""
        streams = self.__dict__.get("streams", {})
        if name not in streams:
            raise AttributeError(f"there is no setting and no stream {name!r}")
        return streams[name]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in STREAMS:
            super().__setattr__("streams", {**self.streams, name: value})  # copies may share the former
        else:
            super().__setattr__(name, value)


STREAMS: dict[str, type] = {}
"""The section of settings of each object stream, by its name: dataclasses whose fields are the stream's arguments."""

SETTINGS: dict[str, Setting] = dict(settings(Config))
"""Every setting by its dotted name, as on the command line."""


def register_settings(name: str, section: type) -> None:
    """Enter an object stream's section of settings; its class is entered in `rdsnet.model.build.STREAMS`."""
    STREAMS[name] = section
    SETTINGS.update(settings(section, f"{name}."))


for _name, _section in (("retinanet", RetinaNetConfig), ("yolact", YolactConfig), ("fcos", FCOSConfig)):
    register_settings(_name, _section)


def sections() -> dict[str, type]:
    """The sections of settings by their names, those of the streams among them."""
    own = {name: kind for name, kind in get_type_hints(Config).items() if isinstance(kind, type) and is_dataclass(kind)}
    return {"model": own.pop("model"), **STREAMS, **own}


VERSION = 2
"""Of the settings' names, stored with them."""

RENAMED = {
    "model.inclusive": "rules.inclusive",
    "model.align_corners": "rules.align_corners",
    "retinanet.anchor_rounding": "rules.anchor_rounding",
    "retinanet.anchor_grid": "rules.anchor_grid",
    "yolact.square_priors": "rules.square_priors",
    "loss.spread_masks": "rules.spread_masks",
    "loss.min_mask_area": "rules.min_mask_area",
    "loss.crop_rule": "rules.crop_rule",
    "detect.crop_rule": "rules.crop_rule",
    "detect.two_steps": "rules.two_steps",
    "detect.one_scale": "rules.one_scale",
    "detect.pre_nms_pairs": "rules.pre_nms_pairs",
    "detect.keep_empty": "rules.keep_empty",
    "detect.whole_boxes": "rules.whole_boxes",
    "detect.prior_cut": "rules.prior_cut",
    "detect.keep_without_evidence": "rules.keep_without_evidence",
}
"""What settings of version 1, which stored none, are called now."""


def get_config(preset: str, changes: Mapping[str, Any] | None = None) -> Config:
    """The configuration of a preset, with changes over it.

    Args:
        preset: one of `PRESETS`.
        changes: nested mapping such as `{"train": {"epochs": 2}}`.

    Raises:
        ValueError: unknown preset (the valid names are listed), or a setting that is unknown, of a wrong type or out of
            range (named).
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; the presets are {', '.join(PRESETS)}")
    return changed(changed(Config(), {"version": VERSION, **PRESETS[preset]}), changes or {})


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """A configuration with changes over it, which may have the names of an older version; errors as of `get_config`."""
    return validate(_over(config, _renamed(changes)))


def _over(config: Config, changes: Mapping[str, Any]) -> Config:
    """A copy with changes over it, which may be those of streams."""
    if not isinstance(changes, Mapping):
        return over(config, changes)  # which says what was expected
    wrong, streams = [], {name: section() for name, section in STREAMS.items()} | config.streams
    for name in STREAMS.keys() & changes.keys():
        try:
            streams[name] = over(streams[name], changes[name], f"{name}.")
        except ValueError as error:
            wrong.append(str(error))
    try:
        config = over(config, {name: value for name, value in changes.items() if name not in STREAMS})
    except ValueError as error:
        wrong.append(str(error))
    if wrong:
        raise ValueError("; ".join(wrong))
    return replace(config, streams=streams)


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """The inverse of `config_to_dict`, also of an older version's; what is missing has its default."""
    return changed(Config(), values)


def config_from_file(path: Path, base: Config | None = None) -> Config:
    """The settings of a YAML file over others (default: the defaults); errors name the file."""
    try:
        return changed(base or Config(), read_yaml(path.read_text(encoding="utf-8")) or {})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_config(run: Path) -> Config:
    """The configuration stored in a run folder.

    Raises:
        FileNotFoundError: it is none.
        ValueError: a setting in it is unknown or wrong (named).
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{run} holds no run to resume: {path.name} is missing")
    return config_from_file(path)


def config_to_dict(config: Config) -> dict[str, Any]:
    """What is stored of a configuration: all but the sections of the object streams that it does not use."""
    unused = STREAMS.keys() - {config.model.stream}
    return {"version": VERSION} | {name: value for name, value in _sections(config).items() if name not in unused}


def flat_settings(config: Config) -> dict[str, Any]:
    """The value of every setting by its dotted name."""
    return flatten(_sections(config))


def _sections(config: Config) -> dict[str, Any]:
    """Every setting, those of all streams in sections of their own."""
    values = asdict(config)
    return values | values.pop("streams")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def validate(config: Config) -> Config:
    """A configuration whose values are what its fields hold.

    Raises:
        ValueError: names every setting of a wrong type or out of range, or else every contradiction.
    """
    config = _over(config, _sections(config))
    wrong = []
    data, model = config.data, config.model
    if model.stream not in STREAMS:
        wrong.append(f"model.stream is {model.stream!r}, expected one of {', '.join(STREAMS)}")
    if data.square is not None and not (data.train_crop is None and data.train_short_side is None):
        wrong.append("data.square gives every image one size: data.train_crop and data.train_short_side must be null")
    if model.norm == "group" and model.channels % 32:
        wrong.append(f"model.channels is {model.channels}, expected a multiple of 32 where model.norm is group")
    for name, stream in (("retinanet", config.retinanet), ("yolact", config.yolact)):
        if stream.negative_iou > stream.positive_iou:
            limits = f"{name}.negative_iou is {stream.negative_iou} and {name}.positive_iou {stream.positive_iou}"
            wrong.append(f"{limits}, expected the first to be no larger")
    if wrong:
        raise ValueError("; ".join(wrong))
    return config


def _renamed(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Stored settings, or changes, of any version under the names of this one.

    Raises:
        ValueError: the version is unknown, or the two rules of cropping that are one by now differ.
    """
    if not isinstance(values, Mapping):
        return values  # which the check refuses
    version = Setting("version", Annotated[int, Range(1, VERSION)]).read(values.get("version", 1))
    kept = {name: value for name, value in values.items() if name != "version"}
    if version == VERSION:
        return kept
    sections = {name: dict(content) for name, content in kept.items() if isinstance(content, Mapping)}
    if sections.get("model", {}).get("stream", "yolact") != "yolact":
        sections.get("yolact", {}).pop("square_priors", None)  # was true by default, also where nothing reads it
    first, second = (sections.get(name, {}).get("crop_rule") for name in ("loss", "detect"))
    if first != second:
        raise ValueError("loss.crop_rule and detect.crop_rule are one setting now, rules.crop_rule, and cannot differ")
    rules = {}
    for old, new in RENAMED.items():
        section, name = old.split(".")
        if name in sections.get(section, {}):
            rules[new.split(".")[1]] = sections[section].pop(name)
    if rules and isinstance(kept.get("rules", {}), Mapping):
        sections["rules"] = rules | sections.get("rules", {})
    return kept | sections
