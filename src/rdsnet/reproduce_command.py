"""`rdsnet reproduce`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from rdsnet.options import add_device
from rdsnet.settings import read_yaml


def define_reproduce(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    what = Literal["table1", "table2", "table3", "table4", "figure3", "figure4", "figure5"]
    meanings = (
        "table1: instance segmentation; table2: detection; table3: correlation and cropping (4 trainings a seed); "
        "table4: boundary refinement; figure3: representations; figure4: pictures; figure5: MBRM's gamma and s"
    )
    parser.add_argument("what", type=what, help=meanings)
    parser.add_argument(
        "--data",
        type=str,
        default="shapes",
        help="shapes (made, cluttered), or a folder with train.json and val.json, or COCO's",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="gets WHAT.csv, .md and .png; repeated, it goes on where it stopped"
    )
    parser.add_argument(
        "--budget",
        type=Literal["tiny", "small", "full"],
        default="small",
        help="tiny: a trial in seconds; small: minutes a training on two CPU cores; full: the presets' own schedules",
    )
    parser.add_argument("--seeds", type=int, default=3, help="so many trainings of each kind: seeds 0, 1, ...")
    parser.add_argument(
        "--preset_family",
        type=Literal["tiny", "full"] | None,
        default=None,
        help="full: the paper's models; tiny: small ones from scratch; default: full for COCO, else tiny",
    )
    parser.add_argument("--config", type=Path | None, default=None, help="YAML file of settings over every preset")
    add_device(parser)


def run_reproduce(options: Namespace) -> None:
    """Measure a table or figure of the paper: train what it needs, and print its rows beside the paper's."""
    from rich.console import Console

    from rdsnet.reproduce import reproduce
    from rdsnet.reproduce.report import terminal

    try:
        settings = {} if options.config is None else read_yaml(options.config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{options.config}: {error}") from None
    result = reproduce(
        options.what,
        options.output,
        data=options.data,
        budget=options.budget,
        seeds=options.seeds,
        family=options.preset_family,
        settings=settings,
        device=options.device,
    )
    print(result.title)
    Console().print(*terminal(result))
    if result.note:
        print(f"in brackets, the paper's figures: {result.note}")
    print(f"{options.what}.csv, .md and .png: {options.output}")
