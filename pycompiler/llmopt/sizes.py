"""Sizes that may change from call to call: torch SymInts → postfix code for the C++ executor.

A size is an int or a SymInt. Equal expressions share one entry, so a program evaluates each once a call.
Codes are the contract with csrc/runtime/expr.h.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import sympy

Size = int | torch.SymInt

CONST, SYMBOL, ADD, MUL, FLOOR_DIV, MOD, MAX, MIN = range(8)


class UnsupportedSize(Exception):
    """A size expression the executor cannot evaluate; the message names it."""


def is_static(size: Size) -> bool:
    return isinstance(size, int)


def expression(size: Size) -> int | sympy.Expr:
    """The sympy expression of a size, or the int when it is one number."""
    if isinstance(size, int):
        return size
    expr = size.node.expr
    return int(expr) if expr.is_Integer else expr


def same_size(a: Size, b: Size) -> bool:
    """True when two sizes are the same expression; never adds a guard."""
    return expression(a) == expression(b)


def same_stride(a: Size, b: Size) -> bool:
    """True when two distances in memory are the same, or would be in a tensor that has elements: strides of PyTorch count a
    dimension of no elements as one, max(1, n). Never adds a guard."""
    if same_size(a, b):
        return True
    if is_static(a) and is_static(b):
        return False
    import sympy

    return bool(sympy.expand(_of_elements(a) - _of_elements(b)) == 0)


def _of_elements(stride: Size) -> Any:
    """A stride's expression with n in place of max(1, n)."""
    import sympy
    from torch.utils._sympy.functions import Max

    expr = sympy.sympify(expression(stride))
    return expr.replace(
        lambda e: e.func is Max and 1 in e.args and len(e.args) == 2,
        lambda e: next(n for n in e.args if n != 1),
    )


def size_hint(size: Size) -> int:
    """The size in the call that is compiled; 0 where nobody knows."""
    return size if isinstance(size, int) else int(size.node.hint or 0)


def _code(expr: Any, symbol_id: Any) -> list[int]:
    import sympy
    from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod, PythonMod

    folds = {sympy.Add: ADD, sympy.Mul: MUL, Max: MAX, Min: MIN, sympy.Max: MAX, sympy.Min: MIN}
    pairs = {FloorDiv: FLOOR_DIV, Mod: MOD, PythonMod: MOD, sympy.Mod: MOD}
    if expr.is_Integer:
        return [CONST, int(expr)]
    if expr.is_Symbol:
        return [SYMBOL, symbol_id(expr)]
    if expr.is_Pow and expr.exp.is_Integer and 0 < int(expr.exp) <= 8:
        expr = sympy.Mul(*[expr.base] * int(expr.exp), evaluate=False)
    if expr.func in folds:
        code = _code(expr.args[0], symbol_id)
        for arg in expr.args[1:]:
            code += [*_code(arg, symbol_id), folds[expr.func]]
        return code
    if expr.func in pairs and len(expr.args) == 2:
        return [*_code(expr.args[0], symbol_id), *_code(expr.args[1], symbol_id), pairs[expr.func]]
    raise UnsupportedSize(f"size expression {expr} has no form the executor can evaluate")


class SizeTable:
    """Numbers size expressions and their symbols in the order they are first seen."""

    def __init__(self) -> None:
        self.codes: list[list[int]] = []
        self.symbols: list[Any] = []  # sympy symbols, in the order their values are passed to run()
        self._ids: dict[Any, int] = {}
        self._symbol_ids: dict[Any, int] = {}

    def id(self, size: Size) -> int:
        """The number of this size's expression; raises UnsupportedSize when it cannot be evaluated natively."""
        expr = expression(size)
        found = self._ids.get(expr)
        if found is None:
            code = [CONST, expr] if isinstance(expr, int) else _code(expr, self._symbol_id)
            found = self._ids[expr] = len(self.codes)
            self.codes.append(code)
        return found

    def _symbol_id(self, symbol: Any) -> int:
        found = self._symbol_ids.get(symbol)
        if found is None:
            found = self._symbol_ids[symbol] = len(self.symbols)
            self.symbols.append(symbol)
        return found
