"""mirror_caches: marks attentions over caches of floats beside which int8 rows can be kept safely, and says why others cannot.

The floats stay what everybody reads and writes; decoding reads the rows. Safe means that whoever else changes the floats is noticed: a
cache that grows is ours until it is returned, and tensors count their edits (llmopt.mirrors).
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from llmopt.exchange import EXCHANGE
from llmopt.graph import FLOATS, argument, fake, is_tensor, kind, storage
from llmopt.passes.kv_cache import leaves
from llmopt.types import Target
from llmopt.writes import mutated_storages, writers_of


def run(graph: fx.Graph, machine: Target) -> None:
    for node, reason in _attentions(graph, machine).items():
        if not reason:
            node.kwargs = {**node.kwargs, "mirror": True}


def notes(graph: fx.Graph, machine: Target, mirrored: Iterable[fx.Node]) -> list[str]:
    """Why caches of floats have no int8 rows beside them, a sentence for each kind; mirrored: the attentions that do."""
    have = set(mirrored)
    counts: dict[str, int] = {}
    for node, reason in _attentions(graph, machine).items():
        if node not in have:
            reason = reason or "are written by PyTorch"
            counts[reason] = counts.get(reason, 0) + 1
    said = [f"keys and values of {count} attention(s) {reason}" for reason, count in counts.items()]
    if others := _read_by_others(graph, machine):
        said.append(f"{others} tensor(s) of a cache are read by no attention kernel")
    return [
        f'kv_cache="int8": {what}, and are read as they are; pass past_key_values=llmopt.KVCache(model)'
        for what in said
    ]


def _read_by_others(graph: fx.Graph, machine: Target) -> int:
    """Caches that grow by cat, or are written by index_copy_, beside those that attention kernels read."""
    static = {n for node in _attentions(graph, machine) for n in node.args[1:3]}
    count = 0
    for node in graph.nodes:
        if kind(node) == "cat" and is_tensor(node) and fake(node).dim() == 4:
            parts = argument(node, 0, "tensors")
            joins = argument(node, 1, "dim", 0) in (-2, 2) and len(parts) == 2
            count += joins and parts[0].op == "placeholder" and leaves(node)
        elif kind(node) == "index_copy_" and node.args[0].op == "placeholder":
            count += fake(node).dim() == 4 and node.args[0] not in static
    return count


def _attentions(graph: fx.Graph, machine: Target) -> dict[fx.Node, str]:
    """Attentions over caches of floats, and why nothing can be kept beside them, or ""."""
    written = mutated_storages(graph)
    given = {storage(node) for node in graph.nodes if node.op == "placeholder"}
    found = {}
    for node in graph.nodes:
        if kind(node) == "llmopt.attention_append" and not node.kwargs.get("as_codes"):
            found[node] = _why_not_growing(machine)
        elif kind(node) == "llmopt.attention" and storage(node.args[1]) in written & given:
            found[node] = _why_not_static(graph, node, machine)
    return found


_ON_GPU = "are on a GPU"


def _why_not_growing(machine: Target) -> str:
    if machine.gpu is not None:
        return _ON_GPU
    return "" if EXCHANGE is not None else "are tensors that this PyTorch makes in a slower way"


def _why_not_static(graph: fx.Graph, node: fx.Node, machine: Target) -> str:
    if machine.gpu is not None:
        return _ON_GPU
    keys, values = node.args[1:3]
    if any(fake(t).dtype not in FLOATS for t in (keys, values)):
        return "are no floats"
    if any(t.op != "placeholder" for t in (keys, values)):
        return "are parts of the tensors that the cache holds"
    writers = [writers_of(graph, t) for t in (keys, values)]
    for cache, found in zip((keys, values), writers, strict=True):
        if len(found) != 1 or kind(found[0]) != "index_copy_" or not found[0] < node:
            return "are written otherwise than by one index_copy_"
        if found[0].args[0] is not cache or found[0].args[1] not in (2, -2):
            return "are written through a part of them"
    if writers[0][0].args[2] is not writers[1][0].args[2]:
        return "are written at positions of their own"
    return ""
