"""Metrics as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table

from rdsnet.results.metrics import COLUMNS, IOUS, MAX_DETECTIONS


def format_parts(parts: Mapping[str, dict[str, Any]], field: str) -> Table:
    """The metrics of parts of a data set as a table, in percent: AP of boxes before and after, of masks and boundaries.

    Args:
        parts: by name, from `CocoEvaluator.summarize`.
        field: what tells the parts apart.
    """
    table = Table(title=f"by {field}")
    table.add_column(field, overflow="fold")  # names that begin alike must not be cut
    kinds = ("regressed", "direct", "refined")
    for heading in ("images", "objects", *(f"box {kind}" for kind in kinds), "mask", "boundary"):
        table.add_column(heading, justify="right")
    for name, metrics in parts.items():
        values = [metrics["box"].get(kind) for kind in kinds] + [metrics.get("mask"), metrics.get("boundary")]
        table.add_row(
            name,
            str(metrics["images"]),
            str(metrics["objects"]),
            *(_percent(value and value["AP"]) for value in values),
        )
    return table


def format_table(metrics: dict[str, Any], class_names: Sequence[str]) -> Group:
    """The metrics as tables for the terminal (`rich`), in percent; the second, by class, only for several classes.

    Args:
        metrics: from `CocoEvaluator.summarize`.
        class_names: by label.
    """
    title = f"{metrics['images']} images, {metrics['objects']} objects, at most {metrics['max_detections']} detections"
    table = Table("", title=title)
    for heading in ("AP", "AP50", "AP75", "small", "medium", "large"):
        table.add_column(heading, justify="right")
    rows = {f"box {kind}": values for kind, values in metrics["box"].items()}
    rows |= {name: metrics[name] for name in ("mask", "boundary") if name in metrics}
    for name, values in rows.items():
        table.add_row(name, *(_percent(values[column]) for column in COLUMNS))
    if len(class_names) < 2:
        return Group(table)
    by_class = Table("class", title="by class")
    for heading in ("objects", "box AP", "mask AP"):
        by_class.add_column(heading, justify="right")
    for name, row in zip(class_names, metrics["per_class"], strict=True):
        by_class.add_row(name, str(row["objects"]), _percent(row["box_AP"]), _percent(row["mask_AP"]))
    return Group(table, by_class)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def ap_table(columns: Mapping[str, np.ndarray]) -> Table:
    """Box AP in percent, averaged and at each IoU, for the terminal."""
    table = Table("box AP", title=f"on the images that were fitted to, at most {MAX_DETECTIONS} detections")
    for name in columns:
        table.add_column(name, justify="right")
    rows = {"AP": [values.mean() for values in columns.values()]}
    rows |= {f"IoU {iou:.2f}": [values[i] for values in columns.values()] for i, iou in enumerate(IOUS)}
    for name, row in rows.items():
        table.add_row(name, *(f"{100 * value:.1f}" for value in row))
    return table
