"""results: what a graph returns can be seen through the windows that the model's own result could be seen through.

Kernels lay attention's result out by position, and projections side by side. Where that is what the caller gets, and a `view` that works in
eager would fail, the caller gets memory laid out as the model's result was.
"""

from __future__ import annotations

from itertools import permutations
from typing import Any

import torch
from torch import fx

from llmopt.graph import (
    emit,
    fake,
    is_dense,
    is_empty,
    is_in_place,
    is_one,
    is_tensor,
    kind,
    same_stride,
    sole_user,
    storage,
    view_base,
)
from llmopt.ops.attention import APPENDS
from llmopt.writes import laid_out_as


def layouts(graph: fx.Graph) -> list[Any]:
    """The example values of what a graph returns, before passes lay anything out anew."""
    return [fake(n) for n in _returned(graph)]


def keep(graph: fx.Graph, before: list[Any]) -> None:
    """Lays out what cannot be seen any more as the values in `before` could."""
    output = graph.output_node()
    together: dict[int | None, dict[fx.Node, torch.Tensor]] = {}  # results by their memory
    for node, value in zip(_returned(graph), before, strict=True):
        if is_tensor(node) and not _is_kept_elsewhere(node):
            together.setdefault(storage(node), {})[node] = value
    for nodes in together.values():
        if all(_joins_alike(fake(node), value) for node, value in nodes.items()):
            continue
        (node, value), *others = nodes.items()
        if not others and _writes_anywhere(node) and is_dense(value):
            node.meta["example_value"] = value
            continue
        with graph.inserting_before(output):
            copies = _windows_on_one_copy(graph, nodes) if others else None
            copies = copies or {node: laid_out_as(node, value) for node, value in nodes.items()}
        for node, copy in copies.items():
            output.replace_input_with(node, copy)


def _writes_anywhere(node: fx.Node) -> bool:
    """An attention that only the caller reads: it puts rows wherever they belong."""
    user = sole_user(node)
    return kind(node) == "llmopt.attention" and user is not None and user.op == "output"


def _windows_on_one_copy(
    graph: fx.Graph, nodes: dict[fx.Node, torch.Tensor]
) -> dict[fx.Node, fx.Node] | None:
    """The windows that results are on one operation's result, on a contiguous copy of that; None where these do not fit either."""
    base = view_base(next(iter(nodes)))
    copies = {base: emit(graph, fake(base).fake_mode, "contiguous", (base,), like=base)}

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:
            source = next(n for n in node.all_input_nodes if storage(n) == storage(base))
            own = copied(source)
            if is_in_place(node):  # the copy is made behind all writes
                copies[node] = own
                return own
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: own if n is source else n)
            copies[node] = emit(graph, fake(base).fake_mode, node.target, args, kwargs, node)
        return copies[node]

    fits = all(_joins_alike(fake(copied(node)), value) for node, value in nodes.items())
    if fits:
        return {node: copies[node] for node in nodes}
    for copy in reversed(list(dict.fromkeys(copies.values()))):
        graph.erase_node(copy)
    return None


def _returned(graph: fx.Graph) -> list[Any]:
    returned = graph.output_node().args[0]
    return list(returned) if isinstance(returned, (tuple, list)) else [returned]


def _is_kept_elsewhere(node: fx.Node) -> bool:
    """Memory of the caller's, and caches that grow in place."""
    base = view_base(node)
    is_cache = kind(base) == "getitem" and kind(base.args[0]) in APPENDS and base.args[1] > 0
    return is_cache or base.op not in ("call_function", "call_method", "call_module")


def _joins_alike(value: torch.Tensor, before: torch.Tensor) -> bool:
    """Whether each pair of dimensions that was one in memory is, and what was dense is."""
    if value is before or is_empty(value):
        return True
    wide = [d for d in range(value.dim()) if not is_one(value.shape[d])]
    if any(same_stride(before.stride(d), 1) and not same_stride(value.stride(d), 1) for d in wide):
        return False
    return all(
        _is_joined(value, outer, inner)
        for outer, inner in permutations(wide, 2)
        if _is_joined(before, outer, inner)
    )


def _is_joined(value: torch.Tensor, outer: int, inner: int) -> bool:
    return same_stride(value.stride(outer), value.stride(inner) * value.shape[inner])
