"""`rdsnet benchmark` and `rdsnet reproduce`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from rdsnet.cli.options import add_device, add_speed
from rdsnet.settings import read_yaml


def define_benchmark(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    parser.add_argument(
        "weights", type=str | None, nargs="?", default=None, help="nuclei, a run folder or a .safetensors file"
    )
    parser.add_argument(
        "--preset", type=str | None, default=None, help="random weights; default, without weights: rdsnet_r50"
    )
    parser.add_argument("--classes", type=int | None, default=None, help="of the preset; default: 80")
    parser.add_argument("--image", type=Path | None, default=None, help="default: one is made")
    size = "of the image that is made, pixels; settings say what the network gets of it; default: 480 640"
    parser.add_argument("--size", type=int, nargs=2, default=None, metavar=("H", "W"), help=size)
    objects = "boxes drawn in place of what is found; default: 100, but none for weights with an image"
    parser.add_argument("--objects", type=int | None, default=None, help=objects)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 2, 4], help="images at once")
    parser.add_argument("--rounds", type=int, default=7, help="everything is timed so often, in turn")
    parser.add_argument("--threads", type=int | None, default=None, help="of the CPU; default: torch's choice")
    parser.add_argument("--output", type=Path | None, default=None, help="JSON file to write")
    add_speed(parser)


def run_benchmark(options: Namespace) -> None:
    """Measure speed and memory by stage, and how much of the machine's own convolution rate the network reaches."""
    from rich.console import Console

    from rdsnet.benchmark.run import measure_source as run
    from rdsnet.benchmark.run import speed_table as format_table

    Console().print(format_table(run(**options.as_dict())))
    if options.output is not None:
        print(f"numbers: {options.output}")


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

    from rdsnet.reproduce.run import reproduce
    from rdsnet.reproduce.tables import terminal

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
