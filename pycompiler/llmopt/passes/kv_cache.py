"""kv_cache: rope + cat(cache, new) + attention → ops.attention_append, whose caches grow in place.

Applies where the concatenated keys and values leave the graph (a DynamicCache keeps them); other concatenations stay as they are.
A cache of codes (llmopt.KVCache) rounds what it joins and widens the whole: then attention reads the codes, appended or not. Scales are
behind the codes, in one tensor, or beside them, in a second one that is joined alike.
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
    replace_all,
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


def _read_codes(node: fx.Node, writes: Writes) -> None:
    """attention over keys and values widened from codes reads the codes."""
    widened = node.args[1:3]
    kinds = {kind(w) for w in widened}
    if kinds not in ({_WIDEN}, {_WIDEN_ARRAYS}):
        return
    rows = [w.args[0] for w in widened]
    scales = [w.args[1] for w in widened] if kinds == {_WIDEN_ARRAYS} else []
    if writes.between([*rows, *scales], min(widened), node):
        return
    node.args = (node.args[0], *rows, *node.args[3:])
    if scales:
        node.kwargs = {**node.kwargs, "k_scale": scales[0], "v_scale": scales[1]}
    for w in dict.fromkeys(widened):
        if not w.users:
            node.graph.erase_node(w)


@dataclass(frozen=True)
class _Joined:
    """cat((cache, new), -2); a cache of None is empty. new_reader: what reads `new`, the cat or the rounding in front of it.

    scales: the cat of the scales beside codes, and of what it is a cat.
    """

    whole: fx.Node
    cache: fx.Node | None
    new: fx.Node
    new_reader: fx.Node
    scales: fx.Node | None = None
    scale_cache: fx.Node | None = None

    @property
    def form(self) -> str:
        """How the cache holds what is joined: as floats, as rows of codes, or codes and scales as arrays."""
        if self.new_reader is self.whole:
            return "floats"
        return "rows" if self.scales is None else "arrays"

    def caches(self) -> list[fx.Node | None]:
        return [self.cache] if self.scales is None else [self.cache, self.scale_cache]

    def wholes(self) -> list[fx.Node]:
        return [self.whole] if self.scales is None else [self.whole, self.scales]


def _cat(node: Any) -> tuple[fx.Node | None, fx.Node] | None:
    """(cache, new) of a concatenation of positions; a cache of None is empty."""
    if not isinstance(node, fx.Node) or kind(node) != "cat" or fake(node).dim() != 4:
        return None
    if argument(node, 1, "dim", 0) not in (-2, 2):
        return None
    parts = [p for p in argument(node, 0, "tensors") if not is_empty(fake(p))]
    if not parts or len(parts) > 2 or (len(parts) == 2 and parts[0].op != "placeholder"):
        return None
    return parts[0] if len(parts) == 2 else None, parts[-1]


def _joined(node: fx.Node, scales: fx.Node | None) -> _Joined | None:
    found = _cat(node)
    if found is None:
        return None
    cache, new = found
    if scales is not None:
        return _joined_arrays(node, cache, new, scales)
    if fake(node).dtype != torch.int8:
        return _Joined(node, cache, new, node)
    if kind(new) != _ROUND or sole_user(new) is not node:
        return None
    return _Joined(node, cache, new.args[0], new)


def _joined_arrays(
    node: fx.Node, cache: fx.Node | None, codes: fx.Node, scales: fx.Node
) -> _Joined | None:
    """Both cats join a part of one rounding to caches of which both are empty or none is."""
    found = _cat(scales)
    if found is None or (found[0] is None) != (cache is None):
        return None
    scale = found[1]
    if (
        any(kind(part) != "getitem" for part in (codes, scale))
        or codes.args[0] is not scale.args[0]
    ):
        return None
    rounding = codes.args[0]
    if kind(rounding) != _ROUND_ARRAYS or (codes.args[1], scale.args[1]) != (0, 1):
        return None
    if (
        set(rounding.users) != {codes, scale}
        or sole_user(codes) is not node
        or sole_user(scale) is not scales
    ):
        return None
    return _Joined(node, cache, rounding.args[0], rounding, scales, found[0])


def _match(graph: fx.Graph, mode: Any, node: fx.Node, written: set[int], writes: Writes) -> None:
    q, keys, values, mask = (argument(node, i, n) for i, n in enumerate(("q", "k", "v", "mask")))
    k_parts, v_parts = (_joined(t, node.kwargs.get(n)) for t, n in ((keys, "k_scale"), (values, "v_scale")))  # fmt: skip
    if k_parts is None or v_parts is None or keys is values:
        return
    k_new, v_new = k_parts.new, v_parts.new
    if (k_parts.cache is None) != (v_parts.cache is None) or k_parts.form != v_parts.form:
        return
    # Codes of keys and values, then scales: in the order of the op's arguments and results.
    caches = [c for pair in zip(k_parts.caches(), v_parts.caches(), strict=True) for c in pair]
    wholes = [w for pair in zip(k_parts.wholes(), v_parts.wholes(), strict=True) for w in pair]
    if any(storage(t) in written for t in (*wholes, *caches) if t is not None):
        return
    if sum(1 for n in keys.users if kind(n) == "llmopt.attention") != 1:
        return
    if not (leaves(keys) and leaves(values)) or is_empty(fake(q)) or is_empty(fake(k_new)):
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
    sinks = node.kwargs.get("sinks")
    given = (q_raw, k_raw, v_new, *caches, cos, sin, mask, sinks)
    inputs = [n for n in given if n is not None]
    last = max(*wholes, *inputs)
    if any(u < last for w in wholes for u in w.users) or writes.moves_reads(node, inputs):
        return
    settings = [argument(node, i, n, d) for i, n, d in _SETTINGS]
    with graph.inserting_after(last):
        anchor = graph.call_function(getitem, (q_raw, 0))  # a place to insert before; removed below
    with graph.inserting_before(anchor):
        args = (q_raw, k_raw, v_new, *caches, cos, sin, rope_kind, mask, *settings)
        kwargs = {n: node.kwargs[n] for n in ("sinks", "nan_rows") if n in node.kwargs}
        if k_parts.form == "rows":
            kwargs["as_codes"] = True
        append = ops.attention_append_arrays if k_parts.form == "arrays" else ops.attention_append
        joined = emit(graph, mode, append, args, kwargs, like=node)
        parts = [emit(graph, mode, getitem, (joined, i), like=node) for i in range(1 + len(wholes))]
    graph.erase_node(anchor)
    replace_all(list(zip((node, *wholes), parts, strict=True)))
    for part in (k_parts, v_parts):
        _erase_rounding(graph, part)


def _erase_rounding(graph: fx.Graph, part: _Joined) -> None:
    if part.form == "floats":
        return
    for reader in list(part.new_reader.users):  # the arrays that it gave
        graph.erase_node(reader)
    graph.erase_node(part.new_reader)


_ROUND, _WIDEN = "llmopt.quantize_kv", "llmopt.dequantize_kv"
_ROUND_ARRAYS, _WIDEN_ARRAYS = "llmopt.quantize_kv_arrays", "llmopt.dequantize_kv_arrays"
_SETTINGS = (
    (4, "scale", 1.0),
    (5, "causal", False),
    (6, "causal_offset", 0),
    (7, "window", 0),
    (8, "softcap", 0.0),
)


def leaves(node: fx.Node) -> bool:
    """True when the value, or a slice of it, is returned by the graph."""
    return any(
        u.op == "output" or (kind(u) == "getitem" and is_tensor(u) and leaves(u))
        for u in node.users
    )
