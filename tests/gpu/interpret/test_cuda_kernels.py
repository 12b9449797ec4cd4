"""Plans whose steps run in the CUDA C++ kernels, on the emulated GPU, beside Triton kernels in the interpreter."""

from __future__ import annotations

from dataclasses import replace

import llmopt
import pytest
import torch
import torch.nn.functional as F
from llmopt import _C, registry
from llmopt.compiled import alive
from llmopt.counters import MOST_TILES, counters
from llmopt.gpu import launching, native
from llmopt.gpu.tune import tuning
from llmopt.gpu.tune.tuning import LaunchBench, Tuning
from llmopt.kernels.attention import Scores
from llmopt.launch import AttentionProblem, LinearProblem
from llmopt.native import cuda
from llmopt.ops.kv_codes import dequantize_arrays, quantize_arrays
from llmopt.quant.kv_cache import dequantize_kv_arrays
from llmopt.target import gpu_target

from tests.tolerance import assert_close

AMPERE = gpu_target("cuda:80")


def compiled(model):
    return torch.compile(model, backend="llmopt", options={"target": "cuda:80"})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_linear_of_8_bits(emulator, dtype):
    model = torch.nn.Sequential(torch.nn.Linear(64, 40), torch.nn.SiLU()).to(dtype)
    model = llmopt.quantize(model, "w8a8", group="channel")
    x = torch.randn(3, 64).to(dtype)
    with torch.no_grad(), emulator.counting() as counters:
        got = compiled(model)(x)
        assert_close(got, model.float()(x.float()).double(), dtype)
    assert counters.launches == 1
    assert "linear_w8a8.cuda" in str(alive()[-1].plan)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_linear_of_4_bits(emulator, dtype):
    """Its input is a part of wider rows, and begins where no 16 bytes do."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 40), torch.nn.SiLU()).to(dtype)
    model = llmopt.quantize(model, "w4a16")
    x = torch.randn(3, 70).to(dtype)[:, 3:67]
    with torch.no_grad(), emulator.counting() as counters:
        got = compiled(model)(x)
        assert_close(got, model.float()(x.float()).double(), dtype)
    assert counters.launches == 1
    assert "linear_w4a16.cuda" in str(alive()[-1].plan)


def test_a_linear_of_8_bits_where_its_gemm_is_chosen(emulator, monkeypatch):
    """By rule Triton's runs; a tuner that measured this one to be faster chooses as here."""
    gemm = registry.KERNELS["linear_w8a8_gemm.cuda"]
    monkeypatch.setitem(registry.KERNELS, gemm.name, replace(gemm, rank=1))
    model = torch.nn.Sequential(torch.nn.Linear(64, 40)).half()
    model = llmopt.quantize(model, "w8a8", group="channel")
    x = torch.randn(20, 64).half()
    with torch.no_grad(), emulator.counting() as counters:
        got = compiled(model)(x)
        assert_close(got, model.float()(x.float()).double(), torch.float16)
    assert counters.launches == 1
    assert "linear_w8a8_gemm.cuda" in str(alive()[-1].plan)


def test_the_tuner_times_one(emulator, monkeypatch):
    """The clock is the test's own, the launch is a real one."""
    of, kernel = LinearProblem(3, 32, 64, "fp16", "w8a8"), registry.KERNELS["linear_w8a8.cuda"]
    cpu = torch.device("cpu")

    def timer(call):
        call()
        return 0.25

    monkeypatch.setattr(tuning, "run", launching.run)  # which shows the emulator its tensors
    entry, conclusive = Tuning(
        AMPERE, cpu, bench_of=lambda *of: LaunchBench(*of, AMPERE, cpu, timer)
    ).measure(kernel, of)
    assert (entry.config, entry.us, conclusive) == ({}, 250.0, True)
    assert entry.problem["source"] == emulator.library.digest[:16]
    assert 0 < entry.roof < 1


@pytest.mark.parametrize("keys", [33, 700])  # 700 are split among blocks
def test_attention_of_one_query(emulator, keys):
    q = torch.randn(1, 4, 1, 64).half()
    k, v = (torch.randn(1, 4, keys, 64).half() for _ in range(2))
    attend = compiled(lambda q, k, v: F.scaled_dot_product_attention(q, k, v))
    with torch.no_grad(), emulator.counting() as counters:
        got = attend(q, k, v)
    assert_close(got, F.scaled_dot_product_attention(q.double(), k.double(), v.double()))
    assert counters.launches == 1
    assert "attention_decode.cuda" in str(alive()[-1].plan)


def test_attention_of_one_query_over_codes(emulator):
    """Scales lie as a growing cache has them: a token's heads side by side."""
    q = torch.randn(1, 4, 1, 64).half()
    cache = [quantize_arrays(torch.randn(70, 1, 2, 64).permute(1, 2, 0, 3)) for _ in range(2)]
    (k, k_scale), (v, v_scale) = cache
    k_scale, v_scale = (s.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for s in (k_scale, v_scale))  # fmt: skip

    def attend(q, k, k_scale, v, v_scale):
        keys, values = (
            dequantize_kv_arrays(*pair, q.dtype) for pair in ((k, k_scale), (v, v_scale))
        )
        return F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)

    with torch.no_grad(), emulator.counting() as counters:
        got = compiled(attend)(q, k, k_scale, v, v_scale)
    wide = (dequantize_arrays(*pair).double() for pair in ((k, k_scale), (v, v_scale)))
    assert_close(got, F.scaled_dot_product_attention(q.double(), *wide, enable_gqa=True))
    assert counters.launches == 1
    assert "attention_decode.cuda" in str(alive()[-1].plan)


def test_what_they_cannot_do_is_tritons(emulator):
    linear = LinearProblem(3, 64, 64, "fp16", "w8a8")
    assert registry.choose("linear_quantized", linear, AMPERE)[0].name == "linear_w8a8.cuda"
    for more in ({"m": 9}, {"group": 64}, {"offsets": True}, {"gated": True}, {"dtype": "fp32"}):
        p = replace(linear, **more)
        assert registry.choose("linear_quantized", p, AMPERE)[0].name == "linear_w8a8.triton"
    nibbles = LinearProblem(3, 64, 64, "fp16", "w4a16", 32)
    assert registry.choose("linear_quantized", nibbles, AMPERE)[0].name == "linear_w4a16.cuda"
    for more in ({"m": 9}, {"group": 0}, {"gated": True}, {"norm": "rms"}):
        p = replace(nibbles, **more)
        assert registry.choose("linear_quantized", p, AMPERE)[0].name == "linear_weight_only.triton"
    decode = AttentionProblem(1, 4, 4, 1, 33, 64, 64, "fp16", "fp16")
    for p in (decode, replace(decode, kv_dtype="i8")):
        assert registry.choose("attention", p, AMPERE)[0].name == "attention_decode.cuda"
    many = {"batch": 1 << 14, "heads": 8, "kv_heads": 8}  # more than there are counters
    impossible = ({"special": True}, {"window": 4}, {"dtype": "bf16", "kv_dtype": "bf16"}, many)
    for more in (*impossible, {"head_dim": 96, "value_dim": 96}):
        p = replace(decode, **more)
        assert registry.choose("attention", p, AMPERE)[0].name == "attention_decode.triton"


def test_where_tritons_were_measured_to_be_faster_they_run(emulator):
    hopper = gpu_target("cuda:90")
    nibbles = LinearProblem(1, 64, 64, "fp16", "w4a16", 32)
    chosen = registry.choose("linear_quantized", nibbles, hopper)[0].name
    assert chosen == "linear_weight_only_gemv.triton"
    decode = AttentionProblem(1, 4, 4, 1, 33, 64, 64, "fp16", "fp16")
    assert registry.choose("attention", decode, hopper)[0].name == "attention_decode.triton"
    codes = LinearProblem(1, 64, 64, "fp16", "w8a8")
    assert registry.choose("linear_quantized", codes, hopper)[0].name == "linear_w8a8.cuda"


def test_counters_stay_where_graphs_know_them():
    few = counters(torch.device("cpu"), 1)
    assert counters(torch.device("cpu"), MOST_TILES).data_ptr() == few.data_ptr()
    with pytest.raises(ValueError, match="65537 tiles are split, at most 65536"):
        counters(torch.device("cpu"), MOST_TILES + 1)


def test_where_nothing_is_built_they_say_so(monkeypatch):
    def library():
        raise cuda.CudaError("this build has no CUDA kernels")

    monkeypatch.setattr(cuda, "library", library)
    p = LinearProblem(3, 64, 64, "fp16", "w8a8")
    reasons = {k.name: why for k, why in registry.candidates("linear_quantized", p, AMPERE)}
    assert reasons["linear_w8a8.cuda"] == "this build has no CUDA kernels"
    assert registry.choose("linear_quantized", p, AMPERE)[0].name == "linear_w8a8.triton"
    amd = {k.name: why for k, why in registry.candidates("linear_quantized", p, gpu_target("hip:gfx942"))}  # fmt: skip
    assert "NVIDIA" in amd["linear_w8a8.cuda"]


@pytest.mark.parametrize("keys", [200, 700])
def test_a_launch_is_packed(emulator, keys):
    """Planned on meta tensors, run over addresses that come later; with 700 keys by several blocks, whose counters end as zeros."""
    kernel, place = registry.KERNELS["attention_decode.cuda"], torch.device("meta")
    problem = AttentionProblem(1, 4, 2, 1, keys, 64, 64, "fp16", "fp16")
    q, o = torch.randn(1, 4, 1, 64).half(), torch.empty(1, 4, 1, 64).half()
    k, v = (torch.randn(1, 2, keys, 64).half() for _ in range(2))
    metas = [torch.empty_like(t, device=place) for t in (q, k, v, o)]
    (tile,) = kernel.configs(problem, AMPERE)
    launch = kernel.launch(problem, tile, AMPERE, *metas, Scores(scale=0.125))
    share = launch.arguments["partial_ptr"]
    partial = torch.full((1 if share is None else share.numel(),), float("nan"))
    assert (share is None) == (keys == 200)
    counter = torch.zeros(launch.arguments["counter_ptr"].numel(), dtype=torch.int32)
    made = {"partial_ptr": 4, "counter_ptr": 5}

    def find(name, tensor):
        known = [i for i, meta in enumerate(metas) if meta is tensor]
        return (known[0] if known else made[name]), 0

    packed = native.pack([launch], AMPERE, torch.device("cpu"), find)
    _C.open_gpu_driver(str(emulator.path))
    emulator.buffers((q, k, v), (o, partial, counter))
    _C.LaunchPlan([packed.launches]).run(
        0, 0, [t.data_ptr() for t in (q, k, v, o, partial, counter)]
    )
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.125, enable_gqa=True)  # fmt: skip
    assert_close(o, want)
    assert not counter.any()
