"""linear_f16: every form (tiles, split K, GEMV, TMA), epilogue and norm, with ragged sizes, against float64."""

from __future__ import annotations

import pytest
import torch
from llmopt import ops
from llmopt.gpu.run import run
from llmopt.kernels import linear, linear_gemv, linear_tma
from llmopt.kernels.operands import Around, counters, dtype_name
from llmopt.launch import GemmTile, LinearProblem
from llmopt.ops.activation import NAMES
from llmopt.target import GPUS, gpu_target

from tests.tolerance import assert_close

HOPPER = gpu_target("cuda:90")
FLOATS = (torch.float16, torch.bfloat16)
FORMS = {
    "tiles": (linear, GemmTile(32, 64, 64), 70),
    "split": (linear, GemmTile(16, 64, 32, split_k=4), 5),
    "gemv": (linear_gemv, GemmTile(1, 64, 128), 2),
    "tma": (linear_tma, GemmTile(64, 64, 64), 70),
}
N, K = 104, 136  # multiples of no tile


def tensor(*shape, dtype=torch.float16, spread=1.0):
    return (torch.randn(shape) * spread).to(dtype)


def result(form, dtype, act="none", gated=False, norm="none", alpha=1.0, **given):
    """(got, want in float64) of one problem."""
    module, tile, m = FORMS[form]
    x, w = tensor(m, K, dtype=dtype), tensor(N, K, dtype=dtype, spread=K**-0.5)
    up = tensor(N, K, dtype=dtype, spread=K**-0.5) if gated else None
    y = torch.full((m, N + 3), float("nan"), dtype=dtype)[:, :N]
    problem = LinearProblem(m, N, K, dtype_name(dtype), act=act, gated=gated, norm=norm)
    around = Around(alpha=alpha, norm_eps=1e-5, **given)
    run(module.launch(problem, tile, HOPPER, x, w, y, around, up))
    wide = {
        name: value.double() if isinstance(value, torch.Tensor) else value
        for name, value in given.items()
    }
    offset, eps = given.get("norm_offset", 0.0), 1e-5
    h = x.double()
    if norm != "none":
        h = h - h.mean(-1, keepdim=True) if norm == "layer" else h
        h = h / (h.square().mean(-1, keepdim=True) + eps).sqrt()
        h = h * (wide["norm_weight"] + offset) if "norm_weight" in wide else h
        h = h + wide["norm_bias"] if "norm_bias" in wide else h
    want = alpha * (h @ w.double().T)
    want = ops.activation.activate(act, want + wide["bias"] if "bias" in wide else want)
    if gated:
        gate = alpha * (h @ up.double().T)
        want = want * (gate + wide["up_bias"] if "up_bias" in wide else gate)
    return y, want + wide["residual"] if "residual" in wide else want


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_everything_at_once(form, dtype):
    m = FORMS[form][2]
    given = {
        "bias": tensor(N, dtype=dtype),
        "up_bias": tensor(N, dtype=dtype),
        "residual": tensor(m, N, dtype=dtype),
    }
    norm = "none"
    if form != "tma":
        norm = "layer"
        given |= {
            "norm_weight": tensor(K, dtype=dtype),
            "norm_bias": tensor(K, dtype=dtype),
            "norm_offset": 1.0,
        }
    assert_close(*result(form, dtype, act="silu", gated=True, norm=norm, alpha=0.5, **given))


@pytest.mark.parametrize("act", NAMES)
def test_activations(act):
    assert_close(*result("gemv", torch.float16, act=act, bias=tensor(N)))


@pytest.mark.parametrize("form", FORMS)
def test_plain(form):
    assert_close(*result(form, torch.float16))


@pytest.mark.parametrize("form", ["tiles", "split", "gemv"])
def test_rms_norm_in_front(form):
    assert_close(*result(form, torch.bfloat16, norm="rms", norm_weight=tensor(K)))


def test_float32_is_not_rounded_to_tf32():
    m, tile = 40, GemmTile(32, 64, 64)
    x, w, y = (
        tensor(m, K, dtype=torch.float32),
        tensor(N, K, dtype=torch.float32),
        torch.empty(m, N),
    )
    launch = linear.launch(LinearProblem(m, N, K, "fp32"), tile, HOPPER, x, w, y, Around())
    run(launch)
    assert_close(y, x.double() @ w.double().T)


def test_split_leaves_its_counters_at_zero():
    result("split", torch.float16)
    assert not counters(torch.device("cpu"), 1).any()


@pytest.mark.parametrize("target", GPUS, ids=str)
@pytest.mark.parametrize("m", [1, 2, 16, 17, 64, 512, 4096])
@pytest.mark.parametrize("gated", [False, True])
def test_every_tile_fits_the_shared_memory(target, m, gated):
    for module in (linear, linear_gemv, linear_tma):
        problem = LinearProblem(m, 4096, 4096, "fp16", gated=gated)
        if module.reject(problem, target):
            continue
        tiles = module.tiles(problem, target)
        assert tiles
        for tile in tiles:
            assert (
                tile.smem_bytes(2, 2, 2 if gated else 1) <= target.gpu.smem_block
                or module is linear_gemv
            )
