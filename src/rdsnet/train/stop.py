"""How a run ends before its time: on Ctrl-C, or when it loses what it needs; as errors that say what to do."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from rdsnet.data.loading import lost_a_process

logger = logging.getLogger(__name__)


class StopRequest:
    """While entered, the first Ctrl-C sets `asked`, the second raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> StopRequest:
        # Python allows signal handlers in the main thread only
        self._previous: Any = None
        if threading.current_thread() is threading.main_thread():
            self._process = os.getpid()
            self._previous = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        # loader processes inherit this handler, and Ctrl-C reaches them too: they go on until the step is done
        if os.getpid() != self._process:
            return
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        sys.stderr.write("\nstopping after this step; press Ctrl-C again to stop at once\n")


def advice(output: Path) -> str:
    """How to go on with a run that was stopped."""
    if (output / "last.ckpt").exists():
        return f"continue with `rdsnet train --resume {output}`"
    return "nothing was kept yet"


def explain(error: Exception, output: Path, ranks: RankWatch) -> Exception:
    """The error that says what a training lost and what to do, where this error is for that reason; else this one."""
    if lost_a_process(error):
        return ChildProcessError(
            f"a process that loads images was killed (memory may have run out: fewer data.workers take less); "
            f"{advice(output)}"
        )
    # What waited for another process fails as a RuntimeError; an error of its own must not hide behind the others' end
    if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
        lost = ranks.lost(patience=2.0)
        if lost is not None:
            return ChildProcessError(f"{lost}; {advice(output)}")
    if isinstance(error, OSError) and not output.is_dir():
        return FileNotFoundError(
            f"the run folder {output} is gone (removed, moved or no longer mounted): put it back and continue with "
            f"`rdsnet train --resume {output}`, or start again"
        )
    return error


class RankWatch(threading.Thread):
    """Sees when another process of a training dies, also where this one waits for it and would not wake.

    The first process knows those that it started, and they know it. What is lost is logged at once. Who then does not
    fail by itself, which takes a GPU's collectives long, is ended: the first process by Lightning, the others here.

    Args:
        output: the run folder.
        started: the processes of ranks 1, 2, ...
        rank: of this process.
    """

    GRACE = 10.0  # seconds

    def __init__(self, output: Path) -> None:
        super().__init__(daemon=True, name="watch of the other processes")
        self.output = output
        self.started: Sequence[subprocess.Popen[Any]] = ()
        self.rank = 0
        self._parent = os.getppid()
        self._over = threading.Event()

    def begin(self, started: Sequence[subprocess.Popen[Any]], rank: int) -> None:
        self.started, self.rank = started, rank
        self.start()

    def end(self) -> None:
        self._over.set()

    def lost(self, patience: float = 0.0) -> str | None:
        """What is lost, within some seconds: a connection breaks a moment before the process has ended."""
        until = time.monotonic() + patience
        while True:
            for rank, process in enumerate(self.started, 1):
                code = process.poll()
                if code:
                    reason = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
                    return f"process {rank} of this training {reason}"
            if self.rank > 0 and os.getppid() != self._parent:
                return "the first process of this training is gone"
            if not (self.started or self.rank) or time.monotonic() >= until:
                return None
            time.sleep(0.05)

    def run(self) -> None:
        while not self._over.wait(0.2):
            lost = self.lost()
            if lost is not None:
                logger.error("%s: all of them stop; %s", lost, advice(self.output))
                if not self._over.wait(self.GRACE):
                    os._exit(2)
                return
