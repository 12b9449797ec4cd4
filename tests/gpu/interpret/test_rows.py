"""norm, rope, swiglu, softmax, embedding and cross_entropy, ragged, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from llmopt.gpu.attentions import codes_and_scales
from llmopt.gpu.run import run
from llmopt.kernels import (
    cross_entropy,
    embedding,
    index_copy,
    norm,
    rope,
    rotary_table,
    softmax,
    swiglu,
)
from llmopt.kernels.operands import dtype_name
from llmopt.launch import RowProblem, RowTile
from llmopt.ops.kv_codes import dequantize_rows, quantize_rows
from llmopt.ops.rope import rotate
from llmopt.target import gpu_target

from tests.tolerance import assert_close

HOPPER = gpu_target("cuda:90")
FLOATS = (torch.float16, torch.bfloat16)


def problem(x, k=None):
    return RowProblem(x.numel() // x.shape[-1], k or x.shape[-1], dtype_name(x.dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("affine", [False, True])
def test_norm(kind, dtype, affine):
    x = (torch.randn(3, 5, 2, 40) + 1).to(dtype)[:, :, 1]  # rows with other rows between them
    weight, bias = (torch.randn(40).to(dtype) for _ in range(2)) if affine else (None, None)
    y = torch.empty(15, 40, dtype=dtype)
    p = problem(x)
    run(norm.launch(p, norm.tiles(p, HOPPER)[0], HOPPER, x, weight, bias, y, kind, 1e-5, 1.0))
    h = x.double() - (x.double().mean(-1, keepdim=True) if kind == "layer" else 0)
    h = h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    want = h * (weight.double() + 1) + bias.double() if affine else h
    assert_close(y, want.reshape(15, 40))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["half", "interleaved"])
@pytest.mark.parametrize("width", [24, 16])
def test_rope_and_append(kind, dtype, width):
    b, h, hkv, s, d, dv = 2, 5, 3, 4, 24, 20
    q, k, v = (
        torch.randn(b, s, n, w).to(dtype).transpose(1, 2) for n, w in ((h, d), (hkv, d), (hkv, dv))
    )
    cos, sin = (torch.randn(1, 1, s, width).to(dtype) for _ in range(2))
    q_out = torch.empty_like(q)
    keys, values = (
        torch.full((9, b, hkv, w), 7.0, dtype=dtype).permute(1, 2, 0, 3) for w in (d, dv)
    )
    new = keys[:, :, 5:], values[:, :, 5:]
    run(rope.launch(problem(q), RowTile(4), HOPPER, q, q_out, cos, sin, kind, k, new[0], v, new[1]))
    wide = [t.double() for t in (q, k, cos, sin)]
    assert_close(q_out, rotated(wide[0], *wide[2:], kind))
    assert_close(new[0], rotated(wide[1], *wide[2:], kind))
    assert torch.equal(new[1], v)
    assert (keys[:, :, :5] == 7).all()
    assert (values[:, :, :5] == 7).all()


@pytest.mark.parametrize("kind", ["half", "interleaved", "none"])
@pytest.mark.parametrize("width", [24, 16])
def test_append_of_codes(kind, width):
    """Rows end where ops/kv_codes.py would round them; what has no code is seen."""
    b, hkv, s, d, dv = 2, 3, 2, 24, 20
    k, v = (torch.randn(b, s, hkv, w).half().transpose(1, 2) for w in (d, dv))
    v[0, 0, 0, 1], v[1, 2, 1] = float("inf"), 0.0
    cos, sin = torch.randn(2, 1, 1, s, width).half() if kind != "none" else (None, None)
    rows = [
        torch.full((5, b, hkv, w + 4), 7, dtype=torch.int8).permute(1, 2, 0, 3) for w in (d, dv)
    ]
    (k8, k_scale), (v8, v_scale) = (codes_and_scales(r[:, :, 3:]) for r in rows)
    q = None if kind == "none" else k
    q_out = None if kind == "none" else torch.empty_like(k)
    run(rope.launch(problem(k), RowTile(4), HOPPER, q, q_out, cos, sin, kind, k, k8, v, v8, k_scale, v_scale))  # fmt: skip
    turned = k.double() if kind == "none" else rotated(k.double(), cos.double(), sin.double(), kind)
    step = turned.abs().amax(-1, keepdim=True) / 127
    assert ((dequantize_rows(rows[0][:, :, 3:]).double() - turned).abs() <= step * 0.51).all()
    want = dequantize_rows(quantize_rows(v))
    assert torch.equal(dequantize_rows(rows[1][:, :, 3:]).isnan(), want.isnan())
    assert_close(dequantize_rows(rows[1][:, :, 3:]), want.double())
    assert all((r[:, :, :3] == 7).all() for r in rows)


def rotated(x, cos, sin, kind):
    width = cos.shape[-1]
    turned = x[..., :width]
    turned = turned * cos + rotate(turned, kind) * sin
    return torch.cat((turned, x[..., width:]), -1)


def test_rope_alone_and_append_without_rope():
    q, cos, sin = torch.randn(2, 3, 4, 16).half(), *torch.randn(2, 2, 1, 4, 16).half()
    out, keys, values = torch.empty_like(q), torch.empty_like(q), torch.empty_like(q)
    run(rope.launch(problem(q), RowTile(8), HOPPER, q, out, cos, sin, "half"))
    assert_close(out, rotated(q.double(), cos.double(), sin.double(), "half"))
    run(
        rope.launch(
            problem(q), RowTile(8), HOPPER, None, None, None, None, "none", q, keys, out, values
        )
    )
    assert torch.equal(keys, q)
    assert torch.equal(values, out)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_swiglu(dtype):
    x, y = torch.randn(3, 2 * 300).to(dtype), torch.empty(3, 300, dtype=dtype)
    run(swiglu.launch(problem(x, 300), RowTile(128), HOPPER, x, y))
    assert_close(y, F.silu(x[:, :300].double()) * x[:, 300:].double())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_softmax(dtype):
    x = (torch.randn(3, 300) * 5).to(dtype)
    x[1, :299] = float("-inf")
    y = torch.empty_like(x)
    run(softmax.launch(problem(x), RowTile(128), HOPPER, x, y))
    assert_close(y, x.double().softmax(-1))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_embedding(dtype):
    table, ids = torch.randn(11, 300).to(dtype), torch.tensor([[3, 0, 10, -1, 11]])
    y = torch.empty(5, 300, dtype=dtype)
    run(embedding.launch(problem(y), RowTile(128), HOPPER, ids, table, y, 2.0))
    assert torch.equal(y[:3], table[ids[0, :3]] * 2)
    assert y[3:].isnan().all()


def test_embedding_of_ids_with_gaps():
    table, ids = torch.randn(11, 40), torch.randint(0, 11, (4, 3)).T[:, ::2]
    y = torch.empty(6, 40)
    run(embedding.launch(problem(y), RowTile(64), HOPPER, ids, table, y))
    assert torch.equal(y.view(3, 2, 40), table[ids])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("positions", ["int64", "float32"])
def test_rotary_table(dtype, positions):
    frequencies = 10000.0 ** -(torch.arange(0, 24, 2) / 24)
    place = torch.tensor([[0, 5, 100000], [7, 8, 9]], dtype=getattr(torch, positions))[..., None]
    cos, sin = (torch.empty(2, 3, 24, dtype=dtype) for _ in range(2))
    p = problem(cos)
    shape = (2, 3, 12)
    run(rotary_table.launch(p, rotary_table.tiles(p, HOPPER)[0], HOPPER, frequencies.expand(shape),
                            place.expand(shape), cos, sin, 1.5))  # fmt: skip
    angle = (frequencies * place.float()).double()  # rounded to float32, as the op says
    whole = torch.cat((angle, angle), -1)
    assert_close(cos, whole.cos() * 1.5)
    assert_close(sin, whole.sin() * 1.5)


def test_index_copy():
    cache, new = torch.zeros(2, 3, 9, 20).half(), torch.randn(2, 4, 3, 20).half().transpose(1, 2)
    want = cache.clone()
    index = torch.tensor([7, 0, 20, -1])  # two that exist
    want.index_copy_(2, index[:2], new[:, :, :2])
    p = problem(new)
    run(index_copy.launch(p, index_copy.tiles(p, HOPPER)[0], HOPPER, cache, index, new))
    assert torch.equal(cache, want)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_cross_entropy(dtype):
    x, target = (torch.randn(5, 300) * 4).to(dtype), torch.tensor([3, 299, -100, 0, 300])
    loss = torch.empty(5)
    run(cross_entropy.launch(problem(x), RowTile(128), HOPPER, x, target, loss))
    assert_close(loss[:4], F.cross_entropy(x[:4].double(), target[:4], reduction="none"))
    assert loss[4].isnan()
