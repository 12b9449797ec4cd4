"""masks: what a model counts to say which keys a query sees, as far as it is known before a call.

transformers looks up every element of a padding mask by indices that count 0, 1, 2 …, and joins comparisons of positions to it by `and`.
What is looked up in order is a window on the padding mask, and what is always true (nothing lies behind the one token that is decoded)
joins nothing. Each is a call of PyTorch's less for every token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from llmopt.graph import (
    PLAIN_ARANGE,
    binary_operands,
    emit,
    fake,
    getitem,
    is_one,
    is_tensor,
    is_view,
    kind,
    replace,
    same_size,
    storage,
    view_base,
)
from llmopt.passes.simplify import copy_matters, erase_unused
from llmopt.sizes import Size, expression, size_hint
from llmopt.writes import mutated_storages

_AND = ("and_", "__and__", "bitwise_and", "logical_and")
_ONES = ("ones", "new_ones", "ones_like")


class _Counter(NamedTuple):
    """start, start + 1, … up to but without `end`, along one dimension of a tensor."""

    start: Size
    end: Size
    dim: int | None  # from the right: -1 is the last; None for one number


def run(graph: fx.Graph) -> None:
    masks = _Masks(graph)
    for node in list(graph.nodes):
        if node.op in ("call_function", "call_method") and is_tensor(node):
            masks.simplify(node)
        masks.remember_size(node)
    erase_unused(graph)


class _Masks:
    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._written = mutated_storages(graph)
        self._sizes: dict[Any, fx.Node] = {}  # a size's expression → a node that has it

    def remember_size(self, node: fx.Node) -> None:
        if not node._erased and isinstance(fake(node), torch.SymInt):
            self._sizes.setdefault(expression(fake(node)), node)

    def simplify(self, node: fx.Node) -> None:
        target: Callable | str
        if kind(node) == "getitem" and (index := self._window(node)) is not None:
            target, arguments = getitem, (node.args[0], index)
        elif kind(node) in _AND and (other := self._joined_with_truth(node)) is not None:
            target, arguments = "expand", (other, *self._expanded(fake(other), fake(node)))
        else:
            return
        if None in arguments[1:] or copy_matters(node, arguments[0], self._written):
            return
        with self._graph.inserting_before(node):
            replace(node, emit(self._graph, fake(node).fake_mode, target, arguments, like=node))

    def _window(self, node: fx.Node) -> tuple | None:
        """The index of a view with the elements that are looked up; None where they are not all, in order."""
        source, given = node.args
        sizes = fake(source).shape if is_tensor(source) else ()
        if not isinstance(given, tuple) or len(given) != len(sizes):
            return None
        counters = [c for i in given if (c := self._counter(i)) is not None]
        if len(counters) < len(sizes) or not all(same_size(c.start, 0) for c in counters):
            return None
        rank = fake(node).dim()
        index: list[int | slice | None] = []
        for counter in counters:
            if counter.dim is None:
                index.append(0)
                continue
            place = rank + counter.dim
            index += [None] * (place - _rank_of(index))
            if _rank_of(index) != place:
                return None  # transposed, or a diagonal
            index.append(slice(None))
        if not all(_are_equal(c.end, size) for c, size in zip(counters, sizes, strict=True)):
            return None
        return (*index, *[None] * (rank - _rank_of(index)))

    def _joined_with_truth(self, node: fx.Node) -> fx.Node | None:
        """The operand of an `and` that is its result."""
        operands = binary_operands(node)
        if operands is None or not all(
            is_tensor(o) and fake(o).dtype == torch.bool for o in operands
        ):
            return None
        if len({fake(n).device for n in (node, *operands)}) > 1:
            return None
        for truth, other in (operands, operands[::-1]):
            if self._is_true(truth):
                return other
        return None

    def _is_true(self, node: Any) -> bool:
        """Whether every element is, in every call."""
        if not is_tensor(node) or fake(node).dtype != torch.bool or storage(node) in self._written:
            return False
        name = kind(node)
        if is_view(node):
            base = view_base(node)
            return base is not node and fake(base).dtype == torch.bool and self._is_true(base)
        if name in _ONES:
            return True
        if name in _AND:
            return all(map(self._is_true, binary_operands(node) or (None,)))
        return self._always_compares(node, name)

    def _always_compares(self, node: fx.Node, name: str) -> bool:
        rule = _COMPARISONS.get(name)
        operands = binary_operands(node) if rule is not None else None
        if rule is None or operands is None:
            return False
        a, b = map(self._range, operands)
        return a is not None and b is not None and statically_known_true(rule(a, b))

    def _range(self, value: Any) -> tuple[Size, Size] | None:
        """The least and the largest of what is compared; None where nobody knows."""
        if isinstance(value, int) and not isinstance(value, bool):
            return value, value
        counter = self._counter(value)
        return None if counter is None else (counter.start, counter.end - 1)

    def _counter(self, node: Any) -> _Counter | None:
        if not is_tensor(node) or fake(node).dtype != torch.int64 or storage(node) in self._written:
            return None
        base, value = view_base(node), fake(node)
        if kind(base) != "arange" or base.kwargs.keys() - PLAIN_ARANGE or len(base.args) > 2:
            return None
        start, end = map(fake, (0, *base.args)[-2:])
        if not all(
            isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool) for n in (start, end)
        ):
            return None
        length, wide = (
            fake(base).shape[0],
            [d for d in range(value.dim()) if not is_one(value.shape[d])],
        )
        if not same_size(value.storage_offset(), 0) or len(wide) > 1:
            return None
        if not wide:
            return _Counter(start, end, None) if is_one(length) else None
        is_whole = same_size(value.shape[wide[0]], length) and same_size(value.stride(wide[0]), 1)
        return _Counter(start, end, wide[0] - value.dim()) if is_whole else None

    def _expanded(self, small: torch.Tensor, large: torch.Tensor) -> list:
        """Arguments of `expand` that make a tensor as large as another; among them None where a size has no node in front."""
        sizes: list[Any] = []
        added = (1,) * (large.dim() - small.dim())
        for own, size in zip((*added, *small.shape), large.shape, strict=True):
            number = expression(size)
            known = number if isinstance(number, int) else self._sizes.get(number)
            sizes.append(-1 if same_size(own, size) and not is_one(size) else known)
        return sizes


# What is always true of two ranges if it is of their ends.
_Range = tuple[Size, Size]
_COMPARISONS: dict[str, Callable[[_Range, _Range], Any]] = {
    "le": lambda a, b: a[1] <= b[0],
    "lt": lambda a, b: a[1] < b[0],
    "ge": lambda a, b: a[0] >= b[1],
    "gt": lambda a, b: a[0] > b[1],
}


def _rank_of(index: list) -> int:
    """Dimensions that an index of windows, new dimensions and numbers leaves."""
    return sum(not isinstance(i, int) for i in index)


def _are_equal(count: Size, size: Size) -> bool:
    """Also of symbols that are equal now: that becomes a guard, without which a count could end before its mask does."""
    if same_size(count, size):
        return True
    if isinstance(expression(count), int) and isinstance(expression(size), int):
        return False
    nodes = [n.node for n in (count, size) if isinstance(n, torch.SymInt)]
    if not all(n.has_hint() for n in nodes):
        return False
    return size_hint(count) == size_hint(size) and bool(count == size)
