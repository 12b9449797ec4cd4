"""Compiled graphs: what the backend returns to Dynamo, and the list of those alive, for reports."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import fx

from llmopt.executor import Segment, segments_of
from llmopt.gpu.executor import GpuSegment
from llmopt.options import Options
from llmopt.overlaps import Overlaps
from llmopt.plan import Plan
from llmopt.quant.budget import Decision
from llmopt.weights import PackedWeight


class RanSegment(NamedTuple):
    """A segment in one profiled call, with nanoseconds and (flops, bytes) per step."""

    segment: Segment
    step_ns: list[int]
    costs: list[tuple[int, int]]


@dataclass
class Run:
    """One profiled call of a compiled graph: every segment that ran, and the whole call."""

    graph: CompiledGraph
    reason: str  # why the call ran as in PyTorch, if it did
    seconds: float = 0.0
    segments: dict[str, RanSegment] = field(default_factory=dict)  # by name


@dataclass(eq=False)
class CompiledGraph:
    """A Dynamo graph as llmopt runs it. Calling it is calling the graph."""

    plan: Plan | None
    executable: fx.GraphModule
    compile_seconds: dict[str, float]
    options: Options
    reason: str = ""  # why the whole graph runs as in PyTorch, if it does
    decision: Decision | None = None  # of precision="auto"
    overlaps: Overlaps | None = None
    calls: int = 0
    _forward: Callable[..., Any] = field(init=False)

    def __post_init__(self) -> None:
        forward = self.executable.forward
        self._forward = forward if self.overlaps is None else self.overlaps.guard(forward)
        _alive.append(weakref.ref(self))

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        if _profile.runs is not None:
            return self._profiled(arguments)
        return self._forward(*arguments)

    def segments(self) -> list[Segment]:
        return segments_of(self.executable)

    def forget_weights(self) -> None:
        """Makes the next call pack or prepare every weight anew."""
        for module in self.executable.children():
            if isinstance(module, Segment | GpuSegment):
                module.forget_weights()

    def cuda_graphs(self) -> list[str]:
        """What is to be said about CUDA graphs, where they were asked for."""
        segments = [m for m in self.executable.children() if isinstance(m, GpuSegment)]
        return [s.graphs.summary() for s in segments if s.graphs is not None]

    def packed(self) -> list[PackedWeight]:
        """The packed weights it reads, some of which other graphs may share."""
        return [weight for segment in self.segments() for weight in segment.packed()]

    def _profiled(self, arguments: tuple) -> Any:
        run = Run(self, self._why_not(arguments))
        segments = self.segments()
        for segment in segments:
            segment.forward = _profiling(segment, run.segments)  # type: ignore[method-assign]
        start = time.perf_counter()
        try:
            result = self._forward(*arguments)
        finally:
            for segment in segments:
                del segment.forward
        run.seconds = time.perf_counter() - start
        assert _profile.runs is not None
        _profile.runs.append(run)
        return result

    def _why_not(self, arguments: tuple) -> str:
        """Why a call runs as in PyTorch, or ""."""
        return self.reason or (self.overlaps.found(arguments) if self.overlaps is not None else "")


def _profiling(segment: Segment, seen: dict[str, RanSegment]) -> Callable[..., Any]:
    def forward(*arguments: Any) -> Any:
        results = segment.profiled(*arguments)
        ran = segment.running()  # another one, where that packs these weights
        symbols = ran.symbol_values(arguments)
        seen[ran.name] = RanSegment(ran, list(ran.profile_ns or []), ran.costs(symbols))
        return results

    return forward


class _Profile(threading.local):
    """Where profiled calls of this thread are collected; None while nobody asks."""

    runs: list[Run] | None = None


_profile = _Profile()
_alive: list[weakref.ref[CompiledGraph]] = []


def alive() -> list[CompiledGraph]:
    """Every compiled graph that still exists, oldest first."""
    _alive[:] = [r for r in _alive if r() is not None]
    return [g for r in _alive if (g := r()) is not None]


class profiling:
    """Within it, compiled graphs called by this thread record how long each step takes."""

    def __enter__(self) -> list[Run]:
        _profile.runs = []
        return _profile.runs

    def __exit__(self, *_: object) -> None:
        _profile.runs = None
