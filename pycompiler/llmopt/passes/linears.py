"""linears: F.linear, GPT-2's Conv1D (addmm) and products with a parameter → ops.linear."""

from __future__ import annotations

from typing import Any

from torch import fx

from llmopt import ops
from llmopt.graph import (
    FLOATS,
    argument,
    emit,
    fake,
    fake_mode_of,
    is_tensor,
    kind,
    own_value,
    replace,
    same_shape,
    same_size,
    sole_user,
    unreadable,
)
from llmopt.parameters import is_weight
from llmopt.writes import Writes


def run(graph: fx.Graph) -> None:
    mode, writes = fake_mode_of(graph), Writes(graph)
    rules = {"linear": _linear, "matmul": _matmul, "mm": _matmul}
    rules["llmopt.linear_quantized_module"] = _quantized
    for node in list(graph.nodes):
        if node.op not in ("call_function", "call_method"):
            continue
        rule = rules.get(kind(node))
        if rule is not None:
            rule(graph, mode, node)
        elif kind(node) == "addmm":
            _addmm(graph, mode, node, writes)


def _usable(x: Any, weight: Any, bias: Any, outputs: int = 0) -> bool:
    """outputs: which dimension of the weight counts them."""
    if not (is_tensor(x) and is_weight(weight)) or any(map(unreadable, (x, weight, bias))):
        return False
    if fake(weight).dim() != 2 or fake(x).dim() < 1:
        return False
    vectors = [] if bias is None else [bias]
    # Only under autocast do they differ in dtype: the linear rounds them to that of x.
    if any(fake(t).dtype not in FLOATS for t in (x, weight, *vectors)):
        return False
    # A bias of one element would be one for all outputs.
    wanted = (fake(weight).shape[outputs],)
    return all(is_weight(v) and same_shape(fake(v).shape, wanted) for v in vectors)


def _linear(graph: fx.Graph, mode: Any, node: fx.Node) -> None:
    x, weight, bias = node.args[0], argument(node, 1, "weight"), argument(node, 2, "bias")
    if _usable(x, weight, bias):
        with graph.inserting_before(node):
            args = (x, (weight,), (bias,))
            new = emit(graph, mode, ops.linear, args, None, node, own_value(node))
        replace(node, new)


def _quantized(graph: fx.Graph, mode: Any, node: fx.Node) -> None:
    """A llmopt.QuantizedLinear: its codes as a weight, until the pass quantize takes them back."""
    x, codes, scales, offsets, bias, bits, activations = node.args
    weights = [t for t in (codes, scales, offsets) if t is not None]
    if not is_tensor(x) or not all(is_weight(w) for w in weights) or fake(x).dtype not in FLOATS:
        return
    if bias is not None:
        fits = same_shape(fake(bias).shape, fake(codes).shape[:1])
        if not (is_weight(bias) and fits and fake(bias).dtype == fake(x).dtype):
            return
    with graph.inserting_before(node):
        args = (codes, scales, offsets, bits, activations, fake(x).dtype)
        weight = emit(graph, mode, ops.dequantize, args, like=node)
        new = emit(graph, mode, ops.linear, (x, (weight,), (bias,)), like=node)
    replace(node, new)


def _addmm(graph: fx.Graph, mode: Any, node: fx.Node, writes: Writes) -> None:
    bias, x, weight = node.args[:3]
    if any(node.kwargs.get(k, 1) != 1 for k in ("beta", "alpha")) or not _usable(
        x, weight, bias, 1
    ):
        return
    source, last = _unflattened(node, x)
    if writes.moves_reads(last, (source, weight, bias)):
        source, last = x, node
    with graph.inserting_before(last):
        transposed = emit(graph, mode, "t", (weight,), like=node)
        new = emit(graph, mode, ops.linear, (source, (transposed,), (bias,)), like=node)
    replace(last, new)
    if last is not node:
        graph.erase_node(node)


def _unflattened(node: fx.Node, x: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The input before a flattening view and the view behind that restores its shape; (x, node) when there are none."""
    user = sole_user(node)
    if (
        kind(x) not in _RESHAPES
        or user is None
        or kind(user) not in _RESHAPES
        or not is_tensor(x.args[0])
    ):
        return x, node
    source = x.args[0]
    restored = (*fake(source).shape[:-1], fake(node).shape[-1])
    if same_size(fake(source).shape[-1], fake(x).shape[-1]) and same_shape(
        fake(user).shape, restored
    ):
        return source, user
    return x, node


_RESHAPES = ("view", "reshape")


def _matmul(graph: fx.Graph, mode: Any, node: fx.Node) -> None:
    x, weight = node.args[0], argument(node, 1, "other")
    if not _usable(x, weight, None):
        return
    with graph.inserting_before(node):
        transposed = emit(graph, mode, "t", (weight,), like=node)
        new = emit(graph, mode, ops.linear, (x, (transposed,), (None,)), like=node)
    replace(node, new)
