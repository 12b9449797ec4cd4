"""One launch per kernel form, on meta tensors of the sizes of a model of 8 billion parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from llmopt import kernels
from llmopt.gpu.attentions import codes_and_scales
from llmopt.launch import AttentionProblem, ChainProblem, Launch, LinearProblem, RowProblem
from llmopt.types import Target

kernels.load()

from llmopt.kernels import (  # noqa: E402
    attention,
    attention_decode,
    cross_entropy,
    embedding,
    index_copy,
    linear,
    linear_codes_gemv,
    linear_gemv,
    linear_tma,
    linear_w8a8,
    linear_weight_only,
    norm,
    pointwise,
    quantize,
    rope,
    rotary_table,
    round_keys,
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


def _w8a8(m: int, group: int, gated: bool = False, bits: int = 8, gemv: bool = False) -> Case:
    def launches(t: Target) -> list[Launch]:
        groups = HIDDEN // group if group else 1
        p = LinearProblem(
            m, HIDDEN, HIDDEN, "fp16", f"w{bits}a8", group, "silu" if gated else "none", gated
        )
        weight, scale = meta(HIDDEN, HIDDEN, dtype=I8), meta(HIDDEN, groups, dtype=F32)
        if bits == 4:
            weight = meta(HIDDEN, HIDDEN // 2, dtype=U8)
        more = {"up": weight, "up_scale": scale} if gated else {}
        if bits == 4:
            more |= {"w_offset": scale, "up_offset": scale if gated else None}
        given = (
            meta(m, HIDDEN, dtype=I8),
            meta(m, groups, dtype=F32),
            weight,
            scale,
            meta(m, HIDDEN),
            Around(bias=meta(HIDDEN)),
        )
        if not gemv:
            return _every_tile(linear_w8a8, p, t, *given, **more)
        return [
            linear_codes_gemv.launch_w8a8(p, c, t, *given, **more)
            for c in linear_codes_gemv.tiles(p, t)
        ]

    return launches


def _weight_only(
    scheme: str, m: int, group: int, offsets: bool, gated: bool = False, module=linear_weight_only, norm_kind: str = "none"
) -> Case:  # fmt: skip
    def launches(t: Target) -> list[Launch]:
        act = "silu" if gated else "none"
        p = LinearProblem(m, HIDDEN, HIDDEN, "fp16", scheme, group, act, gated, norm_kind, offsets)
        w = (
            meta(HIDDEN, HIDDEN, dtype=I8)
            if scheme == "w8a16"
            else meta(HIDDEN, HIDDEN // 2, dtype=U8)
        )
        scale = meta(HIDDEN, HIDDEN // group if group else 1, dtype=F32)
        offset = scale if offsets else None
        more = {"up": w, "up_scale": scale, "up_offset": offset} if gated else {}
        around = Around(residual=None if gated else meta(m, HIDDEN), norm_eps=1e-5,
                        norm_weight=meta(HIDDEN) if norm_kind != "none" else None)  # fmt: skip
        return _every_tile(
            module, p, t, meta(m, HIDDEN), w, scale, offset, meta(m, HIDDEN), around, **more
        )

    return launches


def _attention(
    module, q_len: int, kv_len: int, d: int = 128, int8: bool = False, qk: str = "same", **more
) -> Case:
    """int8: keys and values are codes; qk "i8": keys alone are, and queries are rounded."""

    def launches(t: Target) -> list[Launch]:
        heads, kv_heads = 32, 8
        p = AttentionProblem(
            1, heads, kv_heads, q_len, kv_len, d, d, "fp16", "i8" if int8 else "fp16", qk=qk
        )
        q, o = (meta(1, q_len, heads, d).transpose(1, 2) for _ in range(2))
        dtypes = I8 if int8 or qk == "i8" else F16, I8 if int8 else F16
        k, v = (meta(kv_len, 1, kv_heads, d, dtype=x).permute(1, 2, 0, 3) for x in dtypes)
        k_scale, v_scale = (
            meta(1, kv_heads, kv_len, dtype=F32) if x == I8 else None for x in dtypes
        )
        scores = Scores(
            scale=d**-0.5, causal=True, offset=kv_len - q_len, k_scale=k_scale, v_scale=v_scale,
            mean=meta(1, kv_heads, d, dtype=F32), **more,
        )  # fmt: skip
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


def _keys_alone(t: Target) -> list[Launch]:
    k, v = (meta(1, 1, 8, 128).transpose(1, 2) for _ in range(2))
    room = meta(1, 8, 640, 128)[:, :, 128:129]
    p = RowProblem(1, 128, "fp16")
    return _every_tile(rope, p, t, None, None, None, None, "none", k, room, v, room)


def _rope_codes(t: Target) -> list[Launch]:
    k, v = (meta(1, 512, 8, 128).transpose(1, 2) for _ in range(2))
    rows = meta(640, 1, 8, 132, dtype=I8).permute(1, 2, 0, 3)[:, :, 128:]
    codes, scale = codes_and_scales(rows)
    table, p = meta(1, 1, 512, 128), RowProblem(512, 128, "fp16")
    return _every_tile(rope, p, t, k, meta(1, 512, 8, 128).transpose(1, 2), table, table, "half",
                       k, codes, v, codes, scale, scale)  # fmt: skip


def _round_keys(t: Target) -> list[Launch]:
    k, p = meta(1, 512, 8, 128).transpose(1, 2), RowProblem(8 * 512, 128, "fp16")
    sums, mean = meta(1, 8, 16, 128, dtype=F32), meta(1, 8, 128, dtype=F32)
    codes, scale = meta(1, 8, 512, 128, dtype=I8), meta(1, 8, 512, dtype=F32)
    (tile,) = round_keys.tiles(p, t)
    return [
        round_keys.launch_sums(p, tile, t, k, sums),
        round_keys.launch(p, tile, t, k, sums, codes, scale, mean),
    ]


def _norm(t: Target) -> list[Launch]:
    x = meta(512, 1, HIDDEN)
    return _every_tile(
        norm, RowProblem(512, HIDDEN, "fp16"), t, x, meta(HIDDEN), None, x[:, 0], "rms", 1e-5
    )


def _rows(module, k: int, *operands, **more) -> Case:
    return lambda t: _every_tile(module, RowProblem(512, k, "fp16"), t, *operands, **more)


SOFTCAP = (("const", 30.0), ("binary", "div", 0, 2), ("unary", "tanh", 3), ("binary", "mul", 4, 2),
           ("binary", "mul", 5, 1))  # fmt: skip
MEAN_CENTRED = (("reduce", "mean", 0), ("binary", "sub", 0, 2), ("unary", "square", 3), ("reduce", "mean", 4),
                ("unary", "rsqrt", 5), ("binary", "mul", 3, 6), ("binary", "mul", 7, 1))  # fmt: skip


def _chain(program: tuple, k: int) -> Case:
    """A chain over rows [512, k] and a vector [k]."""

    def launches(t: Target) -> list[Launch]:
        p = ChainProblem(512, k, "fp16", 2, program, (1 + len(program),))
        inputs = [meta(512, k), meta(k).expand(512, k)]
        return _every_tile(pointwise, p, t, (512, k), inputs, [meta(512, k)])

    return launches


def _rotary_table(t: Target) -> list[Launch]:
    frequencies = meta(64, dtype=F32).expand(1, 512, 64)
    positions = meta(1, 512, 1, dtype=torch.int64).expand(1, 512, 64)
    p = RowProblem(512, 128, "fp16")
    tables = (meta(1, 512, 128), meta(1, 512, 128))
    return _every_tile(rotary_table, p, t, frequencies, positions, *tables)


def _index_copy(t: Target) -> list[Launch]:
    index, new = meta(512, dtype=torch.int64), meta(1, 512, 8, 128).transpose(1, 2)
    p = RowProblem(8 * 512, 128, "fp16")
    return _every_tile(index_copy, p, t, meta(1, 8, 4096, 128), index, new)


# Kernels with a matrix product must use tensor cores, and stage their operands asynchronously.
PRODUCTS: dict[str, Case] = {
    "linear 1": _linear(linear, 1),
    "linear 16 rms": _linear(linear, 16, norm_kind="rms"),
    "linear 16 gated rms": _linear(linear, 16, gated=True, norm_kind="rms", n=WIDE),
    "linear 64": _linear(linear, 64),
    "linear 64 gated": _linear(linear, 64, gated=True),
    "linear 512": _linear(linear, 512),
    "linear 512 gated": _linear(linear, 512, gated=True),
    "linear 4096": _linear(linear, 4096),
    "linear 4096 gated": _linear(linear, 4096, gated=True),
    "linear tma 4096": _linear(linear_tma, 4096),
    "linear tma 4096 gated": _linear(linear_tma, 4096, gated=True),
    "w8a8 1 channel": _w8a8(1, 0),
    "w8a8 64 groups": _w8a8(64, 64),
    "w8a8 64 groups gated": _w8a8(64, 128, gated=True),
    "w8a8 512 groups gated": _w8a8(512, 128, gated=True),
    "w8a8 512 groups of 64": _w8a8(512, 64),
    "w8a8 512 groups of 64 gated": _w8a8(512, 64, gated=True),
    "w8a8 4096 groups gated": _w8a8(4096, 128, gated=True),
    "w8a8 512 channel": _w8a8(512, 0),
    "w8a8 4096 channel": _w8a8(4096, 0),
    "w8a8 4096 channel gated": _w8a8(4096, 0, gated=True),
    "w8a8 4096 groups": _w8a8(4096, 64),
    "w4a8 1 groups": _w8a8(1, 32, bits=4),
    "w4a8 512 groups": _w8a8(512, 32, bits=4),
    "w4a8 4096 gated": _w8a8(4096, 32, gated=True, bits=4),
    "w4a8 512 wide groups": _w8a8(512, 128, bits=4),
    "w4a8 512 wide groups gated": _w8a8(512, 128, gated=True, bits=4),
    "w8a16 1": _weight_only("w8a16", 1, 32, False),
    "w8a16 512": _weight_only("w8a16", 512, 128, False),
    "w8a16 512 channel": _weight_only("w8a16", 512, 0, False),
    "w8a16 512 channel gated": _weight_only("w8a16", 512, 0, False, gated=True),
    "w8a16 512 gated": _weight_only("w8a16", 512, 128, True, gated=True),
    "w4a16 16 gated": _weight_only("w4a16", 16, 128, True, gated=True),
    "w4a16 512 gated": _weight_only("w4a16", 512, 128, True, gated=True),
    "w4a16 1": _weight_only("w4a16", 1, 32, True),
    "w4a16 512": _weight_only("w4a16", 512, 128, False),
    "attention 64": _attention(attention, 512, 512, 64),
    "attention 128": _attention(attention, 512, 512),
    "attention 256 capped": _attention(attention, 512, 512, 256, softcap=50.0, window=256),
    "attention 128 int8": _attention(attention, 512, 512, int8=True),
    "attention 128 int8 products": _attention(attention, 512, 512, qk="i8"),
    "attention 256 int8 products capped": _attention(attention, 512, 512, 256, qk="i8", softcap=50.0),
    "attention decode": _attention(attention_decode, 1, 4096),
    "attention decode int8": _attention(attention_decode, 1, 4096, int8=True),
    "attention decode 64": _attention(attention_decode, 1, 100, 64),
}  # fmt: skip
ROWS: dict[str, Case] = {
    "gemv 1": _linear(linear_gemv, 1),
    "gemv 1 gated rms": _linear(linear_gemv, 1, gated=True, norm_kind="rms", n=WIDE),
    "w4a16 gemv 1": _weight_only("w4a16", 1, 32, True, module=linear_codes_gemv),
    "w4a16 gemv 1 gated rms": _weight_only("w4a16", 1, 32, True, True, linear_codes_gemv, "rms"),
    "w8a16 gemv 2": _weight_only("w8a16", 2, 0, False, module=linear_codes_gemv),
    "w8a16 gemv 1 gated rms": _weight_only("w8a16", 1, 32, False, True, linear_codes_gemv, "rms"),
    "w8a8 gemv 1": _w8a8(1, 64, gemv=True),
    "w8a8 gemv 1 channel gated": _w8a8(1, 0, gated=True, gemv=True),
    "w4a8 gemv 1": _w8a8(1, 32, bits=4, gemv=True),
    "quantize rms": _quantize,
    "quantize gated": _quantize_gated,
    "norm": _norm,
    "rope": _rope,
    "rope and codes": _rope_codes,
    "keys alone": _keys_alone,
    "round keys": _round_keys,
    "swiglu": _rows(swiglu, WIDE, meta(512, 2 * WIDE), meta(512, WIDE)),
    "softmax": _rows(softmax, 32000, meta(512, 32000), meta(512, 32000)),
    "embedding": _rows(
        embedding, HIDDEN, meta(1, 512, dtype=torch.int64), meta(32000, HIDDEN), meta(512, HIDDEN)
    ),
    "index copy": _index_copy,
    "chain": _chain(SOFTCAP, HIDDEN),
    "chain with reductions": _chain(MEAN_CENTRED, HIDDEN),
    "chain with the longest reduction": _chain(MEAN_CENTRED, pointwise.WIDEST),
    "cross entropy": _rows(
        cross_entropy, 32000, meta(512, 32000), meta(512, dtype=torch.int64), meta(512, dtype=F32)
    ),
}
# Too short to load wide: an element a lane.
SHORT_ROWS: dict[str, Case] = {"rotary table": _rotary_table}


def cases(
    table: dict[str, Case], targets: tuple[Target, ...]
) -> Iterator[tuple[str, Target, Launch]]:
    """(id, target, launch) of every tile of every form on every target that takes it."""
    for target in targets:
        for name, make in table.items():
            for number, launch in enumerate(make(target)):
                yield f"{target.tier} {name} #{number}", target, launch
