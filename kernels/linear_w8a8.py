"""linear_w8a8 and linear_w4a8 on Triton:  y = epilogue(Σ_g x_scale[m, g] · Σ_{k in g} x_q[m, k] · w[n, k]).

w = scale · (code − zero) + offset; x_q [M, K] s8 with x_scale [M, G] fp32; codes, zero, scale and offset [N, G] as in
linear_weight_only.py: per token and channel (G = 1), or per group of K/G inputs. Sums of products are exact in s32; each group is
folded into fp32 once. The epilogue is linear.py's.
"""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl
from llmopt.kernels.gemm import finish, share_of
from llmopt.kernels.operands import Around, splits_for, workspace
from llmopt.kernels.tiles import reject_product
from llmopt.launch import GemmTile, Launch, LinearProblem
from llmopt.registry import Kernel, register
from llmopt.types import Target

BITS = {"w8a8": 8, "w4a8": 4}
TILES = (
    (16, (GemmTile(16, 64, 128, 4, 4), GemmTile(16, 32, 128, 4, 5))),
    (64, (GemmTile(64, 64, 128, 4, 4), GemmTile(32, 64, 128, 4, 4))),
    (512, (GemmTile(64, 128, 128, 8, 3), GemmTile(64, 64, 128, 4, 4))),
    (None, (GemmTile(128, 128, 128, 8, 3), GemmTile(128, 64, 128, 8, 3))),
)
# As a sweep over an H100 found them: one scale a channel, groups of 64 (the default scheme), those with a gate.
_SM_90_CHANNEL = (
    (64, (GemmTile(64, 32, 128, 4, 5, 2), GemmTile(32, 32, 128, 4, 5))),
    (128, (GemmTile(64, 64, 256, 4, 4), GemmTile(64, 128, 256, 4, 4))),
    (512, (GemmTile(64, 128, 128, 4, 4), GemmTile(128, 64, 128, 4, 4))),
)
_SM_90_GROUPS = ((64, (GemmTile(64, 64, 64, 4, 4, 4),)), (None, (GemmTile(64, 128, 64, 4, 3),)))
_SM_90_GATED_GROUPS = ((None, (GemmTile(128, 32, 64, 4, 3),)),)
_LEAST_K = 32  # bytes of K in one instruction


def reject(p: LinearProblem, t: Target) -> str:
    if p.scheme not in BITS:
        return f"{p.scheme}: {' and '.join(BITS)} are possible"
    if p.norm != "none":
        return "a norm comes before the rounding: quantize does both"
    if p.k % 16:
        return f"K={p.k} is not a multiple of 16"
    if p.group not in (0, 32, 64, 128):
        return f"groups of {p.group}: 32, 64, 128 and all of K are possible"
    if p.group and p.k % p.group:
        return f"groups of {p.group} do not divide K={p.k}"
    return ""


def tiles(p: LinearProblem, t: Target) -> tuple[GemmTile, ...]:
    measured = next((row for most, row in _measured(p, t) if most is None or p.m <= most), ())
    row = next(tiles for most, tiles in TILES if most is None or p.m <= most)
    fitting = dict.fromkeys((*measured, *(_fit(tile, p, t) for tile in row)))
    return tuple(c for c in fitting if _smem(c, p) <= t.gpu.smem_block)


def _measured(p: LinearProblem, t: Target) -> tuple:
    """Rows of tiles that were measured on this generation for problems like this one."""
    if t.tier != "sm_90" or p.scheme != "w8a8" or p.m <= 16:
        return ()
    if p.group == 0:
        return () if p.gated else _SM_90_CHANNEL
    if p.group != 64:
        return ()
    return _SM_90_GROUPS if not p.gated else _SM_90_GATED_GROUPS if p.m > 64 else ()


def reject_tile(c: GemmTile, p: LinearProblem, t: Target) -> str:
    if c.block_k < _LEAST_K or c.block_k != (p.group or c.block_k):
        return f"block_k={c.block_k}: {p.group or f'{_LEAST_K} or more'} is possible"
    # Of a group's product two sums live at once, one of them s32.
    doubled = replace(c, block_m=2 * c.block_m, num_stages=1) if p.group else c
    return reject_product(c, p, t, 1, _codes_bytes(p)) or reject_product(doubled, p, t, 0, 0)


def _fit(tile: GemmTile, p: LinearProblem, t: Target) -> GemmTile:
    if p.scheme == "w4a8":
        return _split(_fit_4_bits(tile, p, t), p, t)
    if p.group:
        # Two accumulators live at once, one of them s32: a wide tile would spill.
        tile = replace(
            tile,
            block_k=p.group,
            block_n=min(tile.block_n, 64) if tile.block_m > 64 else tile.block_n,
        )
    if p.gated and tile.block_m * tile.block_n > 64 * 64:
        tile = replace(tile, block_n=tile.block_n // 2, num_warps=8)
    if p.gated and p.group and tile.block_m * tile.block_n >= 64 * 64:
        tile = replace(tile, block_n=32, num_warps=8)
    if t.device == "hip":
        # Eight warps of 64 lanes would leave each lane half of the registers.
        tile = replace(tile, num_warps=4 if p.group else tile.num_warps, num_stages=2)
    while _smem(tile, p) > t.gpu.smem_block and tile.num_stages > 2:
        tile = replace(tile, num_stages=tile.num_stages - 1)
    return _split(tile, p, t)


def _fit_4_bits(tile: GemmTile, p: LinearProblem, t: Target) -> GemmTile:
    """Widened codes are in registers on their way to the tensor cores, so tiles are small; a thread loads 16 bytes of codes."""
    block_k = p.group or tile.block_k
    block_n = 64 if p.gated and block_k > 64 else 128
    if t.device == "hip" and p.gated:
        block_n = 32
    tile = replace(
        tile, block_m=min(tile.block_m, 32), block_n=block_n, block_k=block_k,
        num_warps=4 if block_k == 32 or t.device == "hip" else 8, num_stages=2 if t.device == "hip" else 3,
    )  # fmt: skip
    return tile if _smem(tile, p) <= t.gpu.smem_block else replace(tile, num_stages=2)


def _split(tile: GemmTile, p: LinearProblem, t: Target) -> GemmTile:
    if p.m > 16:
        return tile
    return replace(tile, split_k=splits_for(triton.cdiv(p.n, tile.block_n), p.k // tile.block_k, t))


def _smem(tile: GemmTile, p: LinearProblem) -> int:
    return tile.smem_bytes(1, _codes_bytes(p), 2 if p.gated else 1)


def _codes_bytes(p: LinearProblem) -> float:
    """Of a weight in shared memory: 4-bit codes are there as they come and, widened, as they are multiplied."""
    return 1.5 if p.scheme == "w4a8" else 1


@triton.jit
def _codes(
    w_rows, col_mask, k, K, BITS: tl.constexpr, ZERO: tl.constexpr, GROUPED: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Codes less zero of one K step as [BLOCK_K, BLOCK_N] s8; a group is whole, so that its step has no end to watch."""
    if BITS == 8:
        ks = k + tl.arange(0, BLOCK_K)
        inside = col_mask[None, :] if GROUPED else col_mask[None, :] & (ks < K)[:, None]
        codes = tl.load(w_rows[None, :] + ks[:, None], mask=inside, other=0)
    else:
        halves = k // 2 + tl.arange(0, BLOCK_K // 2)
        inside = col_mask[:, None] if GROUPED else col_mask[:, None] & (halves < K // 2)[None, :]
        both = tl.load(w_rows[:, None] + halves[None, :], mask=inside, other=0)
        low, high = (both & 15).to(tl.int8) - ZERO, (both >> 4).to(tl.int8) - ZERO
        codes = tl.trans(tl.interleave(low, high))
    return codes


@triton.jit
def _fold(acc, product, x_scale, x_sum, scale_ptr, offset_ptr, cols, col_mask, groups, group):
    """acc with the sums of one group (or of all of K): products [BLOCK_M, BLOCK_N] and inputs [BLOCK_M] s32."""
    scale = tl.load(scale_ptr + cols * groups + group, mask=col_mask, other=0.0)
    acc += product.to(tl.float32) * x_scale[:, None] * scale[None, :]
    if offset_ptr is not None:
        offset = tl.load(offset_ptr + cols * groups + group, mask=col_mask, other=0.0)
        acc += (x_sum.to(tl.float32) * x_scale)[:, None] * offset[None, :]
    return acc


@triton.jit
def linear_w8a8_kernel(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, w_offset_ptr, up_ptr, up_scale_ptr, up_offset_ptr, bias_ptr, up_bias_ptr, residual_ptr,
    y_ptr, partial_ptr, counter_ptr,
    M, N, K, groups, stride_xm, stride_wn, stride_un, stride_rm, stride_ym, alpha,
    ACT: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # 1 which tile am I
    tile, split, tiles, rows, cols, first, end = share_of(M, N, K, BLOCK_M, BLOCK_N, BLOCK_K, SPLIT_K, GROUP_M)  # fmt: skip
    row_mask, col_mask = rows < M, cols < N
    # 2 pointers
    x_rows = x_ptr + rows.to(tl.int64) * stride_xm
    w_rows = w_ptr + cols.to(tl.int64) * stride_wn
    if up_ptr is not None:
        u_rows = up_ptr + cols.to(tl.int64) * stride_un
    # 3 K loop: a group a step folded into fp32, or in s32 all the way
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    up_sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    x_sum = tl.zeros((BLOCK_M,), tl.int32)
    for k in range(first, end, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        inside = row_mask[:, None] if GROUPED else row_mask[:, None] & (ks < K)[None, :]
        x = tl.load(x_rows[:, None] + ks[None, :], mask=inside, other=0)
        if w_offset_ptr is not None:
            of_step = tl.sum(x.to(tl.int32), 1)
            x_sum = of_step if GROUPED else x_sum + of_step
        w = _codes(w_rows, col_mask, k, K, BITS, ZERO, GROUPED, BLOCK_K)
        if GROUPED:
            group = k // BLOCK_K
            x_scale = tl.load(x_scale_ptr + rows * groups + group, mask=row_mask, other=0.0)
            product = tl.dot(x, w, out_dtype=tl.int32)
            acc = _fold(acc, product, x_scale, x_sum, w_scale_ptr, w_offset_ptr, cols, col_mask, groups, group)  # fmt: skip
        else:
            sums = tl.dot(x, w, sums, out_dtype=tl.int32)
        if up_ptr is not None:
            u = _codes(u_rows, col_mask, k, K, BITS, ZERO, GROUPED, BLOCK_K)
            if GROUPED:
                product = tl.dot(x, u, out_dtype=tl.int32)
                up = _fold(up, product, x_scale, x_sum, up_scale_ptr, up_offset_ptr, cols, col_mask, groups, group)  # fmt: skip
            else:
                up_sums = tl.dot(x, u, up_sums, out_dtype=tl.int32)
    if not GROUPED:
        x_scale = tl.load(x_scale_ptr + rows, mask=row_mask, other=0.0)
        acc = _fold(acc, sums, x_scale, x_sum, w_scale_ptr, w_offset_ptr, cols, col_mask, 1, 0)
        if up_ptr is not None:
            up = _fold(up, up_sums, x_scale, x_sum, up_scale_ptr, up_offset_ptr, cols, col_mask, 1, 0)  # fmt: skip
    # 4 epilogue and 5 store, by the last of the blocks that share the tile
    finish(acc, up if up_ptr is not None else None, partial_ptr, counter_ptr, tile, split, tiles,
           bias_ptr, up_bias_ptr, residual_ptr, y_ptr, rows, cols, M, N, stride_rm, stride_ym, alpha,
           ACT, SPLIT_K, BLOCK_M, BLOCK_N)  # fmt: skip


def launch(
    p: LinearProblem, c: GemmTile, t: Target, x, x_scale, w, w_scale, y, around: Around, up=None, up_scale=None,
    w_offset=None, up_offset=None,
) -> Launch:  # fmt: skip
    """x [M, K] s8, x_scale [M, G]; w and up as codes, scales and offsets [N, G] fp32 dense, offsets None where symmetric; y [M, N]."""
    tile_count = triton.cdiv(p.m, c.block_m) * triton.cdiv(p.n, c.block_n)
    planes = 1 if up is None else 2
    partial, counter = workspace(x, tile_count, c.split_k, planes * c.block_m * c.block_n)
    arguments = {
        "x_ptr": x, "x_scale_ptr": x_scale, "w_ptr": w, "w_scale_ptr": w_scale, "up_ptr": up, "up_scale_ptr": up_scale,
        "w_offset_ptr": w_offset, "up_offset_ptr": up_offset,
        "y_ptr": y, "partial_ptr": partial, "counter_ptr": counter, "M": p.m, "N": p.n, "K": p.k,
        "groups": p.k // p.group if p.group else 1, "stride_xm": x.stride(0), "stride_wn": w.stride(0),
        "stride_un": 0 if up is None else up.stride(0), "stride_ym": y.stride(0), **around.arguments(),
    }  # fmt: skip
    bits = BITS[p.scheme]
    constants = {
        "ACT": p.act, "BITS": bits, "ZERO": 8 if bits == 4 and w_offset is None else 0,
        "GROUPED": p.group != 0, **c.constexprs(),
    }  # fmt: skip
    return Launch(
        f"linear_{p.scheme}.triton", linear_w8a8_kernel, (tile_count, c.split_k), arguments, constants, c.num_warps, c.num_stages,
        reads=("x_ptr", "x_scale_ptr", "w_ptr", "w_scale_ptr", "w_offset_ptr", "up_ptr", "up_scale_ptr", "up_offset_ptr",
               "bias_ptr", "up_bias_ptr", "residual_ptr"),
        writes=("y_ptr",),
    )  # fmt: skip


register(
    Kernel(
        "linear_w8a8.triton",
        "linear_quantized",
        10,
        reject,
        tiles,
        launch,
        linear_w8a8_kernel,
        reject_tile,
    )
)
