"""Forms of attention: prompts and decoding, heads of 128 and 64, caches of codes, products of codes; and how keys become codes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from llmopt.kernels.attention import Scores
from llmopt.kernels.round_keys import parts_of
from llmopt.launch import AttentionProblem, RowProblem
from llmopt.ops.kv_codes import dequantize_arrays, quantize_arrays
from torch import Tensor

from bench.gpu.forms.work import Form, Sizes, Work, random, random_codes, size

Length = Callable[[Sizes], int]


def _heads(device: torch.device, length: int, heads: int, head: int) -> Tensor:
    """[1,H,S,D] in the memory order of projections, [1,S,H,D]."""
    return random(device, 1, length, heads, head).transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    causal = q.shape[2] > 1
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def _flops(s: Sizes, q_len: int, kv_len: int, head: int) -> float:
    """Scores that are masked are not counted."""
    return (2.0 if q_len > 1 else 4.0) * s.heads * q_len * kv_len * head


def _attention(queries: Length, keys: Length, head: int | None = None) -> Form:
    def make(s: Sizes, device: torch.device) -> Work:
        q_len, kv_len, d = queries(s), keys(s), head or s.head
        q, o = (_heads(device, q_len, s.heads, d) for _ in range(2))
        k, v = (_heads(device, kv_len, s.kv_heads, d) for _ in range(2))
        causal = q_len > 1
        p = AttentionProblem(1, s.heads, s.kv_heads, q_len, kv_len, d, d, "fp16", "fp16", causal)
        scores = Scores(scale=d**-0.5, causal=causal, offset=kv_len - q_len)
        return Work(
            "attention", p, (q, k, v, o, scores), o, lambda: _sdpa(q.double(), k.double(), v.double()),
            {"SDPA": lambda: _sdpa(q, k, v)}, _flops(s, q_len, kv_len, d), size(q, k, v, o),
        )  # fmt: skip

    return make


def _over_codes(queries: Length, keys: Length) -> Form:
    """Keys and values of llmopt.KVCache."""

    def make(s: Sizes, device: torch.device) -> Work:
        q_len, kv_len, d = queries(s), keys(s), s.head
        q, o = (_heads(device, q_len, s.heads, d) for _ in range(2))
        k, v = (random_codes(device, 1, s.kv_heads, kv_len, d) for _ in range(2))
        k_scale, v_scale = (
            (1 + torch.rand(1, s.kv_heads, kv_len, device=device)) / 127 for _ in range(2)
        )
        k16, v16 = (_heads(device, kv_len, s.kv_heads, d) for _ in range(2))

        def truth() -> Tensor:
            wide = (
                x.double() * scale.double()[..., None] for x, scale in ((k, k_scale), (v, v_scale))
            )
            return _sdpa(q.double(), *wide)

        causal = q_len > 1
        p = AttentionProblem(1, s.heads, s.kv_heads, q_len, kv_len, d, d, "fp16", "i8", causal)
        scores = Scores(
            scale=d**-0.5, causal=causal, offset=kv_len - q_len, k_scale=k_scale, v_scale=v_scale
        )
        return Work(
            "attention", p, (q, k, v, o, scores), o, truth, {"SDPA, fp16 cache": lambda: _sdpa(q, k16, v16)},
            _flops(s, q_len, kv_len, d), size(q, k, v, k_scale, v_scale, o),
        )  # fmt: skip

    return make


def _of_codes(s: Sizes, device: torch.device) -> Work:
    """Products of codes of queries and keys, options={"attention": "int8"}."""
    length, d = s.prompt, s.head
    q, o = (_heads(device, length, s.heads, d) for _ in range(2))
    k, v = (_heads(device, length, s.kv_heads, d) for _ in range(2))
    codes, scales = quantize_arrays(k)

    def truth() -> Tensor:
        """Queries are rounded as well."""
        wide = (
            dequantize_arrays(*quantize_arrays(q), torch.float64),
            dequantize_arrays(codes, scales, torch.float64),
        )
        return _sdpa(*wide, v.double())

    p = AttentionProblem(
        1, s.heads, s.kv_heads, length, length, d, d, "fp16", "fp16", True, qk="i8"
    )
    scores = Scores(scale=d**-0.5, causal=True, k_scale=scales[..., 0])
    return Work(
        "attention", p, (q, codes, v, o, scores), o, truth, {"SDPA": lambda: _sdpa(q, k, v)},
        _flops(s, length, length, d), size(q, codes, v, o),
    )  # fmt: skip


def _sums(k: Tensor) -> Tensor:
    """Of each part of the positions: k [B,H,S,D] → [B,H,parts,D] fp32."""
    parts = parts_of(k.shape[2])
    share = -(-k.shape[2] // parts)
    padded = F.pad(k.float(), (0, 0, 0, parts * share - k.shape[2]))
    return padded.unflatten(2, (parts, share)).sum(3)


def _sum_keys(s: Sizes, device: torch.device) -> Work:
    k = _heads(device, s.prompt, s.kv_heads, s.head)
    sums, p = torch.empty_like(_sums(k)), RowProblem(s.kv_heads * s.prompt, s.head, "fp16")
    return Work(
        "sum_keys", p, (k, sums), sums, lambda: _sums(k).double(), {"PyTorch": lambda: k.sum(2)}, 0.0, size(k, sums)
    )  # fmt: skip


def _round_keys(s: Sizes, device: torch.device) -> Work:
    k = _heads(device, s.prompt, s.kv_heads, s.head)
    sums, codes = _sums(k).contiguous(), torch.empty(k.shape, dtype=torch.int8, device=device)
    scale, mean = torch.empty(k.shape[:3], device=device), torch.empty_like(sums[:, :, 0])

    def plain() -> tuple[Tensor, Tensor]:
        wide = k.float()
        return quantize_arrays(wide - wide.mean(2, keepdim=True))

    p = RowProblem(s.kv_heads * s.prompt, s.head, "fp16")
    return Work(
        "round_keys", p, (k, sums, codes, scale, mean), codes, lambda: plain()[0].double(),
        {"PyTorch": plain}, 0.0, size(k, codes, scale), may_differ=1,
    )  # fmt: skip


ATTENTIONS: dict[str, Form] = {
    "attention, decode": _attention(lambda s: 1, lambda s: s.cached),
    "attention, decode, heads of 64": _attention(lambda s: 1, lambda s: s.cached, 64),
    "attention, decode, int8 cache": _over_codes(lambda s: 1, lambda s: s.cached),
    "attention, prompt": _attention(lambda s: s.prompt, lambda s: s.prompt),
    "attention, prompt, heads of 64": _attention(lambda s: s.prompt, lambda s: s.prompt, 64),
    "attention, prompt, int8 cache": _over_codes(lambda s: s.prompt, lambda s: s.prompt),
    "attention, long prompt": _attention(lambda s: s.cached, lambda s: s.cached),
    "attention, prompt, int8 products": _of_codes,
    "sum keys": _sum_keys,
    "round keys": _round_keys,
}
