"""rotary_table on Triton:  cos and sin of position · frequency, times scale, written to both halves of a row. One block a token.

frequencies fp32 and positions (int64 or fp32) [B,S,R/2] of any strides, cos and sin [B,S,R] with dense rows, as ops/rotary_table.py says.
"""

from __future__ import annotations

import triton
import triton.language as tl
from llmopt.launch import Launch, RowProblem, RowTile
from llmopt.registry import Kernel, register
from llmopt.types import Target


def reject(p: RowProblem, t: Target) -> str:
    return ""


def tiles(p: RowProblem, t: Target) -> tuple[RowTile, ...]:
    return (RowTile(max(triton.next_power_of_2(p.k // 2), 32), 1),)


@triton.jit
def rotary_table_kernel(
    frequency_ptr, position_ptr, cos_ptr, sin_ptr, S, half, scale,
    stride_fb, stride_fs, stride_fk, stride_pb, stride_ps, stride_cb, stride_cs, stride_sb, stride_ss, BLOCK_K: tl.constexpr,
):  # fmt: skip
    b, s = (tl.program_id(0) // S).to(tl.int64), (tl.program_id(0) % S).to(tl.int64)
    ks = tl.arange(0, BLOCK_K)
    mask = ks < half
    position = tl.load(position_ptr + b * stride_pb + s * stride_ps).to(tl.float32)
    frequency = tl.load(
        frequency_ptr + b * stride_fb + s * stride_fs + ks * stride_fk, mask=mask, other=0.0
    ).to(tl.float32)
    angle = position * frequency
    cos, sin = tl.cos(angle) * scale, tl.sin(angle) * scale
    cos_row, sin_row = (
        cos_ptr + b * stride_cb + s * stride_cs,
        sin_ptr + b * stride_sb + s * stride_ss,
    )
    tl.store(cos_row + ks, cos.to(cos_ptr.dtype.element_ty), mask=mask)
    tl.store(cos_row + half + ks, cos.to(cos_ptr.dtype.element_ty), mask=mask)
    tl.store(sin_row + ks, sin.to(sin_ptr.dtype.element_ty), mask=mask)
    tl.store(sin_row + half + ks, sin.to(sin_ptr.dtype.element_ty), mask=mask)


def launch(
    p: RowProblem, c: RowTile, t: Target, frequencies, positions, cos, sin, scale: float = 1.0
) -> Launch:
    """As above; a table of fewer dimensions is one of a single batch row."""
    tensors = [x[None] if x.dim() == 2 else x for x in (frequencies, positions, cos, sin)]
    arguments = {
        "frequency_ptr": frequencies, "position_ptr": positions, "cos_ptr": cos, "sin_ptr": sin,
        "S": tensors[2].shape[1], "half": p.k // 2, "scale": float(scale),
    }  # fmt: skip
    for name, tensor, axes in zip("fpcs", tensors, ("bsk", "bs", "bs", "bs"), strict=True):
        arguments |= {f"stride_{name}{axis}": tensor.stride(d) for d, axis in enumerate(axes)}
    return Launch(
        "rotary_table.triton", rotary_table_kernel, (p.rows,), arguments, c.constexprs(), c.num_warps, c.num_stages,
        reads=("frequency_ptr", "position_ptr"), writes=("cos_ptr", "sin_ptr"),
    )  # fmt: skip


register(Kernel("rotary_table.triton", "rotary_table", 10, reject, tiles, launch))
