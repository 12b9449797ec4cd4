"""round_keys on Triton: keys less their mean over all positions, as s8 codes with one fp32 scale a key (SageAttention, Zhang et al. 2024).

Two launches: sums of parts of the positions, then every key. Softmax does not see what is subtracted from all keys of a head, and without
it a few large channels would take the range of the codes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from llmopt.kernels.gemm import round_rows
from llmopt.launch import Launch, RowProblem, RowTile
from llmopt.registry import Kernel, register
from llmopt.types import Target

BLOCK = 64  # positions at a time
PARTS = 16  # blocks that share the positions of a head, at most


def reject(p: RowProblem, t: Target) -> str:
    return ""


def tiles(p: RowProblem, t: Target) -> tuple[RowTile, ...]:
    return (RowTile(max(triton.next_power_of_2(p.k), 32), 4),)


def parts_of(length: int) -> int:
    return min(triton.cdiv(length, BLOCK), PARTS)


@triton.jit
def _keys(k_row, s, d, end, D, stride_ks):
    inside = (s < end)[:, None] & (d < D)[None, :]
    return tl.load(k_row + s[:, None] * stride_ks + d[None, :], mask=inside, other=0.0).to(
        tl.float32
    )


@triton.jit
def sum_keys_kernel(
    k_ptr,
    sums_ptr,
    H,
    S,
    D,
    stride_kb,
    stride_kh,
    stride_ks,
    PARTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Σ of the keys of one part of the positions of one head."""
    head, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, BLOCK_K)
    k_row = k_ptr + (head // H) * stride_kb + (head % H) * stride_kh
    share = tl.cdiv(S, PARTS)
    end = tl.minimum((part + 1) * share, S)
    total = tl.zeros((BLOCK_K,), tl.float32)
    for first in range(part * share, end, BLOCK_S):
        s = (first + tl.arange(0, BLOCK_S)).to(tl.int64)
        total += tl.sum(_keys(k_row, s, d, end, D, stride_ks), 0)
    tl.store(sums_ptr + (head * PARTS + part) * D + d, total, mask=d < D)


@triton.jit
def round_keys_kernel(
    k_ptr, sums_ptr, codes_ptr, scale_ptr, mean_ptr, H, S, D, stride_kb, stride_kh, stride_ks,
    PARTS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Codes of some positions of one head; its first block keeps the mean."""
    head, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_K,), tl.float32)
    for part in range(PARTS):
        total += tl.load(sums_ptr + (head * PARTS + part) * D + d, mask=d < D, other=0.0)
    mean = total / S
    if block == 0:
        tl.store(mean_ptr + head * D + d, mean, mask=d < D)
    s = (block * BLOCK_S + tl.arange(0, BLOCK_S)).to(tl.int64)
    k = _keys(k_ptr + (head // H) * stride_kb + (head % H) * stride_kh, s, d, S, D, stride_ks)
    k = tl.where((d < D)[None, :], k - mean[None, :], 0.0)
    codes, scale = round_rows(k)
    inside = (s < S)[:, None] & (d < D)[None, :]
    tl.store(codes_ptr + (head * S + s[:, None]) * D + d[None, :], codes, mask=inside)
    tl.store(scale_ptr + head * S + s, scale, mask=s < S)


def _arguments(k, sums) -> dict:
    arguments = {"k_ptr": k, "sums_ptr": sums, "H": k.shape[1], "S": k.shape[2], "D": k.shape[3]}
    return arguments | {f"stride_k{axis}": k.stride(n) for n, axis in enumerate("bhs")}


def _constants(k, c: RowTile) -> dict:
    return {"PARTS": parts_of(k.shape[2]), "BLOCK_S": BLOCK, **c.constexprs()}


def launch_sums(p: RowProblem, c: RowTile, t: Target, k, sums) -> Launch:
    """k [B,Hkv,S,D] with dense rows → sums [B,Hkv,parts_of(S),D] fp32, dense."""
    grid = (k.shape[0] * k.shape[1], parts_of(k.shape[2]))
    return Launch(
        "sum_keys.triton", sum_keys_kernel, grid, _arguments(k, sums), _constants(k, c), c.num_warps, c.num_stages,
        reads=("k_ptr",), writes=("sums_ptr",),
    )  # fmt: skip


def launch(p: RowProblem, c: RowTile, t: Target, k, sums, codes, scale, mean) -> Launch:
    """k and its sums → codes [B,Hkv,S,D] s8, scale [B,Hkv,S] and mean [B,Hkv,D] fp32, all dense."""
    grid = (k.shape[0] * k.shape[1], triton.cdiv(k.shape[2], BLOCK))
    arguments = {**_arguments(k, sums), "codes_ptr": codes, "scale_ptr": scale, "mean_ptr": mean}
    return Launch(
        "round_keys.triton", round_keys_kernel, grid, arguments, _constants(k, c), c.num_warps, c.num_stages,
        reads=("k_ptr", "sums_ptr"), writes=("codes_ptr", "scale_ptr", "mean_ptr"),
    )  # fmt: skip


register(Kernel("sum_keys.triton", "sum_keys", 10, reject, tiles, launch_sums))
register(Kernel("round_keys.triton", "round_keys", 10, reject, tiles, launch))
