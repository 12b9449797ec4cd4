"""What a graph writes in place, and whether a rule may read memory earlier or later than the model did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from llmopt.graph import (
    argument,
    emit,
    fake,
    is_dense,
    is_in_place,
    is_tensor,
    is_view,
    kind,
    readers,
    refresh,
    schemas,
    storage,
    view_base,
    written_when_told,
)
from llmopt.sizes import size_hint


def written_by(node: fx.Node) -> list[fx.Node]:
    """The inputs that a node writes into, or may: what its signature says, else `out` or what stands first."""
    if not is_in_place(node):
        return []
    written: list[Any] = [*written_when_told(node)]
    for schema in schemas(node.target):
        for i, a in enumerate(schema.arguments):
            if a.alias_info is not None and a.alias_info.is_write:
                written.append(argument(node, i, a.name))
    if not written:
        out = node.kwargs.get("out")
        first = node.args[0] if node.args else node.kwargs.get("input")
        written = [first if out is None else out]
    found: list[fx.Node] = []
    fx.node.map_arg(written, found.append)
    return found


def writers_by_storage(graph: fx.Graph) -> dict[int, list[fx.Node]]:
    """Memory that some nodes write into, whole or in part, and these nodes."""
    found: dict[int, dict[fx.Node, None]] = {}
    for node in graph.nodes:
        for n in written_by(node):
            place = storage(n)
            if place is not None:
                found.setdefault(place, {})[node] = None
    return {place: list(nodes) for place, nodes in found.items()}


def mutated_storages(graph: fx.Graph) -> set[int]:
    """Memory that some node writes into."""
    return set(writers_by_storage(graph))


# What gives a window on its input where that lies as it has to, and else a copy.
_WINDOW_OR_COPY = frozenset({"view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "ravel", "contiguous"})  # fmt: skip


# What passes lay out in another way, and with it what is computed from its result.
_LAID_OUT_ANEW = frozenset(
    {
        *("linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "einsum", "conv1d"),
        *("scaled_dot_product_attention", "multi_head_attention_forward", "_transformer_encoder_layer_fwd"),
    }
)  # fmt: skip


def _is_laid_out_anew(node: fx.Node) -> bool:
    """Whether a tensor is an operation's own result, which passes may lay out in another way."""
    if not _is_computed(node) or is_in_place(node) or view_base(node) is not node:
        return False
    maker = node.args[0] if kind(node) == "getitem" else node  # of several results
    return kind(maker) in _LAID_OUT_ANEW or any(map(_is_computed, node.all_input_nodes))


def _is_seen_as_laid_out(node: fx.Node) -> bool:
    return any(kind(u) in _WINDOW_OR_COPY and is_view(u) for u in readers(node))


def _is_computed(node: fx.Node) -> bool:
    return is_tensor(node) and node.op in ("call_function", "call_method", "call_module")


def separate_windows(graph: fx.Graph) -> None:
    """Copies what an operation made, where it matters whether a window on it and a copy of it are memory of their own.

    Passes may lay out the operation's result in another way. A window that needs its layout would then become a copy, which a write into
    either does not reach; and a `reshape` that copied would become a window, which it does. The copy made here has memory of its own,
    whatever becomes of its source. It matters to what the graph writes, and to results that share memory.
    """
    written = mutated_storages(graph)
    results = Counter(storage(n) for n in graph.output_node().all_input_nodes if is_tensor(n))
    shared = {place for place, count in results.items() if count > 1}
    for node in list(graph.nodes):
        matters = storage(node) in written or storage(node) in shared
        if matters and _is_laid_out_anew(node) and _is_seen_as_laid_out(node):
            _copy(node, node.next, list(node.users))
        if kind(node) in _WINDOW_OR_COPY and not is_view(node) and is_tensor(node):
            source = next(filter(is_tensor, node.all_input_nodes))
            both = {storage(node), storage(source)}
            if (both & written or both <= results.keys()) and _is_laid_out_anew(view_base(source)):
                _copy(source, node, [node])


def _copy(node: fx.Node, place: fx.Node, users: list[fx.Node]) -> None:
    """Lets these users read a copy of a node's value, made before `place`."""
    with node.graph.inserting_before(place):
        own = laid_out_as(node, fake(node))
    node.replace_all_uses_with(own, delete_user_cb=lambda user: user in users)
    refresh(users)


def laid_out_as(node: fx.Node, layout: torch.Tensor) -> fx.Node:
    """A copy of a node's value, at the insertion point, whose dimensions lie in memory in the order in which those of `layout` do.

    It does so wherever passes put the value itself.
    """
    graph, mode, strides = node.graph, fake(node).fake_mode, layout.stride()
    order = sorted(range(len(strides)), key=lambda d: size_hint(strides[d]), reverse=True)
    if is_dense(layout) or order == sorted(order):
        return emit(graph, mode, torch.clone, (node,), _DENSE, node)
    turned = emit(graph, mode, "permute", (node, tuple(order)), like=node)
    dense = emit(graph, mode, torch.clone, (turned,), _DENSE, node)
    back = tuple(order.index(d) for d in range(len(order)))
    return emit(graph, mode, "permute", (dense, back), like=node)


_DENSE = {"memory_format": torch.contiguous_format}


class Writes:
    """The nodes of a graph that write memory in place: what a rule asks before it reads memory earlier or later than the model did."""

    def __init__(self, graph: fx.Graph) -> None:
        self._writers = [node for node in graph.nodes if is_in_place(node)]

    def into(self, values: Iterable[fx.Node]) -> set[fx.Node]:
        """Who writes memory of one of the values."""
        places = {storage(v) for v in values} - {None}
        return {w for w in self._writers if any(storage(n) in places for n in written_by(w))}

    def between(self, values: Iterable[fx.Node], first: fx.Node, last: fx.Node) -> bool:
        """True when memory of one of the values is written after `first` and before `last`."""
        if not self._writers:
            return False
        places = {storage(v) for v in values} - {None}
        return any(
            first < w < last and any(storage(n) in places for n in written_by(w))
            for w in self._writers
        )

    def moves_reads(self, last: fx.Node, inputs: Iterable[Any]) -> bool:
        """True when computing `last` from `inputs` at once, where `last` stands, would see another content of some memory than the
        nodes on the way from the inputs to `last` saw."""
        if not self._writers:
            return False
        given = {n for n in inputs if isinstance(n, fx.Node)}
        inside, waiting = {last}, [last]
        while waiting:
            node = waiting.pop()
            for n in node.all_input_nodes:
                read_at = node if n in given else n
                if not (is_view(node) and n in given) and self.between((n,), read_at, last):
                    return True
                if n not in given and n not in inside:
                    inside.add(n)
                    waiting.append(n)
        return False
