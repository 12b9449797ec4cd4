"""assignments: rows written into memory that the graph is given, as models write that keep keys and values in buffers.

cache[:, start:stop] = rows   → copy_ into that window, which is a kernel's
cache[:, :, positions] = rows → index_copy_ along the positions, as is one of [B,S,H,D] along its second dimension
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from llmopt.graph import (
    FLOATS,
    compute_fake,
    emit,
    fake,
    fake_mode_of,
    is_tensor,
    kind,
    same_shape,
    view_base,
)
from llmopt.writes import Writes

_WHOLE = slice(None)


def run(graph: fx.Graph) -> None:
    assign = _Assign(graph)
    for node in list(graph.nodes):
        with graph.inserting_before(node):
            if kind(node) == "setitem_" and not node.users:
                assign.item(node)
            elif kind(node) == "index_copy_" and len(node.args) == 4:
                assign.second_dimension(node)


class _Assign:
    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._mode: Any = fake_mode_of(graph)
        self._writes = Writes(graph)
        self._counted: dict[tuple[fx.Node, Any], fx.Node] = {}

    def item(self, node: fx.Node) -> None:
        target, index, rows = node.args
        if not _is_given(target) or not _is_of_dtype(rows, target):
            return
        parts = list(index) if isinstance(index, tuple) else [index]
        places = [i for i, part in enumerate(parts) if is_tensor(part)]
        if not places and all(map(_is_basic, parts)):
            if self._fills(target, index, rows):
                self._emit("copy_", node, self._emit(operator.getitem, target, target, index), rows)
                self._graph.erase_node(node)
        elif len(places) == 1 and places[0] in (1, 2) and fake(target).dim() == 4:
            self._at_positions(node, target, parts, places[0], rows)

    def _at_positions(
        self, node: fx.Node, target: fx.Node, parts: list[Any], dim: int, rows: fx.Node
    ) -> None:
        positions = parts[dim]
        if fake(positions).dtype != torch.int64 or fake(positions).dim() != 1:
            return
        rest = [*parts[:dim], _WHOLE, *parts[dim + 1 :]]
        if not all(isinstance(part, slice) for part in rest):
            return
        window = target
        if any(part != _WHOLE for part in rest):
            window = self._emit(operator.getitem, target, target, tuple(rest))
        shape = list(fake(window).shape)
        shape[dim] = fake(positions).shape[0]
        if same_shape(shape, fake(rows).shape):
            self._copy(node, window, dim, self._from_the_front(node, positions, target, dim), rows)
            self._graph.erase_node(node)

    def _from_the_front(
        self, node: fx.Node, positions: fx.Node, target: fx.Node, dim: int
    ) -> fx.Node:
        """Positions that an assignment may count from the end, as index_copy_ wants them."""
        size = fake(target).shape[dim]
        if not isinstance(size, int):
            size = self._emit("size", target, target, dim)
        made = self._counted.get((positions, size))
        if made is None or self._writes.between((positions,), made, node):
            is_behind = self._emit("lt", positions, positions, 0)
            moved = self._emit("add", positions, positions, size)
            made = self._emit(torch.where, positions, is_behind, moved, positions)
            self._counted[positions, size] = made
        return made

    def second_dimension(self, node: fx.Node) -> None:
        target, dim, positions, rows = node.args
        if is_tensor(target) and fake(target).dim() == 4 and dim in (1, -3) and not node.users:
            self._copy(node, target, 1, positions, rows)
            self._graph.erase_node(node)

    def _copy(
        self, node: fx.Node, window: fx.Node, dim: int, positions: fx.Node, rows: fx.Node
    ) -> None:
        if dim == 1:
            window, rows = (self._emit("transpose", t, t, 1, 2) for t in (window, rows))
        self._emit("index_copy_", node, window, 2, positions, rows)

    def _fills(self, target: fx.Node, index: Any, rows: fx.Node) -> bool:
        window = compute_fake(self._mode, operator.getitem, (target, index), {})
        return same_shape(window.shape, fake(rows).shape)

    def _emit(self, function: Any, like: fx.Node, *args: Any) -> fx.Node:
        return emit(self._graph, self._mode, function, args, like=like)


def _is_given(target: Any) -> bool:
    return is_tensor(target) and view_base(target).op in ("placeholder", "get_attr")


def _is_of_dtype(rows: Any, target: fx.Node) -> bool:
    return is_tensor(rows) and fake(rows).dtype == fake(target).dtype and fake(rows).dtype in FLOATS


def _is_basic(part: Any) -> bool:
    return part is Ellipsis or (isinstance(part, (slice, int)) and not isinstance(part, bool))
