"""How FX values become kernel operands: rows of a matrix, broadcast tables, sizes in bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from llmopt.graph import FLOATS, expression, fake, is_one, numel, same_size
from llmopt.native.segment import SegmentBuilder
from llmopt.program import MAX_DIMS, View
from llmopt.sizes import Size, same_stride


@dataclass(frozen=True)
class NativeKernel:
    """One way to run an FX node in C++ or on a GPU: `reject` gives "" or the reason it cannot, `lower` emits the steps."""

    name: str
    reject: Callable[[fx.Node], str]
    lower: Callable[[Any, fx.Node], None]  # a SegmentBuilder of the kernel's device
    is_glue: bool = False  # worth taking only next to other native work


def are_static(*sizes: Size) -> bool:
    return all(isinstance(expression(s), int) for s in sizes)


def rows(value: torch.Tensor) -> tuple[Size, Size] | None:
    """(number of rows, stride between them) when value [..., K] reads as a matrix of rows; None when it does not."""
    count: Size = 1
    step: Size | None = None
    inner: Size = 1  # stride the next outer dimension must have
    for d in reversed(range(value.dim() - 1)):
        if is_one(value.shape[d]):
            continue
        if step is None:
            step, inner = value.stride(d), value.stride(d) * value.shape[d]
        elif not same_stride(value.stride(d), inner):
            return None
        else:
            inner = inner * value.shape[d]
        count = count * value.shape[d]
    return count, value.shape[-1] if step is None else step


def as_rows(view: View, value: torch.Tensor) -> View:
    """The operand seen as [rows, K]; the value must have passed `rows`."""
    count, step = rows(value)  # type: ignore[misc]
    return View(
        view.buffer, view.dtype, (count, value.shape[-1]), (step, value.stride(-1)), view.offset
    )


def reads_as_rows(node: Any) -> bool:
    if node is None:
        return True
    value = fake(node)
    if value.dim() == 0 or value.dtype not in FLOATS:
        return False
    return (is_one(value.shape[-1]) or same_size(value.stride(-1), 1)) and rows(value) is not None


def as_row_groups(view: View, value: torch.Tensor) -> View:
    """The operand seen as [rows, K] where its rows are evenly spaced, else with its own dimensions in front of K."""
    return view if rows(value) is None else as_rows(view, value)


def reads_as_row_groups(node: fx.Node) -> bool:
    """True for a float value whose rows are dense, wherever each of them lies."""
    value = fake(node)
    if value.dtype not in FLOATS or not 0 < value.dim() <= MAX_DIMS:
        return False
    return is_one(value.shape[-1]) or same_size(value.stride(-1), 1)


def itemsize(node: fx.Node | None) -> int:
    return 0 if node is None else fake(node).element_size()


def num_bytes(*nodes: fx.Node | None) -> Size:
    """Bytes of all values together; None counts nothing."""
    total: Size = 0
    for node in nodes:
        if node is not None:
            total = total + numel(fake(node)) * itemsize(node)
    return total


def broadcast(view: View, value_shape: tuple[Size, ...], shape: tuple[Size, ...]) -> View:
    """The operand stretched to a shape it broadcasts to: missing dimensions and dimensions of one get stride 0."""
    missing = len(shape) - len(value_shape)
    stride: list[Size] = [0] * missing
    for have, want, step in zip(value_shape, shape[missing:], view.stride, strict=True):
        stride.append(0 if is_one(have) and not is_one(want) else step)
    return View(view.buffer, view.dtype, shape, tuple(stride), view.offset)


def batch_broadcast(s: SegmentBuilder, table: fx.Node | None, like: fx.Node) -> View | None:
    """cos or sin [B|1,1,S,R] as [B,1,S,R], with stride 0 where one batch row serves all."""
    if table is None:
        return None
    view, value = s.view(table), fake(table)
    assert view is not None
    batch_stride = 0 if is_one(value.shape[0]) else value.stride(0)
    size = (fake(like).shape[0], 1, value.shape[2], value.shape[3])
    return View(view.buffer, view.dtype, size, (batch_stride, *value.stride()[1:]), view.offset)


def reject_angles(x: fx.Node, cos: fx.Node, sin: fx.Node) -> str:
    """Why cos and sin [B|1,1,S|1,R] cannot rotate x [B,H,S,D]; "" when they can."""
    tables = [fake(t) for t in (cos, sin)]
    if any(t.dtype not in FLOATS or not same_size(t.stride(-1), 1) for t in tables):
        return "rope needs float tensors with a dense last dimension"
    if not all(is_one(t.shape[1]) for t in tables):
        return "cos and sin differ between heads"
    width, head = tables[0].shape[3], fake(x).shape[3]
    if not are_static(width, head) or not same_size(width, tables[1].shape[3]):
        return "cos and sin differ in width, or have none that is fixed"
    if int(width) % 2 or int(width) > int(head):
        return (
            f"cos and sin rotate {width} of {head} dimensions: an even number up to all is possible"
        )
    return ""
