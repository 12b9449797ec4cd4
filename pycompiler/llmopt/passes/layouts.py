"""layouts: values that a kernel wants with a dense last dimension, and that lie otherwise, are copied in front of it.

A convolution's result, read as tokens, is transposed in memory. The copy is an ordinary `contiguous` in front of the first reader,
which the others share unless the graph writes into what is copied.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from llmopt.graph import (
    FLOATS,
    argument,
    emit,
    fake,
    fake_mode_of,
    is_one,
    is_tensor,
    kind,
    same_size,
    same_stride,
    storage,
)
from llmopt.ops.attention import APPENDS
from llmopt.ops.linear import parts
from llmopt.writes import mutated_storages

_DTYPES = (*FLOATS, torch.bool)


def run(graph: fx.Graph) -> None:
    mode: Any = fake_mode_of(graph)
    written = mutated_storages(graph)
    copies: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        wants = _OPERANDS.get(kind(node)) if node.op == "call_function" else None
        for operand, fits in wants(node) if wants is not None else ():
            if is_tensor(operand) and fake(operand).dtype in _DTYPES and not fits(fake(operand)):
                if operand not in copies or storage(operand) in written:
                    with graph.inserting_before(node):
                        copies[operand] = emit(graph, mode, "contiguous", (operand,), like=operand)
                node.replace_input_with(operand, copies[operand])


def _last_is_dense(value: torch.Tensor) -> bool:
    return value.dim() > 0 and (is_one(value.shape[-1]) or same_size(value.stride(-1), 1))


def _is_matrix(value: torch.Tensor) -> bool:
    """Rows of the last dimension are evenly spaced: one stride leads from each to the next."""
    if not _last_is_dense(value):
        return False
    outer = [d for d in range(value.dim() - 1) if not is_one(value.shape[d])]
    return all(
        same_stride(value.stride(a), value.stride(b) * value.shape[b]) for a, b in pairwise(outer)
    )


def _of_linear(node: fx.Node) -> list[tuple[Any, Callable[[torch.Tensor], bool]]]:
    p = parts(node)
    return [(p["x"], _is_matrix), (p["residual"], _is_matrix)]


# Where the mask of each kind of attention stands.
_MASK = {"llmopt.attention": 3, **dict(zip(APPENDS, (8, 10), strict=True))}


def _of_heads(node: fx.Node) -> list[tuple[Any, Callable[[torch.Tensor], bool]]]:
    mask = argument(node, _MASK[kind(node)], "mask")
    return [*((operand, _last_is_dense) for operand in node.args[:3]), (mask, _is_row)]


def _is_row(mask: torch.Tensor) -> bool:
    return _last_is_dense(mask) or same_size(mask.stride(-1), 0)


_OPERANDS: dict[str, Callable[[fx.Node], list[tuple[Any, Callable[[torch.Tensor], bool]]]]] = {
    "llmopt.linear": _of_linear,
    "llmopt.norm": lambda node: [(node.args[0], _last_is_dense)],
    "llmopt.attention": _of_heads,
    **dict.fromkeys(APPENDS, _of_heads),
}
