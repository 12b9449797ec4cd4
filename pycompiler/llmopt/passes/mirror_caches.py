"""mirror_caches: marks attentions over caches of floats beside which int8 rows can be kept safely, and says why others cannot.

The floats stay what everybody reads and writes; decoding reads the rows. Safe means that whoever else changes the floats is noticed: a
cache that grows is ours until it is returned, and tensors count their edits (llmopt.mirrors).
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from llmopt.exchange import EXCHANGE
from llmopt.graph import FLOATS, fake, kind, storage
from llmopt.types import Target
from llmopt.writes import mutated_storages, writers_of


def run(graph: fx.Graph, machine: Target) -> None:
    for node, reason in _caches(graph, machine).items():
        if not reason:
            node.kwargs = {**node.kwargs, "mirror": True}


def notes(graph: fx.Graph, machine: Target, mirrored: Iterable[fx.Node]) -> list[str]:
    """Why caches of floats have no int8 rows beside them, a sentence for each kind; mirrored: the attentions that do."""
    have = set(mirrored)
    counts: dict[str, int] = {}
    for node, reason in _caches(graph, machine).items():
        if node not in have:
            reason = reason or "are written by PyTorch"
            counts[reason] = counts.get(reason, 0) + 1
    return [
        f'kv_cache="int8": keys and values of {count} attention(s) {reason}, and are read as they are; '
        "pass past_key_values=llmopt.KVCache(model)"
        for reason, count in counts.items()
    ]


def _caches(graph: fx.Graph, machine: Target) -> dict[fx.Node, str]:
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
    if any(len(w) != 1 or kind(w[0]) != "index_copy_" or not w[0] < node for w in writers):
        return "are written otherwise than by one index_copy_"
    if writers[0][0].args[2] is not writers[1][0].args[2]:
        return "are written at positions of their own"
    return ""
