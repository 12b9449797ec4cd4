"""sliding_caches: roll + assignment to the last position + copy_ back, by which a full static cache moves on, → ops.slide_."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from llmopt import ops
from llmopt.graph import (
    argument,
    emit,
    fake,
    fake_mode_of,
    is_tensor,
    kind,
    replace,
    same_size,
    storage,
)
from llmopt.writes import Writes


def run(graph: fx.Graph) -> None:
    mode, writes = fake_mode_of(graph), Writes(graph)
    for node in list(graph.nodes):
        if kind(node) == "copy_":
            _match(graph, mode, node, writes)


def _match(graph: fx.Graph, mode: Any, node: fx.Node, writes: Writes) -> None:
    cache, rolled = argument(node, 0, "self"), argument(node, 1, "src")
    if not (is_tensor(cache) and is_tensor(rolled)) or kind(rolled) != "roll":
        return
    if rolled.args[0] is not cache or fake(cache).dim() != 4:
        return
    by, dim = argument(rolled, 1, "shifts"), argument(rolled, 2, "dims")
    if (_only(by), _only(dim)) not in ((-1, 2), (-1, -2)):
        return
    assigned = [u for u in rolled.users if u is not node]
    if len(assigned) != 1 or kind(assigned[0]) != "setitem_" or assigned[0].users:
        return
    if not assigned[0] < node:
        return
    _, where, new = assigned[0].args
    if not is_tensor(new) or not _is_last_position(where) or not _fits(fake(new), fake(cache)):
        return
    if is_tensor(where[2]) and writes.between((where[2],), where[2], assigned[0]):
        return
    if storage(new) == storage(cache):
        return  # what is assigned would have moved
    if writes.between((cache,), rolled, node) or writes.between((new,), assigned[0], node):
        return
    with graph.inserting_before(node):
        slid = emit(graph, mode, ops.slide_, (cache, new), like=node)
    replace(node, slid)
    graph.erase_node(assigned[0])
    graph.erase_node(rolled)


def _only(value: Any) -> Any:
    """The number in a tuple of one, or what was given."""
    return value[0] if isinstance(value, (tuple, list)) and len(value) == 1 else value


def _is_last_position(where: Any) -> bool:
    """[:, :, -1:], or [:, :, index] where index is a vector of one -1."""
    if not isinstance(where, tuple) or len(where) != 3 or where[:2] != (slice(None), slice(None)):
        return False
    index = where[2]
    if isinstance(index, fx.Node) and kind(index) == "tensor" and fake(index).dtype == torch.int64:
        index = index.args[0]
    return index == [-1] or index == slice(-1, None)


def _fits(new: torch.Tensor, cache: torch.Tensor) -> bool:
    """new is one position of the cache."""
    if new.dim() != 4 or new.dtype != cache.dtype:
        return False
    want = (*cache.shape[:2], 1, cache.shape[3])
    return all(same_size(a, b) for a, b in zip(new.shape, want, strict=True))
