"""torch_layers: nn.MultiheadAttention and nn.TransformerEncoderLayer, one call each in Dynamo's graph → linears, attention and norms.

Results are those of PyTorch with `torch.backends.mha.set_fastpath_enabled(False)`. Its fast path takes any number in a float mask but 0
for "not allowed", and gives NaN for a row with no allowed key.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from math import inf
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from llmopt.graph import (
    FLOATS,
    NOTE,
    expression,
    fake,
    fake_mode_of,
    is_dense,
    is_empty,
    is_tensor,
    kind,
    replace,
    storage,
    unreadable,
)
from llmopt.passes.calls import Calls
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
                rule(Calls(graph, fake_mode_of(graph), node), node)


@dataclass(frozen=True)
class _Projections:
    """Of one attention: weight [E, width] and bias [E] of query, key and value, and those of the result."""

    heads: int
    inputs: tuple[tuple[fx.Node, fx.Node | None], ...]
    result: tuple[fx.Node, fx.Node | None]

    def project(self, call: Calls, inputs: Iterable[fx.Node]) -> Iterator[fx.Node]:
        """Query, key and value of inputs [N, L, width], as [N, H, L, D]."""
        for x, (weight, bias) in zip(inputs, self.inputs, strict=True):
            yield self.by_heads(call, call(F.linear, x, weight, bias))

    def by_heads(self, call: Calls, rows: fx.Node) -> fx.Node:
        return call("transpose", call("unflatten", rows, -1, (self.heads, -1)), 1, 2)

    def joined(self, call: Calls, attended: fx.Node) -> fx.Node:
        """The result [N, L, E] of what each head attended to [N, H, L, D]."""
        rows = call("flatten", call("transpose", attended, 1, 2), 2)
        return call(F.linear, rows, *self.result)


def _thirds(call: Calls, joined: fx.Node | None) -> list[Any]:
    """What lies one below the other for query, key and value."""
    if joined is None:
        return [None] * 3
    size = fake(joined).shape[0] // 3
    return [call("narrow", joined, 0, i * size, size) for i in range(3)]


_RESULT, _WEIGHTS = 0, 1  # of F.multi_head_attention_forward


def _attention_layer(call: Calls, node: fx.Node) -> None:
    """F.multi_head_attention_forward: [L, N, E] or [L, E], and the weights of the keys where they are asked for."""
    bound = inspect.signature(F.multi_head_attention_forward).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    given = bound.arguments
    inputs = tuple(given[name] for name in ("query", "key", "value"))
    if reason := _why_not(node, given, inputs):
        node.meta[NOTE] = f"nn.MultiheadAttention: {reason}"
        return
    p, is_batched = _projections(call, given), fake(inputs[0]).dim() == 3
    turned = {
        x: _dense(call, call("transpose", x, 0, 1)) if is_batched else call("unsqueeze", x, 0)
        for x in dict.fromkeys(inputs)
    }
    q, k, v = p.project(call, (turned[x] for x in inputs))
    of_queries, of_keys = given["attn_mask"], given["key_padding_mask"]
    if not is_batched and of_keys is not None:
        of_keys = call("unsqueeze", of_keys, 0)
    for more in _further_keys(call, given, p, k):
        k, v = (call(torch.cat, [x, row], 2) for x, row in zip((k, v), more, strict=True))
        of_queries, of_keys = (
            None if m is None else call(F.pad, m, (0, 1)) for m in (of_queries, of_keys)
        )
    read = {part.args[1] for part in node.users if part.users}
    masked = of_queries is not None or of_keys is not None
    shares = None
    if _WEIGHTS in read or (given["need_weights"] and masked):
        # With them, a row without a key that it may attend to gives NaN; without them zeros.
        shares = _shares(call, q, k, _added(call, _masks(call, of_queries, of_keys, p.heads), q))
        attended = call("matmul", shares, v)
    elif given["is_causal"] and of_keys is None and not given["need_weights"]:
        # Whatever attn_mask holds.
        attended = call(F.scaled_dot_product_attention, q, k, v, is_causal=True)
    else:
        allowed = _allowed(call, _masks(call, of_queries, of_keys, p.heads))
        attended = call(F.scaled_dot_product_attention, q, k, v, attn_mask=allowed)
    result = p.joined(call, attended)
    written = mutated_storages(call.graph)
    for part in list(node.users):
        if part.args[1] == _RESULT and part.users and is_batched:
            _hand_over(call, part, result, storage(part) in written)
        elif part.users:
            value = result
            if part.args[1] == _WEIGHTS:
                value = call("mean", shares, 1) if given["average_attn_weights"] else shares
            replace(part, value if is_batched else call("squeeze", value, 0))
        else:
            call.graph.erase_node(part)
    call.graph.erase_node(node)


def _projections(call: Calls, given: dict[str, Any]) -> _Projections:
    own = [given[f"{x}_proj_weight"] for x in "qkv"]  # where keys and values have other widths
    is_own = given["use_separate_proj_weight"]
    weights = own if is_own else _thirds(call, given["in_proj_weight"])
    biases = _thirds(call, given["in_proj_bias"])
    result = given["out_proj_weight"], given["out_proj_bias"]
    return _Projections(given["num_heads"], tuple(zip(weights, biases, strict=True)), result)


def _further_keys(
    call: Calls, given: dict[str, Any], p: _Projections, k: fx.Node
) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Keys and values [N, H, 1, D] that are attended to behind those of the input: learnt ones, and zeros."""
    if given["bias_k"] is None and not given["add_zero_attn"]:
        return
    first = call("narrow", k, 2, 0, 1)
    if given["bias_k"] is not None:
        learnt = (p.by_heads(call, given[name]) for name in ("bias_k", "bias_v"))
        key, value = (call("expand_as", row, first) for row in learnt)
        yield key, value
    if given["add_zero_attn"]:
        zeros = call(torch.zeros_like, first)
        yield zeros, zeros


def _shares(call: Calls, q: fx.Node, k: fx.Node, added: fx.Node | None) -> fx.Node:
    """How much of each key's value a query takes: [N, H, L, S]."""
    scores = call("matmul", call("mul", q, fake(q).shape[-1] ** -0.5), call("transpose", k, 2, 3))
    return call(F.softmax, scores if added is None else call("add", scores, added), dim=-1)


def _hand_over(call: Calls, part: fx.Node, result: fx.Node, is_written: bool) -> None:
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
    if given["static_k"] is not None or given["static_v"] is not None:
        return "static_k, static_v"
    if given["training"] and given["dropout_p"]:
        return "dropout"
    if any(kind(u) != "getitem" for u in node.users):
        return "its two results are used as one"
    if given["is_causal"] and given["attn_mask"] is None:
        return "is_causal without attn_mask is an error"
    if reason := _why_no_rows(given.values(), inputs, (2, 3)):
        return reason
    if any(fake(m).dtype not in (torch.bool, fake(inputs[0]).dtype) for m in masks):
        return "a mask is neither bool nor of the query's dtype"
    has_own_keys = given["bias_k"] is not None or given["add_zero_attn"]
    if has_own_keys and is_empty(fake(inputs[1])):
        return "no keys but its own"
    return ""


_LAYER = (
    "src", "embed_dim", "num_heads", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias", "use_gelu", "norm_first", "eps",
    "norm_weight_1", "norm_bias_1", "norm_weight_2", "norm_bias_2",
    "ffn_weight_1", "ffn_bias_1", "ffn_weight_2", "ffn_bias_2", "mask", "mask_type",
)  # fmt: skip
_MASK_DIMS = {0: 2, 1: 2, 2: 4}  # by mask_type: [L, L], [N, L] and [N, H, L, L]
_OF_KEYS = 1


def _encoder_layer(call: Calls, node: fx.Node) -> None:
    """torch._transformer_encoder_layer_fwd over src [N, L, E]."""
    given: dict[str, Any] = {"mask": None, "mask_type": None}
    given |= dict(zip(_LAYER, node.args, strict=False)) | node.kwargs
    source, mask, of_keys = given["src"], given["mask"], given["mask_type"] == _OF_KEYS
    reason = _why_no_rows(given.values(), (source,), (3,))
    if not isinstance(given["eps"], float):
        reason = reason or "eps changes from call to call"
    if mask is not None and fake(mask).dim() != _MASK_DIMS.get(given["mask_type"]):
        reason = reason or "its mask is not of its mask_type"
    if reason:
        node.meta[NOTE] = f"nn.TransformerEncoderLayer: {reason}"
        return
    if mask is not None and fake(mask).is_floating_point():
        mask = call("to", mask, fake(source).dtype)
    weights, biases = _thirds(call, given["qkv_weight"]), _thirds(call, given["qkv_bias"])
    p = _Projections(
        given["num_heads"],
        tuple(zip(weights, biases, strict=True)),
        (given["proj_weight"], given["proj_bias"]),
    )
    masks = _masks(call, None if of_keys else mask, mask if of_keys else None, p.heads)
    allowed = _allowed(call, masks)

    def norm(rows: fx.Node, which: int) -> fx.Node:
        weight, bias = given[f"norm_weight_{which}"], given[f"norm_bias_{which}"]
        return call(F.layer_norm, rows, (given["embed_dim"],), weight, bias, given["eps"])

    def attention(rows: fx.Node) -> fx.Node:
        q, k, v = p.project(call, (rows, rows, rows))
        attended = call(F.scaled_dot_product_attention, q, k, v, attn_mask=allowed)
        return p.joined(call, attended)

    def feed_forward(rows: fx.Node) -> fx.Node:
        inner = call(F.linear, rows, given["ffn_weight_1"], given["ffn_bias_1"])
        inner = call(F.gelu if given["use_gelu"] else F.relu, inner)
        return call(F.linear, inner, given["ffn_weight_2"], given["ffn_bias_2"])

    x, first = source, given["norm_first"]
    for number, part in ((1, attention), (2, feed_forward)):
        x = call("add", x, part(norm(x, number) if first else x))
        x = x if first else norm(x, number)
    replace(node, x)


def _masks(
    call: Calls, of_queries: fx.Node | None, of_keys: fx.Node | None, heads: int
) -> list[fx.Node]:
    """Masks [L, S], [N·H, L, S] or [N, H, L, S] and [N, S] as they are broadcast to scores [N, H, L, S]."""
    masks = []
    if of_queries is not None:
        flat = fake(of_queries).dim() == 3
        masks.append(call("unflatten", of_queries, 0, (-1, heads)) if flat else of_queries)
    if of_keys is not None:
        masks.append(call("unsqueeze", call("unsqueeze", of_keys, 1), 2))
    return masks


def _allowed(call: Calls, masks: list[fx.Node]) -> fx.Node | None:
    """What scaled_dot_product_attention is to be given for masks in which True is "not allowed" and a float is added."""
    floats = [m for m in masks if fake(m).is_floating_point()]
    if floats or not masks:
        return _added(call, masks, floats[0] if floats else None)
    return call("logical_not", masks[0] if len(masks) == 1 else call("logical_or", *masks))


def _added(call: Calls, masks: list[fx.Node], like: fx.Node | None) -> fx.Node | None:
    """What all masks add to scores of the dtype of `like`."""
    added = [
        m
        if fake(m).is_floating_point()
        else call("masked_fill", call(torch.zeros_like, m, dtype=fake(like).dtype), m, -inf)
        for m in masks
    ]
    return reduce(lambda a, b: call("add", a, b), added) if added else None


def _dense(call: Calls, x: fx.Node) -> fx.Node:
    return x if is_dense(fake(x)) else call("contiguous", x)


def _why_no_rows(values: Any, inputs: tuple[fx.Node, ...], dims: tuple[int, ...]) -> str:
    """Why kernels cannot take a layer with these arguments over inputs of so many dimensions, or ""."""
    for value in filter(is_tensor, values):
        if reason := unreadable(value):
            return f"{value.name} is {reason}"
    if any(fake(x).dim() not in dims for x in inputs):
        return "an input has no batch dimension"
    if any(fake(x).dtype not in FLOATS for x in inputs):
        return f"inputs are {fake(inputs[0]).dtype}"
    if any(not isinstance(expression(fake(x).shape[-1]), int) for x in inputs):
        return "its width changes from call to call"
    return ""
