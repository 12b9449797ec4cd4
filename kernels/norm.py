"""norm on Triton:  RMSNorm and LayerNorm of rows, in fp32, as ops/norm.py says. One block a row.

x [outer, inner, K] with any strides of its rows: heads of a projection are rows as well.
"""

from __future__ import annotations

import triton
import triton.language as tl
from llmopt.launch import Launch, RowProblem, RowTile
from llmopt.registry import Kernel, register
from llmopt.types import Target

WIDEST = 65536


def reject(p: RowProblem, t: Target) -> str:
    return "" if p.k <= WIDEST else f"rows of {p.k} columns: up to {WIDEST} are possible"


def tiles(p: RowProblem, t: Target) -> tuple[RowTile, ...]:
    block = max(triton.next_power_of_2(p.k), 16)
    return (RowTile(block, 16 if block > 8192 else 8 if block > 2048 else 4 if block > 256 else 1),)


@triton.jit
def norm_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, inner, K, stride_xo, stride_xi, stride_y, eps, offset,
    NORM: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    ks = tl.arange(0, BLOCK_K)
    mask = ks < K
    x_row = x_ptr + (row // inner) * stride_xo + (row % inner) * stride_xi
    h = tl.load(x_row + ks, mask=mask, other=0.0).to(tl.float32)
    if NORM == "layer":
        h = tl.where(mask, h - tl.sum(h, 0) / K, 0.0)
    h *= 1.0 / tl.sqrt(tl.sum(h * h, 0) / K + eps)
    if weight_ptr is not None:
        h *= tl.load(weight_ptr + ks, mask=mask, other=0.0).to(tl.float32) + offset
    if bias_ptr is not None:
        h += tl.load(bias_ptr + ks, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * stride_y + ks, h.to(y_ptr.dtype.element_ty), mask=mask)


def launch(
    p: RowProblem, c: RowTile, t: Target, x, weight, bias, y, norm: str, eps: float, offset: float = 0.0
) -> Launch:  # fmt: skip
    """x [outer, inner, K] with dense K, weight and bias [K] or None, y [outer · inner, K] with dense K."""
    arguments = {
        "x_ptr": x, "weight_ptr": weight, "bias_ptr": bias, "y_ptr": y, "inner": x.shape[1], "K": p.k,
        "stride_xo": x.stride(0), "stride_xi": x.stride(1), "stride_y": y.stride(0),
        "eps": float(eps), "offset": float(offset),
    }  # fmt: skip
    return Launch(
        "norm.triton", norm_kernel, (p.rows,), arguments, {"NORM": norm, **c.constexprs()}, c.num_warps, c.num_stages,
        reads=("x_ptr", "weight_ptr", "bias_ptr"), writes=("y_ptr",),
    )  # fmt: skip


register(Kernel("norm.triton", "norm", 10, reject, tiles, launch))
