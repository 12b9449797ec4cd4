"""Arithmetic of numbers and tensors, comparisons, truths, casts, limits and choices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from llmopt.casts import FLOAT_CASTS, is_float_cast, rounds
from llmopt.graph import FLOATS, argument, binary_operands, fake, is_tensor, kind, scalar
from llmopt.passes.elementwise.chain import TRUTHS, Chain, Rule, Spelling, is_beyond_dtype

_ROUND = {torch.float16: "round_f16", torch.bfloat16: "round_bf16"}


def binary_rule(name: str) -> Rule:
    def rule(node: fx.Node) -> Spelling | None:
        pair = binary_operands(node)
        if pair is None or not all(is_tensor(p) or scalar(p) is not None for p in pair):
            return None
        return lambda c: c.binary(name, c.value(pair[0]), c.value(pair[1]))

    return rule


def _comparison(name: str) -> Rule:
    """PyTorch rounds a number, and a tensor without dimensions, to the dtype of the tensor that it is compared with."""

    def rule(node: fx.Node) -> Spelling | None:
        pair = binary_operands(node)
        tensors = [p for p in pair or () if is_tensor(p)]
        if pair is None or not all(is_tensor(p) or scalar(p) is not None for p in pair):
            return None
        dtypes = {fake(t).dtype for t in tensors}
        if len(dtypes) > 1 and any(fake(t).dim() == 0 for t in tensors):
            return None
        dtype = dtypes.pop()
        if dtype == torch.bool and len(tensors) < 2:
            return None

        def value(c: Chain, operand: Any) -> int:
            number = scalar(operand)
            return c.value(operand if number is None else torch.tensor(number, dtype=dtype).item())

        return lambda c: c.binary(name, value(c, pair[0]), value(c, pair[1]))

    return rule


def _of_truths(name: str) -> Rule:
    """`&`, `|`, `^` and their functions, which for floats are errors or ask whether these are 0."""

    def rule(node: fx.Node) -> Spelling | None:
        pair = binary_operands(node)
        if pair is None or not all(is_tensor(p) and fake(p).dtype == torch.bool for p in pair):
            return None
        return lambda c: c.binary(name, c.value(pair[0]), c.value(pair[1]))

    return rule


def _not(node: fx.Node) -> Spelling | None:
    x = node.args[0]
    if not is_tensor(x) or fake(x).dtype != torch.bool:
        return None
    return lambda c: c.unary("logical_not", c.value(x))


def _cast(node: fx.Node) -> Spelling | None:
    source = node.args[0] if node.args else None
    if not is_tensor(source) or "memory_format" in node.kwargs:
        return None
    before, after = fake(source).dtype, fake(node).dtype
    if before == after or after not in FLOATS or before not in TRUTHS:
        return None

    def spell(c: Chain) -> int:
        x = c.value(source)
        needs_rounding = is_float_cast(node) and rounds(node)
        if needs_rounding and node is not c.root:  # storing the root's value rounds it
            x = c.unary(_ROUND[after], x)
        return x

    return spell


def _addc(name: str) -> Rule:
    """input + value · (a name b)."""

    def rule(node: fx.Node) -> Spelling | None:
        operands, value = node.args, scalar(node.kwargs.get("value", 1))
        if len(operands) != 3 or not all(is_tensor(x) for x in operands) or value is None:
            return None

        def spell(c: Chain) -> int:
            x, a, b = (c.value(operand) for operand in operands)
            return c.binary("add", x, c.scaled(c.binary(name, a, b), value))

        return spell

    return rule


def _power(node: fx.Node) -> Spelling | None:
    exponent = scalar(argument(node, 1, "exponent"))
    if exponent not in _POWERS or not is_tensor(node.args[0]):
        return None
    return lambda c: _POWERS[exponent](c, c.value(node.args[0]))


_POWERS: dict[float | None, Callable[[Chain, int], int]] = {
    2.0: lambda c, x: c.unary("square", x),
    3.0: lambda c, x: c.binary("mul", c.unary("square", x), x),
    4.0: lambda c, x: c.unary("square", c.unary("square", x)),
    0.5: lambda c, x: c.unary("sqrt", x),
    -0.5: lambda c, x: c.unary("rsqrt", x),
    -1.0: lambda c, x: c.unary("reciprocal", x),
    -2.0: lambda c, x: c.unary("reciprocal", c.unary("square", x)),
}
# Names of the least and the largest number that these give, and which they are else.
_LIMITS: dict[str, tuple[tuple[str | None, Any], tuple[str | None, Any]]] = {
    "clamp": (("min", None), ("max", None)),
    "clip": (("min", None), ("max", None)),
    "hardtanh": (("min_val", -1.0), ("max_val", 1.0)),
    "clamp_min": (("min", None), (None, None)),
    "clamp_max": ((None, None), ("max", None)),
    "relu6": ((None, 0.0), (None, 6.0)),
}


def _limits(node: fx.Node) -> Spelling | None:
    limits, place = [], 1
    for name, default in _LIMITS[kind(node)]:
        limits.append(default if name is None else argument(node, place, name, default))
        place += name is not None
    for limit in limits:
        number = scalar(limit)
        if (
            limit is not None
            and not is_tensor(limit)
            and (number is None or is_beyond_dtype(node, number))
        ):
            return None
    low, high = limits
    return lambda c: c.clamped(
        c.value(node.args[0]),
        None if low is None else c.value(low),
        None if high is None else c.value(high),
    )  # fmt: skip


def _where(node: fx.Node) -> Spelling | None:
    """torch.where(condition, a, b) or a.where(condition, b)."""
    if len(node.args) != 3 or node.kwargs:
        return None
    condition, a, b = node.args
    if node.op == "call_method":
        condition, a = a, condition
    return _choice(node, condition, a, b)


def _masked_fill(node: fx.Node) -> Spelling | None:
    x, mask, value = (argument(node, i, n) for i, n in enumerate(("input", "mask", "value")))
    return _choice(node, mask, value, x) if is_tensor(x) else None


def _choice(node: fx.Node, condition: Any, a: Any, b: Any) -> Spelling | None:
    if not is_tensor(condition) or fake(condition).dtype != torch.bool:
        return None
    numbers = [scalar(p) for p in (a, b) if not is_tensor(p)]
    # True and False are no numbers here, and a number in place of a bool would have to become one.
    if any(n is None for n in numbers) or (numbers and fake(node).dtype == torch.bool):
        return None
    if kind(node) == "masked_fill" and any(
        is_beyond_dtype(node, n) for n in numbers if n is not None
    ):
        return None
    return lambda c: c.where(c.value(condition), c.value(a), c.value(b))


def _prelu(node: fx.Node) -> Spelling | None:
    """With one slope for all channels."""
    x, slope = argument(node, 0, "input"), argument(node, 1, "weight")
    if not (is_tensor(x) and is_tensor(slope)) or fake(slope).numel() != 1:
        return None

    def spell(c: Chain) -> int:
        value = c.value(x)
        return c.where(c.binary("gt", value, 0.0), value, c.binary("mul", value, c.value(slope)))

    return spell


def _of_two_tensors(name: str) -> Rule:
    """torch.max and torch.min of two tensors; of one they reduce."""

    def rule(node: fx.Node) -> Spelling | None:
        pair = binary_operands(node)
        if pair is None or not all(is_tensor(p) for p in pair):
            return None
        return binary_rule(name)(node)

    return rule


_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
_OPERATORS = {
    "logical_and": ("and_", "logical_and", "bitwise_and"),
    "logical_or": ("or_", "logical_or", "bitwise_or"),
    "ne": ("xor", "logical_xor", "bitwise_xor"),
}
_NOT = ("invert", "logical_not", "bitwise_not")
JUMPING = frozenset({*_COMPARISONS, "floor", "round", "hardshrink", "threshold"})
# What may give bools. Arithmetic of bools is left to PyTorch: True + True is True, and 2 in a chain.
OF_TRUTHS = frozenset({*_COMPARISONS, *sum(_OPERATORS.values(), ()), *_NOT, "where", "masked_fill"})
RULES: dict[str, Rule] = {
    **dict.fromkeys(FLOAT_CASTS, _cast),
    **dict.fromkeys(_LIMITS, _limits),
    **{name: _comparison(name) for name in _COMPARISONS},
    **{name: _of_truths(op) for op, names in _OPERATORS.items() for name in names},
    **dict.fromkeys(_NOT, _not),
    "max": _of_two_tensors("maximum"),
    "min": _of_two_tensors("minimum"),
    "pow": _power,
    "where": _where,
    "masked_fill": _masked_fill,
    "prelu": _prelu,
    "addcmul": _addc("mul"),
    "addcdiv": _addc("div"),
}
