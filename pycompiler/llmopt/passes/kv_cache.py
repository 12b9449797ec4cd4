"""kv_cache: rope + cat(cache, new) + attention → ops.attention_append, whose caches grow in place.

Applies where the concatenated keys and values leave the graph (a DynamicCache keeps them); other concatenations stay as they are.
"""

from __future__ import annotations

from typing import Any

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
            _match(graph, mode, node, written, writes)


def _cache_and_new(node: fx.Node) -> tuple[fx.Node | None, fx.Node] | None:
    """The two parts of cat((cache, new), -2); a cache of None is empty."""
    if kind(node) != "cat" or fake(node).dim() != 4 or argument(node, 1, "dim", 0) not in (-2, 2):
        return None
    parts = [p for p in argument(node, 0, "tensors") if not is_empty(fake(p))]
    if len(parts) == 1:
        return None, parts[0]
    if len(parts) != 2 or parts[0].op != "placeholder":
        return None
    return parts[0], parts[1]


def _match(graph: fx.Graph, mode: Any, node: fx.Node, written: set[int], writes: Writes) -> None:
    q, keys, values, mask = (argument(node, i, n) for i, n in enumerate(("q", "k", "v", "mask")))
    k_parts, v_parts = _cache_and_new(keys), _cache_and_new(values)
    if k_parts is None or v_parts is None or keys is values:
        return
    (k_cache, k_new), (v_cache, v_new) = k_parts, v_parts
    if (k_cache is None) != (v_cache is None):
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
        and sole_user(k_new) is keys
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
        joined = emit(graph, mode, ops.attention_append, args, like=node)
        parts = [emit(graph, mode, getitem, (joined, i), like=node) for i in range(3)]
    graph.erase_node(anchor)
    changed = []
    for old, new in zip((node, keys, values), parts, strict=True):
        changed += list(old.users)
        old.replace_all_uses_with(new)
        graph.erase_node(old)
    refresh(changed)


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
