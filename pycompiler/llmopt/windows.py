"""What `as_strided` cuts counts in memory as the traced program laid it out, which kernels and merged linears do not keep.

Each such window takes the traced layout of its tensor along and restores it where another one came. A graph whose windows cannot be
followed so has to run as in PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from llmopt.graph import argument, fake, kind, storage, view_base
from llmopt.sizes import expression
from llmopt.writes import written_by


def pin(gm: fx.GraphModule) -> str:
    """Ties every window to the layout it was traced over, or says why the whole graph has to run as in PyTorch; "" if it need not."""
    windows = [n for n in gm.graph.nodes if kind(n) == "as_strided"]
    windows = [n for n in windows if view_base(n).op not in ("placeholder", "get_attr")]
    if not windows:
        return ""
    if not all(map(_is_inside, windows)):
        return "as_strided reads beside its tensor, or sizes of it change from call to call"
    if _written_later(gm.graph, windows):
        return "memory that as_strided shares is written afterwards"
    for node in windows:
        size, stride, offset = _cut(node)
        layout = tuple(fake(argument(node, 0, "input")).stride())
        node.op, node.target = "call_function", window
        node.args, node.kwargs = (argument(node, 0, "input"), layout, size, stride, offset), {}
        node.meta.pop("llmopt_kind", None)
    gm.recompile()
    return ""


def window(
    x: torch.Tensor, layout: Sequence[int], size: Sequence[int], stride: Sequence[int], offset: int
) -> torch.Tensor:
    """x.as_strided(size, stride) over x laid out by `layout`; offset: counted from the first element of x."""
    if x.stride() != layout:
        x = torch.empty_strided(x.shape, layout, dtype=x.dtype, device=x.device).copy_(x)
    return x.as_strided(size, stride, x.storage_offset() + offset)


def _cut(node: fx.Node) -> tuple[tuple, tuple, int]:
    """Size, stride and the offset from the tensor's own first element."""
    start = argument(node, 3, "storage_offset")
    offset = 0 if start is None else start - fake(argument(node, 0, "input")).storage_offset()
    return tuple(argument(node, 1, "size")), tuple(argument(node, 2, "stride")), offset


def _is_inside(node: fx.Node) -> bool:
    """True when the window reads elements of its tensor only, which has no gaps, and every number of it is known."""
    value = fake(argument(node, 0, "input"))
    given = (argument(node, 1, "size"), argument(node, 2, "stride"))
    if not all(isinstance(v, (tuple, list)) for v in given):
        return False
    numbers = [*given[0], *given[1], argument(node, 3, "storage_offset", 0) or 0]
    traced = [expression(v) for v in (*value.shape, *value.stride(), value.storage_offset())]
    if not all(isinstance(n, int) for n in (*numbers, *traced)):
        return False
    expected = 1
    for step, count in sorted(zip(value.stride(), value.shape, strict=True)):
        if count != 1 and step != expected:
            return False
        expected *= count
    size, stride, offset = _cut(node)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    return 0 in size or 0 <= offset <= last < expected


def _written_later(graph: fx.Graph, windows: Sequence[fx.Node]) -> bool:
    """True when something writes memory that an earlier window shares: a window over a copy would not show it."""
    shared: set[int | None] = set()
    for node in graph.nodes:
        if any(storage(n) in shared for n in written_by(node)):
            return True
        if node in windows:
            shared.add(storage(node))
    return False
