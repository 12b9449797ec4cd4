"""cross_entropy on Triton:  loss[m] = log Σ exp(x[m]) − x[m, target[m]], 0 where target[m] is ignored; one pass over the vocabulary."""

from __future__ import annotations

import triton
import triton.language as tl
from llmopt.kernels.softmax import log_sum, reject, tiles
from llmopt.launch import Launch, RowProblem, RowTile
from llmopt.registry import Kernel, register
from llmopt.types import Target


@triton.jit
def cross_entropy_kernel(x_ptr, target_ptr, loss_ptr, K, stride_x, ignored, BLOCK_K: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row).to(tl.int64)
    counts = target != ignored
    highest, total = log_sum(x_ptr + row * stride_x, K, BLOCK_K)
    known = counts & (target >= 0) & (target < K)
    x = tl.load(x_ptr + row * stride_x + target, mask=known, other=float("nan")).to(tl.float32)
    tl.store(loss_ptr + row, tl.where(counts, highest + tl.log(total) - x, 0.0))


def launch(p: RowProblem, c: RowTile, t: Target, x, target, loss, ignored: int = -100) -> Launch:
    """x [M, V] with dense rows, target [M] int64, loss [M] fp32. A target outside 0..V−1 that is not ignored gives NaN."""
    arguments = {
        "x_ptr": x,
        "target_ptr": target,
        "loss_ptr": loss,
        "K": p.k,
        "stride_x": x.stride(0),
        "ignored": ignored,
    }
    return Launch(
        "cross_entropy.triton", cross_entropy_kernel, (p.rows,), arguments, c.constexprs(), c.num_warps, c.num_stages,
        reads=("x_ptr", "target_ptr"), writes=("loss_ptr",),
    )  # fmt: skip


register(Kernel("cross_entropy.triton", "cross_entropy", 10, reject, tiles, launch))
