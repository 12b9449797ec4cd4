"""repeats: stack, repeat, tile and repeat_interleave that no other pass has a use for → cat and copies, which are kernels'."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import fx

from llmopt.graph import (
    FLOATS,
    argument,
    fake,
    fake_mode_of,
    is_dense,
    is_tensor,
    kind,
    replace,
)
from llmopt.passes.calls import Calls

_MOST_PIECES = 32  # of one cat
_DENSE = {"memory_format": torch.contiguous_format}


def run(graph: fx.Graph) -> None:
    mode: Any = fake_mode_of(graph)
    rules = {
        "stack": _stacked,
        "repeat": _repeated,
        "tile": _repeated,
        "repeat_interleave": _interleaved,
    }
    for node in list(graph.nodes):
        rule = rules.get(kind(node)) if node.op in ("call_function", "call_method") else None
        if rule is None or not is_tensor(node) or not node.args or not is_dense(fake(node)):
            continue
        # What is joined lies as its parts do: a dense result has dense parts.
        if fake(node).dtype in FLOATS and all(is_dense(fake(n)) for n in _tensors(node)):
            with graph.inserting_before(node):
                new = rule(Calls(graph, mode, node), node)
            if new is not None:
                replace(node, new)


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if is_tensor(n)]


def _stacked(call: Calls, node: fx.Node) -> fx.Node | None:
    parts, dim = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
    if not isinstance(parts, (list, tuple)) or not all(map(is_tensor, parts)):
        return None
    if len(parts) > _MOST_PIECES or not isinstance(dim, int):
        return None
    return call(torch.cat, [call("unsqueeze", part, dim) for part in parts], dim)


def _repeated(call: Calls, node: fx.Node) -> fx.Node | None:
    x, *counts = node.args
    if len(counts) == 1 and isinstance(counts[0], (list, tuple)):
        counts = list(counts[0])
    if node.kwargs or any(type(n) is not int or n < 1 for n in counts):
        return None
    if prod(counts) > _MOST_PIECES:
        return None
    counts = [1] * (fake(x).dim() - len(counts)) + counts
    y = x
    for _ in range(len(counts) - fake(x).dim()):
        y = call("unsqueeze", y, 0)
    for dim, count in enumerate(counts):
        if count > 1:
            y = call(torch.cat, [y] * count, dim)
    return call("clone", y) if max(counts, default=1) == 1 else y


def _interleaved(call: Calls, node: fx.Node) -> fx.Node | None:
    x, count, dim = node.args[0], argument(node, 1, "repeats"), argument(node, 2, "dim")
    if type(count) is not int or count < 1 or not isinstance(dim, int):
        return None
    dim %= fake(x).dim()
    wide = call("expand", call("unsqueeze", x, dim + 1), *(count if d == dim + 1 else -1 for d in range(fake(x).dim() + 1)))  # fmt: skip
    return call("flatten", call(torch.clone, wide, **_DENSE), dim, dim + 1)
