"""ops.norm, ops.rope, ops.rotary_table, ops.embedding and index_copy_ on a GPU: one launch each."""

from __future__ import annotations

import math

from torch import fx

from llmopt.gpu.segment import Call, GpuSegmentBuilder
from llmopt.graph import argument, fake, is_dense, numel
from llmopt.launch import Launch, RowProblem
from llmopt.native import rows as cpu
from llmopt.native.operands import (
    NativeKernel,
    as_rows,
    batch_broadcast,
    broadcast,
    num_bytes,
    rows,
)
from llmopt.native.segment import StepRecord, describe
from llmopt.program import View
from llmopt.registry import choose
from llmopt.sizes import Size


def _record(
    node: fx.Node, op: str, detail: str, inputs: tuple[fx.Node, ...], flops: Size, size: Size
) -> StepRecord:
    return StepRecord(
        op,
        f"{op}.triton",
        detail,
        tuple(map(describe, inputs)),
        (describe(node),),
        flops,
        size,
        node,
    )


def _reject_norm(node: fx.Node) -> str:
    x = fake(node.args[0])
    reason = cpu.reject_norm(node)
    if not reason and x.dim() > 2 and rows(x) is None and rows(x.select(-2, 0)) is None:
        return "input rows are not evenly spaced in two steps"
    return reason


def _lower_norm(s: GpuSegmentBuilder, node: fx.Node) -> None:
    from llmopt.kernels.operands import dtype_name

    x, weight, bias, name, eps, offset = node.args[:6]
    value = fake(x)
    view = s.view(x)
    if rows(value) is not None:
        flat = as_rows(view, value)
        size, stride = (flat.size[0], 1, flat.size[1]), (flat.stride[0], 0, flat.stride[1])
    else:
        count, step = rows(value.select(-2, 0))  # type: ignore[misc]
        size = (count, value.shape[-2], value.shape[-1])
        stride = (step, value.stride(-2), value.stride(-1))
    grouped = View(view.buffer, view.dtype, size, stride, view.offset)
    operands = [
        s.operand(t)
        for t in (grouped, s.view(weight), s.view(bias), as_rows(s.view(node), fake(node)))
    ]

    def launches(call: Call) -> list[Launch]:
        x_, weight_, bias_, y = map(call.tensor, operands)
        assert x_ is not None
        assert y is not None
        if y.numel() == 0:
            return []
        p = RowProblem(y.shape[0], y.shape[1], dtype_name(x_.dtype))
        kernel, tile = choose("norm", p, call.target)
        return [kernel.launch(p, tile, call.target, x_, weight_, bias_, y, name, eps, offset)]

    s.launch(launches, _record(node, "norm", name, (x,), 4 * numel(value), num_bytes(x, node)))


def _lower_rope(s: GpuSegmentBuilder, node: fx.Node) -> None:
    from llmopt.kernels.operands import dtype_name

    x, cos, sin, name = node.args
    views = (s.view(x), s.view(node), batch_broadcast(s, cos, x), batch_broadcast(s, sin, x))
    operands = [s.operand(v) for v in views]

    def launches(call: Call) -> list[Launch]:
        x_, y, cos_, sin_ = map(call.tensor, operands)
        assert x_ is not None
        if x_.numel() == 0:
            return []
        p = RowProblem(x_.shape[0] * x_.shape[2], x_.shape[3], dtype_name(x_.dtype))
        kernel, tile = choose("rope", p, call.target)
        return [kernel.launch(p, tile, call.target, x_, y, cos_, sin_, name)]

    s.launch(launches, _record(node, "rope", name, (x,), 3 * numel(fake(x)), num_bytes(x, node)))


def _matrix(view: View) -> View:
    """ids of one or two dimensions, or dense ones, as a matrix."""
    size, stride = view.size, view.stride
    if len(size) > 2:
        size, stride = (math.prod(size),), (1,)
    missing = 2 - len(size)
    size, stride = (1,) * missing + size, (0,) * missing + stride
    return View(view.buffer, view.dtype, size, stride, view.offset)


def _reject_embedding(node: fx.Node) -> str:
    ids = fake(node.args[0])
    if ids.dim() > 2 and not is_dense(ids):
        return "ids are not dense"
    return cpu.reject_embedding(node)


def _lower_embedding(s: GpuSegmentBuilder, node: fx.Node) -> None:
    from llmopt.kernels.operands import dtype_name

    ids, table = node.args[:2]
    scale = argument(node, 2, "scale", 1.0)
    operands = [
        s.operand(v)
        for v in (_matrix(s.view(ids)), s.view(table), as_rows(s.view(node), fake(node)))
    ]

    def launches(call: Call) -> list[Launch]:
        ids_, table_, y = map(call.tensor, operands)
        assert y is not None
        if y.numel() == 0:
            return []
        p = RowProblem(y.shape[0], y.shape[1], dtype_name(y.dtype))
        kernel, tile = choose("embedding", p, call.target)
        return [kernel.launch(p, tile, call.target, ids_, table_, y, scale)]

    s.launch(launches, _record(node, "embedding", "", (ids, table), 0, 2 * num_bytes(node)))


def _lower_rotary_table(s: GpuSegmentBuilder, node: fx.Node) -> None:
    frequencies, positions, scale, _ = node.args
    tables = [s.part(node, i) for i in range(2)]
    *front, width = fake(tables[0]).shape
    inputs = [
        broadcast(s.view(n), tuple(fake(n).shape), (*front, width // 2))
        for n in (frequencies, positions)
    ]
    operands = [s.operand(v) for v in (*inputs, *map(s.view, tables))]
    record = StepRecord(
        "rotary_table", "rotary_table.triton", "", (describe(frequencies), describe(positions)),
        tuple(map(describe, tables)), 20 * numel(fake(tables[0])), num_bytes(*tables), node,
    )  # fmt: skip

    def launches(call: Call) -> list[Launch]:
        from llmopt.kernels.operands import dtype_name

        frequencies_, positions_, cos, sin = map(call.tensor, operands)
        assert cos is not None
        if cos.numel() == 0:
            return []
        p = RowProblem(cos.numel() // cos.shape[-1], cos.shape[-1], dtype_name(cos.dtype))
        kernel, tile = choose("rotary_table", p, call.target)
        return [kernel.launch(p, tile, call.target, frequencies_, positions_, cos, sin, scale)]

    s.launch(launches, record)


def _lower_index_copy(s: GpuSegmentBuilder, node: fx.Node) -> None:
    from llmopt.kernels.operands import dtype_name

    cache, _, index, new = node.args
    operands = [s.operand(s.view(n)) for n in (cache, index, new)]
    record = StepRecord(
        "index_copy", "index_copy.triton", "", (describe(new),), (describe(cache),), 0, 2 * num_bytes(new), node
    )  # fmt: skip

    def launches(call: Call) -> list[Launch]:
        cache_, index_, new_ = map(call.tensor, operands)
        assert cache_ is not None
        assert new_ is not None
        if new_.numel() == 0:
            return []
        p = RowProblem(new_.numel() // new_.shape[3], new_.shape[3], dtype_name(new_.dtype))
        kernel, tile = choose("index_copy", p, call.target)
        return [kernel.launch(p, tile, call.target, cache_, index_, new_)]

    s.launch(launches, record)


KERNELS = {
    "llmopt.norm": NativeKernel("norm.triton", _reject_norm, _lower_norm),
    "llmopt.rope": NativeKernel("rope.triton", cpu.reject_rope, _lower_rope),
    "llmopt.embedding": NativeKernel(
        "embedding.triton", _reject_embedding, _lower_embedding, is_glue=True
    ),
    "llmopt.rotary_table": NativeKernel(
        "rotary_table.triton", cpu.reject_rotary_table, _lower_rotary_table
    ),
    "index_copy_": NativeKernel(
        "index_copy.triton", cpu.reject_index_copy, _lower_index_copy, is_glue=True
    ),
}
