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
    fake_mode_of,
    is_dense,
    is_empty,
    is_one,
    is_tensor,
    kind,
    same_stride,
    sole_user,
    view_base,
)
from llmopt.ops.attention import APPENDS
from llmopt.sizes import size_hint


def layouts(graph: fx.Graph) -> list[Any]:
    """The example values of what a graph returns, before passes lay anything out anew."""
    return [fake(n) for n in _returned(graph)]


def keep(graph: fx.Graph, before: list[Any]) -> None:
    """Copies what cannot be seen any more as the values in `before` could."""
    mode: Any = fake_mode_of(graph)
    output = graph.output_node()
    copies: dict[fx.Node, fx.Node] = {}
    for node, value in zip(_returned(graph), before, strict=True):
        if not is_tensor(node) or node in copies or _is_kept_elsewhere(node):
            continue
        if _joins_alike(fake(node), value):
            continue
        if kind(node) == "llmopt.attention" and sole_user(node) is output and is_dense(value):
            node.meta["example_value"] = value  # it writes rows wherever they belong
        else:
            with graph.inserting_before(output):
                copies[node] = _copied(graph, mode, node, value)
    for node, copy in copies.items():
        output.replace_input_with(node, copy)


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


def _copied(graph: fx.Graph, mode: Any, node: fx.Node, before: torch.Tensor) -> fx.Node:
    """A copy whose dimensions lie in memory in the order in which they lay before."""
    strides = before.stride()
    order = sorted(range(len(strides)), key=lambda d: size_hint(strides[d]), reverse=True)
    if order == sorted(order):
        return emit(graph, mode, "contiguous", (node,), like=node)
    turned = emit(graph, mode, "permute", (node, tuple(order)), like=node)
    dense = emit(graph, mode, "contiguous", (turned,), like=node)
    back = tuple(order.index(d) for d in range(len(order)))
    return emit(graph, mode, "permute", (dense, back), like=node)
