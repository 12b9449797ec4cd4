"""ops.attention and ops.attention_append on a GPU: rotation and append in one launch, then attention in another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from llmopt.gpu.segment import Call, GpuSegmentBuilder, Number, Operand
from llmopt.graph import argument, fake
from llmopt.launch import AttentionProblem, Launch, RowProblem
from llmopt.native import attention as cpu
from llmopt.native.operands import NativeKernel, batch_broadcast, broadcast
from llmopt.native.program import View
from llmopt.native.segment import KvSpec
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

    def launches(self, call: Call) -> list[Launch]:
        q = call.tensor(self.q)
        assert q is not None
        return self.attend(call, q)

    def attend(self, call: Call, q: Tensor) -> list[Launch]:
        from llmopt.kernels.attention import Scores
        from llmopt.kernels.operands import dtype_name

        k, v, o, mask = (call.tensor(t) for t in (self.k, self.v, self.o, self.mask))
        assert k is not None
        assert v is not None
        assert o is not None
        if o.numel() == 0:
            return []
        window = call.values[self.window.id]
        p = AttentionProblem(
            q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3],
            dtype_name(q.dtype), dtype_name(k.dtype), self.causal, window,
        )  # fmt: skip
        scores = Scores(
            scale=self.scale, causal=self.causal, offset=call.values[self.offset.id], window=window,
            softcap=self.softcap, mask=mask,
        )  # fmt: skip
        return [call.launch("attention", p, q, k, v, o, scores)]


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
        k_out, v_out = keys[:, :, keys.shape[2] - new :], values[:, :, values.shape[2] - new :]
        rows = RowProblem(k_new.shape[0] * new, k_new.shape[3], dtype_name(q.dtype))
        q_in = turned = None
        if self.rope_kind != "none":
            b, h, s, d = q.shape
            q_in, turned = q, call.scratch((b, s, h, d), q.dtype).transpose(1, 2)
        before = call.launch(
            "rope", rows, q_in, turned, cos, sin, self.rope_kind, k_new, k_out, v_new, v_out
        )  # fmt: skip
        return [before, *self.attention.attend(call, q if turned is None else turned)]


def _reject(node: fx.Node) -> str:
    return cpu.reject_attention(node) or _reject_mixed(node.args[:3])


def _reject_append(node: fx.Node) -> str:
    q, k_new, v_new = (argument(node, i, "") for i in range(3))
    if (
        fake(q).shape[2] != fake(k_new).shape[2]
        and argument(node, 7, "rope_kind", "none") != "none"
    ):
        return "queries and new keys differ in length"
    if fake(node)[1].dtype != fake(k_new).dtype:
        return "a cache of int8 codes on a GPU: f16, bf16 and f32 are possible"
    return cpu.reject_attention_append(node) or _reject_mixed((q, k_new, v_new))


def _reject_mixed(tensors: Sequence[fx.Node]) -> str:
    dtypes = {fake(t).dtype for t in tensors}
    return f"queries, keys and values of {dtypes}" if len(dtypes) > 1 else ""


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
        s.number(a["causal_offset"]), s.number(a["window"]), a["softcap"],
    )  # fmt: skip


def _lower(s: GpuSegmentBuilder, node: fx.Node) -> None:
    q, k, v = node.args[:3]
    attention = _describe(s, node, 3, s.view(q), s.view(k), s.view(v), s.view(node))
    a = cpu.attention_settings(node, 3)
    detail = "causal" if a["causal"] else "full" if a["mask"] is None else "mask"
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
        b, h, n, d = fake(new).shape
        number = None if cache is None else s.argument(cache)
        buffer = s.grow(KvSpec(number, b, h, n, d, whole.dtype), s.part(node, 1 + i))
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
    record = cpu.attention_record(
        node, q, (keys, values), detail, (q, k_new, v_new), (), impl="triton"
    )
    s.launch(append.launches, record)


KERNELS = {
    "llmopt.attention": NativeKernel("attention.triton", _reject, _lower),
    "llmopt.attention_append": NativeKernel("attention.triton", _reject_append, _lower_append),
}
