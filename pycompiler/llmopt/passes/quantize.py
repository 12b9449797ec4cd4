"""quantize: ops.linear → ops.linear_quantized, where its weights are codes already or a scheme was asked for.

Runs after all other passes: what stands around a linear has joined it by then.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import fx

from llmopt import ops
from llmopt.casts import FLOAT_CASTS
from llmopt.graph import (
    FLOATS,
    NOTE,
    argument,
    emit,
    fake,
    fake_mode_of,
    is_tensor,
    is_view,
    kind,
    own_value,
    replace,
    same_size,
    unreadable,
)
from llmopt.ops.linear import given, parts
from llmopt.parameters import is_buffer, is_weight, weight_name
from llmopt.passes.simplify import erase_unused
from llmopt.quant.schemes import Scheme, of_head

EMBEDDINGS = ("llmopt.embedding", "embedding")
# What models call an output head, or the embedding whose weight it shares.
_HEAD_NAME = re.compile(r"(^|\.)(lm_head|wte|[^.]*embed[^.]*)\.weight$")


def run(
    graph: fx.Graph, scheme: Scheme | None, chosen: Mapping[fx.Node, Scheme] | None = None
) -> list[str]:
    """scheme: for weights that are not quantised yet; None leaves them as they are. chosen: the schemes of single linears, and of
    linears of experts.

    Returns the layers that cannot have it, with the reason: they stay exact.
    """
    exact = []
    mode = fake_mode_of(graph)
    for node in list(graph.nodes):
        if scheme is not None and kind(node) in ("linear", "addmm"):
            exact += [f"{weight_name(w)}: {_why_plain(w)}" for w in _matrices(node)]
        if kind(node) == "llmopt.grouped_linear" and not node.kwargs.get("bits"):
            wanted = scheme if chosen is None else chosen.get(node)
            exact += [] if wanted is None else _experts_with_scheme(graph, mode, node, wanted)
        if kind(node) != "llmopt.linear":
            continue
        weights = parts(node)["weights"]
        if all(kind(w) == "llmopt.dequantize" for w in weights):
            _with_codes(graph, mode, node)
        elif chosen is not None and node in chosen:
            _with_scheme(graph, mode, node, chosen[node])
        elif scheme is not None and not any(kind(w) == "llmopt.dequantize" for w in weights):
            is_head = _is_head(graph, node)
            if not is_head and chooses(node):
                node.meta[NOTE] = "exact: the largest of its results are picked"
                continue
            own = of_head(scheme) if is_head else scheme
            reason = _with_scheme(graph, mode, node, own)
            exact += [f"{weight_name(weights[0])}: {reason}"] if reason else []
    erase_unused(graph)
    return exact


def form_of(weight: fx.Node) -> tuple[Any, ...] | None:
    """What weights must share to become one quantised linear; None for a weight that is no codes."""
    if kind(weight) != "llmopt.dequantize":
        return None
    _, scale, offset, bits, activations, _ = weight.args
    return (fake(scale).shape[1], offset is None, bits, activations)


def _with_codes(graph: fx.Graph, mode: Any, node: fx.Node) -> None:
    weights = parts(node)["weights"]
    if len({form_of(w) for w in weights}) > 1:
        return
    codes, scales, offsets = (tuple(w.args[i] for w in weights) for i in range(3))
    _, _, _, bits, activations, _ = weights[0].args
    _replace(graph, mode, node, (codes, scales, offsets, bits, activations), {})


def _with_scheme(graph: fx.Graph, mode: Any, node: fx.Node, scheme: Scheme) -> str:
    """Returns why the node cannot have the scheme, "" when it has it now."""
    weights = parts(node)["weights"]
    k = fake(weights[0]).shape[1]
    reason = "a buffer: parameters are rounded" if any(map(is_buffer, weights)) else ""
    reason = reason or scheme.reject(k)
    if reason:
        node.meta[NOTE] = f"exact: {reason}"
        return reason
    none = (None,) * len(weights)
    form = (tuple(weights), none, none, scheme.bits, scheme.activations)
    more = {"group": scheme.group_of(k), "symmetric": scheme.symmetric}
    _replace(graph, mode, node, form, more)
    return ""


def _experts_with_scheme(graph: fx.Graph, mode: Any, node: fx.Node, scheme: Scheme) -> list[str]:
    """Returns why the node cannot have the scheme, nothing when it has it now."""
    weights = node.args[1]
    k = fake(weights[0]).shape[2]
    if reason := scheme.reject(k):
        node.meta[NOTE] = f"exact: {reason}"
        return [f"{weight_name(weights[0])}: {reason}"]
    form = {"bits": scheme.bits, "activations": scheme.activations}
    form |= {"group": scheme.group_of(k), "symmetric": scheme.symmetric}
    with graph.inserting_before(node):
        kwargs = {**node.kwargs, **form}
        new = emit(graph, mode, ops.grouped_linear, node.args, kwargs, node, own_value(node))
    replace(node, new)
    return []


def _matrices(node: fx.Node) -> list[fx.Node]:
    """The module's matrices that a node reads."""
    return [n for n in node.all_input_nodes if is_weight(n) and fake(n).dim() == 2]


def _why_plain(weight: fx.Node) -> str:
    """Why no ops.linear reads a weight."""
    if reason := unreadable(weight):
        return f"its weight is {reason}"
    if fake(weight).dtype not in FLOATS:
        return f"weights of {fake(weight).dtype}: f32, f16 and bf16 can be rounded"
    return "its inputs or its bias have another dtype"


def _replace(
    graph: fx.Graph, mode: Any, node: fx.Node, form: tuple[Any, ...], more: dict[str, Any]
) -> None:
    arguments = parts(node)
    kwargs = given(arguments, "x", "weights")
    with graph.inserting_before(node):
        args = (arguments["x"], *form)
        new = emit(graph, mode, ops.linear_quantized, args, {**kwargs, **more}, like=node)
    replace(node, new)


def _is_head(graph: fx.Graph, node: fx.Node) -> bool:
    """A linear with the embedding's weight, or one that is returned and has an output for each row of an embedding. Where the
    model is called with embeddings, its graph looks none up: then one that is returned and is called a head."""
    tables = [n for e in graph.nodes if kind(e) in EMBEDDINGS for n in e.all_input_nodes]
    weights = parts(node)["weights"]
    if any(w in tables for w in weights):
        return True
    if not _only_returned(node):
        return False
    if not tables:
        return _HEAD_NAME.search(weight_name(weights[0])) is not None
    rows = [fake(t).shape[0] for t in tables if fake(t).dtype.is_floating_point]
    return fake(weights[0]).shape[0] in rows


# What a router's results go through on their way to where the largest are chosen.
_ON_THE_WAY = frozenset(
    {
        *FLOAT_CASTS,
        "llmopt.pointwise",
        "llmopt.limit_groups",
        "getitem",
        "softmax",
        "log_softmax",
        "where",
        "masked_fill",
        "add",
        "sub",
        "mul",
        "div",
        "sigmoid",
        "softplus",
        "sqrt",
    }
)
# Where the dimension of what chooses stands, and which it is else.
_CHOOSE = {"topk": (2, -1), "sort": (1, -1), "argsort": (1, -1), "max": (1, None), "argmax": (1, None)}  # fmt: skip


def chooses(node: fx.Node) -> bool:
    """Whether the largest of a linear's outputs are picked: rounding could change altogether which those are."""
    waiting, seen = [node], {node}
    while waiting:
        value = waiting.pop()
        for user in value.users:
            if kind(user) in _CHOOSE and user.args[:1] == (value,):
                place, default = _CHOOSE[kind(user)]
                dim = argument(user, place, "dim", default)
                # Outputs stay side by side in memory, whatever views make of the dimensions around them.
                if isinstance(dim, int) and same_size(fake(value).stride(dim), 1):
                    return True
            if user not in seen and (kind(user) in _ON_THE_WAY or is_view(user)):
                seen.add(user)
                waiting.append(user)
    return False


def _only_returned(node: fx.Node) -> bool:
    casts = ("to", "float")
    return all(
        user.op == "output"
        or (is_tensor(user) and (is_view(user) or kind(user) in casts) and _only_returned(user))
        for user in node.users
    )
