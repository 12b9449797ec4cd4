"""attentions: scaled_dot_product_attention and the spelled-out softmax(q kᵀ · scale + mask) v → ops.attention.

Repeated key/value heads are traced back to the heads they repeat, so that each is read once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from llmopt import ops
from llmopt.casts import is_float_cast
from llmopt.graph import (
    FLOATS,
    NOTE,
    argument,
    emit,
    expression,
    fake,
    fake_mode_of,
    is_tensor,
    kind,
    replace,
    same_shape,
    same_size,
    scalar,
    sole_user,
    storage,
)
from llmopt.passes.scores import RESHAPES, bias_of, four_dims, keeps_last_two, read_scores
from llmopt.passes.simplify import erase_unused
from llmopt.writes import Writes


def run(graph: fx.Graph) -> None:
    mode, writes = fake_mode_of(graph), Writes(graph)
    for node in list(graph.nodes):
        if kind(node) == "transpose":
            _repeat_behind_turns(graph, mode, node, writes)
    for node in list(graph.nodes):
        if node.op not in ("call_function", "call_method"):
            continue
        if kind(node) == "scaled_dot_product_attention":
            _match_sdpa(graph, mode, node, writes)
        elif kind(node) == "softmax":
            _match_softmax(graph, mode, node, writes)
    erase_unused(graph)


def _match_sdpa(graph: fx.Graph, mode: Any, node: fx.Node, writes: Writes) -> None:
    q, k, v = (argument(node, i, name) for i, name in enumerate(("query", "key", "value")))
    mask = argument(node, 3, "attn_mask")
    if argument(node, 4, "dropout_p", 0.0) != 0.0 or not _shapes_fit(q, k, v, mask):
        return
    scale = argument(node, 6, "scale")
    width = expression(fake(q).shape[-1])
    if not isinstance(width, int) or width == 0:
        return
    if scale is not None and scalar(scale) is None:
        node.meta[NOTE] = "scale is not a constant"
        return
    scale = width**-0.5 if scale is None else float(scale)
    causal = argument(node, 5, "is_causal", False)
    if not isinstance(causal, bool):
        node.meta[NOTE] = "is_causal is not a constant"
        return
    k, v = _ungrouped(k), _ungrouped(v)
    if not _gives(q, v, fake(node).shape) or writes.moves_reads(node, (q, k, v, mask)):
        return
    with graph.inserting_before(node):
        mask = _four_dims(graph, mode, mask)
        args = (q, k, v, mask, scale, causal)
        new = emit(graph, mode, ops.attention, args, like=node)
        if fake(new).dtype != fake(node).dtype:  # under autocast
            new = emit(graph, mode, "to", (new, fake(node).dtype), like=node)
    replace(node, new)


def _shapes_fit(q: Any, k: Any, v: Any, mask: Any) -> bool:
    if not all(is_tensor(t) and fake(t).dim() == 4 and fake(t).dtype in FLOATS for t in (q, k, v)):
        return False
    k, v = _ungrouped(k), _ungrouped(v)
    fq, fk, fv = fake(q), fake(k), fake(v)
    if len({(t.dtype, t.device) for t in (fq, fk, fv)}) != 1:
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
    lengths = (fk.shape[2], fv.shape[2])
    if all(isinstance(n, int) for n in lengths) and lengths[0] != lengths[1]:
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


def _repeat_behind_turns(graph: fx.Graph, mode: Any, node: fx.Node, writes: Writes) -> None:
    """Heads repeated in [B,S,Hkv,D] and then brought to the front: in the other order, as `_ungrouped` knows them."""
    dims = sorted(d % 4 for d in node.args[1:] if isinstance(d, int))
    if dims != [1, 2] or fake(node).dim() != 4 or not is_tensor(node.args[0]):
        return
    many = node.args[0]
    base, repeats = _repeated(many, 2)
    if base is many or writes.moves_reads(node, (base,)):
        return
    if storage(many) == storage(base):  # of one head: what is repeated is the head's own memory
        if writes.between((base,), many, graph.output_node()):
            return
    elif writes.into((many,)):
        return
    with graph.inserting_before(node):
        turned = emit(graph, mode, "transpose", (base, 1, 2), like=node)
        new = emit(graph, mode, "repeat_interleave", (turned, repeats, 1), like=node)
    replace(node, new)


def _ungrouped(k: fx.Node) -> fx.Node:
    """The keys or values [B,Hkv,S,D] that k [B,Hkv·n,S,D] repeats; k itself when it repeats nothing."""
    return _repeated(k, 1)[0]


def _repeated(k: fx.Node, heads: int) -> tuple[fx.Node, int]:
    """The value of which each of the heads, in that dimension, stands in k some times, and how often; k and 1 for others."""
    if kind(k) == "repeat_interleave":
        dim, repeats = argument(k, 2, "dim"), argument(k, 1, "repeats")
        fits = dim in (heads, heads - 4) and isinstance(repeats, int)
        return (k.args[0], repeats) if fits else (k, 1)
    if (
        kind(k) not in ("reshape", "view", "flatten")
        or not is_tensor(k.args[0])
        or kind(k.args[0]) != "expand"
    ):
        return k, 1
    expanded = k.args[0]
    unsqueezed = expanded.args[0]
    base = _in_front_of_repeats(unsqueezed, heads) if fake(expanded).dim() == 5 else None
    if base is None:
        return k, 1
    shape, wide = fake(base).shape, fake(expanded).shape
    repeats = expression(wide[heads + 1])
    rest = (*wide[: heads + 1], *wide[heads + 2 :])
    fits = all(same_size(a, b) for a, b in zip(shape, rest, strict=True))
    whole = (*shape[:heads], shape[heads] * wide[heads + 1], *shape[heads + 1 :])
    if not fits or not isinstance(repeats, int) or not same_shape(fake(k).shape, whole):
        return k, 1
    return base, repeats


def _in_front_of_repeats(node: Any, heads: int) -> fx.Node | None:
    """The value of four dimensions which a node has with a further one behind its heads."""
    base = node.args[0] if is_tensor(node) and node.args else None
    if not is_tensor(base) or fake(base).dim() != 4:
        return None
    if kind(node) == "unsqueeze":
        return base if argument(node, 1, "dim") in (heads + 1, heads - 4) else None
    if kind(node) != "getitem" or not isinstance(node.args[1], tuple):
        return None
    index = [*node.args[1]]
    if Ellipsis in index:
        at = index.index(Ellipsis)
        index[at : at + 1] = [slice(None)] * (5 - len(index) + 1)
    index += [slice(None)] * (5 - len(index))
    wanted = [slice(None)] * (heads + 1) + [None] + [slice(None)] * (3 - heads)
    return base if index == wanted else None


def _match_softmax(graph: fx.Graph, mode: Any, node: fx.Node, writes: Writes) -> None:
    dim = argument(node, 1, "dim")
    if not is_tensor(node.args[0]) or dim not in (-1, fake(node).dim() - 1):
        return
    scores = read_scores(node)
    last = node if scores is None or scores.sinks is None else _without_last(node)
    if scores is None or last is None:
        return
    while (user := sole_user(last)) is not None and _passes_on(user):
        last = user
    product = sole_user(last)
    if product is None or kind(product) not in ("matmul", "bmm") or product.args[0] is not last:
        return
    v = argument(product, 1, "mat2")
    v = four_dims(v) if is_tensor(v) else None
    if v is None or fake(product).dtype != fake(scores.q).dtype:
        return
    result = _whole_heads(product)
    if not _gives(scores.q, v, fake(product if result is None else result).shape):
        return
    k, v = scores.k if scores.k_is_transposed else _ungrouped(scores.k), _ungrouped(v)
    read = (
        scores.q,
        k,
        v,
        scores.sinks,
        *(c.tensor for c in (*scores.temperatures, *scores.changes)),
    )
    if writes.moves_reads(product, read):
        return
    with graph.inserting_before(product):
        if scores.k_is_transposed:
            k = emit(graph, mode, "transpose", (k, 2, 3), like=product)
        if not _shapes_fit(scores.q, k, v, None):
            return
        mask, scale = bias_of(graph, mode, scores, product)
        mask = _four_dims(graph, mode, mask)
        q = scores.q
        for t in scores.temperatures:
            q = emit(graph, mode, "mul" if t.number == 1.0 else "div", (q, t.tensor), like=product)
        args = (q, k, v, mask, scale, False, 0, 0, scores.softcap)
        kwargs = {"nan_rows": True} if scores.sinks is None else {"sinks": scores.sinks}
        new = emit(graph, mode, ops.attention, args, kwargs, like=product)
        if result is None and fake(product).dim() == 3:
            new = emit(graph, mode, "flatten", (new, 0, 1), like=product)
    replace(product if result is None else result, new)


def _without_last(weights: fx.Node) -> fx.Node | None:
    """What reads the weights of a row but for the last, that of its sink, where nothing else reads any."""
    user = sole_user(weights)
    if user is None or kind(user) != "getitem" or not isinstance(user.args[1], tuple):
        return None
    *front, last = user.args[1]
    is_whole = front == [...] or front == [slice(None)] * (fake(weights).dim() - 1)
    return user if is_whole and last == slice(None, -1, None) else None


def _passes_on(node: fx.Node) -> bool:
    """Casts of the weights, and reshapes of their batch and heads."""
    return is_float_cast(node) or (kind(node) in RESHAPES and keeps_last_two(node))


def _gives(q: fx.Node, v: fx.Node, shape: Any) -> bool:
    """True when attention of q [B,H,Sq,D] over v [B,Hkv,Skv,Dv] has this shape, with heads apart or flattened."""
    batch, heads, queries = fake(q).shape[:3]
    front = (batch, heads) if len(shape) == 4 else (batch * heads,)
    return same_shape(shape, (*front, queries, fake(v).shape[3]))


def _whole_heads(product: fx.Node) -> fx.Node | None:
    """The only reader of a [B·H,Sq,D] product that gives it back its heads, [B,H,Sq,D]."""
    user = sole_user(product)
    if fake(product).dim() != 3 or user is None or kind(user) not in RESHAPES:
        return None
    fits = fake(user).dim() == 4 and same_shape(fake(user).shape[2:], fake(product).shape[1:])
    return user if fits else None
