"""einsums: torch.einsum of two tensors → F.linear where one is a parameter, else matmul, with what turns dimensions around them.

What attention, linears and experts are made of in models written with einsum, so that later passes read them as they read the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import fx

from llmopt.graph import fake, fake_mode_of, is_tensor, kind, replace, same_size
from llmopt.parameters import is_weight
from llmopt.passes.calls import Calls


def run(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.op != "call_function" or kind(node) != "einsum":
            continue
        equation, *operands = node.args
        if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
            operands = list(operands[0])
        if len(operands) == 2 and all(map(is_tensor, operands)):
            terms = _terms(equation, operands)
            if terms is not None:
                with graph.inserting_before(node):
                    _Rewrite(graph, node, terms, operands).run()


def _terms(equation: Any, operands: list[fx.Node]) -> tuple[str, str, str] | None:
    """The letters of both operands and of the result; None where a letter means more than one dimension, or sizes are broadcast."""
    if not isinstance(equation, str) or "." in equation:
        return None
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    a, _, b = inputs.partition(",")
    if not arrow:
        out = "".join(sorted(x for x in {*a, *b} if (a + b).count(x) == 1))
    if any(len(set(term)) != len(term) for term in (a, b, out)):
        return None
    sizes = dict(zip(a, fake(operands[0]).shape, strict=True))
    if any(
        x in sizes and not same_size(n, sizes[x])
        for x, n in zip(b, fake(operands[1]).shape, strict=True)
    ):
        return None
    alone = {*a} ^ {*b}
    return (a, b, out) if alone <= {*out} else None


class _Rewrite:
    def __init__(
        self, graph: fx.Graph, node: fx.Node, terms: tuple[str, str, str], operands: list[fx.Node]
    ) -> None:
        self._node = node
        self._call = Calls(graph, fake_mode_of(graph), node)
        self._a, self._b, self._out = terms
        self._operands = operands

    def run(self) -> None:
        a, b = self._operands
        new = self._linear(a, b, self._a, self._b) or self._linear(b, a, self._b, self._a)
        new = new or self._product(a, b)
        if new is not None:
            replace(self._node, new)

    def _linear(self, x: fx.Node, weight: fx.Node, rows: str, letters: str) -> fx.Node | None:
        """A product of rows that end in what is summed with a parameter in which that, and the rest, lie side by side."""
        summed = [c for c in letters if c in rows]
        own = [c for c in self._out if c in letters]
        front = [c for c in rows if c not in letters]
        if not is_weight(weight) or not summed or not own or any(c in self._out for c in summed):
            return None
        if list(rows) != [*front, *summed] or list(letters) not in (
            [*own, *summed],
            [*summed, *own],
        ):
            return None
        if not fake(weight).is_contiguous():
            return None
        outputs_first = list(letters) == [*own, *summed]
        first, second = (own, summed) if outputs_first else (summed, own)
        sizes = tuple(fake(weight).shape[letters.index(c)] for c in own)
        weight = self._flatten(self._flatten(weight, 0, len(first)), 1, len(second))
        weight = weight if outputs_first else self._call("t", weight)
        y = self._call(F.linear, self._flatten(x, len(front), len(summed)), weight)
        y = y if len(own) == 1 else self._call("unflatten", y, -1, sizes)
        return self._turned(y, [*front, *own], self._out)

    def _product(self, x: fx.Node, y: fx.Node) -> fx.Node | None:
        """A batch of matrix products, where what is summed and what only one of both has is one dimension each."""
        batch = [c for c in self._out if c in self._a and c in self._b]
        summed = [c for c in self._a if c in self._b and c not in self._out]
        mine = [c for c in self._a if c not in self._b]
        others = [c for c in self._b if c not in self._a]
        if not len(summed) == len(mine) == len(others) == 1:
            return None
        a = self._turned(x, self._a, [*batch, *mine, *summed])
        if list(self._b) == [*batch, *summed, *others]:
            b = y
        else:
            b = self._turned(y, self._b, [*batch, *others, *summed])
            b = self._call("transpose", b, -2, -1)
        return self._turned(self._call("matmul", a, b), [*batch, *mine, *others], self._out)

    def _turned(self, x: fx.Node, letters: Iterable[str], wanted: Iterable[str]) -> fx.Node:
        letters, wanted = list(letters), list(wanted)
        order = [letters.index(c) for c in wanted]
        moved = [i for i, c in enumerate(order) if i != c]
        if not moved:
            return x
        if len(moved) == 2:
            return self._call("transpose", x, *moved)
        return self._call("permute", x, *order)

    def _flatten(self, x: fx.Node, first: int, count: int) -> fx.Node:
        return x if count == 1 else self._call("flatten", x, first, first + count - 1)
