"""What is shown in a terminal while something long runs."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress_bar(what: str, items: Iterable[Any] | None = None, **options: Any) -> tqdm[Any]:
    """A bar of steps, drawn often on a terminal and now and then into a file."""
    pause = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(items, desc=what, mininterval=pause, dynamic_ncols=True, **options)
