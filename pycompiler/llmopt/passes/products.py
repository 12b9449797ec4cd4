"""products: matmul, bmm, mm, addmm, baddbmm and F.linear of computed values → ops.matmul, with what is added behind it.

What is left of them by the passes for linears, attention and experts. A first factor whose rows are not dense is copied.
"""

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
    is_dense,
    is_one,
    is_tensor,
    kind,
    own_value,
    replace,
    same_shape,
    same_size,
    unreadable,
)
from llmopt.parameters import is_weight
from llmopt.passes.calls import Calls

_SECOND = {"matmul": "other", "bmm": "mat2", "mm": "mat2"}


def run(graph: fx.Graph) -> None:
    mode: Any = fake_mode_of(graph)
    for node in list(graph.nodes):
        if node.op not in ("call_function", "call_method"):
            continue
        with graph.inserting_before(node):
            call = Calls(graph, mode, node)
            factors = _factors(call, node)
            if factors is not None:
                x, y, bias = factors
                args = (_with_dense_rows(call, x), y, bias)
                new = emit(graph, mode, ops.matmul, args, None, node, own_value(node))
                replace(node, new)


def _factors(call: Calls, node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """What is multiplied, the second transposed where it is a linear's, and what is added to each row."""
    name = kind(node)
    if name in _SECOND:
        x, y, bias = node.args[0], argument(node, 1, _SECOND[name]), None
    elif name == "linear":
        x, y, bias = node.args[0], argument(node, 1, "weight"), argument(node, 2, "bias")
    elif name == "addmm" and all(node.kwargs.get(k, 1) == 1 for k in ("beta", "alpha")):
        bias, x, y = node.args[0], argument(node, 1, "mat1"), argument(node, 2, "mat2")
    else:
        return None
    given = [x, y] if bias is None else [x, y, bias]
    if not all(map(is_tensor, given)) or any(map(unreadable, given)) or not is_dense(fake(node)):
        return None
    if len({fake(t).dtype for t in (*given, node)}) > 1 or fake(x).dtype not in FLOATS:
        return None
    if min(fake(x).dim(), fake(y).dim()) < 2 or any(fake(t).device.type != "cpu" for t in given):
        return None
    if bias is not None and not same_shape(fake(bias).shape, fake(node).shape[-1:]):
        return None
    if name == "linear":
        if is_weight(y) or fake(y).dim() != 2:
            return None  # a linear that could not be one
        y = call("t", y)
    return x, y, bias


def _with_dense_rows(call: Calls, x: fx.Node) -> Any:
    value = fake(x)
    dense = is_one(value.shape[-1]) or same_size(value.stride(-1), 1)
    return x if dense else call("contiguous", x)
