"""What is shown in a terminal while something long runs."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress_bar(what: str, items: Iterable[Any] | None = None, **options: Any) -> tqdm[Any]:
    """A bar of steps, drawn often on a terminal and now and then into a file."""
    pause = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(items, desc=what, mininterval=pause, dynamic_ncols=True, **options)


def show_messages() -> None:
    """What the package logs for its user goes to standard output, warnings and errors to standard error."""
    messages = logging.getLogger("rdsnet")
    if not messages.handlers:
        messages.setLevel(logging.INFO)
        messages.addHandler(_Terminal())


class _Terminal(logging.Handler):
    """Writes to the streams as they are when something is said: they may be others than those of the first command."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr if record.levelno >= logging.WARNING else sys.stdout, flush=True)
        except OSError:
            self.handleError(record)
