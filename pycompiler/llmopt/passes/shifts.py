"""shifts: roll and pad → copies, which are kernels': what moves round is cut and joined, what is padded by nothing is copied.

Windows of images (Swin and others) are made so in each layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from llmopt.graph import (
    FLOATS,
    argument,
    expression,
    fake,
    fake_mode_of,
    is_dense,
    is_tensor,
    kind,
    replace,
)
from llmopt.passes.calls import Calls


def run(graph: fx.Graph) -> None:
    mode: Any = fake_mode_of(graph)
    rules = {"roll": _rolled, "pad": _padded}
    for node in list(graph.nodes):
        rule = rules.get(kind(node)) if node.op in ("call_function", "call_method") else None
        x = node.args[0] if node.args else None
        if rule is None or not is_tensor(x) or fake(x).dtype not in FLOATS:
            continue
        if is_dense(fake(x)) and is_dense(
            fake(node)
        ):  # else what is joined could be laid out otherwise
            with graph.inserting_before(node):
                new = rule(Calls(graph, mode, node), node, x)
            if new is not None:
                replace(node, new)


def _rolled(call: Calls, node: fx.Node, x: fx.Node) -> fx.Node | None:
    """Along known dimensions of known sizes, by known numbers."""
    shifts, dims = (_numbers(argument(node, i, n)) for i, n in ((1, "shifts"), (2, "dims")))
    if shifts is None or dims is None or len(shifts) != len(dims):
        return None
    sizes = [expression(fake(x).shape[d]) for d in dims]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return None
    y = x
    for shift, dim, size in zip(shifts, dims, sizes, strict=True):
        behind = shift % size
        if behind:
            parts = (
                call("narrow", y, dim, size - behind, behind),
                call("narrow", y, dim, 0, size - behind),
            )
            y = call(torch.cat, parts, dim)
    return call("clone", x) if y is x else y


def _padded(call: Calls, node: fx.Node, x: fx.Node) -> fx.Node | None:
    """With a constant, around known sizes; by nothing around any."""
    amounts = _numbers(argument(node, 1, "pad"))
    value = argument(node, 3, "value")
    if amounts is None or argument(node, 2, "mode", "constant") != "constant":
        return None
    if not any(amounts):
        return call("clone", x)
    if (
        min(amounts) < 0
        or not _borders_are_known(fake(x).shape, amounts)
        or not isinstance(value, (int, float, type(None)))
    ):
        return None
    y, about = x, {"dtype": fake(x).dtype, "device": fake(x).device}
    for i, sizes in enumerate(zip(amounts[::2], amounts[1::2], strict=True)):
        dim = fake(x).dim() - 1 - i
        shape, borders = list(fake(y).shape), []
        for size in sizes:
            shape[dim] = size
            borders.append(
                [call(torch.full, tuple(shape), float(value or 0.0), **about)] if size else []
            )
        if any(borders):
            y = call(torch.cat, (*borders[0], y, *borders[1]), dim)
    return y


def _borders_are_known(shape: Sequence[Any], amounts: tuple[int, ...]) -> bool:
    """Whether sizes that change are none of a border: only what has one in their own dimension."""
    changing = [d for d, size in enumerate(shape) if not isinstance(expression(size), int)]
    padded = [len(shape) - 1 - i // 2 for i, amount in enumerate(amounts) if amount]
    return not changing or (len(changing) == 1 and set(padded) == set(changing))


def _numbers(value: Any) -> tuple[int, ...] | None:
    values = value if isinstance(value, (tuple, list)) else (value,)
    return tuple(values) if all(type(v) is int for v in values) else None
