"""convolutions: short depthwise conv1d → a sum of shifted products, which is one chain.

So state-space layers and their kin look back over some positions (LFM2, Mamba, Qwen3-Next). The sum is made over [B, L, C], where models
that transpose in front of the convolution have channels side by side.
"""

from __future__ import annotations

import operator
from typing import Any

import torch.nn.functional as F
from torch import fx

from llmopt.graph import (
    FLOATS,
    argument,
    expression,
    fake,
    fake_mode_of,
    is_tensor,
    kind,
    replace,
    storage,
)
from llmopt.passes.calls import Calls
from llmopt.writes import mutated_storages

_LONGEST = 4  # positions: what a chain reads with their weights


def run(graph: fx.Graph) -> None:
    mode: Any = fake_mode_of(graph)
    written = mutated_storages(graph)
    for node in list(graph.nodes):
        if node.op == "call_function" and kind(node) == "conv1d" and storage(node) not in written:
            padding = _padding(node)
            if padding is not None:
                with graph.inserting_before(node):
                    replace(node, _sum(Calls(graph, mode, node), node, padding))


def _padding(node: fx.Node) -> int | None:
    """Zeros on both sides; None where a convolution is not short, depthwise and of every position."""
    x, weight, bias = (argument(node, i, n) for i, n in enumerate(("input", "weight", "bias")))
    stride, padding, dilation = (
        _one(argument(node, i, n, d))
        for i, n, d in ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))
    )
    tensors = [x, weight] if bias is None else [x, weight, bias]
    if not all(is_tensor(t) and fake(t).dtype in FLOATS for t in tensors) or fake(x).dim() != 3:
        return None
    if (
        len({fake(t).dtype for t in (node, *tensors)}) != 1  # under autocast its own is another
        or (stride, dilation) != (1, 1)
        or padding is None
    ):
        return None
    channels, inputs, length = map(expression, fake(weight).shape)
    depthwise = inputs == 1 and argument(node, 6, "groups", 1) == channels == expression(
        fake(x).shape[1]
    )
    is_short = isinstance(length, int) and length <= _LONGEST
    return (
        padding
        if depthwise and is_short and isinstance(expression(fake(x).shape[0]), int)
        else None
    )


def _one(value: Any) -> int | None:
    value = value[0] if isinstance(value, (tuple, list)) and len(value) == 1 else value
    return value if type(value) is int else None


def _sum(call: Calls, node: fx.Node, padding: int) -> fx.Node:
    x, weight, bias = (argument(node, i, n) for i, n in enumerate(("input", "weight", "bias")))
    rows = call("transpose", x, 1, 2)
    if padding:
        rows = call(F.pad, call("contiguous", rows), (0, 0, padding, padding))
    length = fake(weight).shape[2]
    total = None
    for i in range(length):
        end = i - length + 1
        part = call(operator.getitem, rows, (slice(None), slice(i, end or None)))
        product = call("mul", part, call(operator.getitem, weight, (slice(None), 0, i)))
        total = product if total is None else call("add", total, product)
    return call("transpose", total if bias is None else call("add", total, bias), 1, 2)
