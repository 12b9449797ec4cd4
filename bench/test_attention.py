"""attention and mask_bounds: prefill against the FMA probe, decode against the read probe."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from llmopt.mirrors import MirrorLayout
from llmopt.ops.kv_codes import SCALE_BYTES, quantize_rows
from llmopt.program import OneOp, run_op

from bench.conftest import copies_beyond_cache
from bench.shapes import DECODE_ATTENTION, INT8_KV_ATTENTION, PREFILL_ATTENTION, Attention

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def live_mask(shape: Attention) -> torch.Tensor | None:
    """The mask of a static cache: its first keys are live."""
    if not shape.slots:
        return None
    mask = torch.zeros(1, 1, 1, shape.slots, dtype=torch.bool)
    mask[..., : shape.keys] = True
    return mask


def ours(shape: Attention, q, k, v, mask, out) -> OneOp:
    bounds = None
    if mask is not None:
        bounds = torch.zeros(1, 1, 1, 4, dtype=torch.int32)
        run_op("mask_bounds", [mask, bounds])
        mask = mask.expand(*q.shape[:3], shape.slots)
        bounds = bounds.expand(*q.shape[:3], 4)
    operands = [q, k, v, out, mask, bounds, None, None, None, None, None]
    ints = [int(shape.causal), shape.keys - shape.queries if shape.causal else 0, 0, 0, 0, 0, 0]
    return OneOp("attention", operands, ints, [shape.dim**-0.5, 0.0])


def theirs(shape: Attention, q, k, v, mask):
    causal = shape.causal and shape.queries > 1
    gqa = shape.heads != shape.kv_heads
    return lambda: F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=gqa
    )


def query_and_cache(shape: Attention, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """q, and keys and values side by side in the order of the shape."""
    q = torch.randn(shape.batch, shape.heads, shape.queries, shape.dim).to(dtype)
    length = shape.slots or shape.keys
    cache = torch.randn(2, shape.batch, shape.kv_heads, length, shape.dim).to(dtype)
    return q, in_order(shape, cache)


def in_order(shape: Attention, cache: torch.Tensor) -> torch.Tensor:
    if not shape.by_position:
        return cache
    return cache.permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 3, 1, 4)


@pytest.mark.parametrize("system", ["llmopt", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*PREFILL_ATTENTION, *DECODE_ATTENTION], ids=str)
def test_attention(timed, shape, dtype, system):
    num_bytes = shape.num_bytes(dtype.itemsize)
    mask = live_mask(shape)
    q, first = query_and_cache(shape, dtype)
    if system == "torch":  # reads dead slots too
        copies = copies_beyond_cache(first.numel() * first.itemsize)
        caches = [first.clone() for _ in range(copies)]  # in the same order
        calls = [theirs(shape, q, k, v, mask) for k, v in caches]
    else:
        caches = [torch.empty_like(first) for _ in range(copies_beyond_cache(num_bytes))]
        for cache in caches:
            cache[..., : shape.keys, :] = first[..., : shape.keys, :]  # dead slots take no memory
        out = torch.empty_like(q)
        calls = [ours(shape, q, k, v, mask, out) for k, v in caches]
        calls[0]()  # never the time of a wrong result
        want = theirs(shape, q, *first, mask)()
        torch.testing.assert_close(calls[0].tensors[3], want, atol=2e-2, rtol=2e-2)
    timed(system, f"attention {shape}", dtype, calls, shape.flops, num_bytes)


@pytest.mark.parametrize("kv", ["int8", "fp32"])
@pytest.mark.parametrize("shape", INT8_KV_ATTENTION, ids=str)
def test_decode_over_int8_kv(timed, shape, kv):
    """The same problem over codes, and beside it over floats: each counts the bytes that it reads."""
    q, first = query_and_cache(shape, torch.float32)
    want = theirs(shape, q, *first, None)()
    row_bytes = shape.dim + SCALE_BYTES if kv == "int8" else 4 * shape.dim
    num_bytes = shape.num_bytes(1) // shape.dim * row_bytes
    if kv == "int8":
        first = in_order(shape, quantize_rows(first))
    caches = [first.clone() for _ in range(copies_beyond_cache(num_bytes))]
    out = torch.empty_like(q)
    calls = [ours(shape, q, k, v, None, out) for k, v in caches]
    calls[0]()  # never the time of a wrong result
    torch.testing.assert_close(calls[0].tensors[3], want, atol=2e-2, rtol=2e-2)
    system = "llmopt" if kv == "int8" else "fp32 KV"
    timed(system, f"attention int8 KV {shape}", q.dtype, calls, shape.flops, num_bytes)


@pytest.mark.parametrize("shape", INT8_KV_ATTENTION, ids=str)
def test_decode_over_codes_beside_floats(timed, shape):
    """A token: its key and value are written, rounded into the mirror, and the mirror is read."""
    q, first = query_and_cache(shape, torch.float32)
    new = [torch.randn(1, shape.kv_heads, 1, shape.dim) for _ in range(2)]
    out = torch.empty_like(q)
    num_bytes = shape.num_bytes(1) // shape.dim * (shape.dim + SCALE_BYTES)
    layout = MirrorLayout(1, shape.kv_heads, shape.keys, shape.dim)

    def call() -> OneOp:
        keys_and_values, mirrors = first.clone(), []
        for _ in range(2):
            memory = torch.zeros(layout.num_bytes, dtype=torch.int8)
            state = memory[: layout.state_bytes].view(torch.int64)[: 2 * shape.kv_heads]
            rows = memory[layout.state_bytes :][: shape.keys * layout.position_bytes]
            width = shape.dim + SCALE_BYTES
            rows = rows.view(1, shape.kv_heads, shape.keys, width)
            if shape.by_position:
                rows = rows.view(1, shape.keys, shape.kv_heads, width).transpose(1, 2)
            mirrors += [rows, state.view(1, shape.kv_heads, 2)]
        operands = [q, *keys_and_values, out, *[None] * 4, *new, None, *mirrors]
        return OneOp("attention", operands, [0, 0, 0, 0, 1, 0, 0], [shape.dim**-0.5, 0.0])

    calls = [call() for _ in range(copies_beyond_cache(num_bytes))]
    for c in calls:
        c()  # rounds all of its keys; never the time of a wrong result
    _, k, v, got, *_ = calls[0].tensors
    torch.testing.assert_close(got, theirs(shape, q, k, v, None)(), atol=2e-2, rtol=2e-2)
    timed("int8 beside fp32", f"attention int8 KV {shape}", q.dtype, calls, shape.flops, num_bytes)


@pytest.mark.parametrize(("rows", "keys"), [(1, 8192), (512, 512)])
def test_mask_bounds(timed, rows, keys):
    mask = torch.ones(1, 1, rows, keys, dtype=torch.bool).tril(keys - rows)
    bounds = torch.zeros(1, 1, rows, 4, dtype=torch.int32)
    op = OneOp("mask_bounds", [mask, bounds])
    timed("llmopt", f"mask_bounds {rows}x{keys}", mask.dtype, [op], 0.0, mask.numel())
