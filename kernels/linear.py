"""linear_f16 on Triton:  y = act(alpha · n(x) Wᵀ + bias) [· (n(x) Upᵀ + up_bias)] + residual,  n an optional RMSNorm or LayerNorm.

x [M, K], W and Up [N, K] fp16, bf16 or fp32 with dense rows, accumulated in fp32, rounded once. Few rows (M ≤ 16) share each tile of
the result among SPLIT_K blocks; the last one to finish adds their shares up and runs the epilogue.
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

# Up to which M a row of the table is the default, and its tiles, best first.
TILES = (
    (16, (GemmTile(16, 64, 128, 4, 4), GemmTile(16, 32, 128, 4, 4), GemmTile(16, 128, 64, 4, 3))),
    (64, (GemmTile(64, 64, 64, 4, 4), GemmTile(32, 64, 64, 4, 4))),
    (512, (GemmTile(64, 128, 64, 4, 3), GemmTile(128, 64, 64, 4, 3))),
    (
        None,
        (GemmTile(128, 128, 64, 8, 3), GemmTile(128, 128, 32, 8, 3), GemmTile(64, 128, 64, 8, 3)),
    ),
)
# First on sm_90 for up to 64 rows that no gate follows, as measured on an H100.
MEASURED = GemmTile(64, 32, 128, 4, 5)
# Of two weights the compiler spills a few bytes of these on sm_90 and sm_100.
NOT_GATED = (GemmTile(16, 32, 128, 4, 4), GemmTile(32, 64, 64, 4, 4))
ITEMSIZE = {"fp16": 2, "bf16": 2, "fp32": 4}


def reject(p: LinearProblem, t: Target) -> str:
    if p.scheme != "f16":
        return f"weights are quantised: {p.scheme}"
    if p.dtype not in ITEMSIZE:
        return f"{p.dtype}: fp16, bf16 and fp32 are possible"
    return ""


def tiles(p: LinearProblem, t: Target) -> tuple[GemmTile, ...]:
    row = next(tiles for most, tiles in TILES if most is None or p.m <= most)
    if t.tier == "sm_90" and 16 < p.m <= 64 and not p.gated and p.dtype != "fp32":
        row = (MEASURED, *row)
    fitting = [fit(tile, p, t) for tile in row if not (p.gated and tile in NOT_GATED)]
    return tuple(tile for tile in fitting if _smem(tile, p) <= t.gpu.smem_block)


def reject_tile(c: GemmTile, p: LinearProblem, t: Target) -> str:
    size = ITEMSIZE[p.dtype]
    return reject_product(c, p, t, size, size)


def fit(tile: GemmTile, p: LinearProblem, t: Target, reserved: int = 0) -> GemmTile:
    """The tile for this problem: a gated one holds two weights, wide types take more bytes, AMD pipelines two stages.

    reserved: bytes of shared memory that are not for the pipeline's stages.
    """
    limit = t.gpu.smem_block - reserved
    if p.gated and tile.block_m * tile.block_n > 64 * 128:
        tile = replace(tile, block_n=tile.block_n // 2)
    if p.gated and tile.block_m * tile.block_n >= 64 * 128:
        # Two accumulators in four warps' registers would spill; sm_100 has them in tensor memory.
        tile = replace(tile, num_warps=4 if t.tier == "sm_100" else 8)
    if t.device == "hip":
        tile = replace(tile, num_stages=2)
    while _smem(tile, p) > limit and tile.num_stages > 2:
        tile = replace(tile, num_stages=tile.num_stages - 1)
    while _smem(tile, p) > limit and tile.block_k > 32:
        tile = replace(tile, block_k=tile.block_k // 2)
    if p.m > 16:
        return tile
    return replace(tile, split_k=splits_for(triton.cdiv(p.n, tile.block_n), p.k // tile.block_k, t))


def _smem(tile: GemmTile, p: LinearProblem) -> int:
    size = ITEMSIZE[p.dtype]
    return tile.smem_bytes(size, size, 2 if p.gated else 1)


@triton.jit
def linear_kernel(
    x_ptr, w_ptr, up_ptr, bias_ptr, up_bias_ptr, residual_ptr, norm_weight_ptr, norm_bias_ptr,
    y_ptr, partial_ptr, counter_ptr,
    M, N, K, stride_xm, stride_wn, stride_un, stride_rm, stride_ym, alpha, norm_eps, norm_offset,
    NORM: tl.constexpr, ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
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
    if NORM != "none":
        mean, rstd = row_statistics(x_rows, row_mask, K, norm_eps, NORM, BLOCK_M, BLOCK_K)
    # 3 K loop
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(first, end, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        k_mask = ks < K
        x = tl.load(
            x_rows[:, None] + ks[None, :], mask=row_mask[:, None] & k_mask[None, :], other=0.0
        )
        if NORM != "none":
            h = normalise(x, mean, rstd, norm_weight_ptr, norm_bias_ptr, ks, K, norm_offset)
            x = h.to(w_ptr.dtype.element_ty)
        w = tl.load(
            w_rows[None, :] + ks[:, None], mask=col_mask[None, :] & k_mask[:, None], other=0.0
        )
        acc = tl.dot(x, w, acc, input_precision="ieee")
        if up_ptr is not None:
            u = tl.load(
                u_rows[None, :] + ks[:, None], mask=col_mask[None, :] & k_mask[:, None], other=0.0
            )
            up = tl.dot(x, u, up, input_precision="ieee")
    # 4 epilogue and 5 store, by the last of the blocks that share the tile
    finish(acc, up if up_ptr is not None else None, partial_ptr, counter_ptr, tile, split, tiles,
           bias_ptr, up_bias_ptr, residual_ptr, y_ptr, rows, cols, M, N, stride_rm, stride_ym, alpha,
           ACT, SPLIT_K, BLOCK_M, BLOCK_N)  # fmt: skip


def launch(p: LinearProblem, c: GemmTile, t: Target, x, w, y, around: Around, up=None) -> Launch:
    """x [M, K], w and up [N, K], y [M, N]; rows dense. See operands.Around for the rest."""
    tile_count = triton.cdiv(p.m, c.block_m) * triton.cdiv(p.n, c.block_n)
    planes = 1 if up is None else 2
    partial, counter = workspace(x, tile_count, c.split_k, planes * c.block_m * c.block_n)
    arguments = {
        "x_ptr": x, "w_ptr": w, "up_ptr": up, "y_ptr": y, "partial_ptr": partial, "counter_ptr": counter,
        "M": p.m, "N": p.n, "K": p.k, "stride_xm": x.stride(0), "stride_wn": w.stride(0),
        "stride_un": 0 if up is None else up.stride(0), "stride_ym": y.stride(0), **around.arguments(), **around.norm_arguments(),
    }  # fmt: skip
    constants = {"NORM": p.norm, "ACT": p.act, **c.constexprs()}
    return Launch(
        "linear_f16.triton", linear_kernel, (tile_count, c.split_k), arguments, constants,
        c.num_warps, c.num_stages,
        reads=("x_ptr", "w_ptr", "up_ptr", *around.READS), writes=("y_ptr",),
    )  # fmt: skip


register(
    Kernel("linear_f16.triton", "linear", 20, reject, tiles, launch, linear_kernel, reject_tile)
)
