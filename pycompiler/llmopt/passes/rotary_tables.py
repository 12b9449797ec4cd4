"""rotary_tables: cos and sin of cat((a, a), -1), where a = frequency · position, → ops.rotary_table."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from llmopt import ops
from llmopt.casts import FLOAT_CASTS, is_float_cast
from llmopt.graph import (
    argument,
    binary_operands,
    emit,
    fake,
    fake_mode_of,
    getitem,
    is_one,
    is_tensor,
    is_view,
    kind,
    replace,
    same_shape,
    scalar,
    sole_user,
)
from llmopt.writes import Writes


def run(graph: fx.Graph) -> None:
    mode, writes = fake_mode_of(graph), Writes(graph)
    for node in list(graph.nodes):
        if kind(node) == "cat" and fake(node).dim() == 3:
            _match(graph, mode, node, writes)


def _match(graph: fx.Graph, mode: Any, whole: fx.Node, writes: Writes) -> None:
    pieces = argument(whole, 0, "tensors")
    if len(pieces) != 2 or pieces[0] is not pieces[1]:
        return
    if argument(whole, 1, "dim", 0) not in (-1, 2) or fake(whole).dtype != torch.float32:
        return
    tables = {kind(user): user for user in whole.users}
    if set(tables) != {"cos", "sin"} or len(whole.users) != 2:
        return
    factors = _factors(pieces[0])
    if factors is None:
        return
    cos, sin = _finished(tables["cos"]), _finished(tables["sin"])
    if cos[1:] != sin[1:]:
        cos, sin = (tables["cos"], 1.0, torch.float32), (tables["sin"], 1.0, torch.float32)
    if not _fit(*map(fake, factors)) or _goes_to_pytorch(cos[0]):
        return
    if writes.moves_reads(whole, factors) or writes.between((whole,), whole, max(cos[0], sin[0])):
        return
    with graph.inserting_before(whole):
        if _is_swap(pieces[0]):
            factors = [emit(graph, mode, "transpose", (f, 1, 2), like=whole) for f in factors]
        frequencies, positions = factors
        args = (frequencies, positions, cos[1], cos[2])
        both = emit(graph, mode, ops.rotary_table, args, like=whole)
        new = [emit(graph, mode, getitem, (both, i), like=whole) for i in range(2)]
    if same_shape(fake(new[0]).shape, fake(whole).shape):
        replace(cos[0], new[0])
        replace(sin[0], new[1])


def _fit(frequencies: torch.Tensor, positions: torch.Tensor) -> bool:
    return frequencies.dtype == torch.float32 and positions.dtype in (torch.int64, torch.float32)


def _goes_to_pytorch(table: fx.Node) -> bool:
    """True when the table is spread by repeat_interleave, which has no kernel: then the table is better made there too."""
    waiting = [table]
    while waiting:
        node = waiting.pop()
        if kind(node) == "repeat_interleave":
            return True
        waiting += [u for u in node.users if kind(u) == "repeat_interleave" or is_view(u)]
    return False


def _factors(angle: fx.Node) -> list[fx.Node] | None:
    """Frequencies and positions whose product is an angle [B,S,R/2], or its transpose [B,R/2,S]."""
    product = angle.args[0] if _is_swap(angle) else angle
    if not is_tensor(product) or kind(product) != "mul" or fake(product).dim() != 3:
        return None
    pair = binary_operands(product)
    if pair is None or not all(is_tensor(p) and fake(p).dim() > 0 for p in pair):
        return None
    if product is not angle and any(fake(p).dim() != 3 for p in pair):
        return None
    along = -1 if product is angle else 1  # the dimension of the frequencies
    single = [is_one(fake(p).shape[along]) for p in pair]
    if single[0] == single[1]:
        return None
    frequencies, positions = pair[::-1] if single[0] else pair
    return [frequencies, _as_integers(positions)]


def _is_swap(node: fx.Node) -> bool:
    return kind(node) == "transpose" and {d % 3 for d in node.args[1:3]} == {1, 2}


def _as_integers(value: fx.Node) -> fx.Node:
    """The positions before they became float32."""
    if (
        kind(value) in FLOAT_CASTS
        and is_tensor(value.args[0])
        and fake(value).dtype == torch.float32
    ):
        source = value.args[0]
        return source if fake(source).dtype == torch.int64 else value
    return value


def _finished(table: fx.Node) -> tuple[fx.Node, float, torch.dtype]:
    """The last node of table · number, cast; with the number and the dtype."""
    scale = 1.0
    user = sole_user(table)
    if user is not None and kind(user) == "mul" and user.args[0] is table:
        factor = scalar(user.args[1])
        if factor is not None:
            table, scale, user = user, factor, sole_user(user)
    if is_float_cast(user) and user.args[0] is table:
        table = user
    return table, scale, fake(table).dtype
