"""softmax on Triton:  y = exp(x − max) / Σ exp(x − max) of rows of any length, in fp32: one pass for max and sum, one to write."""

from __future__ import annotations

import triton
import triton.language as tl
from llmopt.launch import Launch, RowProblem, RowTile
from llmopt.registry import Kernel, register
from llmopt.types import Target


def reject(p: RowProblem, t: Target) -> str:
    return ""


def tiles(p: RowProblem, t: Target) -> tuple[RowTile, ...]:
    block = min(triton.next_power_of_2(p.k), 2048)
    return (RowTile(block, 8 if block > 1024 else 4),)


@triton.jit
def log_sum(x_row, K, BLOCK_K: tl.constexpr):
    """(max, Σ exp(x − max)) of a row, each element read once."""
    best = tl.full((BLOCK_K,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_K,), tl.float32)
    for k in range(0, K, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        x = tl.load(x_row + ks, mask=ks < K, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(best, x)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(best - base) + tl.exp(x - base)
        best = higher
    highest = tl.max(best, 0)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    return highest, tl.sum(total * tl.exp(best - base), 0)


@triton.jit
def softmax_kernel(x_ptr, y_ptr, K, stride_x, stride_y, BLOCK_K: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    highest, total = log_sum(x_ptr + row * stride_x, K, BLOCK_K)
    for k in range(0, K, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + row * stride_x + ks, mask=ks < K, other=float("-inf")).to(tl.float32)
        y = tl.exp(x - highest) / total
        tl.store(y_ptr + row * stride_y + ks, y.to(y_ptr.dtype.element_ty), mask=ks < K)


def launch(p: RowProblem, c: RowTile, t: Target, x, y) -> Launch:
    """x, y [M, K], rows dense. A row of nothing but -inf gives NaN, as in PyTorch."""
    arguments = {"x_ptr": x, "y_ptr": y, "K": p.k, "stride_x": x.stride(0), "stride_y": y.stride(0)}
    return Launch(
        "softmax.triton", softmax_kernel, (p.rows,), arguments, c.constexprs(), c.num_warps, c.num_stages,
        reads=("x_ptr",), writes=("y_ptr",),
    )  # fmt: skip


register(Kernel("softmax.triton", "softmax", 10, reject, tiles, launch))
