"""attention on Triton for few queries: the keys of one kv head are split among blocks, and the last one to finish merges them.

Same operands as attention.py. All query heads of a kv head, and all queries, are rows of one block, so that keys are read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from llmopt.counters import counters
from llmopt.kernels.attention import (
    READS,
    Scores,
    attend,
    base_of,
    fit,
    head_block,
    keys_of,
    operands,
)
from llmopt.kernels.attention import reject as reject_operands
from llmopt.kernels.gemm import arrive
from llmopt.kernels.tiles import reject_attention
from llmopt.launch import AttentionProblem, AttentionTile, Launch
from llmopt.registry import Kernel, register
from llmopt.types import Target

MOST_ROWS = 64
FEWEST_KEYS = 64  # of one split
MOST_SPLITS = 64
_MERGED = 8192  # numbers of splits that are in registers at once


def reject(p: AttentionProblem, t: Target) -> str:
    rows = p.heads // p.kv_heads * p.q_len
    if rows > MOST_ROWS:
        return f"{rows} rows a kv head: up to {MOST_ROWS} are possible"
    if p.qk != "same":
        return "few queries are not worth rounding every key"
    return reject_operands(p, t)


def tiles(p: AttentionProblem, t: Target) -> tuple[AttentionTile, ...]:
    rows = rows_of(p)
    wide = max(p.head_dim, p.value_dim) > 128
    warps = 2 if rows == 16 and t.tier == "sm_90" else 4
    seeds = (AttentionTile(rows, 32 if wide else 64, warps, 3), AttentionTile(rows, 32, warps, 4))
    splits = 1
    while (
        p.batch * p.kv_heads * splits * 2 <= t.gpu.sms
        and p.kv_len >= FEWEST_KEYS * splits * 2
        and splits < MOST_SPLITS
    ):
        splits *= 2
    fitting = (
        fit(AttentionTile(rows, c.block_n, c.num_warps, c.num_stages, splits), p, t) for c in seeds
    )
    return tuple(
        dict.fromkeys(
            AttentionTile(rows, c.block_n, c.num_warps, c.num_stages, splits) for c in fitting
        )
    )


def reject_tile(c: AttentionTile, p: AttentionProblem, t: Target) -> str:
    if c.block_m != rows_of(p):
        return f"block_m={c.block_m}: all {rows_of(p)} rows of a kv head are one block"
    if not 1 <= c.splits <= MOST_SPLITS or c.splits & (c.splits - 1):
        return f"splits={c.splits}: powers of two up to {MOST_SPLITS} are possible"
    return reject_attention(c, p, t, head_block(p.head_dim), head_block(p.value_dim))


def rows_of(p: AttentionProblem) -> int:
    """Rows of one block: every query of every head that shares keys."""
    return max(triton.next_power_of_2(p.heads // p.kv_heads * p.q_len), 16)


@triton.jit
def _merge(
    slots, size, PLAIN: tl.constexpr, NO_KEYS: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, BLOCK_DV: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """What all splits found, [ROWS, BLOCK_DV], read AT_ONCE splits at a time: one after the other each would wait for memory."""
    row, dv = tl.arange(0, ROWS), tl.arange(0, BLOCK_DV)
    # .cg reads the L2 cache: other multiprocessors wrote these.
    scores = slots + tl.arange(0, SPLITS)[:, None] * size + ROWS * BLOCK_DV + row[None, :]
    best = tl.load(scores, cache_modifier=".cg")
    highest = tl.max(best, 0)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    shares = tl.exp2((best - base[None, :]) * base_of(PLAIN))
    whole = tl.sum(shares * tl.load(scores + ROWS, cache_modifier=".cg"), 0)
    merged = tl.zeros((ROWS, BLOCK_DV), tl.float32)
    for first in range(0, SPLITS, AT_ONCE):
        slot = slots + (first + tl.arange(0, AT_ONCE)) * size
        theirs = tl.load(slot[:, None] + ROWS * BLOCK_DV + row[None, :], cache_modifier=".cg")
        weight = tl.exp2((theirs - base[None, :]) * base_of(PLAIN))
        part = slot[:, None, None] + row[None, :, None] * BLOCK_DV + dv[None, None, :]
        merged += tl.sum(tl.load(part, cache_modifier=".cg") * weight[:, :, None], 0)
    return merged / tl.where(whole == 0.0, NO_KEYS, whole)[:, None]


@triton.jit
def attention_decode_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, k_scale_ptr, v_scale_ptr, mask_ptr, slopes_ptr, lengths_ptr, partial_ptr, counter_ptr,
    H, group, Sq, Skv, stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ksb, stride_ksh, stride_ksn, stride_vsb, stride_vsh, stride_vsn,
    stride_ob, stride_oh, stride_om, stride_mb, stride_mh, stride_mm, stride_mn, offset, window, softcap, scale,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, PLAIN: tl.constexpr,
    NO_KEYS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    # 1 which keys of which kv head am I; row r is query r % Sq of the head's r // Sq
    head, split = tl.program_id(0), tl.program_id(1)
    kv_heads = H // group
    b, hk = (head // kv_heads).to(tl.int64), (head % kv_heads).to(tl.int64)
    r = tl.arange(0, BLOCK_M)
    row_mask = r < group * Sq
    i, h = r % Sq, hk * group + r // Sq
    # 2 pointers
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    q = tl.load(q_ptr + b * stride_qb + (h * stride_qh + i * stride_qm)[:, None] + d[None, :],
                mask=row_mask[:, None] & (d < D)[None, :], other=0.0)  # fmt: skip
    k_base = k_ptr + b * stride_kb + hk * stride_kh
    v_base = v_ptr + b * stride_vb + hk * stride_vh
    kv_len = Skv
    if lengths_ptr is not None:
        kv_len = tl.minimum(Skv, tl.load(lengths_ptr + b).to(tl.int32))
    slopes = None
    if slopes_ptr is not None:
        slopes = tl.load(slopes_ptr + h, mask=row_mask, other=0.0)
    mask_rows = None
    if MASK != "none":
        mask_rows = mask_ptr + b * stride_mb + h * stride_mh + i * stride_mm
    # 3 loop over this split's keys
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    low, _, high = keys_of(0, Sq - 1, kv_len, offset, window, CAUSAL, WINDOWED, BLOCK_N)
    share = tl.cdiv(tl.cdiv(high - low, BLOCK_N), SPLITS) * BLOCK_N
    first = low + split * share
    last = tl.minimum(first + share, high)
    k_scale_base = (
        k_scale_ptr + b * stride_ksb + hk * stride_ksh if k_scale_ptr is not None else None
    )
    v_scale_base = (
        v_scale_ptr + b * stride_vsb + hk * stride_vsh if v_scale_ptr is not None else None
    )
    for j0 in range(first, last, BLOCK_N):
        best, total, acc = attend(
            q, None, None, o_ptr, best, total, acc, i, row_mask, mask_rows, slopes, j0, last, k_base, v_base,
            k_scale_base, v_scale_base, stride_kn, stride_vn, stride_ksn, stride_vsn, stride_mn, offset, window, softcap, scale,
            MASK, CAUSAL, WINDOWED, CAPPED, PLAIN, False, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    # 4 merge, divide and 5 store, by the last block of this head
    o_rows = o_ptr + b * stride_ob + h * stride_oh + i * stride_om
    o_mask = row_mask[:, None] & (dv < DV)[None, :]
    if SPLITS == 1:
        o = acc / tl.where(total == 0.0, NO_KEYS, total)[:, None]
        tl.store(o_rows[:, None] + dv[None, :], o.to(o_ptr.dtype.element_ty), mask=o_mask)
    else:
        # A slot holds Σ exp · v [ROWS, BLOCK_DV], then the largest scores [ROWS], then Σ exp [ROWS]: of the rows there are.
        size = ROWS * BLOCK_DV + 2 * ROWS
        slots = partial_ptr + head.to(tl.int64) * SPLITS * size
        mine = slots + split * size
        tl.store(mine + r[:, None] * BLOCK_DV + dv[None, :], acc, mask=(r < ROWS)[:, None])
        tl.store(mine + ROWS * BLOCK_DV + r, best, mask=r < ROWS)
        tl.store(mine + ROWS * BLOCK_DV + ROWS + r, total, mask=r < ROWS)
        if arrive(counter_ptr, head) == SPLITS - 1:
            merged = _merge(slots, size, PLAIN, NO_KEYS, SPLITS, ROWS, BLOCK_DV, AT_ONCE)
            m = tl.arange(0, ROWS)
            o_far = o_ptr + b * stride_ob + (hk * group + m // Sq) * stride_oh + m % Sq * stride_om
            tl.store(o_far[:, None] + dv[None, :], merged.to(o_ptr.dtype.element_ty),
                     mask=(m < group * Sq)[:, None] & (dv < DV)[None, :])  # fmt: skip
            tl.store(counter_ptr + head, 0)  # ready for the next launch


def launch(p: AttentionProblem, c: AttentionTile, t: Target, q, k, v, o, scores: Scores) -> Launch:
    """As attention.launch."""
    partial = counter = None
    rows = triton.next_power_of_2(p.heads // p.kv_heads * p.q_len)
    if c.splits > 1:
        size = rows * (head_block(p.value_dim) + 2)
        partial = torch.empty(
            p.batch * p.kv_heads * c.splits * size, dtype=torch.float32, device=q.device
        )
        counter = counters(q.device, p.batch * p.kv_heads)
    arguments = {**operands(p, q, k, v, o, scores), "partial_ptr": partial, "counter_ptr": counter}
    at_once = min(c.splits, max(_MERGED // (rows * head_block(p.value_dim)), 1))
    constants = {**scores.constants(p), **c.constexprs(), "ROWS": rows, "AT_ONCE": at_once}
    return Launch(
        "attention_decode.triton", attention_decode_kernel, (p.batch * p.kv_heads, c.splits), arguments, constants,
        c.num_warps, c.num_stages, reads=READS, writes=("o_ptr",),
    )  # fmt: skip


register(
    Kernel(
        "attention_decode.triton",
        "attention",
        10,
        reject,
        tiles,
        launch,
        attention_decode_kernel,
        reject_tile,
    )
)
