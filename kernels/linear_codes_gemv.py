"""Linears whose weights are codes, for one or two rows, without tensor cores: each block streams BLOCK_N rows of codes once.

Same operands and, in fp32, results as linear_weight_only.py and linear_w8a8.py: per group scale · (Σ x·code − zero · Σ x) + offset · Σ x,
times the scale of x where x is codes as well. What a thread loads at once it adds up before anything is shared.
"""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl
from llmopt.kernels.gemm import epilogue, normalise, row_statistics, times_weight
from llmopt.kernels.linear_gemv import fit_row
from llmopt.kernels.linear_w8a8 import BITS as ROUNDED_BITS
from llmopt.kernels.linear_w8a8 import reject as reject_rounded
from llmopt.kernels.linear_weight_only import BITS
from llmopt.kernels.linear_weight_only import reject as reject_weight_only
from llmopt.kernels.operands import Around
from llmopt.launch import GemmTile, Launch, LinearProblem
from llmopt.registry import Kernel, register
from llmopt.types import Target

MOST_ROWS = 2
# By bits and whether there are two weights, best first, as measured on an H100; then those over rounded rows.
TILES = {
    (4, False): (
        GemmTile(1, 2, 2048, 2, 2),
        GemmTile(1, 4, 2048, 8, 1),
        GemmTile(1, 4, 1024, 4, 1),
    ),
    (4, True): (GemmTile(1, 2, 2048, 4, 1), GemmTile(1, 1, 1024, 1, 1), GemmTile(1, 4, 1024, 4, 1)),
    (8, False): (GemmTile(1, 1, 1024, 1, 1), GemmTile(1, 2, 2048, 2, 2), GemmTile(1, 2, 512, 2, 3)),
    (8, True): (GemmTile(1, 1, 1024, 4, 1), GemmTile(1, 2, 2048, 8, 1), GemmTile(1, 1, 1024, 1, 1)),
}
ROUNDED_TILES = (GemmTile(1, 4, 1024, 4, 1), GemmTile(1, 2, 1024, 4, 1), GemmTile(1, 8, 1024, 8, 1))
WHOLE = 64  # inputs that are added up at once where one scale serves all K
_PRODUCTS = 256  # of a thread in one K step: what lives in registers at once is some of them


def reject(p: LinearProblem, t: Target) -> str:
    return _reject_rows(p) or reject_weight_only(p, t)


def reject_w8a8(p: LinearProblem, t: Target) -> str:
    return _reject_rows(p) or reject_rounded(p, t)


def _reject_rows(p: LinearProblem) -> str:
    return f"{p.m} rows: up to {MOST_ROWS} are possible" if p.m > MOST_ROWS else ""


def tiles(p: LinearProblem, t: Target) -> tuple[GemmTile, ...]:
    own = ROUNDED_TILES if p.scheme in ROUNDED_BITS else TILES[BITS[p.scheme], p.gated]
    if t.device == "hip":  # whose warps are twice as wide
        own = tuple(replace(c, num_stages=1, num_warps=max(c.num_warps // 2, 1)) for c in own)
    return tuple(dict.fromkeys(fit_row(c, p.k) for c in own))


def reject_tile(c: GemmTile, p: LinearProblem, t: Target) -> str:
    if c.block_m != 1 or c.split_k != 1:
        return f"block_m={c.block_m} split_k={c.split_k}: 1 and 1 are possible"
    if any(size < 1 or size & (size - 1) for size in (c.block_n, c.block_k)):
        return f"blocks of {c.block_n}x{c.block_k}: powers of two are possible"
    if c.block_k < (p.group or WHOLE):
        return f"block_k={c.block_k}: {p.group or WHOLE} and more are possible"
    products = c.block_n * c.block_k * (2 if p.gated else 1) // (c.num_warps * t.gpu.warp_size)
    return (
        ""
        if products <= _PRODUCTS
        else f"{products} products a thread: up to {_PRODUCTS} are possible"
    )


@triton.jit
def _products(
    w_rows, col_mask, k, K, x, BITS: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Σ x · code of each group of one K step, [BLOCK_N, BLOCK_K / GROUP]."""
    if BITS == 4:
        halves = k // 2 + tl.arange(0, BLOCK_K // 2)
        inside = col_mask[:, None] if EVEN else col_mask[:, None] & (halves < K // 2)[None, :]
        both = tl.load(w_rows[:, None] + halves[None, :], mask=inside, other=0)
        codes = tl.interleave((both & 15).to(tl.float32), (both >> 4).to(tl.float32))
    else:
        ks = k + tl.arange(0, BLOCK_K)
        inside = col_mask[:, None] if EVEN else col_mask[:, None] & (ks < K)[None, :]
        codes = tl.load(w_rows[:, None] + ks[None, :], mask=inside, other=0).to(tl.float32)
    return tl.sum(tl.reshape(codes * x[None, :], (BLOCK_N, BLOCK_K // GROUP, GROUP)), 2)


@triton.jit
def _sums_of(x, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    return tl.sum(tl.reshape(x, (GROUPS, GROUP)), 1)


@triton.jit
def _scaled(
    sums, x_sums, scale_ptr, offset_ptr, cols, col_mask, first, groups, ZERO: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """scale · (sums − zero · Σ x) + offset · Σ x of GROUPS groups from the first on; sums [BLOCK_N, GROUPS], Σ x [1, GROUPS]."""
    g = first + tl.arange(0, GROUPS)
    inside = col_mask[:, None] & (g < groups)[None, :]
    at = cols[:, None] * groups + g[None, :]
    if ZERO != 0:
        sums -= ZERO * x_sums
    sums *= tl.load(scale_ptr + at, mask=inside, other=0.0)
    if offset_ptr is not None:
        sums += tl.load(offset_ptr + at, mask=inside, other=0.0) * x_sums
    return sums


@triton.jit
def _x_scales(x_scale_ptr, first, groups, GROUPED: tl.constexpr, GROUPS: tl.constexpr):
    """Of this block's row, one for each group of a K step; ones where one scale serves all K, or none is there."""
    scales = tl.full((GROUPS,), 1.0, tl.float32)
    if GROUPED and x_scale_ptr is not None:
        g = first + tl.arange(0, GROUPS)
        scales = tl.load(x_scale_ptr + tl.program_id(1) * groups + g, mask=g < groups, other=0.0)
    return scales


@triton.jit
def _step(
    w_rows, scale_ptr, offset_ptr, x, x_sums, x_scales, cols, col_mask, k, K, groups, BITS: tl.constexpr, ZERO: tl.constexpr,
    GROUP: tl.constexpr, GROUPED: tl.constexpr, EVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Σ x · w of each group of one K step, [BLOCK_N, BLOCK_K / GROUP]; of codes where one scale serves all K."""
    sums = _products(w_rows, col_mask, k, K, x, BITS, GROUP, EVEN, BLOCK_N, BLOCK_K)
    if GROUPED:
        sums = _scaled(sums * x_scales[None, :], x_sums[None, :], scale_ptr, offset_ptr, cols, col_mask, k // GROUP, groups,
                       ZERO, BLOCK_K // GROUP)  # fmt: skip
    return sums


@triton.jit
def _total(
    acc, x_all, scale_ptr, offset_ptr, cols, col_mask, ZERO: tl.constexpr, GROUPED: tl.constexpr
):
    """Over all of K, [1, BLOCK_N]; where one scale serves all K it comes here."""
    sums = tl.sum(acc, 1)
    if not GROUPED:
        whole = tl.sum(x_all, 0)
        sums = _scaled(sums[:, None], whole, scale_ptr, offset_ptr, cols, col_mask, 0, 1, ZERO, 1)
        sums = tl.sum(sums, 1)
    return sums[None, :]


@triton.jit
def linear_codes_gemv_kernel(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, w_offset_ptr, up_ptr, up_scale_ptr, up_offset_ptr, bias_ptr, up_bias_ptr, residual_ptr,
    norm_weight_ptr, norm_bias_ptr, y_ptr,
    M, N, K, groups, stride_xm, stride_wn, stride_un, stride_rm, stride_ym, alpha, norm_eps, norm_offset,
    NORM: tl.constexpr, ACT: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr, GROUPED: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    GROUPS: tl.constexpr = BLOCK_K // GROUP
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
    # 3 K loop. The deviation of an RMSNorm multiplies sums: it is known when all of the row was read
    acc = tl.zeros((BLOCK_N, GROUPS), tl.float32)
    up = tl.zeros((BLOCK_N, GROUPS), tl.float32)
    x_all = tl.zeros((GROUPS,), tl.float32)
    squares = tl.zeros((GROUPS,), tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        ks = k + tl.arange(0, BLOCK_K)
        x = tl.load(x_row + ks, mask=ks < K, other=0.0).to(tl.float32)
        if ONCE:
            squares += _sums_of(x * x, GROUPS, GROUP)
            x = times_weight(x, norm_weight_ptr, ks, K, norm_offset)
        elif NORM != "none":
            h = normalise(x[None, :], mean, rstd, norm_weight_ptr, norm_bias_ptr, ks, K, norm_offset)  # fmt: skip
            x = tl.where(ks < K, tl.reshape(h, (BLOCK_K,)), 0.0)
        x_scales = _x_scales(x_scale_ptr, k // GROUP, groups, GROUPED, GROUPS)
        x_sums = _sums_of(x, GROUPS, GROUP) * x_scales
        x_all += x_sums
        acc += _step(w_rows, w_scale_ptr, w_offset_ptr, x, x_sums, x_scales, cols, col_mask, k, K, groups,
                     BITS, ZERO, GROUP, GROUPED, EVEN, BLOCK_N, BLOCK_K)  # fmt: skip
        if up_ptr is not None:
            up += _step(u_rows, up_scale_ptr, up_offset_ptr, x, x_sums, x_scales, cols, col_mask, k, K, groups,
                        BITS, ZERO, GROUP, GROUPED, EVEN, BLOCK_N, BLOCK_K)  # fmt: skip
    # 4 epilogue and 5 store
    total = _total(acc, x_all, w_scale_ptr, w_offset_ptr, cols, col_mask, ZERO, GROUPED)
    gate = None
    if up_ptr is not None:
        gate = _total(up, x_all, up_scale_ptr, up_offset_ptr, cols, col_mask, ZERO, GROUPED)
    factor = 1.0
    if ONCE:
        factor = 1.0 / tl.sqrt(tl.sum(squares, 0) / K + norm_eps)
    if x_scale_ptr is not None and not GROUPED:
        factor = tl.load(x_scale_ptr + tl.program_id(1))
    total *= factor
    if up_ptr is not None:
        gate *= factor
    epilogue(total, gate, bias_ptr, up_bias_ptr, residual_ptr, y_ptr, rows, cols, M, N,
             stride_rm, stride_ym, alpha, ACT)  # fmt: skip


def launch(
    p: LinearProblem, c: GemmTile, t: Target, x, w, w_scale, w_offset, y, around: Around,
    up=None, up_scale=None, up_offset=None,
) -> Launch:  # fmt: skip
    """As linear_weight_only.launch."""
    return _launch(p, c, x, None, (w, w_scale, w_offset), (up, up_scale, up_offset), y, around)


def launch_w8a8(
    p: LinearProblem, c: GemmTile, t: Target, x, x_scale, w, w_scale, y, around: Around, up=None, up_scale=None,
    w_offset=None, up_offset=None,
) -> Launch:  # fmt: skip
    """As linear_w8a8.launch; x_scale is dense."""
    return _launch(p, c, x, x_scale, (w, w_scale, w_offset), (up, up_scale, up_offset), y, around)


def _launch(p: LinearProblem, c: GemmTile, x, x_scale, weight, up, y, around: Around) -> Launch:
    bits = (BITS | ROUNDED_BITS)[p.scheme]
    arguments = {
        "x_ptr": x, "x_scale_ptr": x_scale, "y_ptr": y, "M": p.m, "N": p.n, "K": p.k,
        "groups": p.k // p.group if p.group else 1, "stride_xm": x.stride(0), "stride_wn": weight[0].stride(0),
        "stride_un": 0 if up[0] is None else up[0].stride(0), "stride_ym": y.stride(0), **around.arguments(), **around.norm_arguments(),
        **dict(zip(("w_ptr", "w_scale_ptr", "w_offset_ptr"), weight, strict=True)),
        **dict(zip(("up_ptr", "up_scale_ptr", "up_offset_ptr"), up, strict=True)),
    }  # fmt: skip
    constants = {
        "NORM": p.norm, "ACT": p.act, "BITS": bits, "ZERO": 8 if bits == 4 and weight[2] is None else 0,
        "GROUP": p.group or WHOLE, "GROUPED": p.group != 0, "EVEN": p.k % c.block_k == 0,
        "BLOCK_N": c.block_n, "BLOCK_K": c.block_k, "STAGES": c.num_stages,
    }  # fmt: skip
    return Launch(
        f"linear_{p.scheme}_gemv.triton", linear_codes_gemv_kernel, (triton.cdiv(p.n, c.block_n), p.m), arguments, constants,
        c.num_warps, c.num_stages,
        reads=("x_ptr", "x_scale_ptr", "w_ptr", "w_scale_ptr", "w_offset_ptr", "up_ptr", "up_scale_ptr", "up_offset_ptr", *around.READS),
        writes=("y_ptr",),
    )  # fmt: skip


for _name, _rank, _reject, _launcher in (
    ("linear_weight_only_gemv.triton", 10, reject, launch),
    ("linear_w8a8_gemv.triton", 7, reject_w8a8, launch_w8a8),
):
    register(
        Kernel(
            _name,
            "linear_quantized",
            _rank,
            _reject,
            tiles,
            _launcher,
            linear_codes_gemv_kernel,
            reject_tile,
        )
    )
