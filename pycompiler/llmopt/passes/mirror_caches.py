"""mirror_caches: marks attentions over caches of floats beside which int8 rows can be kept safely, and says why others cannot.

The floats stay what everybody reads and writes; decoding reads the rows. Safe means that whoever else changes the floats is noticed: a
cache that grows is ours until it is returned, and tensors count their edits (llmopt.mirrors).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import fx

from llmopt.exchange import EXCHANGE
from llmopt.graph import FLOATS, argument, fake, is_tensor, kind, storage
from llmopt.passes.kv_cache import leaves
from llmopt.types import Target
from llmopt.writes import writers_by_storage

# Key of node.meta: why an attention over a cache of floats is not marked.
_REASON = "llmopt_no_mirror"
_ON_GPU = "are on a GPU"


def run(graph: fx.Graph, machine: Target) -> None:
    writers = writers_by_storage(graph)
    given = {storage(node) for node in graph.nodes if node.op == "placeholder"}
    for node in graph.nodes:
        if kind(node) == "llmopt.attention_append" and not node.kwargs.get("as_codes"):
            _mark(node, True, _why_not_growing(machine))
        elif kind(node) == "llmopt.attention" and storage(node.args[1]) in writers.keys() & given:
            reason = _ON_GPU if machine.gpu is not None else _why_not_static(node, writers)
            _mark(node, None if reason else _positions(node.args[1], writers), reason)


def _mark(node: fx.Node, mirror: fx.Node | bool | None, reason: str) -> None:
    if reason:
        node.meta[_REASON] = reason
    else:
        node.kwargs = {**node.kwargs, "mirror": mirror}


def _why_not_growing(machine: Target) -> str:
    if machine.gpu is not None:
        return _ON_GPU
    return "" if EXCHANGE is not None else "are tensors that this PyTorch makes in a slower way"


def _why_not_static(node: fx.Node, writers: dict[int, list[fx.Node]]) -> str:
    caches = node.args[1:3]
    if any(fake(t).dtype not in FLOATS for t in caches):
        return "are no floats"
    if any(t.op != "placeholder" for t in caches):
        return "are not the very tensors that the caller passed"
    for cache in caches:
        writes = _writers_of(cache, writers)
        if len(writes) != 1 or kind(writes[0]) != "index_copy_" or not writes[0] < node:
            return "are written otherwise than by one index_copy_ in front of it"
        written, dim = writes[0].args[:2]
        if written is not cache or dim not in (2, -2):
            return "are written through a view of them, or not by position"
    keys, values = (_positions(cache, writers) for cache in caches)
    return "" if keys is values else "are written at positions of their own"


def _positions(cache: fx.Node, writers: dict[int, list[fx.Node]]) -> fx.Node:
    """Those that the one index_copy_ into a cache writes."""
    (write,) = _writers_of(cache, writers)
    return write.args[2]


def _writers_of(node: fx.Node, writers: dict[int, list[fx.Node]]) -> list[fx.Node]:
    place = storage(node)
    return [] if place is None else writers.get(place, [])


def notes(graph: fx.Graph, lowered: Mapping[fx.Node, str]) -> list[str]:
    """Why caches of floats have no int8 rows beside them, a sentence for each kind.

    lowered: attentions that run in kernels, and why such a one reads floats though it is marked.
    """
    reasons: Counter[str] = Counter()
    read: set[int | None] = set()
    for node in graph.nodes:
        if "mirror" in node.kwargs or _REASON in node.meta:
            read |= {storage(n) for n in node.all_input_nodes}
            reasons[node.meta.get(_REASON) or lowered.get(node, "are read by no kernel")] += 1
    said = [f"keys and values of {n} attention(s) {why}" for why, n in reasons.items() if why]
    if others := _caches(graph) - read:
        said.append(f"{len(others)} tensor(s) like a cache's get to no attention kernel as such")
    return [
        f'kv_cache="int8": {what}, and are read as they are; pass past_key_values=llmopt.KVCache(model)'
        for what in said
    ]


def _caches(graph: fx.Graph) -> set[int | None]:
    """Memory of inputs that look like a cache's: floats of four dimensions that are written, or joined with what the graph returns."""
    written = writers_by_storage(graph).keys()
    found = set()
    for node in graph.nodes:
        if node.op != "placeholder" or not is_tensor(node):
            continue
        if fake(node).dim() != 4 or fake(node).dtype not in FLOATS:
            continue
        if storage(node) in written or any(_joins(user, node) for user in node.users):
            found.add(storage(node))
    return found


def _joins(node: fx.Node, cache: fx.Node) -> bool:
    if kind(node) != "cat" or argument(node, 1, "dim", 0) not in (-2, 2):
        return False
    parts = argument(node, 0, "tensors")
    return len(parts) == 2 and parts[0] is cache and leaves(node)
