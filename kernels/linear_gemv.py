"""linear_f16 for one or two rows, without tensor cores: each block streams BLOCK_N rows of W once and reduces them in fp32.

Same operands and epilogue as linear.py; the bytes of W are the limit, so nothing is padded to 16 rows.
"""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl
from llmopt.kernels.gemm import epilogue, normalise, row_statistics
from llmopt.kernels.linear import reject as reject_linear
from llmopt.kernels.operands import Around
from llmopt.kernels.tiles import reject_accumulators
from llmopt.launch import GemmTile, Launch, LinearProblem
from llmopt.registry import Kernel, register
from llmopt.types import Target

MOST_ROWS = 2
TILES = (GemmTile(1, 16, 512, 4, 1), GemmTile(1, 8, 512, 4, 1), GemmTile(1, 32, 256, 4, 1))


def reject(p: LinearProblem, t: Target) -> str:
    if p.m > MOST_ROWS:
        return f"{p.m} rows: up to {MOST_ROWS} are possible"
    return reject_linear(p, t)


def tiles(p: LinearProblem, t: Target) -> tuple[GemmTile, ...]:
    given = TILES
    if p.gated and p.dtype == "fp32":  # two weights of four bytes fill twice the registers
        given = tuple(replace(c, block_k=c.block_k // 2) for c in TILES)
    fewest = [c for c in given if triton.cdiv(p.n, c.block_n) * p.m >= t.gpu.sms]
    return (*fewest, *(c for c in given if c not in fewest))


def reject_tile(c: GemmTile, p: LinearProblem, t: Target) -> str:
    if c.block_m != 1 or c.split_k != 1:
        return f"block_m={c.block_m} split_k={c.split_k}: 1 and 1 are possible"
    sizes = (c.block_n, c.block_k)
    if any(size < 1 or size & (size - 1) for size in sizes):
        return f"blocks of {c.block_n}x{c.block_k}: powers of two are possible"
    return reject_accumulators(c.block_n * c.block_k * (2 if p.gated else 1), c.num_warps, t)


@triton.jit
def _dot_rows(w_rows, col_mask, ks, k_mask, x):
    """Σ_k w[n, k] · x[k] of a block [BLOCK_N, BLOCK_K], as [BLOCK_N, BLOCK_K] still to be summed."""
    w = tl.load(w_rows[:, None] + ks[None, :], mask=col_mask[:, None] & k_mask[None, :], other=0.0)
    return w.to(tl.float32) * x


@triton.jit
def linear_gemv_kernel(
    x_ptr, w_ptr, up_ptr, bias_ptr, up_bias_ptr, residual_ptr, norm_weight_ptr, norm_bias_ptr, y_ptr,
    M, N, K, stride_xm, stride_wn, stride_un, stride_rm, stride_ym, alpha, norm_eps, norm_offset,
    NORM: tl.constexpr, ACT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # 1 which columns of which row am I
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) + tl.arange(0, 1)
    row_mask, col_mask = rows < M, cols < N
    # 2 pointers
    x_rows = x_ptr + rows.to(tl.int64) * stride_xm
    w_rows = w_ptr + cols.to(tl.int64) * stride_wn
    if up_ptr is not None:
        u_rows = up_ptr + cols.to(tl.int64) * stride_un
    if NORM != "none":
        mean, rstd = row_statistics(x_rows, row_mask, K, norm_eps, NORM, 1, BLOCK_K)
    # 3 K loop: products stay apart until the end, so that threads add up once
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for k in range(0, K, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        k_mask = ks < K
        x = tl.load(
            x_rows[:, None] + ks[None, :], mask=row_mask[:, None] & k_mask[None, :], other=0.0
        ).to(tl.float32)
        if NORM != "none":
            x = normalise(x, mean, rstd, norm_weight_ptr, norm_bias_ptr, ks, K, norm_offset)
        acc += _dot_rows(w_rows, col_mask, ks, k_mask, x)
        if up_ptr is not None:
            up += _dot_rows(u_rows, col_mask, ks, k_mask, x)
    # 4 epilogue and 5 store
    total = tl.sum(acc, 1)[None, :]
    gate = None
    if up_ptr is not None:
        gate = tl.sum(up, 1)[None, :]
    epilogue(total, gate, bias_ptr, up_bias_ptr, residual_ptr, y_ptr, rows, cols, M, N,
             stride_rm, stride_ym, alpha, ACT)  # fmt: skip


def launch(p: LinearProblem, c: GemmTile, t: Target, x, w, y, around: Around, up=None) -> Launch:
    """As linear.launch."""
    arguments = {
        "x_ptr": x, "w_ptr": w, "up_ptr": up, "y_ptr": y, "M": p.m, "N": p.n, "K": p.k,
        "stride_xm": x.stride(0), "stride_wn": w.stride(0), "stride_un": 0 if up is None else up.stride(0),
        "stride_ym": y.stride(0), **around.arguments(), **around.norm_arguments(),
    }  # fmt: skip
    constants = {"NORM": p.norm, "ACT": p.act, "BLOCK_N": c.block_n, "BLOCK_K": c.block_k}
    return Launch(
        "linear_f16_gemv.triton", linear_gemv_kernel, (triton.cdiv(p.n, c.block_n), p.m), arguments, constants,
        c.num_warps, c.num_stages,
        reads=("x_ptr", "w_ptr", "up_ptr", *around.READS), writes=("y_ptr",),
    )  # fmt: skip


register(
    Kernel(
        "linear_f16_gemv.triton",
        "linear",
        10,
        reject,
        tiles,
        launch,
        linear_gemv_kernel,
        reject_tile,
    )
)
