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

import torch
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
    storage,
    unreadable,
)
from llmopt.writes import mutated_storages


def run(graph: fx.Graph) -> None:
    rules = {
        "multi_head_attention_forward": _attention_layer,
        "_transformer_encoder_layer_fwd": _encoder_layer,
    }
    for node in list(graph.nodes):
        rule = rules.get(kind(node)) if node.op == "call_function" else None
        if rule is not None:
            with graph.inserting_before(node):
                rule(_Calls(graph, fake_mode_of(graph), node), node)


@dataclass(frozen=True)
class _Calls:
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

    def project(self, call: _Calls, x: fx.Node, which: int) -> fx.Node:
        """Query (0), key (1) or value (2) of x [N, L, E], as [N, H, L, D]."""
        width = fake(x).shape[-1]
        weight, bias = (
            None if t is None else call("narrow", t, 0, which * width, width)
            for t in (self.weight, self.bias)
        )
        heads = call("unflatten", call(F.linear, x, weight, bias), -1, (self.heads, -1))
        return call("transpose", heads, 1, 2)


def _attend(call: _Calls, p: _Projections, inputs: tuple[fx.Node, ...], **masking: Any) -> fx.Node:
    """Attention of query, key and value, each [N, L, E], with its projections: [N, L, E]."""
    q, k, v = (p.project(call, x, i) for i, x in enumerate(inputs))
    attended = call(F.scaled_dot_product_attention, q, k, v, **masking)
    rows = call("flatten", call("transpose", attended, 1, 2), 2)
    return call(F.linear, rows, p.out_weight, p.out_bias)


_RESULT = 0  # of F.multi_head_attention_forward; its other part are the attention's weights
_UNUSUAL = ("bias_k", "bias_v", "static_k", "static_v", "use_separate_proj_weight", "add_zero_attn")


def _attention_layer(call: _Calls, node: fx.Node) -> None:
    """F.multi_head_attention_forward, which gives [L, N, E] and weights that nobody may read."""
    bound = inspect.signature(F.multi_head_attention_forward).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    given = bound.arguments
    inputs = tuple(given[name] for name in ("query", "key", "value"))
    if reason := _why_not(node, given, inputs):
        node.meta[NOTE] = f"nn.MultiheadAttention: {reason}"
        return
    p = _Projections(
        given["num_heads"], given["in_proj_weight"], given["in_proj_bias"], given["out_proj_weight"], given["out_proj_bias"],
    )  # fmt: skip
    if given["is_causal"] and given["key_padding_mask"] is None:
        masking: dict[str, Any] = {"is_causal": True}  # whatever attn_mask holds
    else:
        masking = {"attn_mask": _mask(call, given["attn_mask"], given["key_padding_mask"], p.heads)}
    turned = {x: _dense(call, call("transpose", x, 0, 1)) for x in dict.fromkeys(inputs)}
    result = _attend(call, p, tuple(turned[x] for x in inputs), **masking)
    written = mutated_storages(call.graph)
    for part in list(node.users):
        if part.args[1] == _RESULT and part.users:
            _hand_over(call, part, result, storage(part) in written)
        else:
            call.graph.erase_node(part)
    call.graph.erase_node(node)


def _hand_over(call: _Calls, part: fx.Node, result: fx.Node, is_written: bool) -> None:
    """Puts `result` [N, L, E] where `part` [L, N, E] was: as it is where all turn it back, as batch_first does, and write nothing into it.

    Otherwise in the order in memory that PyTorch's has.
    """
    back = [u for u in part.users if kind(u) == "transpose" and sorted(u.args[1:]) == [0, 1]]
    if len(back) == len(part.users) and not is_written:
        for user in back:
            replace(user, result)
        call.graph.erase_node(part)
    else:
        replace(part, _dense(call, call("transpose", result, 0, 1)))


def _why_not(node: fx.Node, given: dict[str, Any], inputs: tuple[Any, ...]) -> str:
    """Why a nn.MultiheadAttention stays PyTorch's, or ""."""
    masks = [m for m in (given["attn_mask"], given["key_padding_mask"]) if m is not None]
    unusual = [name for name in _UNUSUAL if given[name] not in (None, False)]
    if unusual:
        return ", ".join(unusual)
    if given["training"] and given["dropout_p"]:
        return "dropout"
    if any(kind(u) != "getitem" or (u.args[1] != _RESULT and u.users) for u in node.users):
        return "its weights are read"
    if given["need_weights"] and masks:
        # With them, a row with no key to attend to gives NaN; without them zeros.
        return "with a mask its weights are computed; need_weights=False lets kernels do it"
    if given["is_causal"] and given["attn_mask"] is None:
        return "is_causal without attn_mask is an error"
    if reason := _why_no_rows(given.values(), inputs):
        return reason
    if any(fake(m).dtype not in (torch.bool, fake(inputs[0]).dtype) for m in masks):
        return "a mask is neither bool nor of the query's dtype"
    return ""


_LAYER = (
    "src", "embed_dim", "num_heads", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias", "use_gelu", "norm_first", "eps",
    "norm_weight_1", "norm_bias_1", "norm_weight_2", "norm_bias_2",
    "ffn_weight_1", "ffn_bias_1", "ffn_weight_2", "ffn_bias_2", "mask", "mask_type",
)  # fmt: skip
_MASK_DIMS = {0: 2, 1: 2, 2: 4}  # by mask_type: [L, L], [N, L] and [N, H, L, L]
_OF_KEYS = 1


def _encoder_layer(call: _Calls, node: fx.Node) -> None:
    """torch._transformer_encoder_layer_fwd over src [N, L, E]."""
    given: dict[str, Any] = {"mask": None, "mask_type": None}
    given |= dict(zip(_LAYER, node.args, strict=False)) | node.kwargs
    source, mask, of_keys = given["src"], given["mask"], given["mask_type"] == _OF_KEYS
    reason = _why_no_rows(given.values(), (source,))
    if not isinstance(given["eps"], float):
        reason = reason or "eps changes from call to call"
    if mask is not None and fake(mask).dim() != _MASK_DIMS.get(given["mask_type"]):
        reason = reason or "its mask is not of its mask_type"
    if reason:
        node.meta[NOTE] = f"nn.TransformerEncoderLayer: {reason}"
        return
    if mask is not None and fake(mask).is_floating_point():
        mask = call("to", mask, fake(source).dtype)
    p = _Projections(
        given["num_heads"], given["qkv_weight"], given["qkv_bias"], given["proj_weight"], given["proj_bias"],
    )  # fmt: skip
    allowed = _mask(call, None if of_keys else mask, mask if of_keys else None, p.heads)

    def norm(rows: fx.Node, which: int) -> fx.Node:
        weight, bias = given[f"norm_weight_{which}"], given[f"norm_bias_{which}"]
        return call(F.layer_norm, rows, (given["embed_dim"],), weight, bias, given["eps"])

    def attention(rows: fx.Node) -> fx.Node:
        return _attend(call, p, (rows, rows, rows), attn_mask=allowed)

    def feed_forward(rows: fx.Node) -> fx.Node:
        inner = call(F.linear, rows, given["ffn_weight_1"], given["ffn_bias_1"])
        inner = call(F.gelu if given["use_gelu"] else F.relu, inner)
        return call(F.linear, inner, given["ffn_weight_2"], given["ffn_bias_2"])

    x, first = source, given["norm_first"]
    for number, part in ((1, attention), (2, feed_forward)):
        x = call("add", x, part(norm(x, number) if first else x))
        x = x if first else norm(x, number)
    replace(node, x)


def _mask(
    call: _Calls, of_queries: fx.Node | None, of_keys: fx.Node | None, heads: int
) -> fx.Node | None:
    """What scaled_dot_product_attention is to be given for masks [L, S], [N·H, L, S] or [N, H, L, S] and [N, S], in which True is
    "not allowed" and a float is added."""
    masks = []
    if of_queries is not None:
        flat = fake(of_queries).dim() == 3
        masks.append(call("unflatten", of_queries, 0, (-1, heads)) if flat else of_queries)
    if of_keys is not None:
        masks.append(call("unsqueeze", call("unsqueeze", of_keys, 1), 2))
    if not masks:
        return None
    floats = [m for m in masks if fake(m).is_floating_point()]
    if not floats:
        return call("logical_not", masks[0] if len(masks) == 1 else call("logical_or", *masks))
    dtype = fake(floats[0]).dtype
    added = [
        m if m in floats else call("masked_fill", call(torch.zeros_like, m, dtype=dtype), m, -inf)
        for m in masks
    ]
    return added[0] if len(added) == 1 else call("add", *added)


def _dense(call: _Calls, x: fx.Node) -> fx.Node:
    return x if is_dense(fake(x)) else call("contiguous", x)


def _why_no_rows(values: Any, inputs: tuple[fx.Node, ...]) -> str:
    """Why kernels cannot take a layer with these arguments over inputs [A, B, E], or ""."""
    for value in filter(is_tensor, values):
        if reason := unreadable(value):
            return f"{value.name} is {reason}"
    if any(fake(x).dim() != 3 for x in inputs):
        return "an input has no batch dimension"
    if any(fake(x).dtype not in FLOATS for x in inputs):
        return f"inputs are {fake(inputs[0]).dtype}"
    if any(not isinstance(expression(fake(x).shape[-1]), int) for x in inputs):
        return "its width changes from call to call"
    return ""
