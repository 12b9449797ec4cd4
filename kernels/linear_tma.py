"""linear_f16 for NVIDIA sm_90 and newer: blocks stay for many tiles, and the copy engine reads x and W through host-made TMA descriptors.

Same result as linear.py without a norm in front (a separate norm costs little beside many rows).
"""

from __future__ import annotations

import triton
import triton.language as tl
from llmopt.kernels.gemm import epilogue, tile_of
from llmopt.kernels.linear import ITEMSIZE, fit
from llmopt.kernels.linear import reject as reject_linear
from llmopt.kernels.operands import Around
from llmopt.kernels.tiles import reject_product
from llmopt.launch import Descriptor, GemmTile, Launch, LinearProblem
from llmopt.registry import Kernel, register
from llmopt.types import Target

_BARRIERS = 4096  # bytes of shared memory for the copy engine's barriers, and to align its blocks
_WIDEST_BOX = 256  # elements of one side of what the copy engine reads at once
FEWEST_ROWS = 65  # below, blocks would stay for less than one tile
TILES = (
    GemmTile(128, 128, 64, 8, 4),
    GemmTile(128, 128, 64, 8, 3),
    GemmTile(128, 64, 64, 4, 4),
    GemmTile(64, 128, 64, 4, 4),
)
# On sm_90, as measured on an H100: the largest that gives nearly every multiprocessor one, then the others.
MEASURED = (GemmTile(128, 256, 64, 8, 3), GemmTile(128, 128, 64, 4, 6), GemmTile(64, 128, 64, 4, 6))
MEASURED_GATED = (
    GemmTile(128, 128, 64, 8, 4),
    GemmTile(128, 64, 128, 8, 3),
    GemmTile(64, 128, 64, 4, 5),
)
_BUSY = 0.9  # of the multiprocessors


def reject(p: LinearProblem, t: Target) -> str:
    if not t.gpu.has_tma:
        return f"{t} has no TMA"
    if p.norm != "none":
        return "has no norm in front"
    if p.m < FEWEST_ROWS:
        return f"{p.m} rows: {FEWEST_ROWS} or more are possible"
    if p.dtype not in ("fp16", "bf16"):
        return f"{p.dtype}: fp16 and bf16 are possible"
    if p.k * ITEMSIZE[p.dtype] % 16:
        return f"rows of {p.k} elements are not a multiple of 16 bytes"
    return reject_linear(p, t)


def tiles(p: LinearProblem, t: Target) -> tuple[GemmTile, ...]:
    if t.tier == "sm_90":
        own = MEASURED_GATED if p.gated else MEASURED
        busy = [c for c in own if _count(c, p) >= _BUSY * t.gpu.sms]
        first = busy or sorted(own, key=lambda c: -_count(c, p))
        return tuple(dict.fromkeys((*first, *own)))
    # On sm_100, 64 rows fill half of tensor memory's lanes, and two such accumulators spill.
    seeds = [c for c in TILES if not (p.gated and t.tier == "sm_100" and c.block_m < 128)]
    return tuple(dict.fromkeys(fit(c, p, t, reserved=_BARRIERS) for c in seeds))


def _count(c: GemmTile, p: LinearProblem) -> int:
    return triton.cdiv(p.m, c.block_m) * triton.cdiv(p.n, c.block_n)


def reject_tile(c: GemmTile, p: LinearProblem, t: Target) -> str:
    if c.split_k != 1:
        return f"split_k={c.split_k}: blocks stay for whole tiles"
    if max(c.block_m, c.block_n, c.block_k) > _WIDEST_BOX:
        return f"blocks of {c.block_m}x{c.block_n}x{c.block_k}: up to {_WIDEST_BOX} can be copied at once"
    if p.gated and t.tier == "sm_100" and c.block_m < 128:
        return "64 rows of two weights spill on sm_100"
    return reject_product(c, p, t, 2, 2, _BARRIERS)


@triton.jit
def linear_tma_kernel(
    x_desc, w_desc, up_desc, bias_ptr, up_bias_ptr, residual_ptr, y_ptr,
    M, N, K, stride_rm, stride_ym, alpha, blocks,
    ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, blocks):
        # 1 which tile is next
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        first_m, first_n = tile_m * BLOCK_M, tile_n * BLOCK_N
        # 2 the descriptors are the pointers; 3 K loop: what lies outside the matrices reads as zero
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            x = x_desc.load([first_m, k])
            acc = tl.dot(x, w_desc.load([first_n, k]).T, acc)
            if up_desc is not None:
                up = tl.dot(x, up_desc.load([first_n, k]).T, up)
        # 4 epilogue and 5 store
        rows, cols = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
        epilogue(acc, up if up_desc is not None else None, bias_ptr, up_bias_ptr, residual_ptr, y_ptr, rows, cols, M, N,
                 stride_rm, stride_ym, alpha, ACT)  # fmt: skip


def launch(p: LinearProblem, c: GemmTile, t: Target, x, w, y, around: Around, up=None) -> Launch:
    """As linear.launch; x and the weights start at multiples of 16 bytes."""
    tile_count = _count(c, p)
    blocks = min(tile_count, t.gpu.sms)
    w_block = (c.block_n, c.block_k)
    arguments = {
        "x_desc": Descriptor(x, (c.block_m, c.block_k)), "w_desc": Descriptor(w, w_block),
        "up_desc": None if up is None else Descriptor(up, w_block), "y_ptr": y,
        "M": p.m, "N": p.n, "K": p.k, "stride_ym": y.stride(0), "blocks": blocks, **around.arguments(),
    }  # fmt: skip
    constants = {"ACT": p.act, **c.constexprs()}
    del constants["SPLIT_K"]
    return Launch(
        "linear_f16_tma.triton", linear_tma_kernel, (blocks,), arguments, constants, c.num_warps, c.num_stages,
        reads=("x_desc", "w_desc", "up_desc", "bias_ptr", "up_bias_ptr", "residual_ptr"), writes=("y_ptr",),
    )  # fmt: skip


register(
    Kernel(
        "linear_f16_tma.triton", "linear", 5, reject, tiles, launch, linear_tma_kernel, reject_tile
    )
)
