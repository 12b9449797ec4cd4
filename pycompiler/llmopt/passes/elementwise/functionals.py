"""Activations that the VM has no instruction for, as several. Formulas are those of their pages in PyTorch's documentation."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import Any

import torch
from torch import fx

from llmopt.graph import argument, fake, is_tensor, scalar
from llmopt.passes.elementwise.chain import Chain, Rule, Spelling, is_beyond_dtype


def _with_numbers(write: Callable[..., int], *defaults: tuple[str, Any]) -> Rule:
    """An activation of the first argument with further ones that are numbers, by name; None: there must be one."""

    def rule(node: fx.Node) -> Spelling | None:
        given = [scalar(argument(node, 1 + i, n, d)) for i, (n, d) in enumerate(defaults)]
        names = {n for n, _ in defaults}
        others = [
            *node.args[1 + len(names) :],
            *(v for k, v in node.kwargs.items() if k not in names),
        ]
        if not is_tensor(node.args[0] if node.args else None) or any(
            o is not False for o in others
        ):
            return None  # such as inplace=True, or what ATen's operator of that name is given
        if any(g is None or not isfinite(g) or is_beyond_dtype(node, g) for g in given):
            return None
        return lambda c: write(c, c.value(node.args[0]), *given)

    return rule


def _expm1(c: Chain, x: int) -> int:
    """2 t / (1 − t) with t = tanh(x / 2), which near 0 loses nothing; above 1 the difference itself loses little."""
    t = c.unary("tanh", c.scaled(x, 0.5))
    small = c.binary("div", c.scaled(t, 2.0), c.binary("add", c.unary("neg", t), 1.0))
    return c.where(c.binary("gt", x, 1.0), c.binary("sub", c.unary("exp", x), 1.0), small)


def _elu(c: Chain, x: int, alpha: float) -> int:
    return c.where(c.binary("gt", x, 0.0), x, c.scaled(_expm1(c, x), alpha))


def _celu(c: Chain, x: int, alpha: float) -> int:
    below = c.scaled(_expm1(c, c.binary("div", x, alpha)), alpha)
    return c.where(c.binary("gt", x, 0.0), x, below)


def _selu(c: Chain, x: int) -> int:
    """Klambauer et al., "Self-Normalizing Neural Networks"."""
    return c.scaled(_elu(c, x, 1.6732632423543772), 1.0507009873554805)


def _softplus(c: Chain, x: int, beta: float = 1.0, threshold: float = 20.0) -> int:
    scaled = c.scaled(x, beta)
    curved = c.binary("div", c.unary("log1p", c.unary("exp", scaled)), beta)
    return c.where(c.binary("gt", scaled, threshold), x, curved)


def _mish(c: Chain, x: int) -> int:
    return c.binary("mul", x, c.unary("tanh", _softplus(c, x)))


def _log_sigmoid(c: Chain, x: int) -> int:
    rest = c.unary("log1p", c.unary("exp", c.unary("neg", c.unary("abs", x))))
    return c.binary("sub", c.binary("minimum", x, 0.0), rest)


def _hard_sigmoid(c: Chain, x: int) -> int:
    return c.binary("div", c.clamped(c.binary("add", x, 3.0), 0.0, 6.0), 6.0)


def _hard_swish(c: Chain, x: int) -> int:
    gate = c.clamped(c.binary("add", x, 3.0), 0.0, 6.0)
    return c.binary("div", c.binary("mul", x, gate), 6.0)


def _soft_sign(c: Chain, x: int) -> int:
    return c.binary("div", x, c.binary("add", c.unary("abs", x), 1.0))


def _tanh_shrink(c: Chain, x: int) -> int:
    return c.binary("sub", x, c.unary("tanh", x))


def _leaky_relu(c: Chain, x: int, slope: float) -> int:
    below = c.binary("mul", c.clamped(x, None, 0.0), slope)
    return c.binary("add", c.clamped(x, 0.0, None), below)


def _hard_shrink(c: Chain, x: int, least: float) -> int:
    return c.where(c.binary("le", c.unary("abs", x), least), 0.0, x)


def _soft_shrink(c: Chain, x: int, least: float) -> int:
    return c.binary("sub", x, c.clamped(x, -least, least))


def _threshold(c: Chain, x: int, threshold: float, value: float) -> int:
    return c.where(c.binary("le", x, threshold), value, x)


_NEARLY_EQUAL = 8.0  # from there on softplus is the identity but for less than a float16 keeps


def _softplus_rule(node: fx.Node) -> Spelling | None:
    """A low threshold makes it jump."""
    threshold = scalar(argument(node, 2, "threshold", 20.0))
    if threshold is None or threshold < _NEARLY_EQUAL:
        return None
    return _with_numbers(_softplus, ("beta", 1.0), ("threshold", 20.0))(node)


def _hard_shrink_rule(node: fx.Node) -> Spelling | None:
    """PyTorch rounds its number to the dtype of the tensor."""
    spelling = _with_numbers(_hard_shrink, ("lambd", 0.5))(node)
    if spelling is None:
        return None
    least = torch.tensor(scalar(argument(node, 1, "lambd", 0.5)), dtype=fake(node).dtype).item()
    return lambda c: _hard_shrink(c, c.value(node.args[0]), least)


RULES: dict[str, Rule] = {
    "expm1": _with_numbers(_expm1),
    "selu": _with_numbers(_selu),
    "mish": _with_numbers(_mish),
    "log_sigmoid": _with_numbers(_log_sigmoid),
    "logsigmoid": _with_numbers(_log_sigmoid),
    "hardsigmoid": _with_numbers(_hard_sigmoid),
    "hardswish": _with_numbers(_hard_swish),
    "softsign": _with_numbers(_soft_sign),
    "tanhshrink": _with_numbers(_tanh_shrink),
    "elu": _with_numbers(_elu, ("alpha", 1.0)),
    "celu": _with_numbers(_celu, ("alpha", 1.0)),
    "hardshrink": _hard_shrink_rule,
    "softshrink": _with_numbers(_soft_shrink, ("lambd", 0.5)),
    "softplus": _softplus_rule,
    "leaky_relu": _with_numbers(_leaky_relu, ("negative_slope", 0.01)),
    "threshold": _with_numbers(_threshold, ("threshold", None), ("value", None)),
}
