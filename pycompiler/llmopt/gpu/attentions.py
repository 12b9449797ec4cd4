"""ops.attention and those that append on a GPU: rotation and append in one launch, then attention in another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from llmopt.gpu.segment import Call, GpuSegmentBuilder, Number, Operand
from llmopt.graph import FLOATS, argument, fake
from llmopt.launch import LARGEST_GPU_HEAD, AttentionProblem, Launch, RowProblem
from llmopt.native import attention as cpu
from llmopt.native.operands import NativeKernel, batch_broadcast, broadcast, reject_angles
from llmopt.native.segment import KvSpec
from llmopt.ops.kv_codes import SCALE_BYTES
from llmopt.program import View
from llmopt.sizes import Size


@dataclass(frozen=True)
class _Attention:
    """What an attention is, apart from the sizes of a call."""

    q: Operand
    k: Operand  # [B,Hkv,Skv,D] with the new keys, if any, at the end
    v: Operand
    o: Operand
    mask: Operand | None
    scale: float
    causal: bool
    offset: Number
    window: Number
    softcap: float
    qk: str  # "int8": queries and keys are rounded before they are multiplied
    k_scale: Operand | None = None  # [B,Hkv,Skv,1] of codes whose scales are not behind them
    v_scale: Operand | None = None
    nan_rows: bool = False

    def keys_and_values(self, call: Call) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """(keys [B,Hkv,Skv,D], their scales [B,Hkv,Skv] or None, values, theirs)."""
        pairs = ((self.k, self.k_scale), (self.v, self.v_scale))
        (k, k_scale), (v, v_scale) = (_codes_and_scales(call, *pair) for pair in pairs)
        return k, k_scale, v, v_scale

    def launches(self, call: Call) -> list[Launch]:
        q = call.tensor(self.q)
        assert q is not None
        return self.attend(call, q)

    def attend(self, call: Call, q: Tensor) -> list[Launch]:
        from llmopt.kernels.attention import Scores
        from llmopt.kernels.attention_decode import MOST_ROWS
        from llmopt.kernels.operands import dtype_name

        o, mask = call.tensor(self.o), call.tensor(self.mask)
        assert o is not None
        if o.numel() == 0:
            return []
        before: list[Launch] = []
        window, mean = call.values[self.window.id], None
        k, k_scale, v, v_scale = self.keys_and_values(call)
        # Rounding every key pays where many queries read it (predicted).
        many = q.shape[1] // k.shape[1] * q.shape[2] > MOST_ROWS
        qk = "i8" if self.qk == "int8" and many else "same"
        if qk == "i8" and k_scale is None:
            before, k, k_scale, mean = _round_keys(call, k)
        dense = _lie_densely(q, k, v, o) and _lie_alike(k_scale, v_scale)
        special = mask is not None or self.softcap > 0 or not dense
        p = AttentionProblem(
            q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3],
            dtype_name(q.dtype), dtype_name(v.dtype), self.causal, window, special, qk,
        )  # fmt: skip
        scores = Scores(
            scale=self.scale, causal=self.causal, offset=call.values[self.offset.id], window=window,
            softcap=self.softcap, mask=mask, k_scale=k_scale, v_scale=v_scale, mean=mean,
            nan_rows=self.nan_rows and k.shape[2] > 0,
        )  # fmt: skip
        return [*before, call.launch("attention", p, q, k, v, o, scores)]


def _lie_densely(q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> bool:
    """Of one query: its heads [B,H,1,D] are one piece of memory, keys and values have equal strides, rows begin at 8 elements.

    Of more queries, True.
    """
    if q.shape[2] > 1:
        return True
    starts = (t.storage_offset() for t in (q, k, v, o))
    if any(number % 8 for number in (*starts, *k.stride()[:3])):
        return False
    return q.is_contiguous() and o.is_contiguous() and k.stride() == v.stride()


def _lie_alike(k_scale: Tensor | None, v_scale: Tensor | None) -> bool:
    return k_scale is None or v_scale is None or k_scale.stride() == v_scale.stride()


def _codes_and_scales(
    call: Call, codes: Operand, scales: Operand | None
) -> tuple[Tensor, Tensor | None]:
    """A cache's codes and scales, wherever they are; floats as they are."""
    tensor, beside = call.tensor(codes), call.tensor(scales)
    assert tensor is not None
    return codes_and_scales(tensor) if beside is None else (tensor, beside[..., 0])


def codes_and_scales(rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """A cache's rows [B,H,S,D+4] of ops/kv_codes.py as codes [B,H,S,D] and scales [B,H,S]; floats as they are."""
    if rows.dtype != torch.int8:
        return rows, None
    return rows[..., :-SCALE_BYTES], rows.view(torch.float32)[..., -1]


def _round_keys(call: Call, k: Tensor) -> tuple[list[Launch], Tensor, Tensor, Tensor]:
    """(launches, codes, scales, mean) of keys [B,Hkv,S,D] less their mean."""
    from llmopt.kernels.operands import dtype_name
    from llmopt.kernels.round_keys import parts_of

    b, h, s, d = k.shape
    sums = call.scratch((b, h, parts_of(s), d), torch.float32)
    codes, scale = call.scratch((b, h, s, d), torch.int8), call.scratch((b, h, s), torch.float32)
    mean = call.scratch((b, h, d), torch.float32)
    p = RowProblem(b * h * s, d, dtype_name(k.dtype))
    launches = [
        call.launch("sum_keys", p, k, sums),
        call.launch("round_keys", p, k, sums, codes, scale, mean),
    ]
    return launches, codes, scale, mean


@dataclass(frozen=True)
class _Append:
    """An attention whose new keys and values are written behind a cache's first."""

    attention: _Attention
    k_new: Operand
    v_new: Operand
    cos: Operand | None
    sin: Operand | None
    rope_kind: str

    def launches(self, call: Call) -> list[Launch]:
        from llmopt.kernels.operands import dtype_name

        tensors = [self.attention.q, self.k_new, self.v_new, self.cos, self.sin]
        q, k_new, v_new, cos, sin = map(call.tensor, tensors)
        assert q is not None
        assert k_new is not None
        assert v_new is not None
        if q.numel() == 0:
            return []
        new = k_new.shape[2]
        behind = (
            None if t is None else t[:, :, t.shape[2] - new :]
            for t in self.attention.keys_and_values(call)
        )  # fmt: skip
        k_out, k_scale, v_out, v_scale = behind
        rows = RowProblem(k_new.shape[0] * new, k_new.shape[3], dtype_name(q.dtype))
        q_in = turned = None
        if self.rope_kind != "none":
            b, h, s, d = q.shape
            q_in, turned = q, call.scratch((b, s, h, d), q.dtype).transpose(1, 2)
        before = call.launch(
            "rope", rows, q_in, turned, cos, sin, self.rope_kind, k_new, k_out, v_new, v_out, k_scale, v_scale
        )  # fmt: skip
        return [before, *self.attention.attend(call, q if turned is None else turned)]


def _reject_sinks(node: fx.Node) -> str:
    return "attention with sinks is for CPUs" if node.kwargs.get("sinks") is not None else ""


def _reject(node: fx.Node) -> str:
    caches = [fake(t) for t in node.args[1:3]]
    reason = _reject_sinks(node) or cpu.reject_attention(node) or _reject_mixed(node.args[:3])
    return reason or ("" if node.kwargs.get("k_scale") is not None else _reject_codes(caches))


def _reject_append(node: fx.Node) -> str:
    q, k_new, v_new = (argument(node, i, "") for i in range(3))
    if (
        fake(q).shape[2] != fake(k_new).shape[2]
        and argument(node, 7, "rope_kind", "none") != "none"
    ):
        return "queries and new keys differ in length"
    return (
        _reject_sinks(node)
        or cpu.reject_attention_append(node)
        or _reject_mixed((q, k_new, v_new))
        or _reject_codes(fake(node)[1:])
    )


def _reject_append_arrays(node: fx.Node) -> str:
    q, k_new, v_new, *_, cos, sin, rope_kind, mask = (argument(node, i, "") for i in range(11))
    if fake(q).shape[2] != fake(k_new).shape[2] and (rope_kind or "none") != "none":
        return "queries and new keys differ in length"
    reason = _reject_sinks(node) or ("" if cos is None else reject_angles(q, cos, sin))
    return reason or cpu.reject_heads(q, (k_new, v_new), mask) or _reject_mixed((q, k_new, v_new))


def _reject_mixed(tensors: Sequence[fx.Node]) -> str:
    """Keys and values may both be codes; else all are of one dtype. Heads are shorter than some that CPUs take."""
    longest = max(fake(t).shape[3] for t in tensors[:2] if fake(t).dtype in FLOATS)
    if longest > LARGEST_GPU_HEAD:
        return f"head size {longest}: up to {LARGEST_GPU_HEAD} is possible on a GPU"
    q, k, v = (fake(t).dtype for t in tensors)
    if k == v and k in (q, torch.int8):
        return ""
    return f"queries of {q}, keys of {k} and values of {v}"


def _reject_codes(caches: Sequence[Tensor]) -> str:
    """Scales are read as float32, four bytes at a time."""
    for cache in (c for c in caches if c.dtype == torch.int8):
        width = int(cache.shape[3]) - SCALE_BYTES
        if width % SCALE_BYTES:
            return f"a cache of codes of heads of {width}: multiples of {SCALE_BYTES} are possible on a GPU"
    return ""


def _describe(
    s: GpuSegmentBuilder, node: fx.Node, first: int, q: View, k: View, v: View, o: View, *scales: View | None
) -> _Attention:  # fmt: skip
    """The attention of a node whose settings begin at argument `first`, over these operands."""
    a = cpu.attention_settings(node, first)
    mask = s.view(a["mask"])
    if mask is not None:
        shape: tuple[Size, ...] = (*q.size[:3], k.size[2])
        mask = broadcast(mask, mask.size, shape)
    q_, k_, v_, o_ = (s.operand(t) for t in (q, k, v, o))
    k_scale, v_scale = (s.operand(t) for t in scales or (None, None))
    return _Attention(
        q_, k_, v_, o_, s.operand(mask), a["scale"], bool(a["causal"]),  # type: ignore[arg-type]
        s.number(a["causal_offset"]), s.number(a["window"]), a["softcap"], node.kwargs.get("qk", "same"),
        k_scale, v_scale, node.kwargs.get("nan_rows", False),
    )  # fmt: skip


def _qk(node: fx.Node) -> str:
    return "+int8_qk" if node.kwargs.get("qk") == "int8" else ""


def _lower(s: GpuSegmentBuilder, node: fx.Node) -> None:
    q, k, v = node.args[:3]
    scales = [s.view(node.kwargs.get(name)) for name in ("k_scale", "v_scale")]
    attention = _describe(s, node, 3, s.view(q), s.view(k), s.view(v), s.view(node), *scales)
    a = cpu.attention_settings(node, 3)
    detail = "causal" if a["causal"] else "full" if a["mask"] is None else "mask"
    detail += cpu.codes(fake(k)) + _qk(node)
    how = {"impl": "triton", "causal": a["causal"]}
    record = cpu.attention_record(node, q, (fake(k), fake(v)), detail, (q, k, v), (node,), **how)
    s.launch(attention.launches, record)


def _lower_append(s: GpuSegmentBuilder, node: fx.Node) -> None:
    """caches: those of keys and values, then of their scales where they have a tensor of their own."""
    q, k_new, v_new = node.args[:3]
    grown = fake(node)[1:]
    first = 3 + len(grown)  # the argument behind the caches
    caches = []
    for i, (cache, whole) in enumerate(zip(node.args[3:first], grown, strict=True)):
        b, h, n, _ = fake(v_new if i % 2 else k_new).shape
        number = None if cache is None else s.argument(cache)
        spec = KvSpec(number, b, h, n, int(whole.shape[3]), whole.dtype)
        buffer = s.grow(spec, s.part(node, 1 + i))
        caches.append(View(buffer, whole.dtype, tuple(whole.shape), tuple(whole.stride())))
    cos, sin, rope_kind = (argument(node, first + i, "") or None for i in range(3))
    keys, values, *scales = caches
    attention = _describe(
        s, node, first + 3, s.view(q), keys, values, s.view(s.part(node, 0)), *scales
    )
    append = _Append(
        attention,
        k_new=s.operand(s.view(k_new)),  # type: ignore[arg-type]
        v_new=s.operand(s.view(v_new)),  # type: ignore[arg-type]
        cos=s.operand(batch_broadcast(s, cos, q)),
        sin=s.operand(batch_broadcast(s, sin, q)),
        rope_kind=rope_kind or "none",
    )
    a = cpu.attention_settings(node, first + 3)
    detail = "append" + (f"+rope_{append.rope_kind}" if append.rope_kind != "none" else "")
    detail += "+causal" if a["causal"] else "+mask" if a["mask"] is not None else ""
    detail += cpu.codes(grown[0]) + _qk(node)
    how = {"impl": "triton", "causal": a["causal"]}
    kv = (grown[0], grown[1])
    record = cpu.attention_record(node, q, kv, detail, (q, k_new, v_new), (), **how)
    s.launch(append.launches, record)


KERNELS = {
    "llmopt.attention": NativeKernel("attention.triton", _reject, _lower),
    "llmopt.attention_append": NativeKernel("attention.triton", _reject_append, _lower_append),
    "llmopt.attention_append_arrays": NativeKernel(
        "attention.triton", _reject_append_arrays, _lower_append
    ),
}
