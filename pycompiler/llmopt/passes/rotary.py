"""rotary: x·cos + rotate(x)·sin, with rotate in either pairing, → ops.rope; a pass-through tail joins the rope.

Or written for the halves of x, with tables of half the width: cat((a·cos − b·sin, b·cos + a·sin), -1); or for its pairs, there or as
complex numbers (rotary_pairs).
"""

from __future__ import annotations

from typing import Any

from torch import fx

from llmopt.graph import (
    FLOATS,
    binary_operands,
    expression,
    fake,
    is_tensor,
    kind,
    same_shape,
    same_size,
    sole_user,
)
from llmopt.passes import rotary_pairs
from llmopt.passes.rotations import Tables, products_of, rewrite, slice_of
from llmopt.writes import Writes


def run(graph: fx.Graph) -> None:
    tables = Tables(graph)
    writes = Writes(graph)
    for node in list(graph.nodes):
        if node.op not in ("call_function", "call_method"):
            continue
        if kind(node) == "add":
            _match(tables, node, writes)
        elif kind(node) == "cat":
            _match_halves(tables, node, writes)
        elif kind(node) == "stack":
            rotary_pairs.match_stack(tables, node, writes)
        elif kind(node) == "view_as_real":
            rotary_pairs.match_complex(tables, node, writes)


def _match(tables: Tables, node: fx.Node, writes: Writes) -> None:
    pair = binary_operands(node)
    if pair is None or not all(is_tensor(p) and kind(p) == "mul" for p in pair):
        return
    for straight, turned in (pair, pair[::-1]):
        found = _rotation(straight, turned)
        if found is None:
            continue
        x, cos, sin, kind_name = found
        if fake(x).dim() != 4 or fake(x).dtype != fake(node).dtype or fake(x).dtype not in FLOATS:
            return
        if not same_shape(fake(x).shape, fake(node).shape):
            return  # tables of more rows or batches than x
        if fake(cos).dim() not in (2, 3, 4) or fake(sin).dim() != fake(cos).dim():
            return
        if not all(same_size(fake(t).shape[-1], fake(x).shape[-1]) for t in (cos, sin)):
            return
        tail = _pass_through(node, x)
        last, whole = (node, x) if tail is None else (tail, x.args[0])
        if not writes.moves_reads(last, (whole, cos, sin)):
            rewrite(tables, last, whole, cos, sin, kind_name)
        return


def _match_halves(tables: Tables, node: fx.Node, writes: Writes) -> None:
    """The halves a and b of x become a·cos − b·sin and b·cos + a·sin; or turn the other way."""
    parts = node.args[0]
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if len(parts) != 2 or fake(node).dim() != 4 or dim not in (-1, 3):
        return
    first, second = (products_of(tables, part, _half_of) for part in parts)
    if first is None or second is None:
        return
    (x, (cos, cos_sign), (sin, sin_sign)), (other, *turned) = first, second
    if x is not other or turned != [(sin, -sin_sign), (cos, cos_sign)] or cos_sign != 1:
        return
    half = expression(fake(parts[0]).shape[-1])
    if fake(x).dtype != fake(node).dtype or fake(x).dtype not in FLOATS:
        return
    if not same_shape(fake(x).shape, fake(node).shape):
        return
    for table in (cos, sin):
        if fake(table).dim() not in (2, 3, 4) or not same_size(fake(table).shape[-1], half):
            return
    if fake(cos).dim() != fake(sin).dim():
        return
    tail = _pass_through(node, x)
    last, whole = (node, x) if tail is None else (tail, x.args[0])
    if not writes.moves_reads(last, (whole, cos, sin)):
        cos, sin = (
            tables.of_rows(table, is_negative, "half", last, writes)
            for table, is_negative in ((cos, False), (sin, sin_sign == 1))
        )
        rewrite(tables, last, whole, cos, sin, "half")


def _half_of(node: fx.Node) -> tuple[fx.Node | None, int]:
    """x and 0 or 1 where the node is the first or the second half of x's last dimension."""
    width = expression(fake(node).shape[-1])
    if not isinstance(width, int):
        return None, 0
    for number, ends in enumerate(((None, width), (width, None))):
        x = _chunk_of(node, number) or slice_of(node, *ends, None)
        if x is not None and same_size(fake(x).shape[-1], 2 * width):
            return x, number
    return None, 0


def _rotation(straight: fx.Node, turned: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, str] | None:
    """x, cos, sin and pairing when straight = x·cos and turned = rotate(x)·sin."""
    for rotated, sin in (turned.args[:2], turned.args[1::-1]):
        if not (is_tensor(rotated) and is_tensor(sin)):
            return None
        source = _half(rotated) or _interleaved(rotated)
        if source is None:
            continue
        x, kind_name = source
        for left, cos in (straight.args[:2], straight.args[1::-1]):
            if left is x and is_tensor(cos):
                return x, cos, sin, kind_name
    return None


def _chunk_of(node: Any, which: int) -> fx.Node | None:
    """x when node is x.chunk(2, -1)[which], or split likewise."""
    if not is_tensor(node) or kind(node) != "getitem" or node.args[1] != which:
        return None
    chunk = node.args[0]
    if kind(chunk) not in ("chunk", "split") or len(fake(chunk)) != 2:
        return None
    halves = [fake(chunk)[n].shape[-1] for n in range(2)]
    if not same_size(*halves):
        return None
    dim = chunk.args[2] if len(chunk.args) > 2 else chunk.kwargs.get("dim", 0)
    return chunk.args[0] if dim in (-1, fake(chunk.args[0]).dim() - 1) else None


def _half(rotated: fx.Node) -> tuple[fx.Node, str] | None:
    """x of cat((-x[..., R/2:], x[..., :R/2]), -1)."""
    if kind(rotated) != "cat" or len(rotated.args[0]) != 2:
        return None
    dim = rotated.args[1] if len(rotated.args) > 1 else rotated.kwargs.get("dim", 0)
    second, first = rotated.args[0]
    if dim not in (-1, fake(rotated).dim() - 1) or not is_tensor(second) or kind(second) != "neg":
        return None
    width = expression(fake(rotated).shape[-1])
    if not isinstance(width, int) or width % 2:
        return None
    x = slice_of(first, None, width // 2, None) or _chunk_of(first, 0)
    other = slice_of(second.args[0], width // 2, None, None) or _chunk_of(second.args[0], 1)
    if x is None or x is not other or not same_size(fake(x).shape[-1], width):
        return None
    return x, "half"


def _interleaved(rotated: fx.Node) -> tuple[fx.Node, str] | None:
    """x of stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)."""
    if kind(rotated) not in ("flatten", "reshape", "view"):
        return None
    stack = rotated.args[0]
    if not is_tensor(stack) or kind(stack) != "stack" or len(stack.args[0]) != 2:
        return None
    dim = stack.args[1] if len(stack.args) > 1 else stack.kwargs.get("dim", 0)
    second, first = stack.args[0]
    if dim not in (-1, fake(stack).dim() - 1) or not is_tensor(second) or kind(second) != "neg":
        return None
    (x, even), (other, odd) = map(rotary_pairs.part_of, (first, second.args[0]))
    if x is None or x is not other or (even, odd) != (0, 1):
        return None
    return (x, "interleaved") if same_size(fake(rotated).shape[-1], fake(x).shape[-1]) else None


def _pass_through(node: fx.Node, x: fx.Node) -> fx.Node | None:
    """The cat((rope(whole[..., :R]), whole[..., R:]), -1) that follows a partial rotary, or None."""
    user = sole_user(node)
    if user is None or kind(user) != "cat" or len(user.args[0]) != 2 or user.args[0][0] is not node:
        return None
    dim = user.args[1] if len(user.args) > 1 else user.kwargs.get("dim", 0)
    width = expression(fake(x).shape[-1])
    if dim not in (-1, 3) or not isinstance(width, int):
        return None
    whole = slice_of(x, None, width, None)
    rest = slice_of(user.args[0][1], width, None, None)
    return user if whole is not None and whole is rest else None
