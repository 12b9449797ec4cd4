"""attention: softmax(scale · q kᵀ + bias) v with grouped heads, masks as structure, and an optional cache append in front.

A score (i, j) counts when: causal → j ≤ i + offset; window > 0 → j > i + offset − window; boolean mask → mask[i, j].
softcap c > 0 replaces a score s by c · tanh(s / c) (Gemma 2) before the bias is added.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmopt.ops.kv_codes import (
    SCALE_BYTES,
    dequantize_arrays,
    dequantize_rows,
    quantize_arrays,
    quantize_rows,
)
from llmopt.ops.reference import outside_autocast
from llmopt.ops.rope import rope
from llmopt.sizes import Size

# Kinds of nodes that append to caches: their first result is the attention, the others are the grown caches.
APPENDS = ("llmopt.attention_append", "llmopt.attention_append_arrays")


def _allowed(q: Tensor, k: Tensor, causal: bool, offset: int, window: int) -> Tensor | None:
    if not causal and window == 0:
        return None
    i = torch.arange(q.shape[2], device=q.device)[:, None] + offset
    j = torch.arange(k.shape[2], device=q.device)[None, :]
    allowed = j <= i if causal else torch.ones_like(j <= i)
    return allowed & (j > i - window) if window else allowed


@outside_autocast
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float = 1.0,
    causal: bool = False,
    causal_offset: int = 0,
    window: int = 0,
    softcap: float = 0.0,
    *,
    qk: str = "same",
    products: str = "same",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    mirror: Tensor | None = None,
    sinks: Tensor | None = None,
    nan_rows: bool = False,
) -> Tensor:
    """q [B,H,Sq,D], k [B,Hkv,Skv,D], v [B,Hkv,Skv,Dv] → [B,H,Sq,Dv] in q's dtype; H a multiple of Hkv.

    k and v may be int8 rows of ops.kv_codes, four bytes longer; or int8 codes with k_scale and v_scale [B,Hkv,Skv,1] beside them.
    mask: bool (True = attend) or additive float, broadcastable to [B,H,Sq,Skv]. Computed in float32. A row with no key gives zeros.
    qk: "int8" rounds queries and keys to signed bytes before they are multiplied, a scale for each, keys less their mean over all
    positions (unless they are codes already); a kernel may leave few queries as they are.
    products: "bf16" allows a kernel to round what it multiplies to bf16; sums and softmax stay float32. Here nothing is rounded.
    mirror: k and v are a cache beside which a kernel may keep int8 rows, and read these for few queries; of these slots [Sn] int64
    were just written, others not since the last call. Here k and v are read.
    nan_rows: a row with no key gives NaN, as a softmax of nothing but -inf does.
    sinks: [B,H,Sq,1] floats, one more score a row in the softmax, which nothing scales, caps or masks and which has no value.
    """
    group = q.shape[1] // k.shape[1]
    floats = [_widened(t, scale) for t, scale in ((k, k_scale), (v, v_scale))]
    kf, vf = (t.repeat_interleave(group, 1) if group > 1 else t for t in floats)
    if qk == "int8":
        scores = _rounded_scores(q.float(), kf, k.dtype == torch.int8) * scale
    else:
        scores = torch.matmul(q.float(), kf.transpose(2, 3)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    allowed = _allowed(q, k, causal, causal_offset, window)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, float("-inf"))
            if mask.dtype == torch.bool
            else scores + mask.float()
        )
    dead = (scores == float("-inf")).all(-1, keepdim=True)
    if nan_rows:
        dead = torch.zeros_like(dead)
    if sinks is not None:
        scores = torch.cat((scores, sinks.float().expand(*scores.shape[:3], 1)), -1)
    weights = torch.softmax(scores, -1)[..., : kf.shape[2]].masked_fill(dead, 0.0)
    return torch.matmul(weights, vf).to(q.dtype)


def _widened(t: Tensor, scale: Tensor | None) -> Tensor:
    if scale is not None:
        return dequantize_arrays(t, scale)
    return dequantize_rows(t) if t.dtype == torch.int8 else t.float()


def _rounded_scores(q: Tensor, k: Tensor, is_rounded: bool) -> Tensor:
    """q kᵀ of queries and keys that are rounded row by row; k [B,H,Skv,D] is less its mean meanwhile, unless it is rounded."""
    queries = dequantize_rows(quantize_rows(q))
    if is_rounded:
        return torch.matmul(queries, k.transpose(2, 3))
    mean = k.mean(2, keepdim=True)
    keys = dequantize_rows(quantize_rows(k - mean))
    return torch.matmul(queries, keys.transpose(2, 3)) + torch.matmul(q, mean.transpose(2, 3))


def _fake(
    q: Tensor, k: Tensor, v: Tensor, *_settings: Any, v_scale: Tensor | None = None, **_named: Any
) -> Tensor:
    # Memory order [B,Sq,H,Dv]: the projection that follows reads rows of H·Dv.
    b, h, s, _ = q.shape
    d = v.shape[3] - (SCALE_BYTES if v.dtype == torch.int8 and v_scale is None else 0)
    strides = (s * h * d, d, h * d, 1)
    return torch.empty_strided((b, h, s, d), strides, dtype=q.dtype, device=q.device)


attention.fake = _fake  # type: ignore[attr-defined]


@outside_autocast
def attention_append(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    rope_kind: str = "none",
    *settings: Any,
    as_codes: bool = False,
    qk: str = "same",
    products: str = "same",
    mirror: bool = False,
    sinks: Tensor | None = None,
    nan_rows: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotates q and k_new, appends k_new and v_new [B,Hkv,Sn,·] to the caches [B,Hkv,S,·], attends.

    Returns (out, keys, values); keys and values hold S + Sn positions. A cache of None is empty.
    settings: mask, scale, causal, causal_offset, window and softcap of `attention`, and its sinks and nan_rows; mirror: True where a
    kernel may keep int8 rows.
    as_codes: the caches are int8 rows of ops.kv_codes; what is appended is rounded first.
    """
    q, k_new = _rotated(q, k_new, cos, sin, rope_kind)
    if as_codes:
        k_new, v_new = quantize_rows(k_new), quantize_rows(v_new)
    keys, values = _joined(k_cache, k_new), _joined(v_cache, v_new)
    how: dict[str, Any] = {"qk": qk, "products": products, "sinks": sinks, "nan_rows": nan_rows}
    out = attention(q, keys, values, *settings, **how)
    return out, keys, values


def _rotated(
    q: Tensor, k_new: Tensor, cos: Tensor | None, sin: Tensor | None, kind: str
) -> tuple[Tensor, Tensor]:
    if kind == "none":
        return q, k_new
    assert cos is not None
    assert sin is not None
    return rope(q, cos, sin, kind), rope(k_new, cos, sin, kind)


def _joined(cache: Tensor | None, new: Tensor) -> Tensor:
    return new if cache is None else torch.cat((cache, new), 2)


def slab_empty(
    b: Size, h: Size, s: Size, d: Size, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A [B,H,S,D] tensor laid out [S,B,H,D]: its strides do not depend on S, so it can grow in place."""
    strides = (h * d, d, b * h * d, 1)
    return torch.empty_strided((b, h, s, d), strides, dtype=dtype, device=device)


def _fake_append(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    *_settings: Any,
    as_codes: bool = False,
    **_named: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    b, h, s, d = k_new.shape
    dtype, more = (torch.int8, SCALE_BYTES) if as_codes else (k_new.dtype, 0)
    k_len = s if k_cache is None else k_cache.shape[2] + s
    v_len = s if v_cache is None else v_cache.shape[2] + s
    keys = slab_empty(b, h, k_len, d + more, dtype, k_new.device)
    values = slab_empty(b, h, v_len, v_new.shape[3] + more, dtype, v_new.device)
    return _fake(q, keys, values), keys, values


attention_append.fake = _fake_append  # type: ignore[attr-defined]


@outside_autocast
def attention_append_arrays(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    rope_kind: str = "none",
    *settings: Any,
    qk: str = "same",
    products: str = "same",
    sinks: Tensor | None = None,
    nan_rows: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """attention_append over caches of codes [B,Hkv,S,·] int8 whose scales [B,Hkv,S,1] float32 are tensors of their own.

    Returns (out, keys, values, scales of keys, scales of values); caches and scales of None are empty.
    """
    q, k_new = _rotated(q, k_new, cos, sin, rope_kind)
    (k_codes, k_more), (v_codes, v_more) = quantize_arrays(k_new), quantize_arrays(v_new)
    keys, values = _joined(k_cache, k_codes), _joined(v_cache, v_codes)
    k_scale, v_scale = _joined(k_scales, k_more), _joined(v_scales, v_more)
    how: dict[str, Any] = {"qk": qk, "products": products, "sinks": sinks, "nan_rows": nan_rows}
    out = attention(q, keys, values, *settings, **how, k_scale=k_scale, v_scale=v_scale)
    return out, keys, values, k_scale, v_scale


def _fake_append_arrays(
    q: Tensor, k_new: Tensor, v_new: Tensor, k_cache: Tensor | None, *_more: Any, **_named: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    b, h, s, _ = k_new.shape
    length, device = s if k_cache is None else k_cache.shape[2] + s, k_new.device
    keys, values = (
        slab_empty(b, h, length, t.shape[3], torch.int8, device) for t in (k_new, v_new)
    )
    scales = [slab_empty(b, h, length, 1, torch.float32, device) for _ in range(2)]
    out = _fake(q, keys, values, v_scale=scales[1])
    return out, keys, values, scales[0], scales[1]


attention_append_arrays.fake = _fake_append_arrays  # type: ignore[attr-defined]
