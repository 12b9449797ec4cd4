"""kv_cache: rope + cat(cache, new) + attention → ops.attention_append, whose caches grow in place.

Applies where the concatenated keys and values leave the graph (a DynamicCache keeps them); other concatenations stay as they are.
A cache of codes (llmopt.KVCache) rounds what it joins and widens the whole: then attention reads the codes, appended or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from llmopt import ops
from llmopt.graph import (
    argument,
    emit,
    fake,
    fake_mode_of,
    getitem,
    is_empty,
    is_tensor,
    kind,
    refresh,
    same_size,
    sole_user,
    storage,
)
from llmopt.writes import Writes, mutated_storages


def run(graph: fx.Graph) -> None:
    mode = fake_mode_of(graph)
    written, writes = mutated_storages(graph), Writes(graph)
    for node in list(graph.nodes):
        if kind(node) == "llmopt.attention":
            _read_codes(node, writes)
            _match(graph, mode, node, written, writes)


def float_caches(graph: fx.Graph) -> list[str]:
    """Why caches of this graph cannot become codes by themselves, a sentence for each kind of cache.

    What leaves the graph, or is written into a tensor that came in, is the caller's: it may be read or changed by any code before
    the next call, so it keeps its dtype.
    """
    written = mutated_storages(graph)
    reasons: dict[str, int] = {}
    for node in graph.nodes:
        name = kind(node)
        if name == "llmopt.attention_append" and not node.kwargs.get("as_codes"):
            reason = "leave the graph"
        elif name == "llmopt.attention" and storage(node.args[1]) in written:
            reason = "are written into tensors that belong to the caller"
        else:
            continue
        reasons[reason] = reasons.get(reason, 0) + 1
    return [
        f'kv_cache="int8": keys and values of {count} attention(s) {reason}, where any code may read them, and stay as they are; '
        "pass past_key_values=llmopt.KVCache(model)"
        for reason, count in reasons.items()
    ]


def _read_codes(node: fx.Node, writes: Writes) -> None:
    """attention over keys and values widened from codes reads the codes."""
    widened = node.args[1:3]
    if any(kind(w) != _WIDEN for w in widened):
        return
    rows = [w.args[0] for w in widened]
    if writes.between(rows, min(widened), node):
        return
    node.args = (node.args[0], *rows, *node.args[3:])
    for w in dict.fromkeys(widened):
        if not w.users:
            node.graph.erase_node(w)


@dataclass(frozen=True)
class _Joined:
    """cat((cache, new), -2); a cache of None is empty. new_reader: what reads `new`, the cat or the rounding in front of it."""

    whole: fx.Node
    cache: fx.Node | None
    new: fx.Node
    new_reader: fx.Node

    @property
    def as_codes(self) -> bool:
        return self.new_reader is not self.whole


def _joined(node: fx.Node) -> _Joined | None:
    if kind(node) != "cat" or fake(node).dim() != 4 or argument(node, 1, "dim", 0) not in (-2, 2):
        return None
    parts = [p for p in argument(node, 0, "tensors") if not is_empty(fake(p))]
    if not parts or len(parts) > 2 or (len(parts) == 2 and parts[0].op != "placeholder"):
        return None
    cache, new = parts[0] if len(parts) == 2 else None, parts[-1]
    if fake(node).dtype != torch.int8:
        return _Joined(node, cache, new, node)
    if kind(new) != _ROUND or sole_user(new) is not node:
        return None
    return _Joined(node, cache, new.args[0], new)


def _match(graph: fx.Graph, mode: Any, node: fx.Node, written: set[int], writes: Writes) -> None:
    q, keys, values, mask = (argument(node, i, n) for i, n in enumerate(("q", "k", "v", "mask")))
    k_parts, v_parts = _joined(keys), _joined(values)
    if k_parts is None or v_parts is None or keys is values:
        return
    k_cache, k_new, v_cache, v_new = k_parts.cache, k_parts.new, v_parts.cache, v_parts.new
    if (k_cache is None) != (v_cache is None) or k_parts.as_codes != v_parts.as_codes:
        return
    if any(storage(t) in written for t in (keys, values, k_cache, v_cache) if t is not None):
        return
    if sum(1 for n in keys.users if kind(n) == "llmopt.attention") != 1 or not (
        _leaves(keys) or _leaves(values)
    ):
        return
    cos = sin = None
    rope_kind = "none"
    q_raw, k_raw = q, k_new
    both_turned = kind(q) == "llmopt.rope" and kind(k_new) == "llmopt.rope"
    if (
        both_turned
        and q.args[1:] == k_new.args[1:]
        and sole_user(q) is node
        and sole_user(k_new) is k_parts.new_reader
        and same_size(fake(q).shape[2], fake(k_new).shape[2])
    ):
        q_raw, cos, sin, rope_kind = q.args
        k_raw = k_new.args[0]
    inputs = [n for n in (q_raw, k_raw, v_new, k_cache, v_cache, cos, sin, mask) if n is not None]
    last = max(keys, values, *inputs)
    if any(u < last for u in (*keys.users, *values.users)) or writes.moves_reads(node, inputs):
        return
    settings = [argument(node, i, n, d) for i, n, d in _SETTINGS]
    with graph.inserting_after(last):
        anchor = graph.call_function(getitem, (q_raw, 0))  # a place to insert before; removed below
    with graph.inserting_before(anchor):
        args = (q_raw, k_raw, v_new, k_cache, v_cache, cos, sin, rope_kind, mask, *settings)
        kwargs = {"as_codes": True} if k_parts.as_codes else {}
        joined = emit(graph, mode, ops.attention_append, args, kwargs, like=node)
        parts = [emit(graph, mode, getitem, (joined, i), like=node) for i in range(3)]
    graph.erase_node(anchor)
    changed = []
    for old, new in zip((node, keys, values), parts, strict=True):
        changed += list(old.users)
        old.replace_all_uses_with(new)
        graph.erase_node(old)
    for part in (k_parts, v_parts):
        if part.as_codes:
            graph.erase_node(part.new_reader)
    refresh(changed)


_ROUND, _WIDEN = "llmopt.quantize_kv", "llmopt.dequantize_kv"
_SETTINGS = (
    (4, "scale", 1.0),
    (5, "causal", False),
    (6, "causal_offset", 0),
    (7, "window", 0),
    (8, "softcap", 0.0),
)


def _leaves(node: fx.Node) -> bool:
    """True when the value, or a slice of it, is returned by the graph."""
    return any(
        u.op == "output" or (kind(u) == "getitem" and is_tensor(u) and _leaves(u))
        for u in node.users
    )
