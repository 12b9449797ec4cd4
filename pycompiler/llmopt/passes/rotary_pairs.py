"""Rotations of the pairs (2i, 2i + 1) of rows: taken apart, turned and stacked, or as complex numbers that are multiplied."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from llmopt.casts import is_float_cast, unwidened
from llmopt.graph import (
    FLOATS,
    argument,
    binary_operands,
    expression,
    fake,
    is_tensor,
    kind,
    same_shape,
    same_size,
    sole_user,
)
from llmopt.passes.rotations import Tables, products_of, rewrite, slice_of
from llmopt.writes import Writes

_RESHAPES = ("reshape", "view", "unflatten")


def match_stack(tables: Tables, node: fx.Node, writes: Writes) -> None:
    """stack((a·cos − b·sin, b·cos + a·sin), -1).flatten(-2) of x's even numbers a and odd ones b; or the other way round."""
    parts = argument(node, 0, "tensors")
    if len(parts) != 2 or argument(node, 1, "dim", 0) not in (-1, fake(node).dim() - 1):
        return
    first, second = (products_of(tables, part, part_of) for part in parts)
    if first is None or second is None:
        return
    (x, (cos, cos_sign), (sin, sin_sign)), (other, *turned) = first, second
    if x is not other or turned != [(sin, -sin_sign), (cos, cos_sign)] or cos_sign != 1:
        return
    half = expression(fake(parts[0]).shape[-1])
    for table in (cos, sin):
        if fake(table).dim() not in (2, 3, 4) or not same_size(fake(table).shape[-1], half):
            return
    ends = _ends(x, node)
    if ends is None or fake(cos).dim() != fake(sin).dim():
        return
    x, last = ends
    if not writes.moves_reads(last, (x, cos, sin)):
        cos, sin = (
            tables.of_rows(table, is_negative, "interleaved", last, writes)
            for table, is_negative in ((cos, False), (sin, sin_sign == 1))
        )
        rewrite(tables, last, x, cos, sin, "interleaved")


def match_complex(tables: Tables, node: fx.Node, writes: Writes) -> None:
    """view_as_real(view_as_complex(x as pairs) · turns).flatten(-2)."""
    product = node.args[0]
    pair = binary_operands(product) if is_tensor(product) and kind(product) == "mul" else None
    if pair is None or not all(map(is_tensor, pair)):
        return
    for numbers, turns in (pair, pair[::-1]):
        x = _of_pairs(numbers.args[0]) if kind(numbers) == "view_as_complex" else None
        if x is None or not same_shape(fake(numbers).shape, fake(product).shape):
            continue
        ends = _ends(x, node)
        if ends is None or not fake(turns).is_complex() or fake(turns).dim() not in (2, 3, 4):
            return
        if not same_size(fake(turns).shape[-1], fake(numbers).shape[-1]):
            return  # one angle for all pairs
        x, last = ends
        if not writes.moves_reads(last, (x, turns)):
            cos, sin = tables.of_complex(turns, last, writes)
            rewrite(tables, last, x, cos, sin, "interleaved")
        return


def part_of(node: Any) -> tuple[fx.Node | None, int]:
    """x and 0 or 1 where the node is the even or the odd numbers of x's last dimension."""
    for number in range(2):
        x = slice_of(node, number, None, 2)
        if x is not None:
            return x, number
    source, number = _picked(node)
    x = _of_pairs(source)
    return (None, 0) if x is None or number not in (0, 1) else (x, number)


def _picked(node: Any) -> tuple[Any, Any]:
    """A value and the number in its last dimension that the node is."""
    if not is_tensor(node):
        return None, None
    if kind(node) == "select":
        source, dim, number = (
            argument(node, i, n) for i, n in enumerate(("input", "dim", "index"))
        )
        return (source, number) if dim in (-1, fake(source).dim() - 1) else (None, None)
    if kind(node) != "getitem":
        return None, None
    source, index = node.args
    if kind(source) == "unbind":
        pairs = source.args[0]
        is_last = argument(source, 1, "dim", 0) in (-1, fake(pairs).dim() - 1)
        return (pairs, index) if is_last else (None, None)
    if not isinstance(index, tuple) or not is_tensor(source):
        return None, None
    *front, number = index
    is_whole = all(f is Ellipsis or f == slice(None) for f in front)
    is_last = Ellipsis in front or len(index) == fake(source).dim()
    return (source, number) if is_whole and is_last else (None, None)


def _of_pairs(node: Any) -> fx.Node | None:
    """x [..., R] where the node is x as [..., R/2, 2]."""
    if not is_tensor(node) or kind(node) not in _RESHAPES:
        return None
    x = node.args[0]
    *front, half, two = fake(node).shape
    *before, width = fake(x).shape
    fits = same_shape(front, before) and same_size(two, 2) and same_size(2 * half, width)
    return x if fits else None


def _ends(x: fx.Node, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """What is turned and where the result is whole again, without casts to float32 and back."""
    last = sole_user(node)
    if last is None or kind(last) not in ("flatten", *_RESHAPES) or fake(x).dim() != 4:
        return None
    if not same_shape(fake(last).shape, fake(x).shape) or fake(x).dtype not in FLOATS:
        return None
    source, user = unwidened(x), sole_user(last)
    if (
        fake(last).dtype == torch.float32
        and is_float_cast(user)
        and fake(user).dtype == fake(source).dtype
    ):
        return source, user
    return (x, last) if fake(last).dtype == fake(x).dtype else None
