"""One launch per kernel form, on meta tensors of the sizes of a model of 8 billion parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from llmopt import kernels
from llmopt.launch import AttentionProblem, Launch, LinearProblem, RowProblem
from llmopt.types import Target

kernels.load()

from llmopt.kernels import (  # noqa: E402
    attention,
    attention_decode,
    cross_entropy,
    embedding,
    linear,
    linear_gemv,
    linear_tma,
    linear_w8a8,
    linear_weight_only,
    norm,
    quantize,
    rope,
    softmax,
    swiglu,
)
from llmopt.kernels.attention import Scores  # noqa: E402
from llmopt.kernels.operands import Around  # noqa: E402

F16, I8, U8, F32 = torch.float16, torch.int8, torch.uint8, torch.float32
Case = Callable[[Target], list[Launch]]
HIDDEN, WIDE = 4096, 14336


def meta(*shape: int, dtype: torch.dtype = F16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _every_tile(module, problem, target: Target, *operands, **more) -> list[Launch]:
    """The launches of all a module's tiles; none where it refuses."""
    if module.reject(problem, target):
        return []
    return [
        module.launch(problem, c, target, *operands, **more) for c in module.tiles(problem, target)
    ]


def _linear(module, m: int, gated: bool = False, norm_kind: str = "none", n: int = HIDDEN) -> Case:
    def launches(t: Target) -> list[Launch]:
        p = LinearProblem(
            m, n, HIDDEN, "fp16", act="silu" if gated else "none", gated=gated, norm=norm_kind
        )
        around = Around(norm_weight=meta(HIDDEN) if norm_kind != "none" else None, norm_eps=1e-5,
                        bias=meta(n) if norm_kind == "layer" else None, residual=None if gated else meta(m, n))  # fmt: skip
        up = meta(n, HIDDEN) if gated else None
        return _every_tile(module, p, t, meta(m, HIDDEN), meta(n, HIDDEN), meta(m, n), around, up)

    return launches


def _w8a8(m: int, group: int, gated: bool = False) -> Case:
    def launches(t: Target) -> list[Launch]:
        groups = HIDDEN // group if group else 1
        p = LinearProblem(
            m, HIDDEN, HIDDEN, "fp16", "w8a8", group, "silu" if gated else "none", gated
        )
        weight, scale = meta(HIDDEN, HIDDEN, dtype=I8), meta(HIDDEN, groups, dtype=F32)
        more = {"up": weight, "up_scale": scale} if gated else {}
        return _every_tile(linear_w8a8, p, t, meta(m, HIDDEN, dtype=I8), meta(m, groups, dtype=F32), weight, scale,
                           meta(m, HIDDEN), Around(bias=meta(HIDDEN)), **more)  # fmt: skip

    return launches


def _weight_only(scheme: str, m: int, group: int, offsets: bool) -> Case:
    def launches(t: Target) -> list[Launch]:
        p = LinearProblem(m, HIDDEN, HIDDEN, "fp16", scheme, group)
        w = (
            meta(HIDDEN, HIDDEN, dtype=I8)
            if scheme == "w8a16"
            else meta(HIDDEN, HIDDEN // 2, dtype=U8)
        )
        scale = meta(HIDDEN, HIDDEN // group, dtype=F32)
        return _every_tile(linear_weight_only, p, t, meta(m, HIDDEN), w, scale, scale if offsets else None,
                           meta(m, HIDDEN), Around(residual=meta(m, HIDDEN)))  # fmt: skip

    return launches


def _attention(module, q_len: int, kv_len: int, d: int = 128, int8: bool = False, **more) -> Case:
    def launches(t: Target) -> list[Launch]:
        heads, kv_heads = 32, 8
        p = AttentionProblem(
            1, heads, kv_heads, q_len, kv_len, d, d, "fp16", "i8" if int8 else "fp16"
        )
        q, o = (meta(1, q_len, heads, d).transpose(1, 2) for _ in range(2))
        k, v = (
            meta(kv_len, 1, kv_heads, d, dtype=I8 if int8 else F16).permute(1, 2, 0, 3)
            for _ in range(2)
        )
        scale = meta(1, kv_heads, kv_len, dtype=F32) if int8 else None
        scores = Scores(
            scale=d**-0.5, causal=True, offset=kv_len - q_len, k_scale=scale, v_scale=scale, **more
        )
        return _every_tile(module, p, t, q, k, v, o, scores)

    return launches


def _quantize(t: Target) -> list[Launch]:
    x, q, scale = meta(512, HIDDEN), meta(512, HIDDEN, dtype=I8), meta(512, HIDDEN // 64, dtype=F32)
    around = Around(norm_weight=meta(HIDDEN), norm_eps=1e-5)
    return _every_tile(
        quantize, RowProblem(512, HIDDEN, "fp16"), t, x, q, scale, around, norm="rms", group=64
    )


def _quantize_gated(t: Target) -> list[Launch]:
    x, q, scale = meta(512, 2 * WIDE), meta(512, WIDE, dtype=I8), meta(512, 1, dtype=F32)
    return _every_tile(
        quantize, RowProblem(512, WIDE, "fp16"), t, x, q, scale, Around(), gated=True
    )


def _rope(t: Target) -> list[Launch]:
    q, k, v = (meta(1, 512, heads, 128).transpose(1, 2) for heads in (32, 8, 8))
    keys = meta(640, 1, 8, 128).permute(1, 2, 0, 3)[:, :, 128:]
    table = meta(1, 1, 512, 128)
    p = RowProblem(512, 128, "fp16")
    return _every_tile(
        rope, p, t, q, meta(1, 512, 32, 128).transpose(1, 2), table, table, "half", k, keys, v, keys
    )


def _norm(t: Target) -> list[Launch]:
    x = meta(512, 1, HIDDEN)
    return _every_tile(
        norm, RowProblem(512, HIDDEN, "fp16"), t, x, meta(HIDDEN), None, x[:, 0], "rms", 1e-5
    )


def _rows(module, k: int, *operands, **more) -> Case:
    return lambda t: _every_tile(module, RowProblem(512, k, "fp16"), t, *operands, **more)


# Kernels with a matrix product must use tensor cores, and stage their operands asynchronously.
PRODUCTS: dict[str, Case] = {
    "linear 1": _linear(linear, 1),
    "linear 16 rms": _linear(linear, 16, norm_kind="rms"),
    "linear 16 gated rms": _linear(linear, 16, gated=True, norm_kind="rms", n=WIDE),
    "linear 64": _linear(linear, 64),
    "linear 512": _linear(linear, 512),
    "linear 512 gated": _linear(linear, 512, gated=True),
    "linear 4096": _linear(linear, 4096),
    "linear 4096 gated": _linear(linear, 4096, gated=True),
    "linear tma 4096": _linear(linear_tma, 4096),
    "linear tma 4096 gated": _linear(linear_tma, 4096, gated=True),
    "w8a8 1 channel": _w8a8(1, 0),
    "w8a8 64 groups": _w8a8(64, 64),
    "w8a8 512 channel": _w8a8(512, 0),
    "w8a8 4096 channel": _w8a8(4096, 0),
    "w8a8 4096 channel gated": _w8a8(4096, 0, gated=True),
    "w8a8 4096 groups": _w8a8(4096, 64),
    "w8a16 1": _weight_only("w8a16", 1, 32, False),
    "w8a16 512": _weight_only("w8a16", 512, 128, False),
    "w4a16 1": _weight_only("w4a16", 1, 32, True),
    "w4a16 512": _weight_only("w4a16", 512, 128, False),
    "attention 64": _attention(attention, 512, 512, 64),
    "attention 128": _attention(attention, 512, 512),
    "attention 256 capped": _attention(attention, 512, 512, 256, softcap=50.0, window=256),
    "attention 128 int8": _attention(attention, 512, 512, int8=True),
    "attention decode": _attention(attention_decode, 1, 4096),
    "attention decode int8": _attention(attention_decode, 1, 4096, int8=True),
    "attention decode 64": _attention(attention_decode, 1, 100, 64),
}  # fmt: skip
ROWS: dict[str, Case] = {
    "gemv 1": _linear(linear_gemv, 1),
    "gemv 1 gated rms": _linear(linear_gemv, 1, gated=True, norm_kind="rms", n=WIDE),
    "quantize rms": _quantize,
    "quantize gated": _quantize_gated,
    "norm": _norm,
    "rope": _rope,
    "swiglu": _rows(swiglu, WIDE, meta(512, 2 * WIDE), meta(512, WIDE)),
    "softmax": _rows(softmax, 32000, meta(512, 32000), meta(512, 32000)),
    "embedding": _rows(
        embedding, HIDDEN, meta(512, dtype=torch.int64), meta(32000, HIDDEN), meta(512, HIDDEN)
    ),
    "cross entropy": _rows(
        cross_entropy, 32000, meta(512, 32000), meta(512, dtype=torch.int64), meta(512, dtype=F32)
    ),
}


def cases(
    table: dict[str, Case], targets: tuple[Target, ...]
) -> Iterator[tuple[str, Target, Launch]]:
    """(id, target, launch) of every tile of every form on every target that takes it."""
    for target in targets:
        for name, make in table.items():
            for number, launch in enumerate(make(target)):
                yield f"{target.tier} {name} #{number}", target, launch
