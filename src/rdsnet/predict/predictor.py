"""Prediction: images of any kind in, `sv.Detections` out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from rdsnet.device import Device, Precision, choose_device, choose_precision, gather_objects, to_device
from rdsnet.model.build import build_model
from rdsnet.model.fusion import fuse_norms
from rdsnet.model.rdsnet import Find, RDSNet, no_mark
from rdsnet.predict.sources import ImageSource, as_array
from rdsnet.results.exchange import to_detections
from rdsnet.results.metrics import CocoEvaluator
from rdsnet.structures import Objects, PixelRepresentations, above
from rdsnet.terminal import progress_bar
from rdsnet.weights.checkpoint import Checkpoint
from rdsnet.weights.checkpoint import load as load_checkpoint


class Predictor:
    """A trained model, ready for images: its weights, its settings, and the device that it is on.

    Args:
        model: as `load` makes it, or from a training that goes on. It is put into evaluation mode; nothing else of it
            is changed.
        checkpoint: its settings and classes.
        compiled: whether the model was compiled.

    Attributes:
        class_names, category_ids: by `class_id`.
        mark: called with the name of each stage that `predict` enters: load, resize, results, RLE, and those of
            `RDSNet.detect`.
        find: see `RDSNet.detect`.
    """

    def __init__(self, model: RDSNet, checkpoint: Checkpoint, *, compiled: bool = False) -> None:
        self.model = model.eval()
        self.config = checkpoint.config
        self.class_names = checkpoint.class_names
        self.category_ids = checkpoint.category_ids
        self.compiled = compiled
        self.mark: Callable[[str], None] = no_mark
        self.find: Find | None = None

    @property
    def device(self) -> torch.device:
        return self.model.image_mean.device

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
        images = source if isinstance(source, list) else [source]
        self.mark("load")
        arrays = [as_array(image) for image in images]
        self.mark("resize")
        found = [above(objects, threshold) for objects in self.detect(arrays, batch_size=batch_size)]
        self.mark("RLE")
        detections = [to_detections(objects, self.class_names) for objects in found]
        return detections if isinstance(source, list) else detections[0]

    def detect(self, images: Sequence[np.ndarray], *, batch_size: int = 1) -> list[Objects]:
        """The objects of uint8 RGB arrays (H, W, 3), on the CPU, with everything that the model knows of them."""
        sizes = [eval_size(image.shape[0], image.shape[1], self.config.data) for image in images]
        found: dict[int, Objects] = {}
        for chosen in equal_shape_batches(sizes, batch_size):
            resized = [self.resize(images[i]) for i in chosen]
            objects = self.detect_resized(resized, [images[i].shape[:2] for i in chosen])
            found.update(zip(chosen, objects, strict=True))
        return [found[i] for i in range(len(images))]

    def resize(self, image: np.ndarray) -> Tensor:
        """What the network is given of a uint8 RGB array (H, W, 3): uint8 (3, h, w), before padding."""
        return eval_image(image, self.config.data)

    def detect_resized(self, resized: Sequence[Tensor], originals: Sequence[tuple[int, int]]) -> list[Objects]:
        """As `detect`, in one batch, of images that `resize` has made from originals of (H, W)."""
        sizes = [(image.shape[1], image.shape[2]) for image in resized]
        return self.detect_batch(pad_images(resized, padding_multiple(self.config.data)), sizes, originals)

    def detect_batch(
        self, images: Tensor, sizes: Sequence[tuple[int, int]], originals: Sequence[tuple[int, int]]
    ) -> list[Objects]:
        """As `detect_resized`, of images that are padded: uint8 (B, 3, H, W), with their (h, w) before."""
        images = to_device(images, self.device).contiguous(memory_format=torch.channels_last)
        scales = None
        if self.config.rules.one_scale and self.config.data.square is None:  # squashed, each axis has its own factor
            scales = [eval_scale(h, w, self.config.data) for h, w in originals]
        found = self.model.detect(images, sizes, originals, scales, self.mark, self.find)
        self.mark("results")
        return [objects.to("cpu") for objects in found]

    def detect_folder(
        self, folder: CocoFolder, *, batch_size: int = 1, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[ImageRecord, Objects]]:
        """The objects of each image of a COCO folder, in pixels of the originals; every rank does its share."""
        data = self.config.data
        for images, sizes, records in eval_batches(folder, data, batch_size, data.workers, rank, world_size):
            found = self.detect_batch(images, sizes, [record.size for record in records])
            yield from zip(records, found, strict=True)

    def evaluate(
        self,
        folder: CocoFolder,
        *,
        batch_size: int = 1,
        rank: int = 0,
        world_size: int = 1,
        each: Callable[[ImageRecord, Objects], None] | None = None,
    ) -> CocoEvaluator:
        """Detect on a data set and collect what is found, for metrics and results.

        Args:
            rank, world_size: this process detects on its share; in the end every process has the objects of all.
            each: called with every image of this process.
        """
        evaluator = CocoEvaluator(folder, self.config.detect.max_detections)
        found = self.detect_folder(folder, batch_size=batch_size, rank=rank, world_size=world_size)
        images = len(folder) // world_size
        for record, objects in progress_bar("evaluating", found, total=images, leave=False, disable=rank > 0):
            evaluator.add(record.id, objects)
            if each is not None:
                each(record, objects)
        if world_size > 1:
            evaluator.merge(gather_objects(evaluator.state()))
        return evaluator

    @torch.inference_mode()
    def pixel_representations(self, image: np.ndarray) -> PixelRepresentations:
        """Of a uint8 RGB array (H, W, 3).

        Raises:
            ValueError: the model has no pixel stream.
        """
        resized = self.resize(image)
        height, width = resized.shape[1:]
        batch = pad_images([resized], padding_multiple(self.config.data)).to(self.device)
        _, pixels = self.model(self.model.normalise(batch, [(height, width)]))
        if pixels is None:
            raise ValueError("this model has no pixel stream: it finds boxes without masks")
        step = (batch.shape[2] / pixels.shape[2], batch.shape[3] / pixels.shape[3])
        # the image ends inside the grid: the cells of the padding are no part of it
        rows, columns = (-(-resized.shape[i] * pixels.shape[1 + i] // batch.shape[1 + i]) for i in (1, 2))
        return PixelRepresentations(pixels[0, :, :rows, :columns].float().cpu(), step, (height, width))

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
        precision: of the network, see `rdsnet.device.choose_precision`. "bf16" halves its memory and is faster on
            processors and GPUs that know bfloat16; "auto" takes it there. Boxes, masks and their refinement are
            computed from its maps in float32 either way.
        compile: compile the network (`torch.compile`, which needs a C++ compiler for the CPU). The first image then
            takes a minute or so, and so do the first few of other sizes, until what is compiled serves all sizes.

    Raises:
        FileNotFoundError: no such weights.
        ValueError: they do not fit, the device has no instructions for the precision, or nothing can be compiled here;
            says why.
    """
    model, checkpoint = load_checkpoint(source)
    return _ready(model, checkpoint, device, precision, compile)


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
        device, precision, compile: as of `load`.

    Raises:
        ValueError: an unknown preset, or fewer than one class.
    """
    if isinstance(config, str):
        config = get_config(config)
    torch.manual_seed(config.seed)
    model = build_model(config, num_classes=num_classes, pretrained=False)
    names = [f"class {label}" for label in range(num_classes)]
    checkpoint = Checkpoint(config, names, list(range(1, num_classes + 1)))
    return _ready(model.eval(), checkpoint, device, precision, compile)


def _ready(model: RDSNet, checkpoint: Checkpoint, device: Device, precision: Precision, compile: bool) -> Predictor:
    """A model whose training is over becomes as fast as it can, in place: norms folded, cast, moved, compiled."""
    chosen = choose_device(device)
    dtype = torch.bfloat16 if choose_precision(precision, chosen) == "bf16" else torch.float32
    model = fuse_norms(model).to(chosen).to(memory_format=torch.channels_last)
    for part in (model.backbone, model.object_stream, model.pixel_stream):
        if part is not None:
            part.to(dtype)
    if compile:
        _require_compiler(chosen)
        model.compile()
    return Predictor(model, checkpoint, compiled=compile)


def _require_compiler(device: torch.device) -> None:
    """Compile next to nothing, so that what is missing is said at once, and in one line."""
    try:
        torch.compile(torch.relu)(torch.zeros(2, device=device))
    except Exception as error:  # no C++ compiler, no Triton, a Python that is too new: each has an error of its own
        reason = str(error).partition("\n")[0]
        raise ValueError(f"torch.compile does not work on this machine: {reason}") from error
