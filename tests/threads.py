"""Counting the threads that a call runs on."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def threads_that_run(call: Callable[[], object]) -> int:
    """How many threads of this process are on a CPU during each of ten calls, by the clock that Linux has for every thread.

    In some of them a thread of PyTorch's last call still goes to sleep.
    """

    def clocks() -> dict[int, int]:
        ids = [int(task.name) for task in Path("/proc/self/task").iterdir()]
        return {i: time.clock_gettime_ns(~i << 3 | 6) for i in ids}  # as pthread_getcpuclockid does

    counts = []
    for _ in range(10):
        before = clocks()
        call()
        counts.append(sum(ns > before.get(i, 0) for i, ns in clocks().items()))
    return min(counts)
