"""Reductions of the last dimension, and what is made of rows with them."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

from torch import fx

from llmopt.graph import argument, expression, fake, is_tensor, kind, scalar
from llmopt.ops.pointwise import LONGEST_ROW
from llmopt.passes.elementwise.chain import Chain, Rule, Spelling


def _reduction(name: str) -> Rule:
    def rule(node: fx.Node) -> Spelling | None:
        if argument(node, 3, "dtype") is not None or not _is_of_rows(node):
            return None
        return lambda c: c.reduce(name, c.value(node.args[0]))

    return rule


def _least(node: fx.Node) -> Spelling | None:
    """amin: as the largest of the negative values."""
    if not _is_of_rows(node):
        return None
    return lambda c: c.unary("neg", c.reduce("max", c.unary("neg", c.value(node.args[0]))))


def _is_of_rows(node: fx.Node) -> bool:
    """Over the last dimension, kept as one of size 1."""
    dim = argument(node, 1, "dim")
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    last = fake(node.args[0]).dim() - 1
    return dim in (-1, last) and argument(node, 2, "keepdim", False) is True


def _of_row(
    node: fx.Node, dim: Any, keepdim: Any, write: Callable[[Chain, int], int]
) -> Spelling | None:
    """Of the last dimension, kept as one of size 1, where that is no longer than a kernel's rows."""
    x = node.args[0] if node.args else None
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    if not is_tensor(x) or dim not in (-1, fake(x).dim() - 1) or keepdim is not True:
        return None
    if argument(node, 4, "dtype") is not None or "out" in node.kwargs or not _is_short(x):
        return None
    return lambda c: write(c, c.value(x))


def _is_short(x: fx.Node) -> bool:
    width = expression(fake(x).shape[-1])
    return isinstance(width, int) and 0 < width <= LONGEST_ROW


def _length(c: Chain, x: int) -> int:
    return c.unary("sqrt", c.reduce("sum", c.unary("square", x)))


def _norm(node: fx.Node) -> Spelling | None:
    """torch.norm and torch.linalg.vector_norm, of second order."""
    order = argument(node, 1, "ord" if "vector" in kind(node) else "p", 2)
    if order not in (2, 2.0, "fro", None):
        return None
    return _of_row(node, argument(node, 2, "dim"), argument(node, 3, "keepdim", False), _length)


def _normalize(node: fx.Node) -> Spelling | None:
    order, dim, eps = (
        argument(node, i, n, d) for i, n, d in ((1, "p", 2.0), (2, "dim", 1), (3, "eps", 1e-12))
    )
    if order != 2 or scalar(eps) is None:
        return None
    return _of_row(
        node,
        dim,
        True,
        lambda c, x: c.binary("div", x, c.binary("maximum", _length(c, x), float(eps))),
    )


def _deviation(finish: Callable[[Chain, int], int]) -> Rule:
    """var and std, of which the third argument is `unbiased` or there is a `correction`."""

    def rule(node: fx.Node) -> Spelling | None:
        unbiased = argument(node, 2, "unbiased", True)
        correction = scalar(node.kwargs.get("correction", 1 if unbiased is True else 0))
        if not isinstance(unbiased, bool) or correction is None or not is_tensor(node.args[0]):
            return None
        if not _is_short(node.args[0]):
            return None
        freedom = max(fake(node.args[0]).shape[-1] - correction, 0.0)

        def write(c: Chain, x: int) -> int:
            distance = c.unary("square", c.binary("sub", x, c.reduce("mean", x)))
            return finish(c, c.binary("div", c.reduce("sum", distance), float(freedom)))

        return _of_row(node, argument(node, 1, "dim"), argument(node, 3, "keepdim", False), write)

    return rule


def _log_sum_exp(node: fx.Node) -> Spelling | None:
    def write(c: Chain, x: int) -> int:
        largest = c.reduce("max", x)
        is_infinite = c.binary("eq", c.unary("abs", largest), inf)
        shift = c.where(is_infinite, 0.0, largest)
        total = c.reduce("sum", c.unary("exp", c.binary("sub", x, shift)))
        return c.binary("add", c.unary("log", total), shift)

    return _of_row(node, argument(node, 1, "dim"), argument(node, 2, "keepdim", False), write)


def _log_softmax(node: fx.Node) -> Spelling | None:
    def write(c: Chain, x: int) -> int:
        x = c.binary("sub", x, c.reduce("max", x))
        return c.binary("sub", x, c.unary("log", c.reduce("sum", c.unary("exp", x))))

    if argument(node, 3, "dtype") is not None or kind(node) != "log_softmax":
        return None
    return _of_row(node, argument(node, 1, "dim"), True, write)


# Each row gives one number.
REDUCTIONS: dict[str, Rule] = {
    "mean": _reduction("mean"),
    "sum": _reduction("sum"),
    "amax": _reduction("max"),
    "amin": _least,
    "norm": _norm,
    "linalg_vector_norm": _norm,
    "var": _deviation(lambda c, x: x),
    "std": _deviation(lambda c, x: c.unary("sqrt", x)),
    "logsumexp": _log_sum_exp,
}
RULES: dict[str, Rule] = {**REDUCTIONS, "normalize": _normalize, "log_softmax": _log_softmax}
