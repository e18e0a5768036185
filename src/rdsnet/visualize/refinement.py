"""MBRM explained (3.3): what an object's mask says of each edge, what the regressed box says, and what follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from rdsnet.model.mbrm import EVIDENCE, MBRM, log_prior, surprise, whole
from rdsnet.structures import Objects
from rdsnet.visualize.overlay import require_image, require_size, stretched

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NEAR, FAR = "#0072b2", "#d55e00"  # left and top, right and bottom: told apart by the colour-blind as well
EDGES = ("left", "top", "right", "bottom")
COLOURS = (NEAR, NEAR, FAR, FAR)
SIDE = 4.6  # inches, of the longer side of the object's picture
PANEL = 1.25  # inches, how far a panel of curves reaches from the picture
GAP = 0.2
MARGIN = {"left": 0.95, "top": 0.85, "right": 0.2, "bottom": 0.6}
NOTES = 3.1  # inches, for the legend and the numbers in the lower right corner
DASHED = (0, (4, 3))
MASK = "#f0e442"

Window = tuple[float, float, float, float]


@dataclass(frozen=True)
class Evidence:
    """What is known of the two edges along one axis; curves are of near and far edge at `positions`.

    profile     (S,) highest foreground probability of each column or row
    positions   (2, S) 0..S-1 and 1..S
    likelihood  (2, S) log P(M' | X = i), Eq. 5
    prior       (2, S) P(X = i), Eq. 6, which sums to 1
    posterior   (2, S) P(X = i | M'), Eq. 3
    sigma       of the prior, pixels
    """

    profile: np.ndarray
    positions: np.ndarray
    likelihood: np.ndarray
    prior: np.ndarray
    posterior: np.ndarray
    sigma: float


def explain_refinement(image: np.ndarray, objects: Objects, index: int, mbrm: MBRM) -> np.ndarray:
    """How MBRM came from the regressed to the refined box of one object.

    The object, its contrast stretched, with its mask, its regressed box (dashed) and its refined box (solid). Below
    it, along the same pixels, the highest foreground probability of each column with the likelihood of a left and of
    a right edge there (its peak is drawn at 1), and then prior (dashed) and posterior; on its right the same for
    rows, top and bottom. What belongs to left and top edges is blue, to right and bottom edges orange. An edge lies
    between pixels: edge i is the border between the pixels i - 1 and i.

    Args:
        image: uint8 RGB (H, W, 3).
        objects: found in it, with profiles, on any device.
        index: of the object.
        mbrm: of the model that found it.

    Returns:
        uint8 RGB, 1000 to 1400 pixels wide and high.

    Raises:
        ValueError: not such an image, no such object, or objects that MBRM did not refine.
    """
    require_image(image)
    require_size(image, objects.image_size, "objects'")
    if not 0 <= index < len(objects):
        raise ValueError(f"expected the index of one of {len(objects)} objects, got {index}")
    own = objects.select(torch.tensor([index], device=objects.scores.device)).to("cpu")
    if own.profiles is None or own.edge_std.isnan().any():
        raise ValueError("expected an object that MBRM has refined, with its profiles; MBRM is off for this one")
    evidence = [edge_evidence(mbrm, own.regressed_boxes, profile, axis) for axis, profile in enumerate(own.profiles)]
    title = f"How the mask moves the box: object {index}, score {float(own.scores[0]):.2f}"
    return _render(image, own, evidence, shown_window(own, evidence), title)


@torch.no_grad()
def edge_evidence(mbrm: MBRM, regressed: Tensor, profile: Tensor, axis: int) -> Evidence:
    """Of one object, (1, 4), and its profile, (1, S), of columns (axis 0) or rows (axis 1)."""
    device = mbrm.weight.device
    profile, regressed = profile.to(device), regressed.to(device)
    sigma = mbrm.sigma(regressed)[:, axis]
    span = whole(profile, regressed[:, axis::2], mbrm.s)
    return Evidence(
        profile=profile[0].cpu().numpy(),
        positions=span.start.T.cpu().numpy() + np.arange(profile.shape[1]),
        likelihood=-surprise(span, mbrm.weight, mbrm.bias)[0].cpu().numpy(),
        prior=log_prior(span, sigma, mbrm.rules.prior_cut)[0].softmax(dim=1).cpu().numpy(),
        posterior=mbrm.log_joint(span, sigma)[0].softmax(dim=1).cpu().numpy(),
        sigma=float(sigma),
    )


def shown_window(own: Objects, evidence: Sequence[Evidence]) -> Window:
    """What is shown: both boxes with the reach of their priors around, and no side much shorter than the other."""
    both = torch.cat([own.boxes, own.regressed_boxes]).numpy().astype(float)
    low, high = both[:, :2].min(axis=0), both[:, 2:].max(axis=0)
    margin = np.array([EVIDENCE * e.sigma + 2 for e in evidence])
    low, high = np.floor(low - margin), np.ceil(high + margin)
    lacking = np.maximum(np.ceil((0.6 * (high - low).max() - (high - low)) / 2), 0)
    low, high = low - lacking, high + lacking
    return float(low[0]), float(low[1]), float(high[0]), float(high[1])


def _render(image: np.ndarray, own: Objects, evidence: Sequence[Evidence], window: Window, title: str) -> np.ndarray:
    """The page: the picture with the panels of columns below it and of rows on its right, to the same scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    x0, y0, x1, y1 = window
    inch = SIDE / max(x1 - x0, y1 - y0)
    wide, high = (x1 - x0) * inch, (y1 - y0) * inch
    left, top, panels = MARGIN["left"], MARGIN["top"], 2 * (GAP + PANEL)
    width = left + wide + max(NOTES, panels) + MARGIN["right"]
    height = top + high + panels + MARGIN["bottom"]
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    canvas = FigureCanvasAgg(figure)

    def place(left: float, top: float, w: float, h: float) -> Axes:
        return figure.add_axes((left / width, 1 - (top + h) / height, w / width, h / height))

    _draw_object(place(left, top, wide, high), image, own, window)
    for panel, draw in enumerate((_draw_mask_panel, _draw_edge_panel)):
        away = GAP + panel * (PANEL + GAP)
        draw(place(left, top + high + away, wide, PANEL), own, evidence[0], 0, window)
        draw(place(left + wide + away, top, PANEL, high), own, evidence[1], 1, window)
    _write_notes(figure, own, left + wide + 1.5 * GAP, top + high + 3 * GAP)
    figure.text(left / width, 1 - 0.25 / height, title, fontsize=13, weight="bold", va="center")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def _draw_object(axes: Axes, image: np.ndarray, own: Objects, window: Window) -> None:
    from matplotlib import patheffects
    from matplotlib.collections import LineCollection

    x0, y0, x1, y1 = (int(edge) for edge in window)
    cx0, cy0, cx1, cy1 = max(x0, 0), max(y0, 0), min(x1, image.shape[1]), min(y1, image.shape[0])
    axes.set_facecolor("0.9")  # beyond the image
    crop = stretched(image[cy0:cy1, cx0:cx1])
    axes.imshow(crop, extent=(cx0, cx1, cy1, cy0), interpolation="nearest", aspect="auto")
    outline = pixel_borders(own.masks[0].numpy()) + own.windows[0, :2].numpy()
    axes.add_collection(LineCollection(list(outline), colors=MASK, linewidths=1.6))
    halo = [patheffects.withStroke(linewidth=4, foreground="white")]
    for boxes, style in ((own.regressed_boxes, DASHED), (own.boxes, "-")):
        bx0, by0, bx1, by1 = boxes[0].tolist()
        sides = (((bx0, bx0), (by0, by1)), ((bx0, bx1), (by0, by0)), ((bx1, bx1), (by0, by1)), ((bx0, bx1), (by1, by1)))
        for (xs, ys), colour in zip(sides, COLOURS, strict=True):
            axes.plot(xs, ys, color=colour, linestyle=style, linewidth=2, path_effects=halo, solid_capstyle="butt")
    axes.set(xlim=(window[0], window[2]), ylim=(window[3], window[1]))
    axes.tick_params(labelbottom=False, bottom=False, labelsize=10)
    axes.set_ylabel("y, pixels", fontsize=10)
    axes.yaxis.set_label_coords(*_label_place(window))


def pixel_borders(mask: np.ndarray) -> np.ndarray:
    """(M, 2, 2) x, y of both ends of the borders between pixels inside and outside of a mask."""
    padded = np.pad(mask, 1)
    lines = []
    for changes, along in ((np.diff(padded, axis=0)[:, 1:-1], (1, 0)), (np.diff(padded, axis=1)[1:-1], (0, 1))):
        start = np.argwhere(changes)[:, ::-1]
        lines.append(np.stack([start, start + along], axis=1))
    return np.concatenate(lines)


def _draw_mask_panel(axes: Axes, own: Objects, evidence: Evidence, axis: int, window: Window) -> None:
    """What the mask says: its profile, and the likelihood of both edges."""
    bounds = np.arange(len(evidence.profile) + 1)  # pixel i covers [i, i + 1)
    axes.stairs(evidence.profile, bounds, orientation="horizontal" if axis else "vertical", fill=True, color="0.8")
    for position, likelihood, colour in zip(evidence.positions, evidence.likelihood, (NEAR, FAR), strict=True):
        shown = (position >= window[axis]) & (position <= window[axis + 2])
        value = likelihood[shown]
        _curve(axes, axis, position[shown], np.exp(value - value.max()), color=colour, linewidth=1.6)
    _frame(axes, own, axis, window, "mask: profile,\nlikelihood", outer=False)
    value = "x" if axis else "y"
    axes.set(**{f"{value}lim": (0, 1.08), f"{value}ticks": [0, 0.5, 1], f"{value}ticklabels": ["0", "0.5", "1"]})


def _draw_edge_panel(axes: Axes, own: Objects, evidence: Evidence, axis: int, window: Window) -> None:
    """What is believed of both edges before and after the mask was read, near to where it is anything."""
    regressed = own.regressed_boxes[0, axis::2].numpy()
    fill = axes.fill_betweenx if axis else axes.fill_between
    for side, colour in enumerate((NEAR, FAR)):
        shown = np.abs(evidence.positions[side] - regressed[side]) <= 1.3 * EVIDENCE * evidence.sigma + 1
        at, posterior = evidence.positions[side][shown], evidence.posterior[side][shown]
        _curve(axes, axis, at, evidence.prior[side][shown], color=colour, linewidth=1.4, linestyle=DASHED)
        _curve(axes, axis, at, posterior, color=colour, linewidth=1.8)
        fill(at, posterior, color=colour, alpha=0.3, linewidth=0)
    _frame(axes, own, axis, window, "edge: prior,\nposterior", outer=True)
    value: Literal["x", "y"] = "x" if axis else "y"
    axes.set(**{f"{value}lim": (0, None)})
    axes.locator_params(axis=value, nbins=3)


def _curve(axes: Axes, axis: int, at: np.ndarray, value: np.ndarray, **style: Any) -> None:
    axes.plot(*((value, at) if axis else (at, value)), **style)


def _label_place(window: Window) -> tuple[float, float]:
    """Of the names at the left, in widths and heights of the picture: in one line, whatever the numbers' length."""
    return -0.55 * max(window[2] - window[0], window[3] - window[1]) / (SIDE * (window[2] - window[0])), 0.5


def _frame(axes: Axes, own: Objects, axis: int, window: Window, name: str, *, outer: bool) -> None:
    """Lines at the edges, and the pixels of the picture along it, numbered where nothing else lies beyond; its name."""
    line = axes.axhline if axis else axes.axvline
    for boxes, style in ((own.regressed_boxes, DASHED), (own.boxes, "-")):
        for edge, colour in zip(boxes[0, axis::2].tolist(), (NEAR, FAR), strict=True):
            line(edge, color=colour, linestyle=style, linewidth=0.9, alpha=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=10)
    if axis == 0:
        axes.set_xlim(window[0], window[2])
        axes.set_ylabel(name, fontsize=10)
        axes.yaxis.set_label_coords(*_label_place(window))
        axes.tick_params(labelbottom=outer)
        if outer:
            axes.set_xlabel("x, pixels", fontsize=10)
    else:
        axes.set_ylim(window[3], window[1])
        axes.set_title(name, fontsize=10)
        axes.tick_params(labelleft=False)


def _write_notes(figure: Figure, own: Objects, left: float, top: float) -> None:
    """The legend and the numbers, from this place on, inches."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    width, height = figure.get_size_inches()
    handles = [
        Line2D([], [], color=NEAR, linewidth=2, label="left, top"),
        Line2D([], [], color=FAR, linewidth=2, label="right, bottom"),
        Line2D([], [], color="0.3", linewidth=1.6, linestyle=DASHED, label="regressed box, prior"),
        Line2D([], [], color="0.3", linewidth=1.6, label="refined box; likelihood, posterior"),
        Patch(facecolor="0.8", label="highest probability of the mask"),
        Line2D([], [], color=MASK, linewidth=2.5, label="outline of the mask"),
    ]
    place = (left / width, 1 - top / height)
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=place, fontsize=10, frameon=False, borderaxespad=0)
    values = zip(EDGES, own.regressed_boxes[0].tolist(), own.boxes[0].tolist(), own.edge_std[0].tolist(), strict=True)
    lines = ["edge   regressed  refined"]
    lines += [f"{name:<7}{before:7.1f} → {after:7.1f} ± {std:4.1f}" for name, before, after, std in values]
    place = (place[0], 1 - (top + 1.45) / height)
    figure.text(*place, "\n".join(lines), family="monospace", fontsize=10, va="top", linespacing=1.35)
