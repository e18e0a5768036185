"""The command line: `rdsnet COMMAND`.

Each command is a function that defines its options and one that runs it; what they need is imported when they run, so
that `rdsnet --help` does not wait for torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from rdsnet.cli.data import define_check, define_convert, define_shapes, run_check, run_convert, run_shapes
from rdsnet.cli.predict import define_demo, define_predict, run_demo, run_predict
from rdsnet.cli.refine import define_fit_refiner, run_fit_refiner
from rdsnet.cli.studies import define_benchmark, define_reproduce, run_benchmark, run_reproduce
from rdsnet.cli.train import define_evaluate, define_train, run_evaluate, run_train
from rdsnet.cli.visualize import define_visualize, run_visualize


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status: 0, 2 for bad input, 130 for Ctrl-C."""
    # Large tensors in large pages; read by torch when it allocates the first. Prediction on a CPU is 15% faster.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        parser = build_parser(arguments)
        options = parser.parse_args(arguments)
        run: Callable[[Namespace], None] = COMMANDS[options.command][1]
        run(options[options.command])
        return 0
    except BrokenPipeError:  # `rdsnet check ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ArgumentError, ValueError, OSError, FloatingPointError) as error:
        # what a loader process raised comes back as a whole traceback, with the message as its last line
        message = str(error).strip().splitlines()[-1] if "Traceback" in str(error) else str(error)
        print(f"rdsnet: error: {' '.join(message.split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(f"\nrdsnet: {str(stopped) or 'stopped'}", file=sys.stderr)
        return 130


def build_parser(arguments: Sequence[str]) -> ArgumentParser:
    """The parser; defaults of `train` are those of the preset, or of the run to resume, that `arguments` name."""
    description = "RDSNet: objects as tight boxes and full-resolution masks."
    parser = ArgumentParser(prog="rdsnet", description=description, exit_on_error=False, allow_abbrev=False)
    commands = parser.add_subcommands(dest="command", required=True)
    for name, (define, run) in COMMANDS.items():
        description = " ".join((run.__doc__ or "").split())
        command = ArgumentParser(
            prog=f"rdsnet {name}", description=description, exit_on_error=False, allow_abbrev=False
        )
        define(command, arguments if arguments[:1] == [name] else [])
        commands.add_subcommand(name, command, help=description)
    return parser


COMMANDS: dict[str, tuple[Callable[[ArgumentParser, Sequence[str]], None], Callable[[Namespace], None]]] = {
    "train": (define_train, run_train),
    "evaluate": (define_evaluate, run_evaluate),
    "predict": (define_predict, run_predict),
    "check": (define_check, run_check),
    "shapes": (define_shapes, run_shapes),
    "convert": (define_convert, run_convert),
    "benchmark": (define_benchmark, run_benchmark),
    "reproduce": (define_reproduce, run_reproduce),
    "visualize": (define_visualize, run_visualize),
    "fit-refiner": (define_fit_refiner, run_fit_refiner),
    "demo": (define_demo, run_demo),
}
