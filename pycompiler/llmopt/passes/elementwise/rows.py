"""Reductions of the last dimension, and what is made of rows with them."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import torch
from torch import fx

from llmopt.graph import argument, expression, fake, is_tensor, kind, scalar
from llmopt.ops.pointwise import LONGEST_ROW
from llmopt.passes.elementwise.chain import Chain, Rule, Spelling


def _reduction(write: Callable[[Chain, int], int]) -> Rule:
    def rule(node: fx.Node) -> Spelling | None:
        return _of_row(node, argument(node, 1, "dim"), argument(node, 2, "keepdim", False), write)

    return rule


def _of_row(
    node: fx.Node, dim: Any, keepdim: Any, write: Callable[[Chain, int], int]
) -> Spelling | None:
    """Of the last dimension, kept as one of size 1, where that is no longer than a kernel's rows and nobody asks for another dtype."""
    x = node.args[0] if node.args else None
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    if not is_tensor(x) or dim not in (-1, fake(x).dim() - 1) or keepdim is not True:
        return None
    if fake(node).dtype != fake(x).dtype or not _is_short(x):
        return None
    return lambda c: write(c, c.value(x))


def _is_short(x: fx.Node) -> bool:
    width = expression(fake(x).shape[-1])
    return isinstance(width, int) and 0 < width <= LONGEST_ROW


def _euclidean(c: Chain, x: int) -> int:
    return c.unary("sqrt", c.reduce("sum", c.unary("square", x)))


def _norm(node: fx.Node) -> Spelling | None:
    """torch.norm and torch.linalg.vector_norm, of second order."""
    order = argument(node, 1, "ord" if "vector" in kind(node) else "p", 2)
    if order not in (2, 2.0, "fro", None):
        return None
    return _of_row(node, argument(node, 2, "dim"), argument(node, 3, "keepdim", False), _euclidean)


def _normalize(node: fx.Node) -> Spelling | None:
    order, dim, eps = (
        argument(node, i, n, d) for i, n, d in ((1, "p", 2.0), (2, "dim", 1), (3, "eps", 1e-12))
    )
    if order != 2 or scalar(eps) is None:
        return None
    least = torch.tensor(float(eps), dtype=fake(node).dtype).item()  # as PyTorch rounds it
    return _of_row(
        node,
        dim,
        True,
        lambda c, x: c.binary("div", x, c.binary("maximum", _euclidean(c, x), least)),
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


def _log_sum_exp(c: Chain, x: int) -> int:
    largest = c.reduce("max", x)
    shift = c.where(c.binary("eq", c.unary("abs", largest), inf), 0.0, largest)
    total = c.reduce("sum", c.unary("exp", c.binary("sub", x, shift)))
    return c.binary("add", c.unary("log", total), shift)


def _least(c: Chain, x: int) -> int:
    return c.unary("neg", c.reduce("max", c.unary("neg", x)))


def _log_softmax(node: fx.Node) -> Spelling | None:
    def write(c: Chain, x: int) -> int:
        x = c.binary("sub", x, c.reduce("max", x))
        return c.binary("sub", x, c.unary("log", c.reduce("sum", c.unary("exp", x))))

    return _of_row(node, argument(node, 1, "dim"), True, write)


# Each row gives one number.
REDUCTIONS: dict[str, Rule] = {
    "mean": _reduction(lambda c, x: c.reduce("mean", x)),
    "sum": _reduction(lambda c, x: c.reduce("sum", x)),
    "amax": _reduction(lambda c, x: c.reduce("max", x)),
    "amin": _reduction(_least),
    "logsumexp": _reduction(_log_sum_exp),
    "norm": _norm,
    "linalg_vector_norm": _norm,
    "var": _deviation(lambda c, x: x),
    "std": _deviation(lambda c, x: c.unary("sqrt", x)),
}
RULES: dict[str, Rule] = {**REDUCTIONS, "normalize": _normalize, "log_softmax": _log_softmax}
