"""attentions: scaled_dot_product_attention and the spelled-out softmax(q kᵀ · scale + mask) v → ops.attention.

Repeated key/value heads are traced back to the heads they repeat, so that each is read once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from llmopt import ops
from llmopt.graph import (
    argument,
    binary_operands,
    emit,
    expression,
    fake,
    fake_mode_of,
    is_tensor,
    kind,
    replace,
    same_size,
    scalar,
    sole_user,
    strip,
)

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_CASTS = ("to", "float", "type_as", "half", "bfloat16")


def run(graph: fx.Graph) -> None:
    mode = fake_mode_of(graph)
    for node in list(graph.nodes):
        if node.op not in ("call_function", "call_method"):
            continue
        if kind(node) == "scaled_dot_product_attention":
            _match_sdpa(graph, mode, node)
        elif kind(node) == "softmax":
            _match_softmax(graph, mode, node)


def _match_sdpa(graph: fx.Graph, mode: Any, node: fx.Node) -> None:
    q, k, v = (argument(node, i, name) for i, name in enumerate(("query", "key", "value")))
    mask = argument(node, 3, "attn_mask")
    if argument(node, 4, "dropout_p", 0.0) != 0.0 or not _shapes_fit(q, k, v, mask):
        return
    scale = argument(node, 6, "scale")
    width = expression(fake(q).shape[-1])
    if not isinstance(width, int) or not (scale is None or isinstance(scale, (int, float))):
        return
    scale = width**-0.5 if scale is None else float(scale)
    causal = bool(argument(node, 5, "is_causal", False))
    with graph.inserting_before(node):
        mask = _four_dims(graph, mode, mask)
        args = (q, _ungrouped(k), _ungrouped(v), mask, scale, causal)
        new = emit(graph, mode, ops.attention, args, like=node)
    replace(node, new)


def _shapes_fit(q: Any, k: Any, v: Any, mask: Any) -> bool:
    if not all(is_tensor(t) and fake(t).dim() == 4 and fake(t).dtype in FLOATS for t in (q, k, v)):
        return False
    k, v = _ungrouped(k), _ungrouped(v)
    fq, fk, fv = fake(q), fake(k), fake(v)
    if len({fq.dtype, fk.dtype, fv.dtype}) != 1 or fq.device.type != "cpu":
        return False
    heads = [expression(t.shape[1]) for t in (fq, fk, fv)]
    if (
        not all(isinstance(h, int) and h > 0 for h in heads)
        or heads[1] != heads[2]
        or heads[0] % heads[1]
    ):
        return False
    if not all(isinstance(expression(t.shape[3]), int) for t in (fq, fk, fv)):
        return False
    if not (same_size(fq.shape[0], fk.shape[0]) and same_size(fq.shape[0], fv.shape[0])):
        return False
    if mask is None:
        return True
    return (
        is_tensor(mask) and 2 <= fake(mask).dim() <= 4 and fake(mask).dtype in (torch.bool, *FLOATS)
    )


def _four_dims(graph: fx.Graph, mode: Any, mask: Any) -> Any:
    while mask is not None and fake(mask).dim() < 4:
        mask = emit(graph, mode, "unsqueeze", (mask, 0), like=mask)
    return mask


def _ungrouped(k: fx.Node) -> fx.Node:
    """The keys or values [B,Hkv,S,D] that k [B,Hkv·n,S,D] repeats; k itself when it repeats nothing."""
    if kind(k) == "repeat_interleave":
        dim = argument(k, 2, "dim")
        return k.args[0] if dim in (1, -3) and isinstance(argument(k, 1, "repeats"), int) else k
    if (
        kind(k) not in ("reshape", "view", "flatten")
        or not is_tensor(k.args[0])
        or kind(k.args[0]) != "expand"
    ):
        return k
    expanded = k.args[0]
    unsqueezed = expanded.args[0]
    if (
        fake(expanded).dim() != 5
        or not is_tensor(unsqueezed)
        or kind(unsqueezed) not in ("getitem", "unsqueeze")
    ):
        return k
    base = unsqueezed.args[0]
    if not is_tensor(base) or fake(base).dim() != 4:
        return k
    shape, wide = fake(base).shape, fake(expanded).shape
    repeats = wide[2]
    fits = all(
        same_size(a, b)
        for a, b in zip(
            (shape[0], shape[1], shape[2], shape[3]), (wide[0], wide[1], *wide[3:]), strict=True
        )
    )
    if not fits or not same_size(fake(k).shape[1], shape[1] * repeats) or fake(k).dim() != 4:
        return k
    return base


def _match_softmax(graph: fx.Graph, mode: Any, node: fx.Node) -> None:
    dim = argument(node, 1, "dim")
    if not is_tensor(node.args[0]) or dim not in (-1, fake(node).dim() - 1):
        return
    last = node
    while (user := sole_user(last)) is not None and kind(user) in _CASTS:
        last = user
    product = sole_user(last)
    if product is None or kind(product) not in ("matmul", "bmm") or product.args[0] is not last:
        return
    v = product.args[1]
    found = _scores(node.args[0])
    if found is None:
        return
    q, k_transposed, scale, softcap, biases = found
    if not is_tensor(v) or fake(q).dim() != 4 or fake(product).dtype != fake(q).dtype:
        return
    if any(fake(b).dim() > 4 or fake(b).dtype not in FLOATS for b in biases):
        return
    with graph.inserting_before(product):
        k = emit(graph, mode, "transpose", (k_transposed, 2, 3), like=product)
        if kind(k_transposed) in ("transpose", "mT") and fake(k_transposed.args[0]).dim() == 4:
            swapped = (
                tuple(a % 4 for a in k_transposed.args[1:3])
                if kind(k_transposed) == "transpose"
                else (2, 3)
            )
            k = k_transposed.args[0] if set(swapped) == {2, 3} else k
        if not _shapes_fit(q, k, v, None):
            return
        mask = None
        for bias in biases:
            mask = (
                bias if mask is None else emit(graph, mode, torch.add, (mask, bias), like=product)
            )
        mask = _four_dims(graph, mode, mask)
        args = (q, _ungrouped(k), _ungrouped(v), mask, scale, False, 0, 0, softcap)
        new = emit(graph, mode, ops.attention, args, like=product)
    replace(product, new)


def _scores(node: fx.Node) -> tuple[fx.Node, fx.Node, float, float, list[fx.Node]] | None:
    """q, kᵀ, scale, softcap and additive biases of softmax's input."""
    biases: list[fx.Node] = []
    node = _single(node)
    while node is not None and kind(node) == "add" and (pair := binary_operands(node)) is not None:
        if not all(is_tensor(p) for p in pair):
            return None
        scores, bias = pair if _is_scores(pair[0]) else pair[::-1]
        biases.insert(0, bias)
        node = _single(scores)
    softcap, scale = 0.0, 1.0
    if (
        node is not None
        and kind(node) == "mul"
        and is_tensor(node.args[0])
        and kind(node.args[0]) == "tanh"
    ):
        inner = node.args[0].args[0]
        softcap = scalar(node.args[1]) or 0.0
        if not softcap or kind(inner) != "div" or scalar(inner.args[1]) != softcap:
            return None
        if not (sole_user(node.args[0]) and sole_user(inner)):
            return None
        node = _single(inner.args[0])
    while (
        node is not None
        and kind(node) in ("mul", "div")
        and (pair := binary_operands(node)) is not None
    ):
        factor = scalar(pair[1])
        if factor is None or factor == 0.0 or not is_tensor(pair[0]):
            return None
        scale *= factor if kind(node) == "mul" else 1.0 / factor
        node = _single(pair[0])
    if node is None or kind(node) != "matmul" or not all(is_tensor(a) for a in node.args[:2]):
        return None
    return node.args[0], node.args[1], scale, softcap, biases


def _is_scores(node: fx.Node) -> bool:
    return kind(strip(node, (*_CASTS, "mul", "div", "add", "tanh"))) == "matmul"


def _single(node: Any) -> fx.Node | None:
    """The node under casts, when each link has no other reader."""
    while is_tensor(node) and sole_user(node) is not None:
        if kind(node) not in _CASTS:
            return node
        node = node.args[0]
    return None
