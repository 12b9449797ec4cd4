"""linear_f16 for one or two rows, without tensor cores: each block streams BLOCK_N rows of W once and reduces them in fp32.

Same operands and epilogue as linear.py; the bytes of W are the limit, so nothing is padded to 16 rows.
"""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl
from llmopt.kernels.gemm import epilogue, normalise, row_statistics, times_weight
from llmopt.kernels.linear import reject as reject_linear
from llmopt.kernels.operands import Around
from llmopt.kernels.tiles import reject_accumulators
from llmopt.launch import GemmTile, Launch, LinearProblem
from llmopt.registry import Kernel, register
from llmopt.types import Target

MOST_ROWS = 2
AT_ONCE: tl.constexpr = tl.constexpr(8)  # elements a thread loads with one instruction
# Best first, as measured on an H100; of two weights each block takes one row.
TILES = (GemmTile(1, 2, 2048, 8, 1), GemmTile(1, 2, 1024, 4, 1), GemmTile(1, 4, 2048, 4, 1))
GATED_TILES = (GemmTile(1, 1, 2048, 8, 1), GemmTile(1, 2, 2048, 4, 1), GemmTile(1, 1, 1024, 4, 1))


def reject(p: LinearProblem, t: Target) -> str:
    if p.m > MOST_ROWS:
        return f"{p.m} rows: up to {MOST_ROWS} are possible"
    return reject_linear(p, t)


def tiles(p: LinearProblem, t: Target) -> tuple[GemmTile, ...]:
    return tuple(dict.fromkeys(fit_row(c, p.k) for c in (GATED_TILES if p.gated else TILES)))


def fit_row(tile: GemmTile, k: int, least: int = 256) -> GemmTile:
    """No longer than a row needs, and as many warps fewer: a block of 2048 over 768 inputs would be idle for the most part."""
    while tile.block_k // 2 >= max(k, least):
        tile = replace(tile, block_k=tile.block_k // 2, num_warps=max(tile.num_warps // 2, 1))
    return tile


def reject_tile(c: GemmTile, p: LinearProblem, t: Target) -> str:
    if c.block_m != 1 or c.split_k != 1:
        return f"block_m={c.block_m} split_k={c.split_k}: 1 and 1 are possible"
    sizes = (c.block_n, c.block_k)
    if any(size < 1 or size & (size - 1) for size in sizes):
        return f"blocks of {c.block_n}x{c.block_k}: powers of two are possible"
    return reject_accumulators(c.block_n * c.block_k * (2 if p.gated else 1), c.num_warps, t)


@triton.jit
def _products(
    w_rows, col_mask, ks, x, K, EVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Σ w[n, k] · x[k] of what a thread loads at once, [BLOCK_N, BLOCK_K / AT_ONCE], still to be summed."""
    inside = col_mask[:, None] if EVEN else col_mask[:, None] & (ks < K)[None, :]
    w = tl.load(w_rows[:, None] + ks[None, :], mask=inside, other=0.0)
    products = w.to(tl.float32) * x[None, :]
    return tl.sum(tl.reshape(products, (BLOCK_N, BLOCK_K // AT_ONCE, AT_ONCE)), 2)


@triton.jit
def linear_gemv_kernel(
    x_ptr, w_ptr, up_ptr, bias_ptr, up_bias_ptr, residual_ptr, norm_weight_ptr, norm_bias_ptr, y_ptr,
    M, N, K, stride_xm, stride_wn, stride_un, stride_rm, stride_ym, alpha, norm_eps, norm_offset,
    NORM: tl.constexpr, ACT: tl.constexpr, EVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # 1 which columns of which row am I
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) + tl.arange(0, 1)
    col_mask = cols < N
    # 2 pointers
    x_row = x_ptr + tl.program_id(1).to(tl.int64) * stride_xm
    w_rows = w_ptr + cols.to(tl.int64) * stride_wn
    if up_ptr is not None:
        u_rows = up_ptr + cols.to(tl.int64) * stride_un
    ONCE: tl.constexpr = NORM == "rms" and norm_bias_ptr is None
    if NORM != "none" and not ONCE:
        mean, rstd = row_statistics(
            x_row + tl.arange(0, 1), rows < M, K, norm_eps, NORM, 1, BLOCK_K
        )
    # 3 K loop: sums stay apart until the end, so that threads add up once. The deviation of an RMSNorm multiplies them:
    # it is known when all of the row was read
    acc = tl.zeros((BLOCK_N, BLOCK_K // AT_ONCE), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_K // AT_ONCE), tl.float32)
    squares = tl.zeros((BLOCK_K // AT_ONCE,), tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        ks = k + tl.arange(0, BLOCK_K)
        x = tl.load(x_row + ks, mask=ks < K, other=0.0).to(tl.float32)
        if ONCE:
            squares += tl.sum(tl.reshape(x * x, (BLOCK_K // AT_ONCE, AT_ONCE)), 1)
            x = times_weight(x, norm_weight_ptr, ks, K, norm_offset)
        elif NORM != "none":
            h = normalise(
                x[None, :], mean, rstd, norm_weight_ptr, norm_bias_ptr, ks, K, norm_offset
            )
            x = tl.reshape(h, (BLOCK_K,))
        acc += _products(w_rows, col_mask, ks, x, K, EVEN, BLOCK_N, BLOCK_K)
        if up_ptr is not None:
            up += _products(u_rows, col_mask, ks, x, K, EVEN, BLOCK_N, BLOCK_K)
    # 4 epilogue and 5 store
    total = tl.sum(acc, 1)[None, :]
    gate = None
    if up_ptr is not None:
        gate = tl.sum(up, 1)[None, :]
    if ONCE:
        rstd = 1.0 / tl.sqrt(tl.sum(squares, 0) / K + norm_eps)
        total *= rstd
        if up_ptr is not None:
            gate *= rstd
    epilogue(total, gate, bias_ptr, up_bias_ptr, residual_ptr, y_ptr, rows, cols, M, N,
             stride_rm, stride_ym, alpha, ACT)  # fmt: skip


def launch(p: LinearProblem, c: GemmTile, t: Target, x, w, y, around: Around, up=None) -> Launch:
    """As linear.launch."""
    arguments = {
        "x_ptr": x, "w_ptr": w, "up_ptr": up, "y_ptr": y, "M": p.m, "N": p.n, "K": p.k,
        "stride_xm": x.stride(0), "stride_wn": w.stride(0), "stride_un": 0 if up is None else up.stride(0),
        "stride_ym": y.stride(0), **around.arguments(), **around.norm_arguments(),
    }  # fmt: skip
    constants = {
        "NORM": p.norm,
        "ACT": p.act,
        "EVEN": p.k % c.block_k == 0,
        "BLOCK_N": c.block_n,
        "BLOCK_K": c.block_k,
        "STAGES": c.num_stages,
    }
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
