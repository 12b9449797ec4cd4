"""attention on Triton for many queries (Dao et al. 2022):  o = softmax(cap(scale · q kᵀ) + bias) v, keys in blocks, one pass.

q [B,H,Sq,D], k [B,Hkv,Skv,D], v [B,Hkv,Skv,Dv], o [B,H,Sq,Dv], last dimensions dense. What counts: key j for query i when j < length[b];
causal: j ≤ i + offset; window w: j > i + offset − w; boolean mask. Biases: float mask, ALiBi slope[h] · (j − i − offset). k and v may be
s8 with one fp32 scale per key and head, [B,Hkv,Skv] of any strides. A row without keys gives zeros. With products of s8 (SageAttention,
Zhang et al. 2024) queries are rounded as well, a scale a query; keys are s8 then, less their mean over all keys, which no softmax sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from llmopt.kernels.gemm import round_rows, tanh
from llmopt.kernels.tiles import reject_attention
from llmopt.launch import LARGEST_GPU_HEAD, AttentionProblem, AttentionTile, Launch
from llmopt.registry import Kernel, register
from llmopt.types import Target

# Up to which head size a row is the default, and its tiles, best first.
TILES = (
    (64, (AttentionTile(64, 64, 4, 3), AttentionTile(128, 64, 8, 3))),
    (128, (AttentionTile(64, 64, 4, 3), AttentionTile(64, 32, 4, 3))),
    (256, (AttentionTile(64, 32, 8, 2), AttentionTile(32, 32, 4, 2))),
)
WARP_GROUPS = ("sm_90", "sm_100")  # whose products leave registers free
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


def reject(p: AttentionProblem, t: Target) -> str:
    if max(p.head_dim, p.value_dim) > LARGEST_GPU_HEAD:
        return f"heads of {max(p.head_dim, p.value_dim)}: up to {LARGEST_GPU_HEAD} are possible"
    if p.dtype not in ("fp16", "bf16", "fp32"):
        return f"{p.dtype}: fp16, bf16 and fp32 are possible"
    if p.kv_dtype not in (p.dtype, "i8"):
        return f"values of {p.kv_dtype} for queries of {p.dtype}: {p.dtype} and i8 are possible"
    if p.qk not in ("same", "i8"):
        return f"products of {p.qk}: same and i8 are possible"
    return ""


def tiles(p: AttentionProblem, t: Target) -> tuple[AttentionTile, ...]:
    head = max(p.head_dim, p.value_dim)
    row = next(tiles for most, tiles in TILES if head <= most)
    if head > 64 and t.device == "cuda" and t.tier not in WARP_GROUPS:
        row = tuple(c for c in row if c != AttentionTile(64, 64, 4, 3))  # it spills
    return tuple(dict.fromkeys(fit(tile, p, t) for tile in row))


def reject_tile(c: AttentionTile, p: AttentionProblem, t: Target) -> str:
    if c.splits != 1:
        return f"splits={c.splits}: keys of a block of queries are not split"
    return reject_attention(c, p, t, head_block(p.head_dim), head_block(p.value_dim))


def fit(tile: AttentionTile, p: AttentionProblem, t: Target) -> AttentionTile:
    """The tile in the shared memory and registers there are."""
    block_m, block_n, stages, warps = tile.block_m, tile.block_n, tile.num_stages, tile.num_warps
    if t.tier == "sm_100" and block_m <= 64:
        warps = 4  # accumulators are in tensor memory, 64 rows of it belong to four warps
    if p.dtype == "fp32":
        block_m, block_n, stages = min(block_m, 32), 32, 2
    if p.kv_dtype == "i8" and p.head_dim > 64:
        block_n = 32  # widened codes are in registers on their way to the tensor cores
    if t.device == "hip":
        # 256 vector registers a lane: 128 rows of heads of 128 spill.
        block_m, stages = (block_m // 2 if block_m * p.head_dim > 64 * 64 else block_m), 1
    size = 4 if p.dtype == "fp32" else 2
    q = block_m * head_block(p.head_dim) * size
    pair = block_n * (head_block(p.head_dim) + head_block(p.value_dim)) * size
    while q + stages * pair > t.gpu.smem_block and stages > 1:
        stages -= 1
    return AttentionTile(block_m, block_n, warps, stages, tile.splits)


def head_block(size: int) -> int:
    return max(triton.next_power_of_2(size), 16)


@triton.jit
def keys_of(
    first,
    last,
    kv_len,
    offset,
    window,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Keys that some query from first to last may see are in [low, high), and without a window or a mask all see [0, middle).

    low and middle are multiples of BLOCK_N.
    """
    low = 0
    high = kv_len
    if CAUSAL:
        high = tl.minimum(kv_len, tl.maximum(last + offset + 1, 0))
    middle = high // BLOCK_N * BLOCK_N
    if CAUSAL:
        middle = tl.minimum(kv_len, tl.maximum(first + offset + 1, 0)) // BLOCK_N * BLOCK_N
    if WINDOWED:
        low = tl.maximum(first + offset - window + 1, 0) // BLOCK_N * BLOCK_N
    return low, middle, high


@triton.jit
def base_of(PLAIN: tl.constexpr):
    """What differences of scores are multiplied with to be exponents of 2; masks may hold numbers too large to be multiplied before."""
    return 1.0 if PLAIN else LOG2_E


@triton.jit
def _masked(
    s, inside, row_mask, mask_rows, i, j, stride_mn, offset, window,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Scores, -inf where query i does not see key j, with what a float mask adds."""
    seen = inside[None, :] & row_mask[:, None]
    if CAUSAL:
        seen &= j[None, :] <= (i + offset)[:, None]
    if WINDOWED:
        seen &= j[None, :] > (i + offset - window)[:, None]
    if MASK != "none":
        m = tl.load(mask_rows[:, None] + j.to(tl.int64)[None, :] * stride_mn, mask=seen, other=0)
        if MASK == "bool":
            seen &= m != 0
        else:
            s += m.to(tl.float32)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def attend(
    q, q_scale, shift, o_ptr, best, total, acc, i, row_mask, mask_rows, slopes, j0, high, k_base, v_base, k_scale_base, v_scale_base,
    stride_kn, stride_vn, stride_ksn, stride_vsn, stride_mn, offset, window, softcap, scale,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, PLAIN: tl.constexpr, ALL: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One block of keys for rows of queries: (largest score, Σ exp, Σ exp · v) so far → with these keys.

    ALL: every row sees all of these keys. PLAIN: nothing is added to scores, which are then exponents of 2, as `base_of` says.
    """
    to_base = base_of(PLAIN)
    first_scale = scale * LOG2_E if PLAIN else scale
    j = j0 + tl.arange(0, BLOCK_N)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    # Without keys to leave out and with heads that fill their blocks, nothing is compared.
    inside = j < j0 + BLOCK_N if ALL else j < high
    far = j.to(tl.int64)
    k_rows = k_base + far[None, :] * stride_kn + d[:, None]
    whole: tl.constexpr = ALL and D == BLOCK_D and DV == BLOCK_DV
    k = tl.load(k_rows) if whole else tl.load(k_rows, mask=inside[None, :] & (d < D)[:, None], other=0)  # fmt: skip
    if q_scale is not None:
        s = tl.dot(q, k, out_dtype=tl.int32).to(tl.float32) * (q_scale * first_scale)[:, None]
    else:
        if k_scale_base is not None:
            k = k.to(tl.float32).to(q.dtype)  # codes are exact in fp16 and bf16
        s = tl.dot(q, k, input_precision="ieee") * first_scale
    if k_scale_base is not None:
        s *= tl.load(k_scale_base + far * stride_ksn, mask=inside, other=0.0)[None, :]
    if CAPPED:
        if shift is not None:
            s += shift[:, None]
        s = softcap * tanh(s / softcap)
    if slopes is not None:
        s += slopes[:, None] * (j[None, :] - (i + offset)[:, None]).to(tl.float32)
    if not ALL:
        s = _masked(s, inside, row_mask, mask_rows, i, j, stride_mn, offset, window, MASK, CAUSAL, WINDOWED)  # fmt: skip
    higher = tl.maximum(best, tl.max(s, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # no key so far: exp(-inf - 0) = 0
    p = tl.exp2((s - base[:, None]) * to_base)
    shrink = tl.exp2((best - base) * to_base)
    total = total * shrink + tl.sum(p, 1)
    v_rows = v_base + far[:, None] * stride_vn + dv[None, :]
    v = tl.load(v_rows) if whole else tl.load(v_rows, mask=inside[:, None] & (dv < DV)[None, :], other=0)  # fmt: skip
    if v_scale_base is not None:
        p *= tl.load(v_scale_base + far * stride_vsn, mask=inside, other=0.0)[None, :]
        v = v.to(tl.float32).to(o_ptr.dtype.element_ty)
    acc = tl.dot(p.to(o_ptr.dtype.element_ty), v, acc * shrink[:, None], input_precision="ieee")
    return higher, total, acc


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, k_scale_ptr, v_scale_ptr, mean_ptr, mask_ptr, slopes_ptr, lengths_ptr,
    H, group, Sq, Skv, stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ksb, stride_ksh, stride_ksn, stride_vsb, stride_vsh, stride_vsn,
    stride_ob, stride_oh, stride_om, stride_mb, stride_mh, stride_mm, stride_mn, offset, window, softcap, scale,
    QK: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, PLAIN: tl.constexpr,
    NO_KEYS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    # 1 which queries of which head am I
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    # Blocks of later queries see more keys under a causal mask: they begin first.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    i = first + tl.arange(0, BLOCK_M)
    row_mask = i < Sq
    # 2 pointers
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    far = i.to(tl.int64)
    q = tl.load(q_ptr + b * stride_qb + h * stride_qh + far[:, None] * stride_qm + d[None, :],
                mask=row_mask[:, None] & (d < D)[None, :], other=0.0)  # fmt: skip
    hk = h // group
    q_scale = None
    shift = None
    if QK == "i8":
        wide = q.to(tl.float32)
        if mean_ptr is not None:  # what the mean of the keys would have added to a row's scores
            mean = tl.load(mean_ptr + (b * (H // group) + hk) * D + d, mask=d < D, other=0.0)
            shift = tl.sum(wide * mean[None, :], 1) * scale
        q, q_scale = round_rows(wide)
    k_base = k_ptr + b * stride_kb + hk * stride_kh
    v_base = v_ptr + b * stride_vb + hk * stride_vh
    kv_len = Skv
    if lengths_ptr is not None:
        kv_len = tl.minimum(Skv, tl.load(lengths_ptr + b).to(tl.int32))
    slopes = None
    if slopes_ptr is not None:
        slopes = tl.load(slopes_ptr + h + tl.zeros((BLOCK_M,), tl.int32))
    mask_rows = None
    if MASK != "none":
        mask_rows = mask_ptr + b * stride_mb + h * stride_mh + far * stride_mm
    # 3 loop over the keys
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    low, middle, high = keys_of(
        first,
        tl.minimum(first + BLOCK_M, Sq) - 1,
        kv_len,
        offset,
        window,
        CAUSAL,
        WINDOWED,
        BLOCK_N,
    )
    k_scale_base = (
        k_scale_ptr + b * stride_ksb + hk * stride_ksh if k_scale_ptr is not None else None
    )
    v_scale_base = (
        v_scale_ptr + b * stride_vsb + hk * stride_vsh if v_scale_ptr is not None else None
    )
    if APART:
        for j0 in range(low, middle, BLOCK_N):
            best, total, acc = attend(
                q, q_scale, shift, o_ptr, best, total, acc, i, row_mask, mask_rows, slopes, j0, high, k_base, v_base,
                k_scale_base, v_scale_base, stride_kn, stride_vn, stride_ksn, stride_vsn, stride_mn, offset, window, softcap, scale,
                MASK, CAUSAL, WINDOWED, CAPPED, PLAIN, True, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
        low = middle
    for j0 in range(low, high, BLOCK_N):
        best, total, acc = attend(
            q, q_scale, shift, o_ptr, best, total, acc, i, row_mask, mask_rows, slopes, j0, high, k_base, v_base,
            k_scale_base, v_scale_base, stride_kn, stride_vn, stride_ksn, stride_vsn, stride_mn, offset, window, softcap, scale,
            MASK, CAUSAL, WINDOWED, CAPPED, PLAIN, False, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    # 4 divide and 5 store
    o = acc / tl.where(total == 0.0, NO_KEYS, total)[:, None]
    tl.store(o_ptr + b * stride_ob + h * stride_oh + far[:, None] * stride_om + dv[None, :],
             o.to(o_ptr.dtype.element_ty), mask=row_mask[:, None] & (dv < DV)[None, :])  # fmt: skip


@dataclass(frozen=True)
class Scores:
    """What else decides about scores: mask broadcast to [B,H,Sq,Skv], slopes [H] fp32, lengths [B], scales [B,Hkv,Skv] fp32.

    mean [B,Hkv,D] fp32, dense: what was subtracted from keys before they were rounded; a softcap needs it, a softmax does not.
    """

    scale: float = 1.0
    causal: bool = False
    offset: int = 0
    window: int = 0
    softcap: float = 0.0
    mask: Any = None
    slopes: Any = None
    lengths: Any = None
    k_scale: Any = None
    v_scale: Any = None
    mean: Any = None
    nan_rows: bool = False  # what a row without keys gives; else zeros

    def arguments(self) -> dict[str, Any]:
        mask = self.mask
        if mask is not None and mask.dtype == torch.bool:
            mask = mask.view(torch.uint8)
        strides = (0, 0, 0, 0) if mask is None else mask.stride()
        return {
            "mask_ptr": mask, "slopes_ptr": self.slopes, "lengths_ptr": self.lengths,
            "k_scale_ptr": self.k_scale, "v_scale_ptr": self.v_scale, **_strides("ks", self.k_scale), **_strides("vs", self.v_scale),
            **dict(zip(("stride_mb", "stride_mh", "stride_mm", "stride_mn"), strides, strict=True)),
            "offset": self.offset, "window": self.window, "softcap": float(self.softcap), "scale": float(self.scale),
        }  # fmt: skip

    def constants(self, p: AttentionProblem) -> dict[str, Any]:
        kind = "none" if self.mask is None else "bool" if self.mask.dtype == torch.bool else "float"
        return {
            "MASK": kind, "CAUSAL": self.causal, "WINDOWED": self.window > 0, "CAPPED": self.softcap > 0,
            "PLAIN": self.softcap <= 0 and self.slopes is None and kind != "float",
            "NO_KEYS": 0.0 if self.nan_rows else 1.0,  # the sum of none
            "D": p.head_dim, "DV": p.value_dim,
            "BLOCK_D": head_block(p.head_dim), "BLOCK_DV": head_block(p.value_dim),
        }  # fmt: skip


def _strides(name: str, tensor: Any) -> dict[str, int]:
    """Of the first three dimensions; zeros where there is no tensor."""
    strides = (0, 0, 0) if tensor is None else tensor.stride()[:3]
    return dict(zip((f"stride_{name}{axis}" for axis in "bhn"), strides, strict=True))


READS = (
    "q_ptr",
    "k_ptr",
    "v_ptr",
    "k_scale_ptr",
    "v_scale_ptr",
    "mean_ptr",
    "mask_ptr",
    "slopes_ptr",
    "lengths_ptr",
)


def operands(p: AttentionProblem, q, k, v, o, scores: Scores) -> dict[str, Any]:
    """The arguments of an attention launch on [B,·,S,·] tensors."""
    arguments = {"q_ptr": q, "k_ptr": k, "v_ptr": v, "o_ptr": o, "H": p.heads, "group": p.heads // p.kv_heads,
                 "Sq": p.q_len, "Skv": p.kv_len, **scores.arguments()}  # fmt: skip
    for name, tensor, row in (("q", q, "m"), ("k", k, "n"), ("v", v, "n"), ("o", o, "m")):
        for axis, stride in zip(("b", "h", row), tensor.stride()[:3], strict=True):
            arguments[f"stride_{name}{axis}"] = stride
    return arguments


def launch(p: AttentionProblem, c: AttentionTile, t: Target, q, k, v, o, scores: Scores) -> Launch:
    """q, k, v, o as above, of any strides with dense last dimensions."""
    constants = {**scores.constants(p), "QK": p.qk, "BLOCK_M": c.block_m, "BLOCK_N": c.block_n}
    # Keys that all see have a loop of their own where two loops do not spill: sums of warp groups leave registers.
    everywhere = constants["MASK"] == "none" and not constants["WINDOWED"]
    constants["APART"] = everywhere and t.tier in WARP_GROUPS
    if p.qk == "i8":
        constants["BLOCK_D"] = max(
            constants["BLOCK_D"], 32
        )  # fewer products of s8 no instruction has
    mean = scores.mean if scores.softcap > 0 else None
    return Launch(
        "attention.triton", attention_kernel, (triton.cdiv(p.q_len, c.block_m), p.batch * p.heads),
        {**operands(p, q, k, v, o, scores), "mean_ptr": mean}, constants, c.num_warps, c.num_stages, reads=READS, writes=("o_ptr",),
    )  # fmt: skip


register(
    Kernel(
        "attention.triton", "attention", 20, reject, tiles, launch, attention_kernel, reject_tile
    )
)
