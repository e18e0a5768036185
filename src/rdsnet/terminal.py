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
    if messages.handlers:
        return
    messages.setLevel(logging.INFO)
    said, warned = logging.StreamHandler(sys.stdout), logging.StreamHandler(sys.stderr)
    said.addFilter(lambda record: record.levelno < logging.WARNING)
    warned.setLevel(logging.WARNING)
    for handler in (said, warned):
        messages.addHandler(handler)
