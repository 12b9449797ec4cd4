"""quantize_rows on Triton: rows → s8 codes and one fp32 scale per row or group, behind an optional norm or SiLU·up.

code = round(h · 127 / max|h|), ties to even, as ops/linear_quantized.py says; h is n(x), or act(gate) · up of x = [gate, up].
"""

from __future__ import annotations

import triton
import triton.language as tl
from llmopt.kernels.gemm import activate, round_rows
from llmopt.kernels.operands import Around
from llmopt.launch import Launch, RowProblem, RowTile
from llmopt.registry import Kernel, register
from llmopt.types import Target

WIDEST = 32768


def reject(p: RowProblem, t: Target) -> str:
    return "" if p.k <= WIDEST else f"rows of {p.k} columns: up to {WIDEST} are possible"


def tiles(p: RowProblem, t: Target) -> tuple[RowTile, ...]:
    block = max(triton.next_power_of_2(p.k), 32)
    return (RowTile(block, 16 if block > 8192 else 8 if block > 2048 else 4),)


@triton.jit
def quantize_rows_kernel(
    x_ptr, norm_weight_ptr, norm_bias_ptr, q_ptr, scale_ptr, K, groups, stride_xm, norm_eps, norm_offset,
    NORM: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    ks = tl.arange(0, BLOCK_K)
    mask = ks < K
    h = tl.load(x_ptr + row * stride_xm + ks, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(x_ptr + row * stride_xm + K + ks, mask=mask, other=0.0).to(tl.float32)
        h = activate(h, ACT) * up
    if NORM == "layer":
        h = tl.where(mask, h - tl.sum(h, 0) / K, 0.0)
    if NORM != "none":
        h *= 1.0 / tl.sqrt(tl.sum(h * h, 0) / K + norm_eps)
    if norm_weight_ptr is not None:
        h *= tl.load(norm_weight_ptr + ks, mask=mask, other=0.0).to(tl.float32) + norm_offset
    if norm_bias_ptr is not None:
        h += tl.load(norm_bias_ptr + ks, mask=mask, other=0.0).to(tl.float32)
    rows = tl.reshape(tl.where(mask, h, 0.0), (BLOCK_K // GROUP, GROUP))
    codes, scale = round_rows(rows)
    tl.store(q_ptr + row * K + ks, tl.reshape(codes, (BLOCK_K,)), mask=mask)
    numbers = tl.arange(0, BLOCK_K // GROUP)
    tl.store(scale_ptr + row * groups + numbers, scale, mask=numbers < groups)


def launch(
    p: RowProblem, c: RowTile, t: Target, x, q, scale, around: Around,
    norm: str = "none", act: str = "silu", gated: bool = False, group: int = 0,
) -> Launch:  # fmt: skip
    """x [M, K] (gated: [M, 2K]) with dense rows → q [M, K] s8 and scale [M, K/group] fp32, both dense. group 0: all K."""
    arguments = {
        "x_ptr": x, "q_ptr": q, "scale_ptr": scale, "K": p.k, "groups": p.k // group if group else 1,
        "stride_xm": x.stride(0), **around.norm_arguments(),
    }  # fmt: skip
    constants = {
        "NORM": norm,
        "ACT": act,
        "GATED": gated,
        "GROUP": group or c.block_k,
        **c.constexprs(),
    }
    return Launch(
        "quantize_rows.triton", quantize_rows_kernel, (p.rows,), arguments, constants, c.num_warps, c.num_stages,
        reads=("x_ptr", "norm_weight_ptr", "norm_bias_ptr"), writes=("q_ptr", "scale_ptr"),
    )  # fmt: skip


register(Kernel("quantize_rows.triton", "quantize_rows", 10, reject, tiles, launch))
