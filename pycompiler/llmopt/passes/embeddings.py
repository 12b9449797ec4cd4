"""embeddings: F.embedding, and a number its rows are multiplied by, → ops.embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from llmopt import ops
from llmopt.graph import (
    FLOATS,
    argument,
    binary_operands,
    emit,
    fake,
    fake_mode_of,
    is_tensor,
    kind,
    own_value,
    replace,
    scalar,
    sole_user,
)
from llmopt.writes import Writes


def run(graph: fx.Graph) -> None:
    mode, writes = fake_mode_of(graph), Writes(graph)
    for node in list(graph.nodes):
        if node.op == "call_function" and kind(node) == "embedding":
            _match(graph, mode, node, writes)


def _match(graph: fx.Graph, mode: Any, node: fx.Node, writes: Writes) -> None:
    ids, table = argument(node, 0, "input"), argument(node, 1, "weight")
    if not (is_tensor(ids) and is_tensor(table)) or argument(node, 3, "max_norm") is not None:
        return  # max_norm changes the table
    if fake(ids).dtype not in (torch.int64, torch.int32) or fake(table).dtype not in FLOATS:
        return
    last, scale = _scaled(node)
    if writes.moves_reads(last, (ids, table)):
        last, scale = node, 1.0
    with graph.inserting_before(last):
        args = (ids, table) if scale == 1.0 else (ids, table, scale)
        new = emit(graph, mode, ops.embedding, args, None, node, own_value(last))
    replace(last, new)
    if last is not node:
        graph.erase_node(node)


def _scaled(node: fx.Node) -> tuple[fx.Node, float]:
    """The product with a number that is all that reads the rows, and the number; (node, 1.0) without one."""
    user = sole_user(node)
    pair = binary_operands(user) if user is not None and kind(user) == "mul" else None
    if user is None or pair is None or fake(user).dtype != fake(node).dtype:
        return node, 1.0
    factor = scalar(pair[1] if pair[0] is node else pair[0])
    return (node, 1.0) if factor is None else (user, factor)
