"""The command line: `rdsnet COMMAND`.

A command is a function whose signature and docstring say its options. What it needs is imported when it runs, so that
`rdsnet --help` and the answer to a simple mistake do not wait for torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from rdsnet.cli.data import check, convert, shapes
from rdsnet.cli.help import explain, overview
from rdsnet.cli.options import Command, parse, title
from rdsnet.cli.predict import demo, predict
from rdsnet.cli.refine import fit_refiner
from rdsnet.cli.studies import benchmark, reproduce
from rdsnet.cli.train import evaluate, train, typed_settings
from rdsnet.cli.visualize import visualize
from rdsnet.settings import nearest
from rdsnet.terminal import show_messages

COMMANDS: dict[str, Command] = {
    title(command).removeprefix("rdsnet "): command
    for command in (
        train,
        evaluate,
        predict,
        check,
        shapes,
        convert,
        benchmark,
        reproduce,
        visualize,
        fit_refiner,
        demo,
    )
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status: 0, 2 for bad input, 130 for Ctrl-C."""
    # Large tensors in large pages; read by torch when it allocates the first. Prediction on a CPU is 15% faster.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    show_messages()
    try:
        run(list(sys.argv[1:] if arguments is None else arguments))
        return 0
    except BrokenPipeError:  # `rdsnet check ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except _answered() as error:
        print(f"rdsnet: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(f"\nrdsnet: {str(stopped) or 'stopped'}", file=sys.stderr)
        return 130


def _answered() -> tuple[type[Exception], ...]:
    """Errors that whoever typed the command can do something about."""
    memory = [sys.modules["torch"].OutOfMemoryError] if "torch" in sys.modules else []
    return (ValueError, OSError, FloatingPointError, MemoryError, *memory)


HELP = {"-h", "--help", "--help_all", "--help-all"}


def run(words: Sequence[str]) -> None:
    """What was typed after `rdsnet`."""
    if not words:
        raise ValueError(f"expected a command: {', '.join(COMMANDS)}; rdsnet --help explains them")
    name, rest = words[0].replace("_", "-"), words[1:]
    asked = HELP.intersection(words)
    if name == "--version":
        from rdsnet import __version__

        print(f"rdsnet {__version__}")
    elif name in HELP:
        print(overview(COMMANDS))
    elif name not in COMMANDS:
        advice = nearest(name, COMMANDS) or "; rdsnet --help lists the commands"
        raise ValueError(f"unknown command {words[0]!r}{advice}")
    elif asked:
        others = [word for word in rest if word not in HELP]
        everything = not asked.isdisjoint({"--help_all", "--help-all"})
        print(explain(COMMANDS[name], lambda: typed_settings(others), everything=everything))
    else:
        COMMANDS[name](**parse(COMMANDS[name], rest))
