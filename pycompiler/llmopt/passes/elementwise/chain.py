"""A chain of ops.pointwise under construction, and what a rule for an operation gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from typing import Any

import torch
from torch import fx

from llmopt.graph import FLOATS, fake

TRUTHS = (*FLOATS, torch.bool)  # the dtypes of a chain's values


class Chain:
    """Numbers values and writes the instructions of a chain that ends with the node `root`."""

    def __init__(self, root: fx.Node, inputs: Sequence[fx.Node]) -> None:
        self.root = root
        self.program: list[tuple] = []
        self.number: dict[fx.Node, int] = {n: i for i, n in enumerate(inputs)}
        self._inputs = len(inputs)

    def value(self, operand: Any) -> int:
        """The number of a node's value or of a constant."""
        if isinstance(operand, fx.Node):
            return self.number[operand]
        return self._append("const", float(operand))

    def unary(self, name: str, a: int) -> int:
        return self._append("unary", name, a)

    def binary(self, name: str, a: int, b: int | float) -> int:
        """b: a value's number, or a constant as a float."""
        return self._append("binary", name, a, self._operand(b))

    def where(self, condition: int, a: int | float, b: int | float) -> int:
        return self._append("where", condition, self._operand(a), self._operand(b))

    def reduce(self, name: str, a: int) -> int:
        return self._append("reduce", name, a)

    def clamped(self, x: int, low: int | float | None, high: int | float | None) -> int:
        x = x if low is None else self.binary("maximum", x, low)
        return x if high is None else self.binary("minimum", x, high)

    def scaled(self, x: int, factor: float) -> int:
        return x if factor == 1.0 else self.binary("mul", x, factor)

    def _operand(self, x: int | float) -> int:
        return self.value(x) if isinstance(x, float) else x

    def _append(self, *instruction: Any) -> int:
        self.program.append(instruction)
        return self._inputs + len(self.program) - 1


# Writes a node's instructions into a chain that has numbers for its operands.
Spelling = Callable[[Chain], int]
# Looks at a node once; None where ops.pointwise cannot express it.
Rule = Callable[[fx.Node], Spelling | None]


def is_beyond_dtype(node: fx.Node, number: float) -> bool:
    """Whether PyTorch refuses a number because the node's dtype, of floats, cannot hold it."""
    return isfinite(number) and abs(number) > torch.finfo(fake(node).dtype).max
