"""norms: every spelling of RMSNorm and LayerNorm → ops.norm.

RMSNorm is found from its rsqrt outwards: rsqrt(mean(x²) + eps) below, · x, casts and · weight above.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from llmopt import ops
from llmopt.casts import is_float_cast, uncast, unwidened
from llmopt.graph import (
    FLOATS,
    NOTE,
    argument,
    binary_operands,
    emit,
    fake,
    fake_mode_of,
    is_tensor,
    kind,
    own_value,
    replace,
    same_size,
    scalar,
    sole_user,
)
from llmopt.parameters import is_weight
from llmopt.writes import Writes

_VARIABLE_EPS = "eps is not a constant"


def run(graph: fx.Graph) -> None:
    mode, writes = fake_mode_of(graph), Writes(graph)
    for node in list(graph.nodes):
        if kind(node) in ("rsqrt", "div") and node.op in ("call_function", "call_method"):
            _match_rms(graph, mode, node, writes)
        elif kind(node) == "layer_norm":
            _match_layer_norm(graph, mode, node)
        elif kind(node) == "rms_norm":
            _match_rms_norm_call(graph, mode, node)


def _mean_square(node: Any) -> tuple[fx.Node, float] | None:
    """x and eps of `mean(x², -1, keepdim) + eps`."""
    if not is_tensor(node) or kind(node) != "add" or (pair := binary_operands(node)) is None:
        return None
    mean, eps = pair if is_tensor(pair[0]) else pair[::-1]
    if scalar(eps) is None or not is_tensor(mean) or kind(mean) != "mean":
        return None
    dim = argument(mean, 1, "dim")
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    square = mean.args[0]
    if dim not in (-1, fake(square).dim() - 1) or not argument(mean, 2, "keepdim", False):
        return None
    if kind(square) == "pow" and scalar(argument(square, 1, "exponent")) == 2.0:
        return square.args[0], scalar(eps)  # type: ignore[return-value]
    if kind(square) == "square" or (kind(square) == "mul" and square.args[0] is square.args[1]):
        return square.args[0], scalar(eps)  # type: ignore[return-value]
    return None


def _match_rms(graph: fx.Graph, mode: Any, node: fx.Node, writes: Writes) -> None:
    if kind(node) == "rsqrt":
        found = _mean_square(node.args[0])
        product = sole_user(node)
        if found is None or product is None or kind(product) != "mul":
            return
        other = product.args[0] if product.args[1] is node else product.args[1]
    else:  # x / sqrt(mean(x²) + eps)
        pair = binary_operands(node)
        if pair is None or not is_tensor(pair[1]) or kind(pair[1]) != "sqrt":
            return
        found, product, other = _mean_square(pair[1].args[0]), node, pair[0]
    if found is None:
        return
    squared, eps = found
    x = unwidened(squared)
    if unwidened(other) is not x or fake(x).dtype not in FLOATS:
        return
    if fake(squared).dtype != torch.float32:
        return
    last, weight, offset = _follow_weight(product)
    if fake(last).dtype not in FLOATS or writes.moves_reads(last, (x, weight)):
        return
    with graph.inserting_before(last):
        dtype = fake(last).dtype
        args = (x, weight, None, "rms", eps, offset, dtype)
        new = emit(graph, mode, ops.norm, args, None, last, own_value(last))
    replace(last, new)


def _follow_weight(product: fx.Node) -> tuple[fx.Node, Any, float]:
    """The last node of the norm that starts at x · rsqrt(…), its weight (or None) and the weight's offset."""
    last = product
    while (user := sole_user(last)) is not None:
        if _ends_in(user, last):
            last = user
            continue
        if kind(user) != "mul" or (pair := binary_operands(user)) is None:
            break
        if fake(last).dtype.itemsize < fake(user).dtype.itemsize:
            break  # rounded before a wider weight widens it again
        factor = pair[1] if pair[0] is last else pair[0]
        found = _weight(factor, fake(product).shape[-1])
        if found is None:
            break
        last = user
        # casts after the weight belong to the norm too
        while (cast := sole_user(last)) is not None and _ends_in(cast, last):
            last = cast
        return last, *found
    return last, None, 0.0


def _ends_in(cast: fx.Node, last: fx.Node) -> bool:
    """Whether a norm may give what this cast of its value gives: nothing in between was rounded otherwise."""
    is_cast = is_float_cast(cast) and cast.args[0] is last
    return is_cast and fake(last).dtype in (torch.float32, fake(cast).dtype)


def _weight(factor: Any, width: Any) -> tuple[fx.Node, float] | None:
    """(weight, offset) when factor is a [width] parameter or (1 + parameter), casts ignored."""
    node, offset = uncast(factor), 0.0
    if is_tensor(node) and kind(node) == "add" and (pair := binary_operands(node)) is not None:
        value, other = (pair[0], pair[1]) if scalar(pair[0]) is not None else (pair[1], pair[0])
        if scalar(value) is None:
            return None
        node, offset = uncast(other), scalar(value) or 0.0
    if not is_weight(node) or fake(node).dim() != 1 or not same_size(fake(node).shape[0], width):
        return None
    return (node, offset) if fake(node).dtype in FLOATS else None


def _affine_over_last(node: fx.Node) -> tuple[Any, Any, Any] | None:
    """x, weight, bias of a functional norm over exactly the last dimension."""
    x, shape = node.args[0], argument(node, 1, "normalized_shape")
    weight, bias = argument(node, 2, "weight"), argument(node, 3, "bias")
    if len(shape) != 1 or fake(x).dtype not in FLOATS:
        return None
    if any(isinstance(w, fx.Node) and fake(w).dtype not in FLOATS for w in (weight, bias)):
        return None
    return x, weight, bias


def _match_layer_norm(graph: fx.Graph, mode: Any, node: fx.Node) -> None:
    found = _affine_over_last(node)
    if found is None:
        return
    x, weight, bias = found
    eps = scalar(argument(node, 4, "eps", 1e-5))
    if eps is None:
        node.meta[NOTE] = _VARIABLE_EPS
        return
    with graph.inserting_before(node):
        args = (x, weight, bias, "layer", eps, 0.0, fake(node).dtype)
        new = emit(graph, mode, ops.norm, args, None, node, own_value(node))
    replace(node, new)


def _match_rms_norm_call(graph: fx.Graph, mode: Any, node: fx.Node) -> None:
    x, shape = node.args[0], argument(node, 1, "normalized_shape")
    weight, eps = argument(node, 2, "weight"), argument(node, 3, "eps")
    if len(shape) != 1 or fake(x).dtype not in FLOATS:
        return
    # Without eps PyTorch takes that of the dtype it computes in, which is never a short one.
    eps = torch.finfo(torch.float32).eps if eps is None else scalar(eps)
    if eps is None:
        node.meta[NOTE] = _VARIABLE_EPS
        return
    with graph.inserting_before(node):
        new = emit(
            graph, mode, ops.norm, (x, weight, None, "rms", eps, 0.0, fake(node).dtype), like=node
        )
    replace(node, new)
