"""Row and copy kernels: norm.cpu, softmax.cpu, rope.cpu, embedding.cpu, copy.cpu, index_copy.cpu, slide.cpu, arange.cpu."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from llmopt.graph import (
    PLAIN_ARANGE,
    argument,
    fake,
    is_dense,
    is_empty,
    is_one,
    is_tensor,
    kind,
    numel,
    readers,
    same_size,
    storage,
)
from llmopt.native.operands import (
    FLOATS,
    NativeKernel,
    as_row_groups,
    as_rows,
    batch_broadcast,
    broadcast,
    num_bytes,
    reads_as_row_groups,
    reads_as_rows,
    reject_angles,
)
from llmopt.native.segment import SegmentBuilder, StepRecord, describe
from llmopt.ops.norm import KINDS as NORM_KINDS
from llmopt.ops.rope import KINDS as ROPE_KINDS
from llmopt.program import DTYPE_CODES, MAX_DIMS, View
from llmopt.sizes import Size


def reject_norm(node: fx.Node) -> str:
    x, weight, bias = node.args[:3]
    if not reads_as_row_groups(x):
        return "the input's last dimension is not dense"
    if not reads_as_rows(node):
        return "output rows are not known to be evenly spaced in memory"
    vectors = [v for v in (weight, bias) if v is not None]
    if any(fake(v).dtype not in FLOATS or not is_dense(fake(v)) for v in vectors):
        return "weight or bias is not a dense float vector"
    return ""


def _lower_norm(s: SegmentBuilder, node: fx.Node) -> None:
    x, weight, bias, name, eps, offset = node.args[:6]
    x_rows, y_rows = as_row_groups(s.view(x), fake(x)), as_rows(s.view(node), fake(node))
    operands = [x_rows, None, s.view(weight), s.view(bias), y_rows, None]
    record = StepRecord(
        "norm",
        "norm.cpu",
        name,
        (describe(x),),
        (describe(node),),
        4 * numel(fake(x)),
        num_bytes(x, node),
        node,
    )
    s.step("norm", operands, [NORM_KINDS.index(name)], [eps, offset], record)


def _reject_softmax(node: fx.Node) -> str:
    x = argument(node, 0, "input")
    if not is_tensor(x) or not reads_as_row_groups(x) or fake(x).device.type != "cpu":
        return "its rows are not dense floats"
    last = fake(x).dim() - 1
    if len(node.args) > 2 or argument(node, 1, "dim") not in (-1, last):
        return "is not over the last dimension, or has more arguments by position"
    return "" if reads_as_row_groups(node) else "its result's rows are not dense floats"


def _lower_softmax(s: SegmentBuilder, node: fx.Node) -> None:
    x = argument(node, 0, "input")
    record = StepRecord(
        "softmax",
        "softmax.cpu",
        "",
        (describe(x),),
        (describe(node),),
        5 * numel(fake(x)),
        num_bytes(x, node),
        node,
    )
    s.step("softmax", [s.view(x), s.view(node)], [], [], record)


def reject_rope(node: fx.Node) -> str:
    x, cos, sin, _ = node.args
    if fake(x).dtype not in FLOATS or not same_size(fake(x).stride(-1), 1):
        return "rope needs float tensors with a dense last dimension"
    return reject_angles(x, cos, sin)


def _lower_rope(s: SegmentBuilder, node: fx.Node) -> None:
    x, cos, sin, name = node.args
    operands = [s.view(x), batch_broadcast(s, cos, x), batch_broadcast(s, sin, x), s.view(node)]
    record = StepRecord(
        "rope",
        "rope.cpu",
        name,
        (describe(x),),
        (describe(node),),
        3 * numel(fake(x)),
        num_bytes(x, node),
        node,
    )
    s.step("rope", operands, [ROPE_KINDS.index(name)], [], record)


def reject_embedding(node: fx.Node) -> str:
    ids, table = fake(node.args[0]), fake(node.args[1])
    if ids.dtype not in (torch.int64, torch.int32) or ids.dim() > MAX_DIMS:
        return f"ids of {ids.dtype} with {ids.dim()} dimensions: int64 and int32 are possible"
    if table.dim() != 2 or table.dtype not in FLOATS or not same_size(table.stride(-1), 1):
        return "the table is not a matrix of dense float rows"
    return ""


def _lower_embedding(s: SegmentBuilder, node: fx.Node) -> None:
    ids, table = node.args[:2]
    operands = [s.view(ids), s.view(table), as_rows(s.view(node), fake(node))]
    record = StepRecord(
        "embedding",
        "embedding.cpu",
        "",
        (describe(ids), describe(table)),
        (describe(node),),
        0,
        2 * num_bytes(node),
        node,
    )
    s.step("embedding", operands, [], [argument(node, 2, "scale", 1.0)], record)


def reject_rotary_table(node: fx.Node) -> str:
    frequencies = fake(node.args[0])
    if not is_one(frequencies.shape[-1]) and not same_size(frequencies.stride(-1), 1):
        return "frequencies are not dense"
    used = all(any(u.args[1] == i for u in node.users) for i in range(2))
    return "" if used else "cos or sin is not used"


def _lower_rotary_table(s: SegmentBuilder, node: fx.Node) -> None:
    frequencies, positions, scale, _ = node.args
    tables = [s.part(node, i) for i in range(2)]
    *front, width = fake(tables[0]).shape
    operands = [
        broadcast(s.view(n), tuple(fake(n).shape), (*front, width // 2))
        for n in (frequencies, positions)
    ]
    operands += [s.view(t) for t in tables]
    record = StepRecord(
        "rotary_table",
        "rotary_table.cpu",
        "",
        (describe(frequencies), describe(positions)),
        tuple(describe(t) for t in tables),
        20 * numel(fake(tables[0])),  # about that many for each cosine and sine
        num_bytes(*tables),
        node,
    )
    s.step("rotary_table", operands, [], [scale], record)


_DENSE_FORMATS = (None, torch.contiguous_format, torch.preserve_format)
COPIES = frozenset({"contiguous", "clone", "reshape", "flatten"})


def reject_copy(node: fx.Node) -> str:
    x = node.args[0]
    if not is_tensor(x) or fake(x).dtype not in DTYPE_CODES or fake(x).dtype != fake(node).dtype:
        return f"copies to {fake(node).dtype} are left to PyTorch"
    if fake(x).dtype in (
        torch.int64,
        torch.int32,
    ):  # so that ids always come from outside a segment
        return "integers are copied by PyTorch"
    if not is_dense(fake(node)) or node.kwargs.get("memory_format") not in _DENSE_FORMATS:
        return "its layout in memory is PyTorch's to choose"
    if fake(x).dim() > MAX_DIMS:
        return f"{fake(x).dim()} dimensions: up to {MAX_DIMS} are possible"
    return ""


def _lower_copy(s: SegmentBuilder, node: fx.Node) -> None:
    x = node.args[0]
    y = copied(s.view(node), fake(x))
    record = StepRecord(
        "copy", "copy.cpu", "", (describe(x),), (describe(node),), 0, num_bytes(x, node), node
    )
    s.step("copy", [s.view(x), y], [], [], record)


def copied(whole: View, x: torch.Tensor) -> View:
    """A dense result seen in the shape of what it is a copy of."""
    strides: list[Size] = []
    step: Size = 1
    for size in reversed(x.shape):
        strides.insert(0, step)
        step = step * size
    return View(whole.buffer, whole.dtype, tuple(x.shape), tuple(strides), whole.offset)


def reject_cat(node: fx.Node) -> str:
    pieces, dim = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
    if (
        not isinstance(dim, int)
        or not all(is_tensor(p) for p in pieces)
        or fake(node).dim() > MAX_DIMS
    ):
        return f"joins more than tensors of up to {MAX_DIMS} dimensions along one that is known"
    if any(fake(p).dtype != fake(node).dtype or fake(p).dim() != fake(node).dim() for p in pieces):
        return "its pieces differ in dtype or in dimensions"
    return "" if fake(node).dtype in FLOATS else f"{fake(node).dtype} is joined by PyTorch"


def cat_pieces(s: SegmentBuilder, node: fx.Node) -> Iterator[tuple[fx.Node, View]]:
    """Every tensor that is joined, and its place in the result."""
    pieces, dim = argument(node, 0, "tensors"), argument(node, 1, "dim", 0) % fake(node).dim()
    whole = s.view(node)
    start: Size = 0
    for piece in pieces:
        shape = tuple(fake(piece).shape)
        offset = whole.offset + start * whole.stride[dim]
        yield piece, View(whole.buffer, whole.dtype, shape, whole.stride, offset)
        start = start + shape[dim]


def _lower_cat(s: SegmentBuilder, node: fx.Node) -> None:
    for piece, y in cat_pieces(s, node):
        record = StepRecord(
            "copy",
            "copy.cpu",
            "cat",
            (describe(piece),),
            (describe(node),),
            0,
            2 * num_bytes(piece),
            node,
        )
        s.step("copy", [s.view(piece), y], [], [], record)


def _reject_memory(node: fx.Node) -> str:
    value = fake(node)
    if value.dtype not in FLOATS or value.device.type != "cpu" or value.dim() > MAX_DIMS:
        return f"memory for {value.dtype} with {value.dim()} dimensions comes from PyTorch"
    return "" if is_dense(value) else "its layout in memory is PyTorch's to choose"


def _lower_memory(s: SegmentBuilder, node: fx.Node) -> None:
    """A value has its place in memory already, whoever writes it."""


def reject_index_copy(node: fx.Node) -> str:
    if len(node.args) != 4 or node.kwargs:
        return "arguments by name"
    cache, dim, index, new = node.args
    values = [fake(t) for t in (cache, new)]
    if dim not in (2, -2) or any(v.dim() != 4 or v.dtype not in FLOATS for v in values):
        return "floats [B,H,S,D] are written at positions S by a kernel, nothing else"
    if fake(index).dtype != torch.int64 or fake(index).dim() != 1:
        return "positions are not a vector of int64"
    if values[0].dtype != values[1].dtype:
        return f"writes {values[1].dtype} into {values[0].dtype}, which PyTorch refuses"
    return "" if all(same_size(v.stride(-1), 1) for v in values) else "last dimension is not dense"


def _lower_index_copy(s: SegmentBuilder, node: fx.Node) -> None:
    cache, _, index, new = node.args
    record = StepRecord(
        "index_copy",
        "index_copy.cpu",
        "",
        (describe(new),),
        (describe(cache),),
        0,
        2 * num_bytes(new),
        node,
    )
    s.step("index_copy", [s.view(cache), s.view(index), s.view(new)], [], [], record)


def _reject_slide(node: fx.Node) -> str:
    values = [fake(t) for t in node.args]
    if any(v.dtype not in FLOATS for v in values):
        return f"windows of {values[0].dtype} are moved by PyTorch"
    if not all(same_size(v.stride(-1), 1) for v in values):
        return "last dimension is not dense"
    if is_empty(values[0]):
        return "its window is empty"
    return _reject_shared(values[0])


def _reject_shared(y: torch.Tensor) -> str:
    """Why expanded memory cannot be written element by element; "" for any other."""
    dims = zip(y.shape, y.stride(), strict=True)
    spread = all(is_one(size) or not same_size(step, 0) for size, step in dims)
    return "" if spread else "several elements share memory"


def _lower_slide(s: SegmentBuilder, node: fx.Node) -> None:
    cache, new = node.args
    record = StepRecord(
        "slide",
        "slide.cpu",
        "",
        (describe(new),),
        (describe(cache),),
        0,
        2 * num_bytes(cache),
        node,
    )
    s.step("slide", [s.view(cache), s.view(new)], [], [], record)


def _reject_copy_into(node: fx.Node) -> str:
    """copy_: memory of the caller, or of an operation, becomes a copy of a value."""
    if len(node.args) != 2 or not all(is_tensor(n) for n in node.args):
        return "copies a number, or as it is told by more arguments"
    y, x = map(fake, node.args)
    if x.dtype not in FLOATS or y.dtype not in FLOATS or not x.dim() <= y.dim() <= MAX_DIMS:
        return f"copies floats of up to {MAX_DIMS} dimensions into floats, nothing else"
    if storage(node.args[0]) == storage(node.args[1]):
        return "copies within the same memory"
    return _reject_shared(y)


def _lower_copy_into(s: SegmentBuilder, node: fx.Node) -> None:
    y, x = node.args
    source = broadcast(s.view(x), tuple(fake(x).shape), tuple(fake(y).shape))
    record = StepRecord(
        "copy", "copy.cpu", "in place", (describe(x),), (describe(y),), 0, num_bytes(x, y), node
    )
    s.step("copy", [source, s.view(y)], [], [], record)


def arange_bounds(node: fx.Node) -> tuple[Size, Size] | None:
    """Start and step of a torch.arange that counts in int64 on the CPU, else None."""
    value = fake(node)
    if value.dtype != torch.int64 or value.device.type != "cpu":
        return None
    if node.kwargs.keys() - PLAIN_ARANGE:
        return None
    given = [fake(a) if isinstance(a, fx.Node) else a for a in node.args]
    if not all(isinstance(a, (int, torch.SymInt)) for a in given):
        return None
    start = given[0] if len(given) > 1 else 0
    return start, given[2] if len(given) > 2 else 1


def _reject_arange(node: fx.Node) -> str:
    if arange_bounds(node) is None:
        return "counts by numbers that are no integers, or not on the CPU"
    if any(kind(u) in ("llmopt.embedding", "index_copy_") for u in readers(node)):
        return "indices are checked before a segment runs"
    return ""


def _lower_arange(s: SegmentBuilder, node: fx.Node) -> None:
    bounds = arange_bounds(node)
    assert bounds is not None
    record = StepRecord("arange", "arange.cpu", "", (), (describe(node),), 0, num_bytes(node), node)
    s.step("arange", [s.view(node)], list(bounds), [], record)


KERNELS = {
    "arange": NativeKernel("arange.cpu", _reject_arange, _lower_arange, is_glue=True),
    "llmopt.norm": NativeKernel("norm.cpu", reject_norm, _lower_norm),
    "llmopt.embedding": NativeKernel(
        "embedding.cpu", reject_embedding, _lower_embedding, is_glue=True
    ),
    "softmax": NativeKernel("softmax.cpu", _reject_softmax, _lower_softmax, is_glue=True),
    "llmopt.rope": NativeKernel("rope.cpu", reject_rope, _lower_rope),
    "llmopt.rotary_table": NativeKernel(
        "rotary_table.cpu", reject_rotary_table, _lower_rotary_table
    ),
    "index_copy_": NativeKernel(
        "index_copy.cpu", reject_index_copy, _lower_index_copy, is_glue=True
    ),
    "llmopt.slide_": NativeKernel("slide.cpu", _reject_slide, _lower_slide, is_glue=True),
    "copy_": NativeKernel("copy.cpu", _reject_copy_into, _lower_copy_into, is_glue=True),
    "new_empty": NativeKernel("memory", _reject_memory, _lower_memory, is_glue=True),
    "cat": NativeKernel("copy.cpu", reject_cat, _lower_cat, is_glue=True),
    **{name: NativeKernel("copy.cpu", reject_copy, _lower_copy, is_glue=True) for name in COPIES},
}
