"""linear_w8a8, linear_w8a16, linear_w4a16 and quantize_rows: integers exact, results against float64."""

from __future__ import annotations

import pytest
import torch
from llmopt.gpu.run import run
from llmopt.kernels import linear_codes_gemv, linear_w8a8, linear_weight_only, quantize
from llmopt.kernels.operands import Around, dtype_name
from llmopt.launch import GemmTile, LinearProblem, RowProblem
from llmopt.ops.activation import activate
from llmopt.ops.linear_quantized import dequantized, quantized_activations
from llmopt.ops.norm import normalized
from llmopt.target import gpu_target

from tests.tolerance import assert_close

HOPPER = gpu_target("cuda:90")
FLOATS = (torch.float16, torch.bfloat16)
N, K = 104, 192


def codes(*shape):
    return torch.randint(-127, 128, shape, dtype=torch.int8)


@pytest.mark.parametrize(
    ("m", "tile"), [(70, GemmTile(64, 64, 128)), (5, GemmTile(16, 64, 64, split_k=2))], ids=str
)
def test_w8a8_is_exact_before_the_scales(m, tile):
    x, w, y = codes(m, K), codes(N, K), torch.empty(m, N)
    x[0], w[0] = -128, -128
    problem = LinearProblem(m, N, K, "fp32", "w8a8")
    one = [torch.ones(rows, 1) for rows in (m, N)]
    run(linear_w8a8.launch(problem, tile, HOPPER, x, one[0], w, one[1], y, Around()))
    assert torch.equal(y.double(), x.double() @ w.double().T)


@pytest.mark.parametrize("group", [0, 64])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("m", "tile"), [(70, GemmTile(64, 64, 64)), (3, GemmTile(16, 64, 64, split_k=2))], ids=str
)
def test_w8a8(m, tile, gated, group):
    groups = K // group if group else 1
    x, w, up = codes(m, K), codes(N, K), codes(N, K) if gated else None
    x_scale, w_scale, up_scale = (torch.rand(rows, groups) * 0.01 for rows in (m, N, N))
    bias, residual, y = (
        torch.randn(N),
        torch.randn(m, N).half(),
        torch.empty(m, N, dtype=torch.float16),
    )
    problem = LinearProblem(m, N, K, "fp16", "w8a8", group, "silu", gated)
    around = Around(bias=bias, residual=residual)
    more = (up, up_scale) if gated else ()
    run(linear_w8a8.launch(problem, tile, HOPPER, x, x_scale, w, w_scale, y, around, *more))
    h = dequantized(x, x_scale, None, 8).double()
    want = activate("silu", h @ dequantized(w, w_scale, None, 8).double().T + bias)
    if gated:
        want = want * (h @ dequantized(up, up_scale, None, 8).double().T)
    assert_close(y, want + residual)


@pytest.mark.parametrize(("scheme", "group"), [("w8a8", 64), ("w4a8", 32), ("w4a8", 0)])
@pytest.mark.parametrize("with_offsets", [False, True])
def test_integer_products_with_offsets_and_of_4_bits(scheme, group, with_offsets):
    m, bits, groups = 5, linear_w8a8.BITS[scheme], K // group if group else 1
    weights = [
        codes(N, K) if bits == 8 else torch.randint(0, 256, (N, K // 2), dtype=torch.uint8)
        for _ in range(2)
    ]
    scales = [torch.rand(N, groups) * 0.01 for _ in range(2)]
    offsets = [torch.randn(N, groups) * 0.1 if with_offsets else None for _ in range(2)]
    x, x_scale, y = codes(m, K), torch.rand(m, groups) * 0.01, torch.empty(m, N).half()
    problem = LinearProblem(m, N, K, "fp16", scheme, group, "silu", True)
    tile = GemmTile(16, 64, group or 64, split_k=2)
    run(linear_w8a8.launch(problem, tile, HOPPER, x, x_scale, weights[0], scales[0], y, Around(),
                           weights[1], scales[1], offsets[0], offsets[1]))  # fmt: skip
    h = dequantized(x, x_scale, None, 8).double()
    gate, up = (
        h @ dequantized(w, s, o, bits).double().T
        for w, s, o in zip(weights, scales, offsets, strict=True)
    )
    assert_close(y, activate("silu", gate) * up)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("scheme", ["w8a16", "w4a16"])
@pytest.mark.parametrize(("group", "with_offsets"), [(32, True), (64, False), (0, False)])
def test_weight_only(scheme, dtype, group, with_offsets):
    m, bits, groups = 5, linear_weight_only.BITS[scheme], K // group if group else 1
    tile = GemmTile(16, 64, group or 64, split_k=2)
    weights = [
        codes(N, K) if bits == 8 else torch.randint(0, 256, (N, K // 2), dtype=torch.uint8)
        for _ in range(2)
    ]
    scales = [torch.rand(N, groups) * (0.002 if bits == 8 else 0.02) for _ in range(2)]
    offsets = [torch.randn(N, groups) * 0.02 if with_offsets else None for _ in range(2)]
    x, norm_weight = torch.randn(m, K).to(dtype), torch.randn(K).to(dtype)
    y = torch.empty(m, N, dtype=dtype)
    problem = LinearProblem(m, N, K, dtype_name(dtype), scheme, group, "gelu_tanh", True, "rms")
    around = Around(norm_weight=norm_weight, norm_eps=1e-6)
    run(linear_weight_only.launch(problem, tile, HOPPER, x, weights[0], scales[0], offsets[0], y, around,
                                  weights[1], scales[1], offsets[1]))  # fmt: skip
    h = normalized(x, "rms", norm_weight, None, 1e-6, 0.0).double()
    gate, up = (
        h @ dequantized(*w, bits).double().T for w in zip(weights, scales, offsets, strict=True)
    )
    assert_close(y, activate("gelu_tanh", gate) * up)


def test_weight_only_with_many_rows_and_a_plain_epilogue():
    m = 70
    x, w, scale = torch.randn(m, K).half(), codes(N, K), torch.rand(N, K // 64) * 0.002
    y = torch.empty(m, N, dtype=torch.float16)
    problem = LinearProblem(m, N, K, "fp16", "w8a16", 64)
    run(
        linear_weight_only.launch(
            problem, GemmTile(64, 64, 64), HOPPER, x, w, scale, None, y, Around()
        )
    )
    assert_close(y, x.double() @ dequantized(w, scale, None, 8).double().T)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("form", ["plain", "rms", "layer", "gated"])
def test_quantize_rows(form, group, dtype):
    m, k = 3, 160
    x = torch.randn(m, k * (2 if form == "gated" else 1)).to(dtype)
    x[1, :32] = 0
    weight, bias = torch.randn(k).to(dtype), torch.randn(k).to(dtype)
    around = (
        Around(norm_weight=weight, norm_bias=bias, norm_eps=1e-5)
        if form in ("rms", "layer")
        else Around()
    )
    q, scale = torch.empty(m, k, dtype=torch.int8), torch.empty(m, k // group if group else 1)
    problem = RowProblem(m, k, dtype_name(dtype))
    tile = quantize.tiles(problem, HOPPER)[0]
    norm = form if form in ("rms", "layer") else "none"
    run(
        quantize.launch(
            problem, tile, HOPPER, x, q, scale, around, norm, "silu", form == "gated", group
        )
    )
    h = x.float()
    if norm != "none":
        h = normalized(x, norm, weight, bias, 1e-5, 0.0)
    if form == "gated":
        h = activate("silu", h[:, :k]) * h[:, k:]
    want, want_scale = quantized_activations(h, scale.shape[1])
    assert_close(scale, want_scale.double())
    # A last-bit difference of the scale may move a value that lies halfway.
    assert (q.float() - want.flatten(1)).abs().max() <= (0 if form == "plain" else 1)
    assert (q.float() != want.flatten(1)).float().mean() < 0.01


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("scheme", ["w8a16", "w4a16"])
@pytest.mark.parametrize(
    ("group", "with_offsets", "norm"),
    [
        (32, True, "rms"),
        (64, False, "layer"),
        (0, False, "none"),
        (0, True, "rms"),
        (64, True, "none"),
    ],
)
def test_weight_only_of_two_rows(scheme, dtype, group, with_offsets, norm):
    m, bits, groups = 2, linear_weight_only.BITS[scheme], K // group if group else 1
    weights = [
        codes(N, K) if bits == 8 else torch.randint(0, 256, (N, K // 2), dtype=torch.uint8)
        for _ in range(2)
    ]
    scales = [torch.rand(N, groups) * (0.002 if bits == 8 else 0.02) for _ in range(2)]
    offsets = [torch.randn(N, groups) * 0.02 if with_offsets else None for _ in range(2)]
    x, norm_weight = torch.randn(m, K).to(dtype), torch.randn(K).to(dtype)
    norm_bias = torch.randn(K).to(dtype) if norm == "layer" else None
    y, residual = torch.empty(m, N, dtype=dtype), torch.randn(m, N).to(dtype)
    gated = norm != "none"
    problem = LinearProblem(
        m, N, K, dtype_name(dtype), scheme, group, "silu", gated, norm, with_offsets
    )
    around = Around(norm_weight=norm_weight, norm_bias=norm_bias, norm_eps=1e-6, residual=residual)
    tile = GemmTile(1, 32, 128, 4, 1)
    assert linear_codes_gemv.reject(problem, HOPPER) == ""
    assert linear_codes_gemv.reject_tile(tile, problem, HOPPER) == ""
    run(linear_codes_gemv.launch(problem, tile, HOPPER, x, weights[0], scales[0], offsets[0], y, around,
                                       *((weights[1], scales[1], offsets[1]) if gated else ())))  # fmt: skip
    h = normalized(x, norm, norm_weight, norm_bias, 1e-6, 0.0).double() if gated else x.double()
    gate, up = (
        h @ dequantized(*w, bits).double().T for w in zip(weights, scales, offsets, strict=True)
    )
    assert_close(y, activate("silu", gate) * (up if gated else 1) + residual.double())


@pytest.mark.parametrize(
    ("scheme", "group", "with_offsets"),
    [("w8a8", 0, False), ("w8a8", 64, True), ("w4a8", 32, True), ("w4a8", 0, False)],
)
def test_rounded_rows_one_by_one(scheme, group, with_offsets):
    m, bits, groups = 2, linear_w8a8.BITS[scheme], K // group if group else 1
    weights = [
        codes(N, K) if bits == 8 else torch.randint(0, 256, (N, K // 2), dtype=torch.uint8)
        for _ in range(2)
    ]
    scales = [torch.rand(N, groups) * 0.01 for _ in range(2)]
    offsets = [torch.randn(N, groups) * 0.1 if with_offsets else None for _ in range(2)]
    x, x_scale, y = codes(m, K), torch.rand(m, groups) * 0.01, torch.empty(m, N).half()
    problem = LinearProblem(m, N, K, "fp16", scheme, group, "silu", True, offsets=with_offsets)
    assert linear_codes_gemv.reject_w8a8(problem, HOPPER) == ""
    run(linear_codes_gemv.launch_w8a8(problem, GemmTile(1, 32, 128, 4, 1), HOPPER, x, x_scale, weights[0], scales[0], y,
                                      Around(), weights[1], scales[1], offsets[0], offsets[1]))  # fmt: skip
    h = dequantized(x, x_scale, None, 8).double()
    gate, up = (
        h @ dequantized(w, s, o, bits).double().T
        for w, s, o in zip(weights, scales, offsets, strict=True)
    )
    assert_close(y, activate("silu", gate) * up)
