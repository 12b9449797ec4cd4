"""swiglu on Triton:  y = act(gate) · up of rows x = [gate, up], in fp32, rounded once; for gates and ups that are there already."""

from __future__ import annotations

import triton
import triton.language as tl
from llmopt.kernels.gemm import activate
from llmopt.launch import Launch, RowProblem, RowTile
from llmopt.registry import Kernel, register
from llmopt.types import Target


def reject(p: RowProblem, t: Target) -> str:
    return ""


def tiles(p: RowProblem, t: Target) -> tuple[RowTile, ...]:
    return (RowTile(1024, 4), RowTile(2048, 8))


@triton.jit
def swiglu_kernel(x_ptr, y_ptr, K, stride_x, stride_y, ACT: tl.constexpr, BLOCK_K: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    ks = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = ks < K
    gate = tl.load(x_ptr + row * stride_x + ks, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * stride_x + K + ks, mask=mask, other=0.0).to(tl.float32)
    tl.store(
        y_ptr + row * stride_y + ks,
        (activate(gate, ACT) * up).to(y_ptr.dtype.element_ty),
        mask=mask,
    )


def launch(p: RowProblem, c: RowTile, t: Target, x, y, act: str = "silu") -> Launch:
    """x [M, 2K], y [M, K], rows dense."""
    arguments = {"x_ptr": x, "y_ptr": y, "K": p.k, "stride_x": x.stride(0), "stride_y": y.stride(0)}
    return Launch(
        "swiglu.triton", swiglu_kernel, (p.rows, triton.cdiv(p.k, c.block_k)), arguments, {"ACT": act, **c.constexprs()},
        c.num_warps, c.num_stages, reads=("x_ptr",), writes=("y_ptr",),
    )  # fmt: skip


register(Kernel("swiglu.triton", "swiglu", 10, reject, tiles, launch))
