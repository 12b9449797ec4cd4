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
    fake,
    fake_mode_of,
    is_tensor,
    kind,
    same_shape,
    view_base,
)
from llmopt.passes.calls import Calls
from llmopt.writes import Writes

_WHOLE = slice(None)


def run(graph: fx.Graph) -> None:
    assign = _Assign(graph)
    for node in list(graph.nodes):
        with graph.inserting_before(node):
            if kind(node) == "setitem_" and not node.users:
                is_done = assign.item(node)
            elif kind(node) == "index_copy_" and len(node.args) == 4 and not node.users:
                is_done = assign.second_dimension(node)
            else:
                continue
        if is_done:
            graph.erase_node(node)


class _Assign:
    """Writes an assignment in front of it in the way that kernels know; False where there is none."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._mode: Any = fake_mode_of(graph)
        self._writes = Writes(graph)
        self._counted: dict[tuple[fx.Node, Any], fx.Node] = {}

    def item(self, node: fx.Node) -> bool:
        target, index, rows = node.args
        if not _is_given(target) or not _is_of_dtype(rows, target):
            return False
        parts = list(index) if isinstance(index, tuple) else [index]
        places = [i for i, part in enumerate(parts) if is_tensor(part)]
        if not places and all(map(_is_basic, parts)):
            if not same_shape(self._window(target, index).shape, fake(rows).shape):
                return False
            call = self._calls(node)
            call("copy_", call(operator.getitem, target, index), rows)
            return True
        if len(places) == 1 and places[0] in (1, 2) and fake(target).dim() == 4:
            return self._at_positions(node, target, parts, places[0], rows)
        return False

    def _at_positions(
        self, node: fx.Node, target: fx.Node, parts: list[Any], dim: int, rows: fx.Node
    ) -> bool:
        positions = parts[dim]
        rest = (*parts[:dim], _WHOLE, *parts[dim + 1 :])
        if fake(positions).dtype != torch.int64 or fake(positions).dim() != 1:
            return False
        if not all(isinstance(part, slice) for part in rest):
            return False
        shape = list(self._window(target, rest).shape)
        shape[dim] = fake(positions).shape[0]
        if not same_shape(shape, fake(rows).shape):
            return False
        call = self._calls(node)
        is_whole = all(part == _WHOLE for part in rest)
        window = target if is_whole else call(operator.getitem, target, rest)
        _copy(call, window, dim, self._from_the_front(call, positions, target, dim), rows)
        return True

    def _from_the_front(
        self, call: Calls, positions: fx.Node, target: fx.Node, dim: int
    ) -> fx.Node:
        """Positions that an assignment may count from the end, as index_copy_ wants them."""
        size = fake(target).shape[dim]
        if not isinstance(size, int):
            size = call("size", target, dim)
        made = self._counted.get((positions, size))
        if made is None or self._writes.between((positions,), made, call.like):
            is_behind = call("lt", positions, 0)
            made = call(torch.where, is_behind, call("add", positions, size), positions)
            self._counted[positions, size] = made
        return made

    def second_dimension(self, node: fx.Node) -> bool:
        target, dim, positions, rows = node.args
        if not is_tensor(target) or fake(target).dim() != 4 or dim not in (1, -3):
            return False
        _copy(self._calls(node), target, 1, positions, rows)
        return True

    def _window(self, target: fx.Node, index: Any) -> torch.Tensor:
        return compute_fake(self._mode, operator.getitem, (target, index), {})

    def _calls(self, node: fx.Node) -> Calls:
        return Calls(self._graph, self._mode, node)


def _copy(call: Calls, window: fx.Node, dim: int, positions: fx.Node, rows: fx.Node) -> None:
    if dim == 1:
        window, rows = (call("transpose", t, 1, 2) for t in (window, rows))
    call("index_copy_", window, 2, positions, rows)


def _is_given(target: Any) -> bool:
    return is_tensor(target) and view_base(target).op in ("placeholder", "get_attr")


def _is_of_dtype(rows: Any, target: fx.Node) -> bool:
    return is_tensor(rows) and fake(rows).dtype == fake(target).dtype and fake(rows).dtype in FLOATS


def _is_basic(part: Any) -> bool:
    return part is Ellipsis or (isinstance(part, (slice, int)) and not isinstance(part, bool))
