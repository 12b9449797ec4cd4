"""attention.cpu: ops.attention and ops.attention_append → mask analysis once per mask, then one attention step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from llmopt.graph import argument, fake, is_one, numel, same_size
from llmopt.native.operands import (
    FLOATS,
    NativeKernel,
    are_static,
    batch_broadcast,
    broadcast,
    num_bytes,
    reject_angles,
)
from llmopt.native.segment import (
    SHORT_DTYPES,
    KvSpec,
    MirrorSpec,
    SegmentBuilder,
    StepRecord,
    describe,
)
from llmopt.ops.kv_codes import SCALE_BYTES
from llmopt.ops.rope import KINDS as ROPE_KINDS
from llmopt.program import View
from llmopt.sizes import Size

LARGEST_HEAD = 512

_ATTENTION = (
    ("mask", None),
    ("scale", 1.0),
    ("causal", False),
    ("causal_offset", 0),
    ("window", 0),
    ("softcap", 0.0),
)


def attention_settings(node: fx.Node, first: int) -> dict[str, Any]:
    return {
        name: argument(node, first + i, name, default)
        for i, (name, default) in enumerate(_ATTENTION)
    }


def reject_heads(
    q: fx.Node,
    keys_and_values: Sequence[fx.Node],
    mask: fx.Node | None,
    scale_bytes: int = SCALE_BYTES,
) -> str:
    """scale_bytes: that codes of a head end with."""
    for t in (q, *keys_and_values):
        is_codes = t is not q and fake(t).dtype == torch.int8
        if not (is_codes or fake(t).dtype in FLOATS) or not same_size(fake(t).stride(-1), 1):
            return "attention needs float tensors, or rows of codes, with a dense last dimension"
        size = fake(t).shape[3] - (scale_bytes if is_codes else 0)
        if not are_static(size) or int(size) > LARGEST_HEAD:
            return f"head size {size}: up to {LARGEST_HEAD} is possible"
    if mask is not None and fake(mask).dtype not in (torch.bool, *FLOATS):
        return f"a mask of {fake(mask).dtype}: bool, f32, f16 and bf16 are possible"
    if mask is not None and not is_one(fake(mask).shape[3]):
        step = fake(mask).stride(3)
        if not same_size(step, 1) and not same_size(step, 0):
            return "the mask's last dimension is not dense"
    return ""


_ARRAYS = "scales in tensors of their own are for GPUs: KVCache(model, layout='rows') is for CPUs"


def _nan_rows(node: fx.Node) -> int:
    return int(node.kwargs.get("nan_rows", False))


def _behind(
    s: SegmentBuilder, node: fx.Node, mirrors: Sequence[View | None], count: int
) -> list[View | None]:
    """The last operands: `count` for mirrors, and sinks."""
    return [*(mirrors or [None] * count), s.view(node.kwargs.get("sinks"))]


def _bf16_products(node: fx.Node) -> int:
    return int(node.kwargs.get("products") == "bf16")


def _reject_gpu_only(node: fx.Node) -> str:
    if node.kwargs.get("k_scale") is not None:
        return _ARRAYS
    qk = node.kwargs.get("qk", "same")
    return "" if qk == "same" else f"products of queries and keys in {qk} are for GPUs"


def reject_attention(node: fx.Node) -> str:
    scale_bytes = SCALE_BYTES if node.kwargs.get("k_scale") is None else 0
    mask = attention_settings(node, 3)["mask"]
    return reject_heads(node.args[0], node.args[1:3], mask, scale_bytes)


def reject_attention_append(node: fx.Node) -> str:
    q, k_new, v_new, k_cache, v_cache, cos, sin = (argument(node, i, "") for i in range(7))
    if cos is not None and (reason := reject_angles(q, cos, sin)):
        return reason
    for cache, new, whole in ((k_cache, k_new, fake(node)[1]), (v_cache, v_new, fake(node)[2])):
        if cache is not None and fake(cache).dtype != whole.dtype:
            return "the cache's dtype differs from the new keys' dtype"
        if fake(new).dtype not in FLOATS:
            return f"new keys of {fake(new).dtype}: f32, f16 and bf16 are possible"
    return reject_heads(q, (k_new, v_new), attention_settings(node, 8)["mask"])


def _dense_strides(size: Sequence[Size]) -> tuple[Size, ...]:
    strides: list[Size] = []
    step: Size = 1
    for n in reversed(size):
        strides.insert(0, step)
        step = step * n
    return tuple(strides)


def _mask_operands(
    s: SegmentBuilder, node: fx.Node, mask: fx.Node | None, shape: Sequence[Size]
) -> tuple[View | None, View | None]:
    """The mask and its live-key bounds, both broadcast to [B,H,Sq,·]; a segment computes the bounds of a mask once."""
    view = s.view(mask)
    if view is None:
        return None, None
    # One bias for all keys is a row of keys: what is analysed must have the length that attention reads.
    rows, keys = tuple(view.size[:3]), shape[3]
    view = broadcast(view, view.size, (*rows, keys))
    size = (*rows, 4)
    buffer, is_new = s.shared_buffer(("bounds", mask), size[0] * size[1] * size[2] * 16)
    bounds = View(buffer, torch.int32, size, _dense_strides(size))
    if is_new:
        record = StepRecord(
            "mask_bounds", "mask_bounds.cpu", "", (describe(mask),), (), 0, num_bytes(mask), node
        )
        s.step("mask_bounds", [view, bounds], [], [], record)
    whole = tuple(shape)
    return broadcast(view, view.size, whole), broadcast(bounds, size, (*whole[:3], 4))


def codes(keys: Tensor) -> str:
    return "+int8_kv" if keys.dtype == torch.int8 else ""


def _written_elsewhere(s: SegmentBuilder, node: fx.Node) -> str:
    """Why codes are not kept beside caches though a pass allowed it, or "": their kernel has to know what was written."""
    written = {r.node.args[0] for r in s.records if r.op == "index_copy"}
    is_allowed = node.kwargs.get("mirror") is not None
    here = written.issuperset(node.args[1:3])
    return "are written outside of the segment that reads them" if is_allowed and not here else ""


def _static_mirrors(s: SegmentBuilder, node: fx.Node) -> list[View]:
    """Positions that this segment has written, codes and state of keys, and of values; none where a pass allowed none."""
    positions = node.kwargs.get("mirror")
    if positions is None:
        return []
    mirrors = [s.view(positions)]
    for cache in node.args[1:3]:
        mirrors += s.mirror(MirrorSpec(argument=s.argument(cache)), fake(cache))
    return mirrors


def _details(node: fx.Node, keys: Tensor, is_mirrored: bool) -> str:
    said = codes(keys)
    for word, is_so in (
        ("+sinks", node.kwargs.get("sinks") is not None),
        ("+bf16_allowed", _bf16_products(node)),
        ("+int8_mirror", is_mirrored),
    ):
        said += word if is_so else ""
    return said


def attention_record(
    node: fx.Node,
    q: fx.Node,
    kv: tuple[Tensor, Tensor],
    detail: str,
    inputs: tuple,
    outputs: tuple,
    impl: str = "cpu",
    is_mirrored: bool = False,
    note: str = "",
    causal: bool = False,
) -> StepRecord:
    """causal: the queries are the last of the keys, and scores above the diagonal are no work."""
    b, h, sq, d = fake(q).shape
    scores_twice = 2 * sq * kv[0].shape[2] - (sq * (sq - 1) if causal else 0)
    flops = 2 * b * h * scores_twice * d
    size = num_bytes(q, q)
    for t in kv:  # as decoding reads them
        size += (
            numel(t) + numel(t) // t.shape[3] * SCALE_BYTES
            if is_mirrored
            else numel(t) * t.element_size()
        )
    return StepRecord(
        "attention",
        f"attention.{impl}",
        detail,
        tuple(describe(i) for i in inputs),
        tuple(describe(o) for o in outputs),
        flops,
        size,
        node,
        multiplies="bf16" if _bf16_products(node) else SHORT_DTYPES[fake(q).dtype],
        note=note,
    )


def _lower_attention(s: SegmentBuilder, node: fx.Node) -> None:
    q, k, v = node.args[:3]
    a = attention_settings(node, 3)
    keys = fake(k).shape[2]
    mask, bounds = _mask_operands(s, node, a["mask"], (*fake(q).shape[:3], keys))
    note = _written_elsewhere(s, node)
    mirrors = [] if note else _static_mirrors(s, node)
    is_mirrored = bool(mirrors)
    operands = [s.view(q), s.view(k), s.view(v), s.view(node), mask, bounds, *[None] * 4]
    operands += _behind(s, node, mirrors, 5)
    ints = [int(a["causal"]), a["causal_offset"], a["window"], 0, 0]
    ints += [_bf16_products(node), _nan_rows(node)]
    detail = "causal" if a["causal"] else "mask" if mask is not None else "full"
    detail += _details(node, fake(k), is_mirrored)
    record = attention_record(
        node,
        q,
        (fake(k), fake(v)),
        detail,
        (q, k, v),
        (node,),
        is_mirrored=is_mirrored,
        note=note,
        causal=a["causal"],
    )
    s.step("attention", operands, ints, [a["scale"], a["softcap"]], record)


def _lower_attention_append(s: SegmentBuilder, node: fx.Node) -> None:
    q, k_new, v_new, k_cache, v_cache, cos, sin, rope_name = (
        argument(node, i, "") for i in range(8)
    )
    a = attention_settings(node, 8)
    _, keys, values = fake(node)
    is_mirrored = bool(node.kwargs.get("mirror"))
    views = []
    mirrors: list[View] = []
    for i, (cache, new, whole) in enumerate(((k_cache, k_new, keys), (v_cache, v_new, values))):
        b, h, n, _ = fake(new).shape
        d = int(whole.shape[3])
        number = None if cache is None else s.argument(cache)
        spec = KvSpec(number, b, h, n, d, whole.dtype, is_mirrored)
        buffer = s.grow(spec, s.part(node, 1 + i))
        views.append(View(buffer, whole.dtype, tuple(whole.shape), tuple(whole.stride())))
        if is_mirrored:
            mirrors += s.mirror(MirrorSpec(kv=len(s.kv) - 1), whole)
    total = keys.shape[2]
    mask, bounds = _mask_operands(s, node, a["mask"], (*fake(q).shape[:3], total))
    operands = [
        s.view(q),
        *views,
        s.view(s.part(node, 0)),
        mask,
        bounds,
        batch_broadcast(s, cos, q),
        batch_broadcast(s, sin, q),
    ]
    operands += [s.view(k_new), s.view(v_new), None, *_behind(s, node, mirrors, 4)]
    ints = [int(a["causal"]), a["causal_offset"], a["window"], ROPE_KINDS.index(rope_name), 1]
    ints += [_bf16_products(node), _nan_rows(node)]
    detail = "append" + (f"+rope_{rope_name}" if rope_name != "none" else "")
    detail += "+causal" if a["causal"] else "+mask" if mask is not None else ""
    detail += _details(node, keys, is_mirrored)
    record = attention_record(
        node,
        q,
        (keys, values),
        detail,
        (q, k_new, v_new),
        (),
        is_mirrored=is_mirrored,
        causal=a["causal"],
    )
    s.step("attention", operands, ints, [a["scale"], a["softcap"]], record)


KERNELS = {
    "llmopt.attention": NativeKernel(
        "attention.cpu", lambda n: _reject_gpu_only(n) or reject_attention(n), _lower_attention
    ),
    "llmopt.attention_append": NativeKernel(
        "attention.cpu",
        lambda n: _reject_gpu_only(n) or reject_attention_append(n),
        _lower_attention_append,
    ),
    "llmopt.attention_append_arrays": NativeKernel(
        "attention.cpu", lambda n: _ARRAYS, _lower_attention_append
    ),
}
