"""ops.attention and ops.attention_append on a GPU: rotation and append in one launch, then attention in another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from llmopt.gpu.segment import Call, GpuSegmentBuilder, Number, Operand
from llmopt.graph import argument, fake
from llmopt.launch import AttentionProblem, Launch, RowProblem
from llmopt.native import attention as cpu
from llmopt.native.operands import NativeKernel, batch_broadcast, broadcast
from llmopt.native.program import View
from llmopt.native.segment import KvSpec
from llmopt.ops.kv_codes import SCALE_BYTES
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

    def launches(self, call: Call) -> list[Launch]:
        q = call.tensor(self.q)
        assert q is not None
        return self.attend(call, q)

    def attend(self, call: Call, q: Tensor) -> list[Launch]:
        from llmopt.kernels.attention import Scores
        from llmopt.kernels.attention_decode import MOST_ROWS
        from llmopt.kernels.operands import dtype_name

        k, v, o, mask = (call.tensor(t) for t in (self.k, self.v, self.o, self.mask))
        assert k is not None
        assert v is not None
        assert o is not None
        if o.numel() == 0:
            return []
        before: list[Launch] = []
        window, mean = call.values[self.window.id], None
        (k, k_scale), (v, v_scale) = codes_and_scales(k), codes_and_scales(v)
        # Rounding every key pays where many queries read it (predicted).
        many = q.shape[1] // k.shape[1] * q.shape[2] > MOST_ROWS
        qk = "i8" if self.qk == "int8" and many else "same"
        if qk == "i8" and k_scale is None:
            before, k, k_scale, mean = _round_keys(call, k)
        special = mask is not None or self.softcap > 0 or not _lie_densely(q, k, v, o)
        p = AttentionProblem(
            q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3],
            dtype_name(q.dtype), dtype_name(v.dtype), self.causal, window, special, qk,
        )  # fmt: skip
        scores = Scores(
            scale=self.scale, causal=self.causal, offset=call.values[self.offset.id], window=window,
            softcap=self.softcap, mask=mask, k_scale=k_scale, v_scale=v_scale, mean=mean,
        )  # fmt: skip
        return [*before, call.launch("attention", p, q, k, v, o, scores)]


def _lie_densely(q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> bool:
    """Whether one query's heads [B,H,1,D] are one piece of memory, and keys and values have equal strides; of more queries, True."""
    if q.shape[2] > 1:
        return True
    return q.is_contiguous() and o.is_contiguous() and k.stride() == v.stride()


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
        keys, values = call.tensor(self.attention.k), call.tensor(self.attention.v)
        assert q is not None
        assert k_new is not None
        assert v_new is not None
        assert keys is not None
        assert values is not None
        if q.numel() == 0:
            return []
        new = k_new.shape[2]
        k_out, k_scale = codes_and_scales(keys[:, :, keys.shape[2] - new :])
        v_out, v_scale = codes_and_scales(values[:, :, values.shape[2] - new :])
        rows = RowProblem(k_new.shape[0] * new, k_new.shape[3], dtype_name(q.dtype))
        q_in = turned = None
        if self.rope_kind != "none":
            b, h, s, d = q.shape
            q_in, turned = q, call.scratch((b, s, h, d), q.dtype).transpose(1, 2)
        before = call.launch(
            "rope", rows, q_in, turned, cos, sin, self.rope_kind, k_new, k_out, v_new, v_out, k_scale, v_scale
        )  # fmt: skip
        return [before, *self.attention.attend(call, q if turned is None else turned)]


def _reject(node: fx.Node) -> str:
    caches = [fake(t) for t in node.args[1:3]]
    return cpu.reject_attention(node) or _reject_mixed(node.args[:3]) or _reject_codes(caches)


def _reject_append(node: fx.Node) -> str:
    q, k_new, v_new = (argument(node, i, "") for i in range(3))
    if (
        fake(q).shape[2] != fake(k_new).shape[2]
        and argument(node, 7, "rope_kind", "none") != "none"
    ):
        return "queries and new keys differ in length"
    return (
        cpu.reject_attention_append(node)
        or _reject_mixed((q, k_new, v_new))
        or _reject_codes(fake(node)[1:])
    )


def _reject_mixed(tensors: Sequence[fx.Node]) -> str:
    """Keys and values may both be codes; else all are of one dtype."""
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
    s: GpuSegmentBuilder, node: fx.Node, first: int, q: View, k: View, v: View, o: View
) -> _Attention:
    """The attention of a node whose settings begin at argument `first`, over these operands."""
    a = cpu.attention_settings(node, first)
    mask = s.view(a["mask"])
    if mask is not None:
        shape: tuple[Size, ...] = (*q.size[:3], k.size[2])
        mask = broadcast(mask, mask.size, shape)
    q_, k_, v_, o_ = (s.operand(t) for t in (q, k, v, o))
    return _Attention(
        q_, k_, v_, o_, s.operand(mask), a["scale"], bool(a["causal"]),  # type: ignore[arg-type]
        s.number(a["causal_offset"]), s.number(a["window"]), a["softcap"], node.kwargs.get("qk", "same"),
    )  # fmt: skip


def _qk(node: fx.Node) -> str:
    return "+int8_qk" if node.kwargs.get("qk") == "int8" else ""


def _lower(s: GpuSegmentBuilder, node: fx.Node) -> None:
    q, k, v = node.args[:3]
    attention = _describe(s, node, 3, s.view(q), s.view(k), s.view(v), s.view(node))
    a = cpu.attention_settings(node, 3)
    detail = "causal" if a["causal"] else "full" if a["mask"] is None else "mask"
    detail += cpu.codes(fake(k)) + _qk(node)
    record = cpu.attention_record(
        node, q, (fake(k), fake(v)), detail, (q, k, v), (node,), impl="triton"
    )
    s.launch(attention.launches, record)


def _lower_append(s: GpuSegmentBuilder, node: fx.Node) -> None:
    q, k_new, v_new, k_cache, v_cache, cos, sin, rope_kind = (
        argument(node, i, "") for i in range(8)
    )
    _, keys, values = fake(node)
    caches = []
    for i, (cache, new, whole) in enumerate(((k_cache, k_new, keys), (v_cache, v_new, values))):
        b, h, n, _ = fake(new).shape
        number = None if cache is None else s.argument(cache)
        buffer = s.grow(
            KvSpec(number, b, h, n, int(whole.shape[3]), whole.dtype), s.part(node, 1 + i)
        )
        caches.append(View(buffer, whole.dtype, tuple(whole.shape), tuple(whole.stride())))
    attention = _describe(s, node, 8, s.view(q), caches[0], caches[1], s.view(s.part(node, 0)))
    append = _Append(
        attention,
        k_new=s.operand(s.view(k_new)),  # type: ignore[arg-type]
        v_new=s.operand(s.view(v_new)),  # type: ignore[arg-type]
        cos=s.operand(batch_broadcast(s, cos, q)),
        sin=s.operand(batch_broadcast(s, sin, q)),
        rope_kind=rope_kind or "none",
    )
    a = cpu.attention_settings(node, 8)
    detail = "append" + (f"+rope_{rope_kind}" if rope_kind != "none" else "")
    detail += "+causal" if a["causal"] else "+mask" if a["mask"] is not None else ""
    detail += cpu.codes(keys) + _qk(node)
    record = cpu.attention_record(
        node, q, (keys, values), detail, (q, k_new, v_new), (), impl="triton"
    )
    s.launch(append.launches, record)


KERNELS = {
    "llmopt.attention": NativeKernel("attention.triton", _reject, _lower),
    "llmopt.attention_append": NativeKernel("attention.triton", _reject_append, _lower_append),
}
