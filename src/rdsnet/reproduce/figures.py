"""What figures 3 and 5 measure, and the pictures of all comparisons (matplotlib, without a window)."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from rdsnet.data.coco import CocoFolder
from rdsnet.data.loading import eval_batches
from rdsnet.data.records import ImageRecord
from rdsnet.files import replace_file, write_image
from rdsnet.model.mbrm import MBRM
from rdsnet.model.mbrm_fit import NothingToFit, Pairs, fit, with_kernel
from rdsnet.predict.predictor import Predictor
from rdsnet.reproduce.plan import GAMMAS, KERNEL_SIDES
from rdsnet.reproduce.study import Numbers, percent
from rdsnet.reproduce.tables import Line, Result, changes, spread
from rdsnet.results.matching import match_boxes
from rdsnet.results.metrics import CocoEvaluator
from rdsnet.rle import rasterise
from rdsnet.structures import above
from rdsnet.terminal import progress_bar
from rdsnet.train.run import matched_pairs
from rdsnet.visualize.overlay import COLOURS, distinct_colours, draw_objects, draw_truth
from rdsnet.visualize.representations import to_sphere
from rdsnet.visualize.sheet import captioned_row, contact_sheet

logger = logging.getLogger(__name__)

PICTURES = 6  # validation images in figure 4
SCENES = 4  # in figure 3
MAX_SCENES = 200  # that figure 3's numbers are means over
PLACES = ("pixels of the object", "pixels of other objects", "pixels of no object")
PLACE_COLUMNS = ("foreground half", "background half", "probability")
SCENE_TITLES = ("objects found", "pixel representations as colours", "o foreground, x background half")
POINTS = 1500  # pixels drawn on each sphere


def sweep(predictor: Predictor, val: CocoFolder, fitted_to: CocoFolder) -> dict[str, Numbers]:
    """Box AP in percent by setting, "gamma = 0.05" or "s = 4"; the other one is the model's own.

    Args:
        val: evaluated.
        fitted_to: training images, for the fits of MBRM.
    """
    config, own = predictor.config, copy.deepcopy(predictor.model.mbrm).cpu()
    pairs = matched_pairs(predictor, fitted_to)
    variants = {f"gamma = {gamma:g}": _fitted(own, pairs, gamma=gamma) for gamma in GAMMAS}
    variants |= {f"s = {s}": _fitted(with_kernel(own, s), pairs, gamma=own.gamma) for s in KERNEL_SIDES}
    evaluators = {name: CocoEvaluator(val, config.detect.max_detections) for name in variants}
    decision = "mean" if config.detect.refine == "mean" else "argmax"
    detections = predictor.detect_folder(val, batch_size=config.train.batch_size)
    for record, objects in progress_bar("refining", detections, total=len(val), leave=False):
        assert objects.profiles is not None
        for name, mbrm in variants.items():
            boxes = objects.regressed_boxes
            if mbrm.gamma > 0:
                with torch.inference_mode():
                    boxes = mbrm(*objects.profiles, boxes, decision).boxes
            # as a plain detector's, so that nothing but these boxes is measured
            evaluators[name].add(record.id, replace(objects, regressed_boxes=boxes, masks=[], profiles=None))
    return {name: percent(evaluator.summarize()["box"]["regressed"]) for name, evaluator in evaluators.items()}


def _fitted(own: MBRM, pairs: Sequence[Pairs], *, gamma: float) -> MBRM:
    """A copy with this gamma, fitted anew."""
    mbrm = copy.deepcopy(own)
    mbrm.gamma = gamma
    if gamma > 0:
        try:
            fit(mbrm, pairs)
        except NothingToFit as error:
            logger.warning("%s; it keeps the numbers that its authors published", error)
    return mbrm


@dataclass(frozen=True)
class Scene:
    """Representations of an image and of the K objects in it that were found.

    record
    pixels      (D, h, w) on the mask grid
    owner       (h, w) int64: the found object that each cell's centre belongs to, -1 for none, -2 for an object that
                was not found
    background  (K, D) half of the objects' representations
    foreground  (K, D)
    boxes       (K, 4) of the truth, in pixels of the image
    """

    record: ImageRecord
    pixels: Tensor
    owner: Tensor
    background: Tensor
    foreground: Tensor
    boxes: Tensor


@torch.inference_mode()
def scenes(predictor: Predictor, folder: CocoFolder, images: int = MAX_SCENES) -> Iterator[Scene]:
    """The first images of a folder, each with the best detection of every object that has one."""
    model, device = predictor.model, predictor.device
    for batch, sizes, records in eval_batches(folder.subset(folder.images[:images]), predictor.config.data, 1, 0):
        record, size = records[0], sizes[0]
        raw, pixels = model(model.normalise(batch.to(device), sizes))
        assert pixels is not None
        found = model.object_stream.detect(raw, 0, size, record.size)
        boxes, labels = record.truth(masks=True)
        detections, objects = match_boxes(found.boxes, found.labels, boxes, labels)
        order = objects.argsort()
        objects, anchors = objects[order], found.anchors[detections[order]]
        halves = model.object_stream.representations(raw, torch.zeros_like(anchors), anchors).cpu()
        step = [raw.size[axis] / pixels.shape[2 + axis] for axis in (0, 1)]
        centres = [
            (np.arange(pixels.shape[2 + axis]) + 0.5) * step[axis] * record.size[axis] / size[axis] for axis in (0, 1)
        ]
        owner = _owners(record, objects.tolist(), centres)
        yield Scene(record, pixels[0].float().cpu(), owner, halves[:, 0], halves[:, 1], boxes[objects])


def _owners(record: ImageRecord, found: Sequence[int], centres: Sequence[np.ndarray]) -> Tensor:
    """`Scene.owner` of cells whose centres lie at these y and x in the image, or in the padding beyond it."""
    height, width = record.size
    at = np.ix_(*(np.minimum(c, side - 1).astype(int) for c, side in zip(centres, record.size, strict=True)))
    owner = torch.full((len(centres[0]), len(centres[1])), -1)
    numbers = {number: i for i, number in enumerate(found)}
    for number, annotation in enumerate(record.objects(masks=True)):
        assert annotation.rle is not None
        mask = rasterise(annotation.rle, (0, 0, width, height), record.size)
        owner[mask[at]] = numbers.get(number, -2)
    return owner


def similarities(predictor: Predictor, folder: CocoFolder) -> dict[str, Numbers]:
    """By kind of pixels (`PLACES`), means over the objects found: cosine between a pixel's representation and each half
    of the object's, and the foreground probability of Eq. 1, without any crop."""
    sums = torch.zeros(len(PLACES), len(PLACE_COLUMNS), dtype=torch.float64)
    counts = torch.zeros(len(PLACES), 1, dtype=torch.float64)
    for scene in scenes(predictor, folder):
        pixels = scene.pixels.flatten(1)
        owner = scene.owner.flatten()
        values = torch.stack(
            [
                F.normalize(scene.foreground, dim=1) @ F.normalize(pixels, dim=0),
                F.normalize(scene.background, dim=1) @ F.normalize(pixels, dim=0),
                ((scene.foreground - scene.background) @ pixels).sigmoid(),
            ]
        )  # (3, K, h * w)
        for i in range(len(scene.boxes)):
            for place, chosen in enumerate((owner == i, (owner != i) & (owner != -1), owner == -1)):
                if chosen.any():
                    sums[place] += values[:, i, chosen].mean(1)
                    counts[place] += 1
    means = (sums / counts).tolist()
    return {
        place: dict(zip(PLACE_COLUMNS, row if count else [None] * len(PLACE_COLUMNS), strict=True))
        for place, row, count in zip(PLACES, means, counts[:, 0].tolist(), strict=True)
    }


def on_the_sphere(scene: Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Representations reduced to three numbers and brought to length 1 (`to_sphere`), as the figure shows them.

    Returns:
        pixels (h, w, 3), foreground halves (K, 3), background halves (K, 3).
    """
    pixels = scene.pixels.flatten(1).T
    reduced = to_sphere(torch.cat([pixels, scene.foreground, scene.background]))
    shown, fore, back = reduced.split([len(pixels), len(scene.foreground), len(scene.background)])
    return shown.reshape(*scene.owner.shape, 3).numpy(), fore.numpy(), back.numpy()


def draw_table(result: Result, path: Path) -> None:
    """A panel a column: each row's change against the baseline (or its number), and the paper's beside it."""
    lines = changes(result) or result.lines
    columns = result.accuracies
    figure = Figure(figsize=(2 + 1.9 * len(columns), 1.4 + 0.42 * len(lines)), layout="constrained")
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    height = np.arange(len(lines))
    for axis, column in zip(axes, columns, strict=True):
        _points(axis, lines, column, height)
        axis.set_title(column, fontsize=10)
        axis.grid(axis="x", alpha=0.3)
        if result.baseline is not None:
            axis.axvline(0, color="grey", linewidth=1)
    axes[0].set_yticks(height, [line.name for line in lines])
    axes[0].set_ylim(len(lines) - 0.5, -0.5)
    against = "" if result.baseline is None else f"change against {result.baseline}, "
    figure.supxlabel(f"{against}mean and standard deviation over seeds; hollow: the paper's", fontsize=9)
    figure.suptitle(result.title, fontsize=11)
    _save(figure, path)


def _points(axis: Any, lines: Sequence[Line], column: str, height: np.ndarray) -> None:
    for y, line in zip(height, lines, strict=True):
        average, deviation = spread(line.values, column)
        if average is not None:
            axis.errorbar(average, y, xerr=deviation, fmt="o", color="C0", capsize=3)
        for value in line.paper.get(column, ()):
            axis.plot(value, y, "D", color="C1", markerfacecolor="none")


def draw_curves(result: Result, path: Path) -> None:
    """Figure 5: the change of AP over gamma and over s, seed by seed, and that of each size of objects."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    lines = changes(result)
    for axis, name in zip(figure.subplots(1, 2, sharey=True), ("gamma", "s"), strict=True):
        own = [line for line in lines if line.name.startswith(f"{name} = ")]
        places = [float(line.name.split(" = ")[1]) for line in own]
        for i, column in enumerate(result.columns):
            values = [spread(line.values, column) for line in own]
            if all(average is None for average, _ in values):
                continue  # no object of that size
            axis.errorbar(
                places,
                [np.nan if average is None else average for average, _ in values],
                yerr=[deviation or 0.0 for _, deviation in values],
                label=column,
                marker="o",
                markersize=4,
                capsize=3,
                linewidth=2 if i == 0 else 1,
                alpha=1 if i == 0 else 0.5,
            )
        axis.axhline(0, color="grey", linewidth=1)
        axis.set_xlabel(name)
        axis.grid(alpha=0.3)
    low, high = figure.axes[0].get_ylim()
    figure.axes[0].set_ylim(min(low, -0.5), max(high, 0.5))  # changes of less than a point look it
    figure.axes[0].set_ylabel(f"box AP, change against {result.baseline}")
    figure.axes[1].legend(fontsize=8)
    figure.suptitle(result.title, fontsize=11)
    _save(figure, path)


def draw_spheres(scenes: Sequence[Scene], path: Path) -> None:
    """Figure 3: image, pixel representations as colours, and both kinds of representations on a sphere.

    Objects have the colour of their outline; circles are their foreground halves, crosses their background halves,
    points are pixels, grey those of no object.
    """
    figure = Figure(figsize=(11, 3.6 * len(scenes)), layout="constrained")
    for row, scene in enumerate(scenes):
        pixels, foreground, background = on_the_sphere(scene)
        colours = COLOURS[distinct_colours(scene.boxes.numpy())] / 255
        axes: list[Any] = [
            figure.add_subplot(
                len(scenes), 3, 3 * row + i + 1, title="" if row else title, projection="3d" if i == 2 else None
            )
            for i, title in enumerate(SCENE_TITLES)
        ]
        image, shown, sphere = axes
        image.imshow(scene.record.read())
        image.autoscale(False)
        for (x1, y1, x2, y2), colour in zip(scene.boxes.tolist(), colours, strict=True):
            image.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], color=colour, linewidth=2)
        image.set_axis_off()
        shown.imshow((pixels + 1) / 2)
        shown.set_axis_off()
        _draw_sphere(sphere, scene, pixels, foreground, background, colours)
    _save(figure, path)


def _draw_sphere(
    axis: Any, scene: Scene, pixels: np.ndarray, foreground: np.ndarray, background: np.ndarray, colours: np.ndarray
) -> None:
    owner, points = scene.owner.numpy().ravel(), pixels.reshape(-1, 3)
    drawn = np.random.default_rng(0).permutation(len(points))[:POINTS]
    shades = np.full((len(points), 3), 0.75)
    shades[owner >= 0] = colours[owner[owner >= 0]]
    axis.scatter(*points[drawn].T, c=shades[drawn], s=3, depthshade=False)
    for halves, marker in ((foreground, "o"), (background, "X")):
        axis.scatter(*halves.T, c=colours, s=90, marker=marker, edgecolors="black", depthshade=False)
    axis.set_box_aspect((1, 1, 1))
    axis.set(xlim=(-1, 1), ylim=(-1, 1), zlim=(-1, 1), xticklabels=[], yticklabels=[], zticklabels=[])


def draw_pictures(predictors: Mapping[str, Predictor], val: CocoFolder, path: Path, *, threshold: float = 0.3) -> None:
    """Figure 4: the first validation images with two objects or more; truth, then what each model found."""
    several = [record for record in val.images if len(record.annotations) > 1]
    folder = val.subset((several or val.images)[:PICTURES])
    found = [{r.id: objects for r, objects in p.detect_folder(folder)} for p in predictors.values()]
    pictures = []
    for record in folder.images:
        image, names, scale = record.read(), val.class_names, 2 if max(record.size) < 400 else 1
        row = [draw_truth(image, record, names, scale=scale)]
        for own in found:
            row.append(draw_objects(image, above(own[record.id], threshold), names, regressed=False, scale=scale))
        pictures += captioned_row(row, ["truth", *predictors])
    write_image(path, contact_sheet(pictures, 1 + len(predictors)))


def _save(figure: Figure, path: Path) -> None:
    replace_file(path, lambda partial: figure.savefig(partial, dpi=110))
