"""linear_w8a16 and linear_w4a16 on Triton:  y = epilogue(n(x) · wᵀ),  w[n, k] = scale[n, g] · (code[n, k] − zero) + offset[n, g].

Codes: 8 bits s8 [N, K], zero 0; 4 bits u8 [N, K/2], the even input in the low half, zero 8 without offsets and 0 with them. One
K step is one group, so that scales and offsets multiply sums: acc += scale · Σ x·code + offset · Σ x.
"""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl
from llmopt.kernels.gemm import finish, normalise, row_statistics, share_of
from llmopt.kernels.operands import Around, splits_for, workspace
from llmopt.kernels.tiles import reject_product
from llmopt.launch import GemmTile, Launch, LinearProblem
from llmopt.registry import Kernel, register
from llmopt.types import Target

BITS = {"w8a16": 8, "w4a16": 4}
GROUPS = (32, 64, 128)
WHOLE = 64  # inputs of a K step where one scale serves all K
TILES = (
    (16, (GemmTile(16, 64, WHOLE, 4, 4), GemmTile(16, 32, WHOLE, 4, 4))),
    (None, (GemmTile(64, 64, WHOLE, 4, 3), GemmTile(32, 64, WHOLE, 4, 3))),
)


def reject(p: LinearProblem, t: Target) -> str:
    if p.scheme not in BITS:
        return f"{p.scheme}: {' and '.join(BITS)} are possible"
    if p.dtype not in ("fp16", "bf16"):
        return f"{p.dtype}: fp16 and bf16 are possible"
    if p.group not in (0, *GROUPS):
        return f"groups of {p.group}: {', '.join(map(str, GROUPS))} and all of K are possible"
    if p.group and p.k % p.group:
        return f"groups of {p.group} do not divide K={p.k}"
    if p.k % 16:
        return f"K={p.k} is not a multiple of 16"
    return ""


def tiles(p: LinearProblem, t: Target) -> tuple[GemmTile, ...]:
    row = next(tiles for most, tiles in TILES if most is None or p.m <= most)
    return tuple(dict.fromkeys(_fit(tile, p, t) for tile in row))


def reject_tile(c: GemmTile, p: LinearProblem, t: Target) -> str:
    if c.block_k != (p.group or c.block_k):
        return f"block_k={c.block_k}: a K step is one group of {p.group}"
    return reject_product(c, p, t, 2, BITS[p.scheme] / 8)


def _fit(tile: GemmTile, p: LinearProblem, t: Target) -> GemmTile:
    tile = replace(tile, block_k=p.group or WHOLE)
    if tile.block_m * tile.block_k > 64 * 64:
        tile = replace(tile, num_warps=8)  # widened codes pass through registers
    if t.device == "hip":
        tile = replace(tile, num_stages=2)
    if p.m > 16:
        return _fit_many_rows(tile, p, t)
    return replace(tile, split_k=splits_for(triton.cdiv(p.n, tile.block_n), p.k // tile.block_k, t))


def _fit_many_rows(tile: GemmTile, p: LinearProblem, t: Target) -> GemmTile:
    """Of two weights both are widened at once: one narrow tile that holds them in registers."""
    if not p.gated:
        return tile if p.group or tile.block_m == 64 else replace(tile, num_stages=2)
    wide = tile.block_k > 64
    # On AMD eight warps of 64 lanes would leave each lane half of the registers.
    warps = 8 if t.device == "cuda" and (wide or t.tier == "sm_100") else 4
    return replace(
        tile, block_m=32 if wide and BITS[p.scheme] == 8 else 64, block_n=32, num_warps=warps
    )


@triton.jit
def _codes(w_rows, col_mask, k, K, zero, BITS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Codes less zero of one K step as [BLOCK_N, BLOCK_K] fp32: exact in fp16 and bf16 as well."""
    if BITS == 4:
        halves = k // 2 + tl.arange(0, BLOCK_K // 2)
        both = tl.load(
            w_rows[:, None] + halves[None, :],
            mask=col_mask[:, None] & (halves < K // 2)[None, :],
            other=0,
        )
        codes = tl.interleave((both & 15).to(tl.float32), (both >> 4).to(tl.float32))
    else:
        ks = k + tl.arange(0, BLOCK_K)
        codes = tl.load(
            w_rows[:, None] + ks[None, :], mask=col_mask[:, None] & (ks < K)[None, :], other=0
        ).to(tl.float32)
    return codes - zero


@triton.jit
def _step(acc, x, x_sum, codes, scale_ptr, offset_ptr, cols, col_mask, groups, group):
    scale = tl.load(scale_ptr + cols * groups + group, mask=col_mask, other=0.0)
    acc += tl.dot(x, tl.trans(codes.to(x.dtype))) * scale[None, :]
    if offset_ptr is not None:
        offset = tl.load(offset_ptr + cols * groups + group, mask=col_mask, other=0.0)
        acc += x_sum[:, None] * offset[None, :]
    return acc


@triton.jit
def linear_weight_only_kernel(
    x_ptr, w_ptr, w_scale_ptr, w_offset_ptr, up_ptr, up_scale_ptr, up_offset_ptr, bias_ptr, up_bias_ptr, residual_ptr,
    norm_weight_ptr, norm_bias_ptr, y_ptr, partial_ptr, counter_ptr,
    M, N, K, groups, stride_xm, stride_wn, stride_un, stride_rm, stride_ym, alpha, norm_eps, norm_offset,
    NORM: tl.constexpr, ACT: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # 1 which tile am I
    tile, split, tiles, rows, cols, first, end = share_of(M, N, K, BLOCK_M, BLOCK_N, BLOCK_K, SPLIT_K, GROUP_M)  # fmt: skip
    row_mask, col_mask = rows < M, cols < N
    # 2 pointers
    x_rows = x_ptr + rows.to(tl.int64) * stride_xm
    w_rows = w_ptr + cols.to(tl.int64) * stride_wn
    if up_ptr is not None:
        u_rows = up_ptr + cols.to(tl.int64) * stride_un
    if NORM != "none":
        mean, rstd = row_statistics(x_rows, row_mask, K, norm_eps, NORM, BLOCK_M, BLOCK_K)
    # 3 K loop, a group a step
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(first, end, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_rows[:, None] + ks[None, :], mask=row_mask[:, None] & (ks < K)[None, :], other=0.0
        )
        if NORM != "none":
            h = normalise(x, mean, rstd, norm_weight_ptr, norm_bias_ptr, ks, K, norm_offset)
            x = tl.where((ks < K)[None, :], h, 0.0).to(x_ptr.dtype.element_ty)
        x_sum = tl.sum(x.to(tl.float32), 1)
        group = k // BLOCK_K if GROUPED else 0
        codes = _codes(w_rows, col_mask, k, K, ZERO, BITS, BLOCK_K)
        acc = _step(acc, x, x_sum, codes, w_scale_ptr, w_offset_ptr, cols, col_mask, groups, group)
        if up_ptr is not None:
            codes = _codes(u_rows, col_mask, k, K, ZERO, BITS, BLOCK_K)
            up = _step(
                up, x, x_sum, codes, up_scale_ptr, up_offset_ptr, cols, col_mask, groups, group
            )
    # 4 epilogue and 5 store, by the last of the blocks that share the tile
    finish(acc, up if up_ptr is not None else None, partial_ptr, counter_ptr, tile, split, tiles,
           bias_ptr, up_bias_ptr, residual_ptr, y_ptr, rows, cols, M, N, stride_rm, stride_ym, alpha,
           ACT, SPLIT_K, BLOCK_M, BLOCK_N)  # fmt: skip


def launch(
    p: LinearProblem, c: GemmTile, t: Target, x, w, w_scale, w_offset, y, around: Around,
    up=None, up_scale=None, up_offset=None,
) -> Launch:  # fmt: skip
    """x [M, K]; w and up as codes, scales and offsets [N, G] fp32 dense, offsets None where symmetric; y [M, N]."""
    bits = BITS[p.scheme]
    tile_count = triton.cdiv(p.m, c.block_m) * triton.cdiv(p.n, c.block_n)
    planes = 1 if up is None else 2
    partial, counter = workspace(x, tile_count, c.split_k, planes * c.block_m * c.block_n)
    arguments = {
        "x_ptr": x, "w_ptr": w, "w_scale_ptr": w_scale, "w_offset_ptr": w_offset, "up_ptr": up,
        "up_scale_ptr": up_scale, "up_offset_ptr": up_offset,
        "y_ptr": y, "partial_ptr": partial, "counter_ptr": counter, "M": p.m, "N": p.n, "K": p.k,
        "groups": p.k // p.group if p.group else 1, "stride_xm": x.stride(0), "stride_wn": w.stride(0),
        "stride_un": 0 if up is None else up.stride(0), "stride_ym": y.stride(0), **around.arguments(), **around.norm_arguments(),
    }  # fmt: skip
    constants = {
        "NORM": p.norm, "ACT": p.act, "BITS": bits, "ZERO": 8 if bits == 4 and w_offset is None else 0,
        "GROUPED": p.group != 0, **c.constexprs(),
    }  # fmt: skip
    return Launch(
        f"linear_{p.scheme}.triton", linear_weight_only_kernel, (tile_count, c.split_k), arguments, constants, c.num_warps, c.num_stages,
        reads=("x_ptr", "w_ptr", "w_scale_ptr", "w_offset_ptr", "up_ptr", "up_scale_ptr", "up_offset_ptr", *around.READS),
        writes=("y_ptr",),
    )  # fmt: skip


register(
    Kernel(
        "linear_weight_only.triton",
        "linear_quantized",
        20,
        reject,
        tiles,
        launch,
        linear_weight_only_kernel,
        reject_tile,
    )
)
