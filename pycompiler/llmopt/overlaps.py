"""Inputs that share memory in a later call, but did not in the call that was compiled.

A graph that writes into an input is compiled for the sharing that it was traced with. Dynamo looks again only at whether two inputs are the
same tensor, not at whether they are views of the same memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor, fx

from llmopt.graph import is_tensor, storage
from llmopt.messages import warn_once
from llmopt.parameters import is_weight
from llmopt.writes import mutated_storages

_MESSAGE = (
    "inputs of a graph share memory that it writes into, and did not when it was compiled: such calls run as in PyTorch; "
    "torch.compile with such inputs first runs them in kernels"
)


class Overlaps:
    """What a graph is, and which pairs of its inputs must be apart for what was compiled from it."""

    def __init__(self, graph: fx.Graph, root: fx.GraphModule) -> None:
        """graph: before any pass; root: has the attributes that it reads."""
        self._root, self._graph = root, fx.Graph()
        self._graph.output(self._graph.graph_copy(graph, {}))
        written = mutated_storages(graph)
        places = [n for n in graph.nodes if n.op == "placeholder"]
        self._memory = [storage(n) if is_tensor(n) else None for n in places]
        self._written = [i for i, s in enumerate(self._memory) if s in written]
        self._read = [
            i
            for i, n in enumerate(places)
            if is_tensor(n) and i not in set(self._written) and not is_weight(n)
        ]

    def guard(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """`compiled` for inputs that are apart, the graph as in PyTorch for others."""

        def forward(*arguments: Any) -> Any:
            if not self._found(arguments):
                return compiled(*arguments)
            warn_once(_MESSAGE)
            return self._as_traced(*arguments)

        return forward

    @cached_property
    def _as_traced(self) -> fx.GraphModule:
        return fx.GraphModule(self._root, self._graph)

    def _found(self, arguments: Sequence[Any]) -> bool:
        owners: dict[int, list[int]] = {}
        for i in self._written:
            place = arguments[i].untyped_storage().data_ptr()
            others = owners.setdefault(place, [])
            if others and self._any_shared(arguments, i, others):
                return True
            others.append(i)
        for i in self._read:
            others = owners.get(arguments[i].untyped_storage().data_ptr(), [])
            if others and self._any_shared(arguments, i, others):
                return True
        return False

    def _any_shared(self, arguments: Sequence[Any], i: int, others: list[int]) -> bool:
        """Whether an input shares bytes with one of others, in memory that was not the same when the graph was compiled."""
        new = [o for o in others if self._memory[o] != self._memory[i]]
        begin, end = _span(arguments[i])
        return any(begin < e and b < end for b, e in (_span(arguments[o]) for o in new))


def overlaps_of(graph: fx.Graph, root: fx.GraphModule) -> Overlaps | None:
    """None for a graph that writes into none of its inputs, or has only one that it could share memory with."""
    written = mutated_storages(graph)
    inputs = [n for n in graph.nodes if n.op == "placeholder" and is_tensor(n) and not is_weight(n)]
    if len(inputs) < 2 or not any(storage(n) in written for n in inputs):
        return None
    return Overlaps(graph, root)


def _span(tensor: Tensor) -> tuple[int, int]:
    """First byte and the one behind the last."""
    begin = tensor.data_ptr()
    if tensor.numel() == 0:
        return begin, begin
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.element_size()
