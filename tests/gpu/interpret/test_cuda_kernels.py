"""Plans whose steps run in the CUDA C++ kernels, on the emulated GPU, beside Triton kernels in the interpreter."""

from __future__ import annotations

import llmopt
import pytest
import torch
import torch.nn.functional as F
from cuda_emulator.emulator import Emulator, build
from llmopt import registry
from llmopt.compiled import alive
from llmopt.counters import MOST_TILES, counters
from llmopt.gpu import executor
from llmopt.gpu.plan import tensors
from llmopt.gpu.run import run
from llmopt.launch import AttentionProblem, LinearProblem
from llmopt.native import cuda
from llmopt.target import gpu_target

from tests.tolerance import assert_close

AMPERE = gpu_target("cuda:80")


@pytest.fixture(scope="module")
def emulated_gpu() -> Emulator:
    return Emulator(build())


@pytest.fixture
def emulator(emulated_gpu, monkeypatch):
    """The library of this installation is the emulated one, whose launches see the tensors of their launch and no others."""
    emulated_gpu.device()
    emulated_gpu.seed(0)

    def launch(step):
        scratch = tensors(step, ("partial_ptr", "counter_ptr"))
        emulated_gpu.buffers(tensors(step, step.reads), [*tensors(step, step.writes), *scratch])
        run(step)

    monkeypatch.setattr(cuda, "library", lambda: emulated_gpu.library)
    monkeypatch.setattr(executor, "run", launch)
    torch._dynamo.reset()
    return emulated_gpu


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


def test_what_they_cannot_do_is_tritons(emulator):
    linear = LinearProblem(3, 64, 64, "fp16", "w8a8")
    assert registry.choose("linear_quantized", linear, AMPERE)[0].name == "linear_w8a8.cuda"
    for more in ({"m": 9}, {"group": 64}, {"offsets": True}, {"gated": True}, {"dtype": "fp32"}):
        p = LinearProblem(**{**linear.__dict__, **more})
        assert registry.choose("linear_quantized", p, AMPERE)[0].name == "linear_w8a8.triton"
    decode = AttentionProblem(1, 4, 4, 1, 33, 64, 64, "fp16", "fp16")
    assert registry.choose("attention", decode, AMPERE)[0].name == "attention_decode.cuda"
    many = {"batch": 1 << 14, "heads": 8, "kv_heads": 8}  # more than there are counters
    for more in ({"special": True}, {"window": 4}, {"kv_dtype": "i8"}, {"head_dim": 96, "value_dim": 96}, many):  # fmt: skip
        p = AttentionProblem(**{**decode.__dict__, **more})
        assert registry.choose("attention", p, AMPERE)[0].name == "attention_decode.triton"


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
