"""CUDA graphs of one segment, in mode="reduce-overhead": its launches captured once and replayed over the same memory.

Weights and static caches are read where they are, which is part of what a graph is found by; every other input is copied into memory of
the graph's own, and results out of it. Captures and replays of a device happen on one stream, so that no two share scratch memory.
See docs/adr/0007-cuda-graphs-per-segment.md.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from llmopt.gpu.segment import GpuSegmentBuilder
from llmopt.gpu.weights import Prepared
from llmopt.graph import is_in_place, kind, view_base
from llmopt.messages import say
from llmopt.parameters import is_weight
from llmopt.writes import written_by

log = logging.getLogger("llmopt")

MOST_GRAPHS = 8  # of a segment; the one replayed longest ago goes
_MOST_SEEN = 256
_REPEATABLE = frozenset({"index_copy_"})  # writes that give the same when done twice
# Of all steps, over arguments and results; gives what must live as long as the launches may be repeated.
Launch = Callable[[Sequence[Any], Sequence[Tensor]], Any]


class Recorder(Protocol):
    """What captures launches and replays them: the driver, or a stand-in for it in tests."""

    def ordered(self) -> AbstractContextManager[None]:
        """Within it, work is behind all earlier replays and all earlier work of the current stream, and in front of later work."""

    def capture(self, body: Callable[[], None]) -> Callable[[], None]:
        """Captures what body launches, without running it; returns what replays it, within `ordered`."""


class CudaRecorder:
    """CUDA graphs of one device, with a stream and a memory pool that all of them share."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def ordered(self) -> Any:
        outside = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(outside)
        with torch.cuda.stream(self._stream):
            yield
        outside.wait_stream(self._stream)

    def capture(self, body: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # Another thread may allocate while this one captures.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            body()
        return graph.replay


_recorders: dict[torch.device, Recorder] = {}
_recorders_lock = threading.Lock()


def recorder_of(device: torch.device) -> Recorder:
    """The recorder of a device, made once."""
    with _recorders_lock:
        if device not in _recorders:
            _recorders[device] = CudaRecorder(device)
        return _recorders[device]


@dataclass
class _Captured:
    """A graph with the memory it reads and writes; it keeps alive what its launches point to."""

    replay: Callable[[], None]
    inputs: list[tuple[int, Tensor]]  # (argument, its copy)
    results: list[Tensor]
    weights: list[Prepared]
    plans: list[Any]


class SegmentGraphs:
    """Decides, call by call, whether a segment's launches are made, captured or replayed."""

    def __init__(self, builder: GpuSegmentBuilder, name: str) -> None:
        self.name = name
        self.reason = _why_not(builder)  # why none can be captured, or ""
        self.replays = 0
        self._held = _held(builder)
        self._graphs: OrderedDict[tuple, _Captured] = OrderedDict()
        self._seen: OrderedDict[tuple, None] = OrderedDict()
        self._lock = threading.Lock()

    def run(
        self,
        arguments: Sequence[Any],
        symbols: Sequence[int],
        weights: list[Prepared],
        results: Sequence[Tensor],
        launch: Launch,
    ) -> bool:
        """Fills the results by a graph, captured now if this call is the second of its kind; False: launch instead.

        The first call of a kind is launched: kernels are compiled then, and many kinds never come again.
        """
        if self.reason:
            return False
        held = tuple(arguments[i].data_ptr() for i in self._held)
        key = (*symbols, *held, *map(id, weights))
        with self._lock:
            found = self._graphs.get(key)
            if found is None:
                if not self._seen_before(key):
                    return False
                found = self._capture(arguments, weights, results, launch)
                if found is None:
                    return False
                self._graphs[key] = found
                if len(self._graphs) > MOST_GRAPHS:
                    self._graphs.popitem(last=False)
            self._graphs.move_to_end(key)
            self._replay(found, arguments, results)
        return True

    def summary(self) -> str:
        """In words, for explain and LLMOPT_DEBUG."""
        if self.reason:
            return f"{self.name}: no CUDA graph: {self.reason}"
        return f"{self.name}: {len(self._graphs)} CUDA graph(s), replayed {self.replays} times"

    def _seen_before(self, key: tuple) -> bool:
        if key in self._seen:
            return True
        self._seen[key] = None
        if len(self._seen) > _MOST_SEEN:
            self._seen.popitem(last=False)
        return False

    def _capture(
        self,
        arguments: Sequence[Any],
        weights: list[Prepared],
        results: Sequence[Tensor],
        launch: Launch,
    ) -> _Captured | None:
        recorder = recorder_of(results[0].device)
        own: list[Any] = list(arguments)
        inputs = []
        for i, value in enumerate(arguments):
            if isinstance(value, Tensor) and i not in self._held:
                own[i] = _memory_like(value)
                inputs.append((i, own[i]))
        made = [_memory_like(r) for r in results]
        plans: list[Any] = []
        try:
            with recorder.ordered():
                _copy([(t, arguments[i]) for i, t in inputs])
                launch(own, made)  # compiles for the copies' alignment: a capture cannot
            replay = recorder.capture(lambda: plans.append(launch(own, made)))
        except RuntimeError as error:
            self.reason = f"capturing failed: {error}"
            log.warning("%s", self.summary())
            return None
        say(1, f"{self.name}: CUDA graph {len(self._graphs) + 1} captured")
        return _Captured(replay, inputs, made, weights, plans)

    def _replay(
        self, graph: _Captured, arguments: Sequence[Any], results: Sequence[Tensor]
    ) -> None:
        with recorder_of(results[0].device).ordered():
            _copy([(t, arguments[i]) for i, t in graph.inputs])
            graph.replay()
            _copy(list(zip(results, graph.results, strict=True)))
        self.replays += 1


def _memory_like(tensor: Tensor) -> Tensor:
    """Uninitialised memory in exactly this tensor's layout: empty_like makes what has gaps dense."""
    return torch.empty_strided(
        tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )


def _copy(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    for to, source in pairs:
        _distinct(to).copy_(_distinct(source))


def _distinct(tensor: Tensor) -> Tensor:
    """Every element in memory once: an expanded dimension is its first index."""
    for dimension, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dimension]:
            tensor = tensor.narrow(dimension, 0, 1)
    return tensor


def _why_not(builder: GpuSegmentBuilder) -> str:
    if builder.kv:
        return (
            "a cache that grows: its length and place are arguments of the launches; "
            "decoding with a static cache gets one"
        )
    for record in builder.records:
        if is_in_place(record.node) and kind(record.node) not in _REPEATABLE:
            return f"{kind(record.node)} writes an input in place"
    return "" if builder.results else "it has no result of its own"


def _held(builder: GpuSegmentBuilder) -> tuple[int, ...]:
    """The arguments a graph reads where they are: weights, and what the segment writes."""
    inputs = {view_base(node): number for node, number in builder.inputs.items()}
    found = {view.argument for spec in builder.specs() for view in spec.views()}
    found |= {number for node, number in builder.inputs.items() if is_weight(node)}
    for record in builder.records:
        written = (view_base(node) for node in written_by(record.node))
        found |= {inputs[base] for base in written if base in inputs}
    return tuple(sorted(found))
