"""The pictures of a comparison (matplotlib, without a window)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from rdsnet.config import Config
from rdsnet.data import CocoFolder
from rdsnet.files import replace_file
from rdsnet.inference import detect_folder
from rdsnet.model import RDSNet
from rdsnet.predict import above
from rdsnet.reproduce.plan import SPEED
from rdsnet.reproduce.report import Line, Result, changes, spread
from rdsnet.reproduce.representations import Scene, on_the_sphere
from rdsnet.visualize import COLOURS, captioned, contact_sheet, distinct_colours, draw_objects, draw_truth

PICTURES = 6  # validation images in figure 4
SCENES = 4  # in figure 3
POINTS = 1500  # pixels drawn on each sphere


def draw_table(result: Result, path: Path) -> None:
    """A panel a column: each row's change against the baseline (or its number), and the paper's beside it."""
    lines = changes(result) or result.lines
    columns = [column for column in result.columns if column != SPEED]
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
        image = figure.add_subplot(len(scenes), 3, 3 * row + 1, title="objects found" if row == 0 else "")
        image.imshow(scene.record.read())
        image.autoscale(False)
        for (x1, y1, x2, y2), colour in zip(scene.boxes.tolist(), colours, strict=True):
            image.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], color=colour, linewidth=2)
        image.set_axis_off()
        shown = figure.add_subplot(
            len(scenes), 3, 3 * row + 2, title="pixel representations as colours" if row == 0 else ""
        )
        shown.imshow((pixels + 1) / 2)
        shown.set_axis_off()
        sphere: Any = figure.add_subplot(
            len(scenes), 3, 3 * row + 3, projection="3d", title="o foreground, x background half" if row == 0 else ""
        )
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


def draw_pictures(
    models: dict[str, tuple[RDSNet, Config]], val: CocoFolder, path: Path, *, threshold: float = 0.3
) -> None:
    """Figure 4: the first validation images with two objects or more; truth, then what each model found."""
    folder = copy.copy(val)
    several = [record for record in folder.images if len(record.annotations) > 1]
    folder.images = (several or folder.images)[:PICTURES]
    scales = [2 if max(record.height, record.width) < 400 else 1 for record in folder.images]
    pairs = list(zip(folder.images, scales, strict=True))
    columns = [[captioned(draw_truth(r.read(), r, val.class_names, scale=scale), "truth") for r, scale in pairs]]
    for name, (model, config) in models.items():
        found = {r.id: above(objects, threshold) for r, objects in detect_folder(model, folder, config)}
        drawn = [
            draw_objects(r.read(), found[r.id], val.class_names, regressed=False, scale=scale) for r, scale in pairs
        ]
        columns.append([captioned(picture, name) for picture in drawn])
    sheet = contact_sheet([picture for row in zip(*columns, strict=True) for picture in row], len(columns))
    replace_file(path, lambda partial: Image.fromarray(sheet).save(partial, format="png"))


def _save(figure: Figure, path: Path) -> None:
    replace_file(path, lambda partial: figure.savefig(partial, format="png", dpi=110))
