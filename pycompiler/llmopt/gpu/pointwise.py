"""ops.pointwise, and copies that nothing else took, on a GPU: one launch of a function generated from the chain."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from llmopt.gpu.segment import Call, GpuSegmentBuilder, Launches, Operand
from llmopt.graph import FLOATS, fake, same_shape
from llmopt.launch import ChainProblem, Launch
from llmopt.native import pointwise as cpu
from llmopt.native import rows as cpu_rows
from llmopt.native.operands import NativeKernel, broadcast, num_bytes
from llmopt.native.segment import StepRecord, describe
from llmopt.program import View
from llmopt.registry import choose


def chain_launches(
    program: tuple, results: tuple[int, ...], reads: Sequence[Operand], writes: Sequence[Operand]
) -> Launches:
    """The step of a chain over operands that all have the shape of its results."""

    def launches(call: Call) -> list[Launch]:
        from llmopt.kernels.operands import dtype_name

        inputs, outputs = ([call.tensor(t) for t in side] for side in (reads, writes))
        shape = outputs[0].shape  # type: ignore[union-attr]
        count, k = shape.numel(), shape[-1] if shape else 1
        if count == 0:
            return []
        dtype = dtype_name(outputs[0].dtype)  # type: ignore[union-attr]
        p = ChainProblem(count // k, k, dtype, len(inputs), program, results)
        kernel, tile = choose("pointwise", p, call.target)
        return [kernel.launch(p, tile, call.target, shape, inputs, outputs)]

    return launches


def _reject(node: fx.Node) -> str:
    program, _, _, *inputs = node.args
    shape = fake(node)[0].shape
    whole = [same_shape(fake(n).shape[-1:], shape[-1:]) for n in inputs]
    for op, *args in program:
        operands = args if op in ("const", "where") else args[1:]
        if op == "reduce" and args[0] == "sum" and not whole[args[1]]:
            return "sums a value that has one column"
        whole.append(op in ("unary", "binary", "where") and any(whole[a] for a in operands))
    return cpu.reject(node)


def _lower(s: GpuSegmentBuilder, node: fx.Node) -> None:
    program, results, _, *inputs = node.args
    outputs = [s.part(node, i) for i in range(len(results))]
    shape = tuple(fake(node)[0].shape)
    reads = [s.operand(broadcast(s.view(n), tuple(fake(n).shape), shape)) for n in inputs]
    writes = [s.operand(s.view(o)) for o in outputs]
    launches = chain_launches(program, results, reads, writes)  # type: ignore[arg-type]
    s.launch(launches, cpu.chain_record(node, outputs, "pointwise.triton"))


def _reject_copy(node: fx.Node) -> str:
    dtype = fake(node).dtype
    return cpu_rows.reject_copy(node) or (
        "" if dtype in FLOATS else f"{dtype} is copied by PyTorch"
    )


def _copy(s: GpuSegmentBuilder, node: fx.Node, x: fx.Node, y: View, detail: str) -> None:
    record = StepRecord(
        "copy", "pointwise.triton", detail, (describe(x),), (describe(node),), 0, 2 * num_bytes(x), node
    )  # fmt: skip
    operands = s.operand(s.view(x)), s.operand(y)
    s.launch(chain_launches((), (0,), operands[:1], operands[1:]), record)  # type: ignore[arg-type]


def _lower_copy(s: GpuSegmentBuilder, node: fx.Node) -> None:
    x = node.args[0]
    _copy(s, node, x, cpu_rows.copied(s.view(node), fake(x)), "")


def _lower_cat(s: GpuSegmentBuilder, node: fx.Node) -> None:
    for piece, y in cpu_rows.cat_pieces(s, node):
        _copy(s, node, piece, y, "cat")


KERNELS = {
    "llmopt.pointwise": NativeKernel("pointwise.triton", _reject, _lower, is_glue=True),
    "cat": NativeKernel("pointwise.triton", cpu_rows.reject_cat, _lower_cat, is_glue=True),
    **{
        name: NativeKernel("pointwise.triton", _reject_copy, _lower_copy, is_glue=True)
        for name in cpu_rows.COPIES
    },
}
