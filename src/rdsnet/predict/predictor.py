"""Prediction: images of any kind in, `sv.Detections` out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import overload

import numpy as np
import supervision as sv
import torch
from torch import Tensor

from rdsnet.config import Config, get_config
from rdsnet.data.coco import CocoFolder
from rdsnet.data.loading import equal_shape_batches, eval_batches, pad_images
from rdsnet.data.records import ImageRecord
from rdsnet.data.transforms import eval_image, eval_scale, eval_size, padding_multiple
from rdsnet.device import Device, Precision, choose_device, gather_objects, to_device
from rdsnet.model.build import build_model
from rdsnet.model.fusion import fuse_norms
from rdsnet.model.rdsnet import RDSNet
from rdsnet.predict.sources import ImageSource, as_array
from rdsnet.results.exchange import to_detections
from rdsnet.results.metrics import CocoEvaluator
from rdsnet.structures import Objects, above
from rdsnet.terminal import progress_bar
from rdsnet.weights.checkpoint import Checkpoint
from rdsnet.weights.checkpoint import load as load_checkpoint


class Predictor:
    """A trained model, ready for images.

    Args:
        model: from `rdsnet.weights.checkpoint.load` or training; changed in place.
        checkpoint: what is stored with it.
        device: where it runs.
        precision: of the network; "bf16" halves its memory and is faster on CPUs and GPUs that know bfloat16. Boxes,
            masks and their refinement are computed from its maps in float32 either way.
        compile: compile the network (`torch.compile`, which needs a C++ compiler for the CPU). The first image then
            takes a minute or so, and so do the first few of other sizes, until what is compiled serves all sizes.

    Attributes:
        class_names: by `class_id`.
        compiled: whether the network was.

    Raises:
        ValueError: an unknown precision, or nothing can be compiled here; says why.
    """

    def __init__(
        self,
        model: RDSNet,
        checkpoint: Checkpoint,
        device: torch.device,
        *,
        precision: Precision = "32",
        compile: bool = False,
    ) -> None:
        if precision not in ("32", "bf16"):
            raise ValueError(f"unknown precision {precision!r}; valid are '32' and 'bf16'")
        self.model = model.to(device).to(memory_format=torch.channels_last).eval()
        if precision == "bf16":
            for part in (model.backbone, model.object_stream, model.pixel_stream):
                if part is not None:
                    part.bfloat16()
        if compile:
            _require_compiler(device)
            self.model.compile()
        self.compiled = compile
        self.config = checkpoint.config
        self.class_names = checkpoint.class_names
        self.category_ids = checkpoint.category_ids
        self.device = device

    @overload
    def predict(self, source: ImageSource, *, threshold: float = ..., batch_size: int = ...) -> sv.Detections: ...

    @overload
    def predict(
        self, source: list[ImageSource], *, threshold: float = ..., batch_size: int = ...
    ) -> list[sv.Detections]: ...

    def predict(
        self, source: ImageSource | list[ImageSource], *, threshold: float = 0.5, batch_size: int = 1
    ) -> sv.Detections | list[sv.Detections]:
        """Find the objects of an image, or of each image of a list.

        Args:
            source: a file, a PIL image, an array (uint8 RGB (H, W, 3) or grey (H, W)), or a list of these.
            threshold: objects score at least this, 0..1; scores below the configuration's `score_threshold` (0.05)
                are never there.
            batch_size: images that the network takes at once; it does not change the results.

        Returns:
            `sv.Detections` in pixels of the image: `xyxy` (refined boxes), `mask` (`sv.CompactMask`), `confidence`,
            `class_id`; in `data` `class_name`, `regressed_xyxy` (before refinement), `edge_std` (standard deviation of
            left, top, right and bottom edge, pixels) and `interval` (N, 4, 2), where each lies with 95%. A list of them
            for a list.

        Raises:
            FileNotFoundError, ValueError: a file is missing or not an image, an array of another form.
        """
        if isinstance(source, list):
            found = self.find([as_array(image) for image in source], batch_size=batch_size)
            return [to_detections(above(objects, threshold), self.class_names) for objects in found]
        return to_detections(above(self.find([as_array(source)])[0], threshold), self.class_names)

    def find(self, images: Sequence[np.ndarray], *, batch_size: int = 1) -> list[Objects]:
        """The objects of uint8 RGB arrays (H, W, 3), on the CPU, with everything that the model knows of them."""
        sizes = [eval_size(image.shape[0], image.shape[1], self.config.data) for image in images]
        found: dict[int, Objects] = {}
        for chosen in equal_shape_batches(sizes, batch_size):
            resized = [self.resize(images[i]) for i in chosen]
            objects = self.find_resized(resized, [images[i].shape[:2] for i in chosen])
            found.update(zip(chosen, objects, strict=True))
        return [found[i] for i in range(len(images))]

    def resize(self, image: np.ndarray) -> Tensor:
        """What the network is given of a uint8 RGB array (H, W, 3): uint8 (3, h, w), before padding."""
        return eval_image(image, self.config.data)

    def find_resized(self, resized: Sequence[Tensor], originals: Sequence[tuple[int, int]]) -> list[Objects]:
        """As `find`, in one batch, of images that `resize` has made from originals of (H, W)."""
        batch = pad_images(resized, padding_multiple(self.config.data))
        sizes = [(image.shape[1], image.shape[2]) for image in resized]
        return detect(self.model, batch, sizes, originals, self.config)

    def set_max_detections(self, count: int) -> None:
        """Objects an image, at most: for detector and metric together."""
        if count < 1:
            raise ValueError(f"expected max_detections of at least 1, got {count}")
        self.config.detect.max_detections = self.model.object_stream.max_detections = count

    def require_classes(self, folder: CocoFolder) -> None:
        """Raise a ValueError where a data set's classes are not the model's, in the same order."""
        if folder.class_names != self.class_names:
            raise ValueError(
                f"the model knows the classes {', '.join(self.class_names)}; "
                f"{folder.json_path} has {', '.join(folder.class_names)}"
            )


def load(
    source: str | Path, *, device: Device = "auto", precision: Precision = "32", compile: bool = False
) -> Predictor:
    """A predictor from bundled weights, a run folder or a .safetensors file, its batch norms folded into convolutions.

    Args:
        source: "nuclei" (docs/nuclei.md), or what `rdsnet train` or `rdsnet convert` wrote.
        device: "cpu", "cuda", or "auto" for a GPU where there is one.
        precision, compile: as of `Predictor`.

    Raises:
        FileNotFoundError, ValueError: no such weights, or they do not fit; says what is wrong.
    """
    model, checkpoint = load_checkpoint(source)
    model = fuse_norms(model.eval())
    return Predictor(model, checkpoint, choose_device(device), precision=precision, compile=compile)


def _require_compiler(device: torch.device) -> None:
    """Compile next to nothing, so that what is missing is said at once, and in one line."""
    try:
        torch.compile(torch.relu)(torch.zeros(2, device=device))
    except Exception as error:  # no C++ compiler, no Triton, a Python that is too new: each has an error of its own
        reason = str(error).partition("\n")[0]
        raise ValueError(f"torch.compile does not work on this machine: {reason}") from error


def detect(
    model: RDSNet,
    images: Tensor,
    sizes: Sequence[tuple[int, int]],
    output_sizes: Sequence[tuple[int, int]],
    config: Config,
) -> list[Objects]:
    """`RDSNet.detect` on the model's device, results on the CPU; images have the sizes that `config.data` gives."""
    device = model.image_mean.device
    images = to_device(images, device).contiguous(memory_format=torch.channels_last)
    scales = None
    if config.rules.one_scale and config.data.square is None:  # squashed, each axis has its own factor, and exactly
        scales = [eval_scale(h, w, config.data) for h, w in output_sizes]
    return [objects.to("cpu") for objects in model.detect(images, sizes, output_sizes, scales)]


def detect_folder(
    model: RDSNet, folder: CocoFolder, config: Config, *, batch_size: int = 1, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[ImageRecord, Objects]]:
    """Run a model over the images of a COCO folder, in pixels of the originals; every rank does its share."""
    batches = eval_batches(folder, config.data, batch_size, config.data.workers, rank, world_size)
    for images, sizes, records in batches:
        found = detect(model, images, sizes, [record.size for record in records], config)
        yield from zip(records, found, strict=True)


def evaluate(
    model: RDSNet,
    folder: CocoFolder,
    config: Config,
    *,
    batch_size: int = 1,
    rank: int = 0,
    world_size: int = 1,
    each: Callable[[ImageRecord, Objects], None] | None = None,
) -> CocoEvaluator:
    """Run a model over a data set and collect what it finds, for metrics and results. Leaves it in evaluation mode.

    Args:
        rank, world_size: this process detects on its share; in the end every process has the objects of all.
        each: called with every image of this process.
    """
    model.eval()
    evaluator = CocoEvaluator(folder, config.detect.max_detections)
    found = detect_folder(model, folder, config, batch_size=batch_size, rank=rank, world_size=world_size)
    images = len(folder) // world_size
    for record, objects in progress_bar("evaluating", found, total=images, leave=False, disable=rank > 0):
        evaluator.add(record.id, objects)
        if each is not None:
            each(record, objects)
    if world_size > 1:
        evaluator.merge(gather_objects(evaluator.state()))
    return evaluator


def untrained(
    config: Config | str,
    *,
    num_classes: int = 80,
    device: Device = "auto",
    precision: Precision = "32",
    compile: bool = False,
) -> Predictor:
    """A predictor with random weights: as fast as the same with trained ones, with nothing to fetch.

    Args:
        config: a configuration, or the name of a preset; its pretrained trunk is left out.
        num_classes: C.
        device, precision, compile: as of `rdsnet.load`.

    Raises:
        ValueError: an unknown preset, or fewer than one class.
    """
    if isinstance(config, str):
        config = get_config(config)
    config = replace(config, model=replace(config.model, pretrained="none"))
    torch.manual_seed(config.seed)
    model = fuse_norms(build_model(config, num_classes=num_classes).eval())
    names = [f"class {label}" for label in range(num_classes)]
    checkpoint = Checkpoint(config, names, list(range(1, num_classes + 1)))
    return Predictor(model, checkpoint, choose_device(device), precision=precision, compile=compile)
