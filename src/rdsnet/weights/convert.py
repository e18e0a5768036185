"""Checkpoints of other projects, as ours: the authors' release (mmdetection 1), torchvision's RetinaNet, and YOLACT.

A key map says, for our names, what the source calls them. A key of the source that is missing, left over or of another
shape is an error that names it: a conversion is whole or is refused.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from rdsnet.config import Config, get_config
from rdsnet.model.build import build_model
from rdsnet.model.rdsnet import RDSNet
from rdsnet.weights.checkpoint import Checkpoint, check_weights, save

Source = Literal["release", "torchvision", "yolact"]

KeyMap = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]
"""(pattern of the beginning of our name, what it is in the source); the first that matches counts"""

OtherForms = Mapping[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]]
"""our name -> the shape that the tensor has in the source, and how it becomes ours"""

COCO_NAMES = tuple(
    """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
    parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
    handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
    surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
    broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors,
    teddy bear, hair drier, toothbrush""".replace("\n    ", " ").split(", ")
)

_UNUSED_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)

COCO_IDS = tuple(i for i in range(1, 91) if i not in _UNUSED_IDS)

_TOWERS = {"class": "cls", "box": "reg", "representation": "rep"}

RELEASE_KEYS: KeyMap = (
    (r"backbone\.trunk\.", "backbone."),
    (r"backbone\.fpn\.inner_blocks\.(\d)\.0\.", r"neck.lateral_convs.\1.conv."),
    (r"backbone\.fpn\.layer_blocks\.(\d)\.0\.", r"neck.fpn_convs.\1.conv."),
    (r"backbone\.fpn\.extra_blocks\.convs\.(\d)\.", lambda m: f"neck.fpn_convs.{3 + int(m[1])}.conv."),
    (r"object_stream\.([a-z]+)_tower\.(\d)\.0\.", lambda m: f"bbox_head.{_TOWERS[m[1]]}_convs.{m[2]}.conv."),
    (r"object_stream\.([a-z]+)_tower\.(\d)\.1\.", lambda m: f"bbox_head.{_TOWERS[m[1]]}_convs.{m[2]}.gn."),
    (r"object_stream\.classify\.", "bbox_head.retina_cls."),
    (r"object_stream\.regress\.", "bbox_head.retina_reg."),
    (r"object_stream\.represent\.", "bbox_head.retina_rep."),
    # odd positions of the release's branches are upsamplings
    (r"pixel_stream\.branches\.(\d)\.(\d)\.0\.", lambda m: f"mask_head.lateral_convs.{m[1]}.{2 * int(m[2])}.conv."),
    (r"pixel_stream\.branches\.(\d)\.(\d)\.1\.", lambda m: f"mask_head.lateral_convs.{m[1]}.{2 * int(m[2])}.gn."),
    (r"pixel_stream\.merge\.0\.", "mask_head.final_convs.0.0.conv."),
    (r"pixel_stream\.merge\.1\.", "mask_head.final_convs.0.0.gn."),
    (r"pixel_stream\.project\.", "mask_head.conv_reps."),
    (r"mbrm\.", "mbrm."),
)

_RELEASE_FORMS: OtherForms = {"mbrm.weight": ((1, 1, 9), Tensor.flatten), "mbrm.bias": ((1,), Tensor.squeeze)}

_BRANCHES = {"class": "classification", "box": "regression"}

# Our other parameters, of representation branch, pixel stream and MBRM, have no counterpart
TORCHVISION_KEYS: KeyMap = (
    (r"backbone\.trunk\.", "backbone.body."),
    (r"backbone\.fpn\.extra_blocks\.convs\.(\d)\.", lambda m: f"backbone.fpn.extra_blocks.p{6 + int(m[1])}."),
    (r"backbone\.fpn\.", "backbone.fpn."),
    (r"object_stream\.(class|box)_tower\.", lambda m: f"head.{_BRANCHES[m[1]]}_head.conv."),
    (r"object_stream\.classify\.", "head.classification_head.cls_logits."),
    (r"object_stream\.regress\.", "head.regression_head.bbox_reg."),
)

# as earlier versions of torchvision named them, and its published v1 weights still do
OLD_TORCHVISION_KEYS: KeyMap = (
    (r"backbone\.fpn\.(inner|layer)_blocks\.(\d)\.0\.", r"backbone.fpn.\1_blocks.\2."),
    (
        r"object_stream\.(class|box)_tower\.(\d)\.0\.",
        lambda m: f"head.{_BRANCHES[m[1]]}_head.conv.{2 * int(m[2])}.",
    ),
    *TORCHVISION_KEYS,
)

# Its pyramid's lists begin with the coarsest level; odd positions of its protonet are activations, 6 the upsampling
YOLACT_KEYS: KeyMap = (
    (r"backbone\.trunk\.layer(\d)\.", lambda m: f"backbone.layers.{int(m[1]) - 1}."),
    (r"backbone\.trunk\.", "backbone."),
    (r"backbone\.fpn\.inner_blocks\.(\d)\.0\.", lambda m: f"fpn.lat_layers.{2 - int(m[1])}."),
    (r"backbone\.fpn\.layer_blocks\.(\d)\.0\.", lambda m: f"fpn.pred_layers.{2 - int(m[1])}."),
    (r"backbone\.fpn\.extra_blocks\.convs\.(\d)\.", r"fpn.downsample_layers.\1."),
    (r"object_stream\.shared\.0\.", "prediction_layers.0.upfeature.0."),
    (r"object_stream\.classify\.", "prediction_layers.0.conf_layer."),
    (r"object_stream\.regress\.", "prediction_layers.0.bbox_layer."),
    (r"object_stream\.represent\.", "prediction_layers.0.mask_layer."),
    (r"pixel_stream\.before\.(\d)\.0\.", lambda m: f"proto_net.{2 * int(m[1])}."),
    (r"pixel_stream\.after\.0\.", "proto_net.8."),
    (r"pixel_stream\.project\.", "proto_net.10."),
    (r"semantic\.classify\.", "semantic_seg_conv."),
)

# Leftovers of earlier versions in its published files, which its own loading drops too
_YOLACT_LEFTOVERS = r"backbone\.layer\d\.|fpn\.downsample_layers\.[2-9]\."

# Sizes of input and priors, which the weights do not show: the published files' names begin so
_YOLACT_SIZES = ("yolact_im700", "yolact_im400")

# Parts that a checkpoint has whole or not at all: batch norms that were frozen do not count batches; the release's
# published files have no MBRM, whose numbers stand in its code: they are our defaults
_OPTIONAL = (r"\.num_batches_tracked$", r"^mbrm\.")

# SHA-256 of torchvision's published v1 weights begins so; they were trained, and are run, with batch norm's epsilon 0
_PUBLISHED_V1 = "eeacb38b"


def convert(source: Source, file: Path, output: Path, preset: str | None = None) -> Checkpoint:
    """Convert a checkpoint file to weights that `rdsnet.load` opens.

    Args:
        source: "release": the authors' RDSNet on ResNet-50 or 101; "torchvision": `retinanet_resnet50_fpn` or `_v2`
            with COCO's 91 rows of classes; "yolact": YOLACT on ResNet-50 or 101.
        file: of `torch.save`, a dict of tensors or one that holds it as "state_dict" or "model". Whatever else
            it holds (optimizer, schedule) is dropped. It is read without running what it contains.
        output: .safetensors file, replaced whole or not at all.
        preset: of "yolact" only: settings of the weights; default: yolact_im700 or yolact_im400 where the file's name
            begins so, else yolact_base on ResNet-101 and yolact_r50 on ResNet-50.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unsafe, damaged, or keys that do not fit; says which.
    """
    if preset is not None and source != "yolact":
        raise ValueError(f"a checkpoint of {source} says itself which preset it is; got {preset!r}")
    state = read_state(file)
    if source == "release":
        model, checkpoint = from_release(state, str(file))
    elif source == "torchvision":
        published = hashlib.sha256(file.read_bytes()).hexdigest().startswith(_PUBLISHED_V1)
        model, checkpoint = from_torchvision(state, str(file), norm_eps=0.0 if published else 1e-5)
    elif source == "yolact":
        named = next((size for size in _YOLACT_SIZES if file.name.startswith(size)), None)
        model, checkpoint = from_yolact(state, str(file), preset=preset or named)
    else:
        raise ValueError(f"unknown source {source!r}; valid are release, torchvision, yolact")
    output.parent.mkdir(parents=True, exist_ok=True)
    save(output, model, checkpoint.config, checkpoint.class_names, checkpoint.category_ids)
    return checkpoint


def from_release(state: Mapping[str, Tensor], name: str = "checkpoint") -> tuple[RDSNet, Checkpoint]:
    """The release's network with trained weights, in evaluation mode, and what is stored with them.

    Args:
        state: by the release's names, all of them; as published, MBRM's may be absent.
        name: of the state in messages.

    Raises:
        ValueError: every key that is missing, left over or of another shape is named.
    """
    deep = any(key.startswith("backbone.layer3.22.") for key in state)
    config = _settings("rdsnet_r101_release" if deep else "rdsnet_r50_release")
    return _filled(config, state, RELEASE_KEYS, name, _RELEASE_FORMS)


def from_torchvision(
    state: Mapping[str, Tensor], name: str = "checkpoint", *, norm_eps: float = 1e-5
) -> tuple[RDSNet, Checkpoint]:
    """An RDSNet whose trunk, pyramid, class and box branches are torchvision's detector, in evaluation mode.

    Representation branch and pixel stream are fresh (the same ones each time) until they are trained, so the stored
    configuration leaves refinement off: boxes are torchvision's. Of the 91 rows of classes the 80 in use are kept.

    Args:
        state, name: as of `from_release`, by torchvision's names, old or new.
        norm_eps: epsilon of the batch norms that the weights were trained with.

    Raises:
        ValueError: as `from_release`.
    """
    group_norm = any(key.startswith("head.classification_head.conv.0.1.") for key in state)
    old_names = any(re.match(r"backbone\.fpn\.inner_blocks\.\d\.(weight|bias)$", key) for key in state)
    preset = "rdsnet_r50_torchvision_v2" if group_norm else "rdsnet_r50_torchvision"
    config = _settings(preset, detect={"refine": "off"})
    rows = 9 * (1 + max(COCO_IDS))
    forms: OtherForms = {
        "object_stream.classify.weight": ((rows, 256, 3, 3), _coco_rows),
        "object_stream.classify.bias": ((rows,), _coco_rows),
    }
    keys = OLD_TORCHVISION_KEYS if old_names else TORCHVISION_KEYS
    model, checkpoint = _filled(config, state, keys, name, forms)
    for module in model.backbone.trunk.modules():
        if isinstance(module, nn.BatchNorm2d):  # ours has an epsilon of 1e-5: the scale makes up for the difference
            variance = cast(Tensor, module.running_var)
            module.weight.data *= ((variance + module.eps) / (variance + norm_eps)).sqrt()
    return model, checkpoint


def from_yolact(
    state: Mapping[str, Tensor], name: str = "checkpoint", *, preset: str | None = None
) -> tuple[RDSNet, Checkpoint]:
    """YOLACT with trained weights, in evaluation mode, and what is stored with them.

    Args:
        state, name: as of `from_release`, by YOLACT's names.
        preset: settings of the weights; default: yolact_base on ResNet-101, yolact_r50 on ResNet-50.

    Raises:
        ValueError: as `from_release`.
    """
    state = {key: values for key, values in state.items() if not re.match(_YOLACT_LEFTOVERS, key)}
    deep = any(key.startswith("backbone.layers.2.22.") for key in state)
    config = _settings(preset or ("yolact_base" if deep else "yolact_r50"))
    return _filled(config, state, YOLACT_KEYS, name, {})


def source_names(model: nn.Module, keys: KeyMap) -> dict[str, str]:
    """Our name -> the source's, for everything of a model's state that the source has."""
    names = {}
    for ours in model.state_dict():
        for pattern, replacement in keys:
            theirs, count = re.subn(f"^{pattern}", replacement, ours)
            if count:
                names[ours] = theirs
                break
    return names


def read_state(file: Path) -> dict[str, Tensor]:
    """The tensors of a `torch.save` file, by name; nothing in it is executed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not what `torch.save` writes, or holds more than tensors and plain values.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no such file: {file}")
    try:
        # files of torch before 1.6 are no zip archives and cannot be mapped
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # an unsafe or damaged file raises errors of many kinds
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"unsafe, it would call {unsafe[1]}" if unsafe else f"cannot be read ({type(error).__name__})"
        raise ValueError(f"{file} is refused: {reason}; expected tensors and plain values only") from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{file}: expected a dict of tensors, got {type(content).__name__}")
    for key, value in content.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{file}: expected a tensor as {key!r}, got {type(value).__name__}")
    return dict(content)


def _settings(preset: str, **changes: dict[str, Any]) -> Config:
    return get_config(preset, {"model": {"pretrained": "none"}, **changes})


def _filled(
    config: Config, state: Mapping[str, Tensor], keys: KeyMap, name: str, forms: OtherForms
) -> tuple[RDSNet, Checkpoint]:
    """The network of these settings with the weights of a state; what the state lacks is fresh, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = build_model(config, num_classes=len(COCO_NAMES))
    own = model.state_dict()
    names = source_names(model, keys)
    for optional in _OPTIONAL:
        if not any(re.search(optional, key) for key in state):
            names = {ours: theirs for ours, theirs in names.items() if not re.search(optional, theirs)}
    shapes = {ours: forms[ours][0] if ours in forms else own[ours].shape for ours in names}
    check_weights(state, {names[ours]: torch.empty(shape, device="meta") for ours, shape in shapes.items()}, name)
    for ours, theirs in names.items():
        own[ours].copy_(forms[ours][1](state[theirs]) if ours in forms else state[theirs])
    return model.eval(), Checkpoint(config, list(COCO_NAMES), list(COCO_IDS))


def _coco_rows(values: Tensor) -> Tensor:
    """(A * 91, ...) -> (A * 80, ...): torchvision's labels are COCO's category ids, anchor by anchor."""
    return values.unflatten(0, (-1, 1 + max(COCO_IDS)))[:, list(COCO_IDS)].flatten(0, 1)
