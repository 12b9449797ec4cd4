"""mirror_caches: marks attentions over caches of floats beside which int8 rows can be kept safely, and says why others cannot.

The floats stay what everybody reads and writes; decoding reads the rows. Safe means that whoever else changes the floats is noticed: a
cache that grows is ours until it is returned, and tensors count their edits (llmopt.mirrors).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from llmopt.exchange import EXCHANGE
from llmopt.graph import FLOATS, argument, fake, is_tensor, kind, storage
from llmopt.passes.kv_cache import leaves
from llmopt.types import Target
from llmopt.writes import writers_by_storage


def run(graph: fx.Graph, machine: Target) -> None:
    for node, found in _attentions(graph, machine).items():
        if not isinstance(found, str):
            node.kwargs = {**node.kwargs, "mirror": found}


def notes(graph: fx.Graph, machine: Target, mirrored: Iterable[fx.Node]) -> list[str]:
    """Why caches of floats have no int8 rows beside them, a sentence for each kind; mirrored: the attentions that do."""
    have = set(mirrored)
    counts: dict[str, int] = {}
    for node, found in _attentions(graph, machine).items():
        if node not in have:
            reason = found if isinstance(found, str) else "are written by PyTorch"
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


def _attentions(graph: fx.Graph, machine: Target) -> dict[fx.Node, Any]:
    """Attentions over caches of floats, and what `mirror` of ops.attention is for each, or why nothing can be kept beside its cache."""
    writers = writers_by_storage(graph)
    given = {storage(node) for node in graph.nodes if node.op == "placeholder"}
    found: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if kind(node) == "llmopt.attention_append" and not node.kwargs.get("as_codes"):
            found[node] = _growing(machine)
        elif kind(node) == "llmopt.attention" and storage(node.args[1]) in writers.keys() & given:
            found[node] = _static(node, machine, writers)
    return found


_ON_GPU = "are on a GPU"


def _growing(machine: Target) -> Any:
    if machine.gpu is not None:
        return _ON_GPU
    return True if EXCHANGE is not None else "are tensors that this PyTorch makes in a slower way"


def _static(node: fx.Node, machine: Target, writers: dict[int, list[fx.Node]]) -> Any:
    """The positions that were written, or a reason."""
    if machine.gpu is not None:
        return _ON_GPU
    if any(fake(t).dtype not in FLOATS for t in node.args[1:3]):
        return "are no floats"
    if any(t.op != "placeholder" for t in node.args[1:3]):
        return "are parts of the tensors that the cache holds"
    positions = []
    for cache in node.args[1:3]:
        place = storage(cache)
        found = [] if place is None else writers.get(place, [])
        if len(found) != 1 or kind(found[0]) != "index_copy_" or not found[0] < node:
            return "are written otherwise than by one index_copy_"
        written, dim, index = found[0].args[:3]
        if written is not cache or dim not in (2, -2):
            return "are written through a part of them"
        positions.append(index)
    return positions[0] if positions[0] is positions[1] else "are written at positions of their own"
