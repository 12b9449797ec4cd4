"""What rotations are made of: products with tables, parts of rows; and what they become, ops.rope."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from llmopt import ops
from llmopt.graph import (
    binary_operands,
    emit,
    expression,
    fake,
    fake_mode_of,
    is_one,
    is_tensor,
    is_view,
    kind,
    replace,
    same_size,
)
from llmopt.writes import Writes

_RESHAPES = ("view", "reshape", "unsqueeze")


class Tables:
    """cos and sin of a graph, with the dimensions of 1 that broadcasting puts before those of [S,R].

    A table keeps its one view, by which layers that share it are known.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.mode: Any = fake_mode_of(graph)
        self._first = next(n for n in graph.nodes if n.op != "placeholder")
        self._views: dict[fx.Node, fx.Node] = {}
        self._complex: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self._same: dict[tuple[Any, ...], fx.Node] = {}
        self._whole: dict[tuple[fx.Node, bool, str], fx.Node] = {}

    def of_four(self, table: fx.Node) -> fx.Node:
        missing = 4 - fake(table).dim()
        if missing == 0:
            return table
        if table not in self._views:
            before = self._first if table.op == "placeholder" else table.next
            with self.graph.inserting_before(before):
                index = (None,) * missing + (Ellipsis,)
                view = emit(self.graph, self.mode, operator.getitem, (table, index), like=table)
            self._views[table] = view
        return self._views[table]

    def first_like(self, table: fx.Node) -> fx.Node:
        """The first view that shows the same as `table`: layers that make their own views share what is made of one."""
        base = table.args[0] if table.args else None
        if not is_tensor(base) or not is_view(table):
            return table
        key: tuple[Any, ...] = (self.first_like(base),)
        if kind(table) in _RESHAPES:
            key = (*key, fake(table).dtype, *map(expression, fake(table).shape))
        else:
            key = (*key, kind(table), repr(table.args[1:]), repr(table.kwargs))
        return self._same.setdefault(key, table)

    def of_rows(
        self, table: fx.Node, is_negative: bool, pairing: str, last: fx.Node, writes: Writes
    ) -> fx.Node:
        """The table [..., R/2] for rows of R, each number for both of a pair, or its negative, as it is where `last` reads it."""
        key = (table, is_negative, pairing)
        made = self._whole.get(key)
        if made is None or writes.between((table,), made, last):
            with self.graph.inserting_before(last):
                half = self._emit("neg", table, like=table) if is_negative else table
                made = self._twice(half, pairing, table)
            self._whole[key] = made
        return made

    def of_complex(self, turns: fx.Node, last: fx.Node, writes: Writes) -> tuple[fx.Node, fx.Node]:
        """cos and sin [..., R] of complex numbers [..., R/2], made once for all that read the same."""
        base, places = _without_ones(turns)
        base = self.first_like(base)
        made = self._complex.get(base)
        with self.graph.inserting_before(last):
            if made is None or writes.between((base,), made[0], last):
                numbers = self._emit("resolve_conj", base, like=base)
                parts = self._emit(torch.view_as_real, numbers, like=base)
                halves = (
                    self._emit(operator.getitem, parts, (Ellipsis, i), like=base) for i in range(2)
                )
                made = tuple(self._twice(half, "interleaved", base) for half in halves)
                self._complex[base] = made
            cos, sin = (self._with_ones(table, places, last) for table in made)
        return cos, sin

    def _twice(self, half: fx.Node, pairing: str, like: fx.Node) -> fx.Node:
        if pairing == "half":
            return self._emit(torch.cat, (half, half), -1, like=like)
        return self._emit(
            "flatten", self._emit(torch.stack, (half, half), -1, like=like), -2, like=like
        )

    def _with_ones(self, table: fx.Node, places: tuple[int, ...], like: fx.Node) -> fx.Node:
        for place in places:
            table = self._emit("unsqueeze", table, place, like=like)
        return table

    def _emit(self, target: Any, *args: Any, like: fx.Node) -> fx.Node:
        return emit(self.graph, self.mode, target, args, like=like)


def _without_ones(node: fx.Node) -> tuple[fx.Node, tuple[int, ...]]:
    """The value that node shows with further dimensions of 1, and which dimensions of node those are."""
    base, places = node, tuple[int, ...]()
    while kind(base) in _RESHAPES and fake(base.args[0]).dtype == fake(node).dtype:
        added = _added_ones(fake(base.args[0]).shape, fake(node).shape)
        if added is None:
            break
        base, places = base.args[0], added
    return base, places


def _added_ones(shape: Any, to: Any) -> tuple[int, ...] | None:
    places, i = [], 0
    for d, size in enumerate(to):
        if i < len(shape) and same_size(size, shape[i]):
            i += 1
        elif is_one(size):
            places.append(d)
        else:
            return None
    return tuple(places) if i == len(shape) else None


def products_of(
    tables: Tables, node: Any, part_of: Callable[[fx.Node], tuple[fx.Node | None, int]]
) -> tuple[fx.Node, tuple[fx.Node, int], tuple[fx.Node, int]] | None:
    """x, and with which table and sign its first and its second part go into a sum or a difference.

    part_of: x and 0 or 1 where a node is a part of it.
    """
    pair = binary_operands(node) if is_tensor(node) and kind(node) in ("add", "sub") else None
    if pair is None:
        return None
    found: dict[int, tuple[fx.Node, int]] = {}
    sources = set()
    for product, sign in zip(pair, (1, -1 if kind(node) == "sub" else 1), strict=True):
        factors = (
            binary_operands(product) if is_tensor(product) and kind(product) == "mul" else None
        )
        if factors is None or not all(map(is_tensor, factors)):
            return None
        for half, table in (factors, factors[::-1]):
            x, number = part_of(half)
            if x is None:
                continue
            is_negative = kind(table) == "neg"
            table = tables.first_like(table.args[0] if is_negative else table)
            found[number] = (table, -sign if is_negative else sign)
            sources.add(x)
            break
    if len(found) != 2 or len(sources) != 1:
        return None
    return sources.pop(), found[0], found[1]


def slice_of(node: Any, start: int | None, stop: int | None, step: int | None) -> fx.Node | None:
    """x when node is x[..., start:stop:step]."""
    if not is_tensor(node) or kind(node) != "getitem" or not isinstance(node.args[1], tuple):
        return None
    *front, last = node.args[1]
    if any(f is not Ellipsis and f != slice(None) for f in front) or not isinstance(last, slice):
        return None
    if Ellipsis not in front and len(front) != fake(node).dim() - 1:
        return None
    x = node.args[0]
    width = expression(fake(x).shape[-1])
    if not isinstance(width, int) or not all(
        isinstance(v, (int, type(None))) for v in (last.start, last.stop, last.step)
    ):
        return None
    wanted = slice(start, stop, step).indices(width)
    return x if last.indices(width) == wanted else None


def rewrite(
    tables: Tables, last: fx.Node, whole: fx.Node, cos: fx.Node, sin: fx.Node, name: str
) -> None:
    graph, mode = tables.graph, tables.mode
    size = (1,) * (4 - fake(cos).dim()) + tuple(fake(cos).shape)
    heads_third = is_one(size[2]) and not is_one(size[1])
    if not (is_one(size[1]) or heads_third):
        return
    cos, sin = tables.of_four(cos), tables.of_four(sin)
    with graph.inserting_before(last):
        if heads_third:  # [B,S,H,D] with cos [B,S,1,R]
            whole, cos, sin = (
                emit(graph, mode, "transpose", (t, 1, 2), like=last) for t in (whole, cos, sin)
            )
        new = emit(graph, mode, ops.rope, (whole, cos, sin, name), like=last)
        if heads_third:
            new = emit(graph, mode, "transpose", (new, 1, 2), like=last)
    replace(last, new)
