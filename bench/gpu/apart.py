"""A piece of work in a process of its own: a GPU fault, a crash or a hang there ends nothing else."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable


def apart(work: Callable[[], None], seconds: float) -> str:
    """Runs work in a fork of this process, which must not have used a GPU; "" or what went wrong there."""
    process = multiprocessing.get_context("fork").Process(target=_in_group, args=(work,))
    process.start()
    process.join(seconds)
    if process.is_alive():
        assert process.pid is not None
        with contextlib.suppress(ProcessLookupError):  # it has no group yet, or ended just now
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
        return f"stopped after {seconds:.0f} s"
    code = process.exitcode or 0
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    return f"its process ended with exit code {code}" if code else ""


def _in_group(work: Callable[[], None]) -> None:
    """With the processes it starts, so that they end with it."""
    os.setsid()
    work()
