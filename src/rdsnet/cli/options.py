"""Options that several commands share."""

from __future__ import annotations

from typing import Literal

from jsonargparse import ArgumentParser


def add_device(parser: ArgumentParser) -> None:
    devices = Literal["auto", "cpu", "cuda"]
    parser.add_argument("--device", type=devices, default="auto", help="auto: a GPU where there is one")


def add_speed(parser: ArgumentParser) -> None:
    add_device(parser)
    precisions = Literal["auto", "32", "bf16", "bf16-forced"]
    meanings = "of the network; auto: bf16 where the processor or GPU has instructions for it; bf16-forced: anywhere"
    parser.add_argument("--precision", type=precisions, default="32", help=meanings)
    parser.add_argument("--compile", action="store_true", help="compile the network, which takes a minute at first")
