"""matmul.cpu: ops.matmul."""

from __future__ import annotations

from torch import fx

from llmopt.graph import argument, fake, is_dense, is_one, numel, same_size
from llmopt.native.operands import NativeKernel, as_rows, broadcast, num_bytes, reads_as_rows
from llmopt.native.segment import SegmentBuilder, StepRecord, describe
from llmopt.program import MAX_DIMS, View


def _reject(node: fx.Node) -> str:
    x, bias = fake(node.args[0]), argument(node, 2, "bias")
    if fake(node).dim() > MAX_DIMS:
        return f"results have {fake(node).dim()} dimensions: up to {MAX_DIMS} are possible"
    if not is_one(x.shape[-1]) and not same_size(x.stride(-1), 1):
        return "rows of the first factor are not dense"
    if bias is not None and not is_dense(fake(bias)):
        return "the bias is not dense"
    return ""


def _lower(s: SegmentBuilder, node: fx.Node) -> None:
    x, y, bias = node.args[0], node.args[1], argument(node, 2, "bias")
    record = StepRecord(
        "matmul",
        "matmul.cpu",
        "" if bias is None else "bias",
        (describe(x), describe(y)),
        (describe(node),),
        2 * numel(fake(node)) * fake(x).shape[-1],
        num_bytes(x, y, bias, node),
        node,
    )
    first, second, result = s.view(x), _transposed(s.view(y)), s.view(node)
    if fake(y).dim() == 2 and reads_as_rows(x) and reads_as_rows(node):  # one matrix for all rows
        first, result = as_rows(first, fake(x)), as_rows(result, fake(node))
    else:
        batch = result.size[:-2]
        first, second = (broadcast(v, v.size, (*batch, *v.size[-2:])) for v in (first, second))
    s.step("matmul", [first, second, s.view(bias), result], [], [], record)


def _transposed(view: View) -> View:
    (*size, k, n), (*stride, along_k, along_n) = view.size, view.stride
    return View(view.buffer, view.dtype, (*size, n, k), (*stride, along_n, along_k), view.offset)


KERNELS = {"llmopt.matmul": NativeKernel("matmul.cpu", _reject, _lower)}
