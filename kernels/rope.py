"""rope and its place before attention:  q and k rotated by position, k and v written behind a cache's keys, in one launch.

A cache may hold s8 codes with a scale per token and head: what is written is rounded first.

x [B,H,S,D], cos and sin [B|1,1,S,R]: the first R dimensions turn in pairs, (i, i + R/2) for "half", (2i, 2i + 1) for "interleaved".
"""

from __future__ import annotations

import triton
import triton.language as tl
from llmopt.kernels.gemm import round_rows
from llmopt.launch import Launch, RowProblem, RowTile
from llmopt.registry import Kernel, register
from llmopt.types import Target

HEADS = 8  # of one block


def reject(p: RowProblem, t: Target) -> str:
    return ""


def tiles(p: RowProblem, t: Target) -> tuple[RowTile, ...]:
    return (RowTile(HEADS, 4), RowTile(4, 2))


@triton.jit
def copy_heads(x_ptr, y_ptr, h, heads, stride_xh, stride_yh, first, D, BLOCK: tl.constexpr):
    """Dimensions from first on of heads h [BLOCK_H] of one token."""
    d = first + tl.arange(0, BLOCK)
    mask = (h < heads)[:, None] & (d < D)[None, :]
    x = tl.load(x_ptr + (h * stride_xh)[:, None] + d[None, :], mask=mask)
    tl.store(y_ptr + (h * stride_yh)[:, None] + d[None, :], x, mask=mask)


@triton.jit
def store_codes(x, rows, scale_ptr, h, heads, d, D, stride_sh):
    """Rounds heads x [BLOCK_H, BLOCK] in fp32, zero outside, to codes at rows [BLOCK_H], as ops/kv_codes.py says."""
    codes, scale = round_rows(x)
    tl.store(rows[:, None] + d[None, :], codes, mask=(h < heads)[:, None] & (d < D)[None, :])
    tl.store(scale_ptr + h * stride_sh, scale, mask=h < heads)


@triton.jit
def _turned(
    x_ptr,
    cos_row,
    sin_row,
    h,
    heads,
    stride_xh,
    d,
    KIND: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
):
    """Dimensions d of heads h [BLOCK_H] of one token in fp32, rotated unless KIND is "none"; zero where there are none."""
    x_rows = x_ptr + (h * stride_xh)[:, None]
    inside = (h < heads)[:, None]
    x = tl.load(x_rows + d[None, :], mask=inside & (d < D)[None, :], other=0.0).to(tl.float32)
    if KIND != "none":
        if KIND == "half":
            other = tl.where(d < R // 2, d + R // 2, d - R // 2)
            sign = tl.where(d < R // 2, -1.0, 1.0)
        else:
            other = d ^ 1
            sign = tl.where(d % 2 == 0, -1.0, 1.0)
        y = tl.load(x_rows + other[None, :], mask=inside & (d < R)[None, :], other=0.0).to(
            tl.float32
        )
        cos = tl.load(cos_row + d, mask=d < R, other=1.0).to(tl.float32)
        sin = tl.load(sin_row + d, mask=d < R, other=0.0).to(tl.float32)
        x = x * cos[None, :] + y * (sin * sign)[None, :]
    return x


@triton.jit
def _rotate(
    x_ptr, y_ptr, cos_row, sin_row, h, heads, stride_xh, stride_yh,
    KIND: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Heads h [BLOCK] of one token."""
    pair = tl.arange(0, BLOCK_R)
    first, second = (pair, pair + R // 2) if KIND == "half" else (2 * pair, 2 * pair + 1)
    inside = pair < R // 2
    mask = (h < heads)[:, None] & inside[None, :]
    a = tl.load(x_ptr + (h * stride_xh)[:, None] + first[None, :], mask=mask, other=0.0).to(
        tl.float32
    )
    b = tl.load(x_ptr + (h * stride_xh)[:, None] + second[None, :], mask=mask, other=0.0).to(
        tl.float32
    )
    cos_a = tl.load(cos_row + first, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_a = tl.load(sin_row + first, mask=inside, other=0.0).to(tl.float32)[None, :]
    cos_b = tl.load(cos_row + second, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_b = tl.load(sin_row + second, mask=inside, other=0.0).to(tl.float32)[None, :]
    y_rows = y_ptr + (h * stride_yh)[:, None]
    tl.store(y_rows + first[None, :], (a * cos_a - b * sin_a).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(
        y_rows + second[None, :], (b * cos_b + a * sin_b).to(y_ptr.dtype.element_ty), mask=mask
    )
    if R < D:
        copy_heads(x_ptr, y_ptr, h, heads, stride_xh, stride_yh, R, D, BLOCK_REST)


@triton.jit
def rope_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, v_out_ptr, k_scale_ptr, v_scale_ptr, S, H, Hkv,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_qob, stride_qoh, stride_qos, stride_kob, stride_koh, stride_kos, stride_vob, stride_voh, stride_vos,
    stride_ksb, stride_ksh, stride_kss, stride_vsb, stride_vsh, stride_vss, stride_cb, stride_cs, stride_sb, stride_ss,
    KIND: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    # 1 which heads of which token am I: those of q come first, then k's, then v's
    b, s = (tl.program_id(0) // S).to(tl.int64), (tl.program_id(0) % S).to(tl.int64)
    part = tl.program_id(1)
    q_parts, kv_parts = tl.cdiv(H, BLOCK_H), tl.cdiv(Hkv, BLOCK_H)
    lane = tl.arange(0, BLOCK_H)
    # What is None is no argument of the compiled kernel: its branch must not be compiled, whatever part says.
    if part < q_parts:
        if q_ptr is not None:
            h = part * BLOCK_H + lane
            x, y = (
                q_ptr + b * stride_qb + s * stride_qs,
                q_out_ptr + b * stride_qob + s * stride_qos,
            )
            cos_row, sin_row = (
                cos_ptr + b * stride_cb + s * stride_cs,
                sin_ptr + b * stride_sb + s * stride_ss,
            )
            _rotate(
                x, y, cos_row, sin_row, h, H, stride_qh, stride_qoh, KIND, D, R, BLOCK_R, BLOCK_REST
            )
    elif part < q_parts + kv_parts:
        if k_ptr is not None:
            h = (part - q_parts) * BLOCK_H + lane
            k, k_to = (
                k_ptr + b * stride_kb + s * stride_ks,
                k_out_ptr + b * stride_kob + s * stride_kos,
            )
            cos_row, sin_row = None, None
            if KIND != "none":
                cos_row, sin_row = (
                    cos_ptr + b * stride_cb + s * stride_cs,
                    sin_ptr + b * stride_sb + s * stride_ss,
                )
            if k_scale_ptr is not None:
                scale = k_scale_ptr + b * stride_ksb + s * stride_kss
                d = tl.arange(0, BLOCK_D)
                turned = _turned(k, cos_row, sin_row, h, Hkv, stride_kh, d, KIND, D, R)
                store_codes(turned, k_to + h * stride_koh, scale, h, Hkv, d, D, stride_ksh)
            elif KIND == "none":
                copy_heads(k, k_to, h, Hkv, stride_kh, stride_koh, 0, D, BLOCK_D)
            else:
                _rotate(
                    k,
                    k_to,
                    cos_row,
                    sin_row,
                    h,
                    Hkv,
                    stride_kh,
                    stride_koh,
                    KIND,
                    D,
                    R,
                    BLOCK_R,
                    BLOCK_REST,
                )
    else:
        if v_ptr is not None:
            h = (part - q_parts - kv_parts) * BLOCK_H + lane
            v, v_to = (
                v_ptr + b * stride_vb + s * stride_vs,
                v_out_ptr + b * stride_vob + s * stride_vos,
            )
            if v_scale_ptr is not None:
                v_scale = v_scale_ptr + b * stride_vsb + s * stride_vss
                e = tl.arange(0, BLOCK_DV)
                values = _turned(v, None, None, h, Hkv, stride_vh, e, "none", DV, 0)
                store_codes(values, v_to + h * stride_voh, v_scale, h, Hkv, e, DV, stride_vsh)
            else:
                copy_heads(v, v_to, h, Hkv, stride_vh, stride_voh, 0, DV, BLOCK_DV)


def launch(
    p: RowProblem, c: RowTile, t: Target, q, q_out, cos, sin, kind: str, k=None, k_out=None, v=None, v_out=None,
    k_scale=None, v_scale=None,
) -> Launch:  # fmt: skip
    """q [B,H,S,D] → q_out; k, v [B,Hkv,S,·] → k_out, v_out of the same shapes, or None; cos and sin [B|1,1,S,R].

    kind "none" copies k and v only, and q is not written: q_out, cos and sin are None. With scales [B,Hkv,S] fp32, k_out and v_out
    take codes s8.
    """
    shape = (k if q is None else q).shape
    batch, length, d = shape[0], shape[2], shape[3]
    heads, kv_heads = (0 if q is None else q.shape[1]), (0 if k is None else k.shape[1])
    width, dv = (0 if cos is None else cos.shape[3]), (0 if v is None else v.shape[3])
    arguments = {
        "q_ptr": q, "k_ptr": k, "v_ptr": v, "cos_ptr": cos, "sin_ptr": sin,
        "q_out_ptr": q_out, "k_out_ptr": k_out, "v_out_ptr": v_out,
        "k_scale_ptr": k_scale, "v_scale_ptr": v_scale, "S": length, "H": heads, "Hkv": kv_heads,
    }  # fmt: skip
    for name, tensor in (("q", q), ("k", k), ("v", v), ("qo", q_out), ("ko", k_out), ("vo", v_out),
                         ("ks", k_scale), ("vs", v_scale)):  # fmt: skip
        for axis, stride in zip(
            "bhs", (0, 0, 0) if tensor is None else tensor.stride()[:3], strict=True
        ):
            arguments[f"stride_{name}{axis}"] = stride
    for name, table in (("c", cos), ("s", sin)):
        arguments[f"stride_{name}b"] = (
            0 if table is None or table.shape[0] == 1 else table.stride(0)
        )
        arguments[f"stride_{name}s"] = 0 if table is None else table.stride(2)
    constants = {
        "KIND": kind, "D": d, "DV": dv, "R": width,
        "BLOCK_R": triton.next_power_of_2(max(width // 2, 1)), "BLOCK_REST": triton.next_power_of_2(max(d - width, 1)),
        "BLOCK_D": triton.next_power_of_2(d), "BLOCK_DV": triton.next_power_of_2(max(dv, 1)), "BLOCK_H": c.block_k,
    }  # fmt: skip
    parts = triton.cdiv(heads, c.block_k) + 2 * triton.cdiv(kv_heads, c.block_k)
    return Launch(
        "rope.triton", rope_kernel, (batch * length, parts), arguments, constants, c.num_warps, c.num_stages,
        reads=("q_ptr", "k_ptr", "v_ptr", "cos_ptr", "sin_ptr"),
        writes=("q_out_ptr", "k_out_ptr", "v_out_ptr", "k_scale_ptr", "v_scale_ptr"),
    )  # fmt: skip


register(Kernel("rope.triton", "rope", 10, reject, tiles, launch))
