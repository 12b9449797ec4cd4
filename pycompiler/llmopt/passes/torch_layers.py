"""torch_layers: nn.MultiheadAttention and nn.TransformerEncoderLayer, one call each in Dynamo's graph → linears, attention and norms.

Results are those of PyTorch with `torch.backends.mha.set_fastpath_enabled(False)`. Its fast path takes any number in a float mask but 0
for "not allowed", and gives NaN for a row with no allowed key.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any

import torch.nn.functional as F
from torch import fx

from llmopt.graph import (
    FLOATS,
    NOTE,
    emit,
    expression,
    fake,
    fake_mode_of,
    is_dense,
    is_tensor,
    kind,
    replace,
    unreadable,
)


def run(graph: fx.Graph) -> None:
    rules = {
        "multi_head_attention_forward": _attention_layer,
        "_transformer_encoder_layer_fwd": _encoder_layer,
    }
    for node in list(graph.nodes):
        rule = rules.get(kind(node)) if node.op == "call_function" else None
        if rule is not None:
            with graph.inserting_before(node):
                rule(_Emitter(graph, fake_mode_of(graph), node), node)


@dataclass(frozen=True)
class _Emitter:
    """Adds calls in the place of a node."""

    graph: fx.Graph
    mode: Any
    like: fx.Node

    def __call__(self, target: Callable | str, *args: Any, **kwargs: Any) -> fx.Node:
        return emit(self.graph, self.mode, target, args, kwargs, self.like)


@dataclass(frozen=True)
class _Projections:
    """Of one attention: the projections of query, key and value one below the other [3E, E], and that of the result [E, E]."""

    heads: int
    weight: fx.Node
    bias: fx.Node | None
    out_weight: fx.Node
    out_bias: fx.Node | None

    def project(self, emit: _Emitter, x: fx.Node, which: int) -> fx.Node:
        """Query (0), key (1) or value (2) of x [A, B, E], as [A, B, H, D]."""
        width = fake(x).shape[-1]
        weight, bias = (
            None if t is None else emit("narrow", t, 0, which * width, width)
            for t in (self.weight, self.bias)
        )
        return emit("unflatten", emit(F.linear, x, weight, bias), -1, (self.heads, -1))


def _attend(
    emit: _Emitter, p: _Projections, inputs: tuple[fx.Node, ...], mask: fx.Node | None
) -> fx.Node:
    """Attention of query, key and value, each [N, L, E], with its projections: [N, L, E]."""
    q, k, v = (emit("transpose", p.project(emit, x, i), 1, 2) for i, x in enumerate(inputs))
    attended = emit(F.scaled_dot_product_attention, q, k, v, attn_mask=mask)
    rows = emit("flatten", emit("transpose", attended, 1, 2), 2)
    return emit(F.linear, rows, p.out_weight, p.out_bias)


def _attention_layer(emit: _Emitter, node: fx.Node) -> None:
    """F.multi_head_attention_forward, which gives [L, N, E] and weights that nobody may read."""
    bound = inspect.signature(F.multi_head_attention_forward).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    given = bound.arguments
    inputs = tuple(given[name] for name in ("query", "key", "value"))
    if reason := _why_not(node, given, inputs):
        node.meta[NOTE] = reason
        return
    p = _Projections(
        given["num_heads"], given["in_proj_weight"], given["in_proj_bias"], given["out_proj_weight"], given["out_proj_bias"],
    )  # fmt: skip
    batch = fake(inputs[0]).shape[1]
    mask = _mask(emit, given["attn_mask"], given["key_padding_mask"], batch, p.heads)
    turned = {x: _dense(emit, emit("transpose", x, 0, 1)) for x in dict.fromkeys(inputs)}
    result = _attend(emit, p, tuple(turned[x] for x in inputs), mask)
    result = emit("transpose", result, 0, 1)
    for part in list(node.users):
        if part.args[1] == _RESULT:
            replace(part, result)
        else:
            emit.graph.erase_node(part)
    emit.graph.erase_node(node)


_RESULT = 0  # the other part are the attention's weights
_UNUSUAL = ("bias_k", "bias_v", "static_k", "static_v", "use_separate_proj_weight", "add_zero_attn")


def _why_not(node: fx.Node, given: dict[str, Any], inputs: tuple[Any, ...]) -> str:
    """Why a nn.MultiheadAttention stays PyTorch's, or ""."""
    unusual = [name for name in _UNUSUAL if given[name] not in (None, False)]
    if unusual:
        return f"nn.MultiheadAttention with {', '.join(unusual)}"
    if given["training"] and given["dropout_p"]:
        return "nn.MultiheadAttention with dropout"
    if any(kind(u) != "getitem" or (u.args[1] != _RESULT and u.users) for u in node.users):
        return "the weights of nn.MultiheadAttention are read"
    if given["need_weights"] and not (given["attn_mask"] is given["key_padding_mask"] is None):
        # With them, a row with no key to attend to gives NaN; without them zeros.
        return "nn.MultiheadAttention with a mask computes weights; need_weights=False lets kernels do it"
    if not (_readable(*given.values()) and all(map(_is_rows, inputs))):
        return "nn.MultiheadAttention is not over [L, N, E] in a float dtype, or E changes from call to call"
    return ""


_LAYER = (
    "src", "embed_dim", "num_heads", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias", "use_gelu", "norm_first", "eps",
    "norm_weight_1", "norm_bias_1", "norm_weight_2", "norm_bias_2",
    "ffn_weight_1", "ffn_bias_1", "ffn_weight_2", "ffn_bias_2", "mask", "mask_type",
)  # fmt: skip
_OF_KEYS = 1  # a mask_type: [N, L]; the others are of queries and keys


def _encoder_layer(emit: _Emitter, node: fx.Node) -> None:
    """torch._transformer_encoder_layer_fwd over src [N, L, E]."""
    given = {"mask": None, "mask_type": None, **dict(zip(_LAYER, node.args, strict=False))}
    given |= node.kwargs
    x, mask = given["src"], given["mask"]
    if not (_readable(*given.values()) and _is_rows(x) and isinstance(given["eps"], float)):
        node.meta[NOTE] = (
            "nn.TransformerEncoderLayer is not over [N, L, E] in a float dtype, or E or eps change from call to call"
        )
        return

    def norm(x: fx.Node, which: int) -> fx.Node:
        weight, bias = given[f"norm_weight_{which}"], given[f"norm_bias_{which}"]
        return emit(F.layer_norm, x, (given["embed_dim"],), weight, bias, given["eps"])

    def attention(x: fx.Node) -> fx.Node:
        p = _Projections(
            given["num_heads"], given["qkv_weight"], given["qkv_bias"], given["proj_weight"], given["proj_bias"],
        )  # fmt: skip
        of_keys = given["mask_type"] == _OF_KEYS
        bias = _mask(emit, None if of_keys else mask, mask if of_keys else None, fake(x).shape[0], p.heads)  # fmt: skip
        return _attend(emit, p, (x, x, x), bias)

    def feed_forward(x: fx.Node) -> fx.Node:
        inner = emit(F.linear, x, given["ffn_weight_1"], given["ffn_bias_1"])
        inner = emit(F.gelu if given["use_gelu"] else F.relu, inner)
        return emit(F.linear, inner, given["ffn_weight_2"], given["ffn_bias_2"])

    for number, part in ((1, attention), (2, feed_forward)):
        first = given["norm_first"]
        x = emit("add", x, part(norm(x, number) if first else x))
        x = x if first else norm(x, number)
    replace(node, x)


def _mask(
    emit: _Emitter, of_queries: fx.Node | None, of_keys: fx.Node | None, batch: Any, heads: int
) -> fx.Node | None:
    """What scaled_dot_product_attention is to be given for masks [L, S], [N·H, L, S] or [N, H, L, S] and [N, S], in which True is
    "not allowed" and a float is added."""
    masks = []
    if of_queries is not None:
        shape = fake(of_queries).shape
        front = (1, 1) if len(shape) == 2 else (batch, heads)
        masks.append(emit("view", of_queries, (*front, *shape[-2:])))
    if of_keys is not None:
        size = fake(of_keys).shape
        masks.append(emit("view", of_keys, (size[0], 1, 1, size[1])))
    if not masks:
        return None
    if all(not fake(m).is_floating_point() for m in masks):
        both = masks[0] if len(masks) == 1 else emit("logical_or", *masks)
        return emit("logical_not", both)
    dtype = next(fake(m).dtype for m in masks if fake(m).is_floating_point())
    added = [
        m
        if fake(m).is_floating_point()
        else emit("masked_fill", emit("to", emit("zeros_like", m), dtype), m, -inf)
        for m in masks
    ]
    return added[0] if len(added) == 1 else emit("add", *added)


def _dense(emit: _Emitter, x: fx.Node) -> fx.Node:
    return x if is_dense(fake(x)) else emit("contiguous", x)


def _is_rows(x: fx.Node) -> bool:
    """[A, B, E] with an E that stays the same between calls."""
    return fake(x).dim() == 3 and isinstance(expression(fake(x).shape[-1]), int)


def _readable(*values: Any) -> bool:
    """Tensors that kernels can read, of floats that they compute on, or masks."""
    tensors = [v for v in values if is_tensor(v)]
    return not any(map(unreadable, tensors)) and all(
        fake(t).dtype in FLOATS or not fake(t).is_floating_point() for t in tensors
    )
