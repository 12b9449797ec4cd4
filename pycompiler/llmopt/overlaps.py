"""Inputs that share memory in a call, but did not in the call that was compiled.

A graph that writes into an input is compiled for the sharing that it was traced with. Dynamo looks again only at whether two inputs are the
same tensor, not at whether they have bytes in common.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import accumulate, combinations
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, fx

from llmopt.graph import fake, storage
from llmopt.messages import warn_once
from llmopt.native.segment import picker
from llmopt.parameters import is_weight
from llmopt.sizes import expression
from llmopt.weights import bytes_of
from llmopt.writes import mutated_storages

_SHARED = "inputs share memory that the graph writes into, and did not when it was compiled"
_UNDECIDED = "inputs lie in memory that the graph writes into in so many steps that looking for a byte of both takes too long"
_ADVICE = (
    "where they are views of one tensor, torch.compile with such inputs first runs them in kernels"
)
_WORK = 10_000  # of NumPy's search for a byte that two tensors share

_ADDRESS = Tensor.data_ptr
_Range = tuple[int, int]  # first byte, and the one behind the last


class _Written:
    """Where the inputs lie that a graph writes into, in one call."""

    def __init__(self, ranges: Iterable[_Range]) -> None:
        by_begin = sorted(ranges)
        self._begins = [begin for begin, _ in by_begin]
        self._ends = [*accumulate((end for _, end in by_begin), max)]  # the last one so far

    def are_apart(self) -> bool:
        return all(a <= b for a, b in zip(self._ends, self._begins[1:], strict=False))

    def touch(self, begin: int, end: int) -> bool:
        before = bisect_left(self._begins, end)
        return before > 0 and self._ends[before - 1] > begin


class _Seen(NamedTuple):
    """Where written inputs and weights were in a call, and what came of it."""

    places: tuple[list[int], list[tuple]]
    written: _Written
    reason: str


class Overlaps:
    """What a graph is, and which pairs of its inputs must be apart for what is compiled from it."""

    def __init__(self, graph: fx.Graph, root: fx.GraphModule, written: set[int]) -> None:
        """graph: as it was traced; root: has the attributes that it reads; written: memory that it writes into."""
        self._root, self._graph = root, fx.Graph()
        self._graph.output(self._graph.graph_copy(graph, {}))
        inputs = dict(enumerate(n for n in graph.nodes if n.op == "placeholder"))
        self._memory = {i: s for i, n in inputs.items() if (s := storage(n)) is not None}
        self._written = [i for i, s in self._memory.items() if s in written]
        others = [i for i, s in self._memory.items() if s not in written]
        self._weights = [i for i in others if is_weight(inputs[i])]
        self._read = [i for i in others if not is_weight(inputs[i])]
        self._bytes = {i: bytes_of(t) for i in self._memory if _is_fixed(t := fake(inputs[i]))}
        held = [*self._written, *self._weights]
        self._pick_held = picker(held)
        self._changing = [i for i in held if i not in self._bytes]
        self._seen: _Seen | None = None

    def guard(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """`compiled` for inputs that are apart, the graph as in PyTorch for others."""

        def forward(*arguments: Any) -> Any:
            if not (reason := self.found(arguments)):
                return compiled(*arguments)
            warn_once(f"calls run as in PyTorch: {reason}; {_ADVICE}")
            return self._as_traced(*arguments)

        return forward

    def found(self, arguments: Sequence[Any]) -> str:
        """Why what was compiled is not for these inputs, or "".

        Caches and weights stay where they are from call to call, so that they are compared with each other only once.
        """
        places = (
            [*map(_ADDRESS, self._pick_held(arguments))],
            [(arguments[i].shape, arguments[i].stride()) for i in self._changing],
        )
        seen = self._seen
        if seen is None or seen.places != places:
            written = _Written(self._range(arguments, i) for i in self._written)
            mixed = [] if written.are_apart() else self._written
            reason = self._among(arguments, combinations(mixed, 2))
            reason = reason or self._with_written(arguments, self._weights, written)
            seen = self._seen = _Seen(places, written, reason)
        return seen.reason or self._with_written(arguments, self._read, seen.written)

    @cached_property
    def _as_traced(self) -> fx.GraphModule:
        return fx.GraphModule(self._root, self._graph)

    def _range(self, arguments: Sequence[Any], i: int) -> _Range:
        begin = _ADDRESS(arguments[i])
        size = self._bytes.get(i)
        return begin, begin + (bytes_of(arguments[i]) if size is None else size)

    def _with_written(self, arguments: Sequence[Any], inputs: list[int], written: _Written) -> str:
        near = [i for i in inputs if written.touch(*self._range(arguments, i))]
        return self._among(arguments, ((i, w) for i in near for w in self._written))

    def _among(self, arguments: Sequence[Any], pairs: Iterable[tuple[int, int]]) -> str:
        """What is found first in pairs of inputs whose memory was not the same when the graph was compiled."""
        new = ((a, b) for a, b in pairs if self._memory[a] != self._memory[b])
        return next(filter(None, (_common(arguments[a], arguments[b]) for a, b in new)), "")


def overlaps_of(graph: fx.Graph, root: fx.GraphModule) -> Overlaps | None:
    """None for a graph that writes into none of its inputs, or has only one."""
    inputs = [s for n in graph.nodes if n.op == "placeholder" and (s := storage(n)) is not None]
    written = mutated_storages(graph) if len(inputs) > 1 else set()
    return Overlaps(graph, root, written) if not written.isdisjoint(inputs) else None


def _is_fixed(tensor: Tensor) -> bool:
    return all(isinstance(expression(n), int) for n in (*tensor.shape, *tensor.stride()))


def _common(a: Tensor, b: Tensor) -> str:
    """What is to be said of bytes that two tensors share, or may; "" where they share none."""
    both = _elements(a), _elements(b)
    try:
        shared = np.shares_memory(*both, max_work=_WORK)  # type: ignore[arg-type]  # its stubs know no number
        return _SHARED if shared else ""
    except np.exceptions.TooHardError:
        return _UNDECIDED


def _elements(tensor: Tensor) -> np.ndarray:
    """A tensor's memory, element for element; nobody reads it."""
    size = tensor.element_size()
    described = {
        "data": (tensor.data_ptr(), True),
        "shape": tuple(tensor.shape),
        "strides": tuple(step * size for step in tensor.stride()),
        "typestr": f"|V{size}",
        "version": 3,
    }
    return np.asarray(SimpleNamespace(__array_interface__=described))
