"""Seconds of a call on a GPU, with a cold L2 cache and without the host's share; and a stand-in that only runs the call, for rehearsals.

The host needs longer to launch a short kernel than the kernel runs, and a CUDA graph longer to begin. So two graphs are timed: one that
clears L2 several times, and one that clears it before each of as many calls. What the second takes longer are the calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

Call = Callable[[], Any]
WARM_CALLS = 3  # before a capture: they compile, and allocate what stays
_CALLS = 10  # of one graph
_REPLAYS = 15
_CLEARING = (
    256 << 20
)  # bytes that are read: several times any L2. Written ones would go back to memory while the call runs


@dataclass(frozen=True)
class Timed:
    """seconds of one call; note: what they contain that they should not, or ""."""

    seconds: float
    note: str = ""


@dataclass(frozen=True)
class Clock:
    """A way to time: `time` one call on the GPU, `wall` as a user sees it, and what results of it are called."""

    time: Callable[[Call], Timed]
    source: str  # "measured" or "rehearsed"

    def wall(self, call: Call, calls: int) -> float:
        """Seconds of one call on the host's clock, until its results are there; the median of several."""
        is_gpu = self is MEASURED
        seconds = []
        for _ in range(calls):
            if is_gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            if is_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return median(seconds)

    def busy(self, call: Call, calls: int) -> float:
        """Seconds for which the GPU runs kernels in one call, as its own profiler says; 0 in a rehearsal."""
        if self is not MEASURED:
            return 0.0
        from torch.profiler import ProfilerActivity, profile

        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
            for _ in range(calls):
                call()
            torch.cuda.synchronize()
        on_gpu = (e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA)
        microseconds = sum(e.time_range.elapsed_us() for e in on_gpu if not e.is_user_annotation)
        return microseconds / calls / 1e6


def _on_gpu(call: Call) -> Timed:
    try:
        return Timed(_between_clearings(call))
    except RuntimeError as error:
        note = f"with the host's share, no CUDA graph: {error}".splitlines()[0][:120]
    from triton.testing import do_bench

    # do_bench clears L2 between calls and waits for the GPU; milliseconds.
    return Timed(float(do_bench(call, warmup=10, rep=40, return_mode="median")) / 1e3, note)


def _between_clearings(call: Call) -> float:
    """Seconds of a call as a node of a graph. Raises RuntimeError where it cannot be captured."""
    buffer = torch.zeros(_CLEARING // 4, device="cuda")

    def clear() -> None:
        torch.amax(buffer)

    def both() -> None:
        clear()
        call()

    graphs = [_captured(clear), _captured(both)]
    seconds: list[list[float]] = [[], []]
    for _ in range(_REPLAYS):
        for graph, found in zip(graphs, seconds, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / 1e3)
    cleared, whole = map(median, seconds)
    return max(whole - cleared, 0.0) / _CALLS


def _captured(body: Call) -> torch.cuda.CUDAGraph:
    """A body several times over, run once already."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_CALLS):
            body()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(_CALLS):
            body()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _once(call: Call) -> Timed:
    start = time.perf_counter()
    call()
    return Timed(time.perf_counter() - start)


MEASURED = Clock(_on_gpu, "measured")
REHEARSED = Clock(_once, "rehearsed")
