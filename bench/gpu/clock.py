"""Seconds of a call on a GPU, with a cold L2 cache; and a stand-in that only runs the call, for rehearsals."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Call = Callable[[], Any]


@dataclass(frozen=True)
class Clock:
    """A way to time: `seconds` of one call, and what results of it are called."""

    seconds: Callable[[Call], float]
    source: str  # "measured" or "rehearsed"


def _on_gpu(call: Call) -> float:
    from triton.testing import do_bench

    # do_bench clears L2 between calls and waits for the GPU; milliseconds.
    return float(do_bench(call, warmup=10, rep=40, return_mode="median")) / 1e3


def _once(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


MEASURED = Clock(_on_gpu, "measured")
REHEARSED = Clock(_once, "rehearsed")
