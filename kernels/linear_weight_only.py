"""linear_w8a16 and linear_w4a16 on Triton:  y = epilogue(n(x) · wᵀ),  w[n, k] = scale[n, g] · (code[n, k] − zero) + offset[n, g].

Codes: 8 bits s8 [N, K], zero 0; 4 bits u8 [N, K/2], the even input in the low half, zero 8 without offsets and 0 with them.
Weights are widened to x's dtype on their way to the tensor cores, as a model that keeps them wide has them.
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
# Up to which M a row of the table is the default, and its tiles, best first.
TILES = (
    (16, (GemmTile(16, 64, 256, 4, 3), GemmTile(16, 64, 128, 4, 4), GemmTile(16, 32, 128, 4, 4))),
    (64, (GemmTile(64, 64, 256, 8, 4), GemmTile(32, 64, 128, 4, 3))),
    (128, (GemmTile(128, 64, 128, 8, 4), GemmTile(64, 64, 64, 4, 4))),
    (512, (GemmTile(256, 64, 64, 4, 4), GemmTile(128, 64, 64, 8, 3))),
    (None, (GemmTile(128, 128, 64, 8, 3), GemmTile(64, 64, 64, 4, 3))),
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
    if p.group and c.block_k % p.group:
        return f"block_k={c.block_k}: multiples of the group's {p.group} are possible"
    return reject_product(c, p, t, 2, BITS[p.scheme] / 8, _beside(c, p))


def _fit(tile: GemmTile, p: LinearProblem, t: Target) -> GemmTile:
    tile = replace(tile, block_k=max(tile.block_k, p.group))
    if p.gated:  # both weights are widened at once and pass through registers
        tile = replace(tile, block_n=max(tile.block_n // 2, 32), block_m=min(tile.block_m, 64))
    if t.device == "cuda" and (
        tile.block_m * tile.block_k > 64 * 64 or (p.gated and tile.block_k > 64)
    ):
        tile = replace(
            tile,
            num_warps=4 if tile.block_m == 256 and tile.block_k == 64 and t.tier == "sm_90" else 8,
        )
    # Inputs and widened weights of a K step pass through registers, but for the products of warp groups.
    most = 256 * 64 if t.tier in ("sm_90", "sm_100") else 32 * 128 if p.gated else 64 * 128
    while tile.block_m * tile.block_k > most and tile.block_m > 16:
        tile = replace(tile, block_m=tile.block_m // 2)
    if t.device == "hip":
        tile = replace(tile, num_stages=2, block_m=min(tile.block_m, 64), num_warps=4)
    while _smem(tile, p) > t.gpu.smem_block and tile.num_stages > 2:
        tile = replace(tile, num_stages=tile.num_stages - 1)
    while _smem(tile, p) > t.gpu.smem_block and tile.block_m > 16:
        tile = replace(tile, block_m=tile.block_m // 2)
    while _smem(tile, p) > t.gpu.smem_block and tile.block_k > max(p.group, 32):
        tile = replace(tile, block_k=tile.block_k // 2)
    if p.m > 64:
        return tile
    return replace(tile, split_k=splits_for(triton.cdiv(p.n, tile.block_n), p.k // tile.block_k, t))


def _smem(c: GemmTile, p: LinearProblem) -> int:
    return c.smem_bytes(2, BITS[p.scheme] / 8, 2 if p.gated else 1) + _beside(c, p)


def _beside(c: GemmTile, p: LinearProblem) -> int:
    """Bytes of shared memory beside inputs and codes: a K step of widened weights; scales and offsets of every stage."""
    groups = c.block_k // p.group if p.group else 1
    factors = 4 * groups * (2 if p.offsets else 1) * c.num_stages
    return c.block_n * (2 * c.block_k + factors) * (2 if p.gated else 1)


@triton.jit
def _weights(
    w_rows, col_mask, cols, k, K, scale_ptr, offset_ptr, groups, ZERO: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    GROUPED: tl.constexpr, EVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One K step of w, [BLOCK_N, BLOCK_K] fp32."""
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    if BITS == 4:
        halves = k // 2 + tl.arange(0, BLOCK_K // 2)
        inside = col_mask[:, None] if EVEN else col_mask[:, None] & (halves < K // 2)[None, :]
        both = tl.load(w_rows[:, None] + halves[None, :], mask=inside, other=0)
        codes = tl.interleave((both & 15).to(tl.float32), (both >> 4).to(tl.float32))
    else:
        ks = k + tl.arange(0, BLOCK_K)
        inside = col_mask[:, None] if EVEN else col_mask[:, None] & (ks < K)[None, :]
        codes = tl.load(w_rows[:, None] + ks[None, :], mask=inside, other=0).to(tl.float32)
    g = (k // GROUP if GROUPED else 0) + tl.arange(0, GROUPS)
    at = cols[:, None] * groups + g[None, :]
    known = col_mask[:, None] if EVEN else col_mask[:, None] & (g < groups)[None, :]
    scale = tl.load(scale_ptr + at, mask=known, other=0.0)
    w = (tl.reshape(codes, (BLOCK_N, GROUPS, GROUP)) - ZERO) * scale[:, :, None]
    if offset_ptr is not None:
        w += tl.load(offset_ptr + at, mask=known, other=0.0)[:, :, None]
    return tl.reshape(w, (BLOCK_N, BLOCK_K))


@triton.jit
def linear_weight_only_kernel(
    x_ptr, w_ptr, w_scale_ptr, w_offset_ptr, up_ptr, up_scale_ptr, up_offset_ptr, bias_ptr, up_bias_ptr, residual_ptr,
    norm_weight_ptr, norm_bias_ptr, y_ptr, partial_ptr, counter_ptr,
    M, N, K, groups, stride_xm, stride_wn, stride_un, stride_rm, stride_ym, alpha, norm_eps, norm_offset,
    NORM: tl.constexpr, ACT: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, GROUPED: tl.constexpr,
    GROUP: tl.constexpr, EVEN: tl.constexpr,
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
    # 3 K loop
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(first, end, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        inside = row_mask[:, None] if EVEN else row_mask[:, None] & (ks < K)[None, :]
        x = tl.load(x_rows[:, None] + ks[None, :], mask=inside, other=0.0)
        if NORM != "none":
            h = normalise(x, mean, rstd, norm_weight_ptr, norm_bias_ptr, ks, K, norm_offset)
            x = tl.where((ks < K)[None, :], h, 0.0).to(x_ptr.dtype.element_ty)
        w = _weights(w_rows, col_mask, cols, k, K, w_scale_ptr, w_offset_ptr, groups, ZERO, BITS, GROUP, GROUPED, EVEN,
                     BLOCK_N, BLOCK_K)  # fmt: skip
        acc = tl.dot(x, tl.trans(w.to(x.dtype)), acc)
        if up_ptr is not None:
            w = _weights(u_rows, col_mask, cols, k, K, up_scale_ptr, up_offset_ptr, groups, ZERO, BITS, GROUP, GROUPED, EVEN,
                         BLOCK_N, BLOCK_K)  # fmt: skip
            up = tl.dot(x, tl.trans(w.to(x.dtype)), up)
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
        "GROUPED": p.group != 0, "GROUP": p.group or c.block_k,
        "EVEN": p.k % c.block_k == 0, **c.constexprs(),
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
