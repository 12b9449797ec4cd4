"""The tuner's bench on launches that run, in the interpreter with a clock of the test's own: what differs or fails is no candidate."""

from __future__ import annotations

import contextlib
import dataclasses

import llmopt
import pytest
import torch
from llmopt.gpu import device as gpu_device
from llmopt.gpu.run import run
from llmopt.gpu.tune.problems import example, operands
from llmopt.gpu.tune.tuning import LaunchBench
from llmopt.kernels.operands import dtype_name
from llmopt.launch import AttentionProblem, GemmTile, Launch, LinearProblem
from llmopt.registry import KERNELS
from llmopt.target import gpu_target

HERE = gpu_target("cuda:80")
CPU = torch.device("cpu")
LINEAR = KERNELS["linear_f16.triton"]
PROBLEM = LinearProblem(16, 32, 64, "fp16")
TILE = GemmTile(16, 32, 64, 4, 2)


def bench(kernel=LINEAR, timer=lambda call: 1.0) -> LaunchBench:
    return LaunchBench(kernel, PROBLEM, HERE, CPU, timer)


def test_a_call_is_timed_in_microseconds():
    calls = []

    def timer(call):
        call()
        calls.append(call)
        return 0.25

    assert bench(timer=timer)(TILE) == 250.0
    assert len(calls) == 1


def test_launches_are_on_the_device_of_their_operands(monkeypatch):
    on = []

    @contextlib.contextmanager
    def entered(device):
        on.append(device)
        yield
        on.append("left")

    monkeypatch.setattr(gpu_device, "on", entered)
    tries = bench(timer=lambda call: len(on))
    assert tries.reject(TILE) == ""
    assert tries(TILE) == 3e3  # within the second time
    assert on == [CPU, "left", CPU, "left"]


def test_other_tiles_give_the_defaults_result():
    tries = bench()
    for tile in (TILE, GemmTile(16, 16, 32, 4, 2), GemmTile(16, 32, 16, 4, 2, split_k=2)):
        assert tries.reject(tile) == ""


def test_a_wrong_result_and_a_failure_are_named():
    def launch(p, c, t, *operands, **more):
        found = LINEAR.launch(p, c, t, *operands, **more)
        if c.block_n == 16:  # a kernel that leaves out half of K
            return dataclasses.replace(found, arguments={**found.arguments, "K": 32})
        if c.block_k == 16:
            raise MemoryError("out of resources: shared memory")
        return found

    tries = bench(dataclasses.replace(LINEAR, launch=launch))
    assert tries.reject(TILE) == ""
    assert "from the default's" in tries.reject(GemmTile(16, 16, 64, 4, 2))
    assert tries.reject(TILE) == ""
    failing = bench(dataclasses.replace(LINEAR, launch=lambda p, c, t, *o, **m: dataclasses.replace(
        LINEAR.launch(p, c, t, *o, **m), grid=(1, "x") if c.block_k == 16 else (1, 1))))  # fmt: skip
    assert failing.reject(TILE) == ""
    assert failing.reject(GemmTile(16, 32, 16, 4, 2)).startswith("it does not run: ")


@pytest.mark.parametrize(
    ("name", "of", "x", "w"),
    [
        ("linear_f16.triton", LinearProblem(16, 64, 64, "bf16", gated=True, norm="layer"), "bf16", "bf16"),
        ("linear_w8a8.triton", LinearProblem(16, 64, 64, "fp16", "w8a8", 32, gated=True), "i8", "i8"),
        ("linear_w8a8.triton", LinearProblem(16, 64, 64, "fp16", "w4a8", 32, gated=True, offsets=True), "i8", "u8"),
        ("linear_weight_only.triton", LinearProblem(16, 64, 64, "fp16", "w8a16", 32), "fp16", "i8"),
        ("linear_weight_only.triton", LinearProblem(16, 64, 64, "fp16", "w4a16", 32, gated=True), "fp16", "u8"),
        ("linear_weight_only.triton", LinearProblem(16, 64, 64, "fp16", "w4a16", 32, offsets=True), "fp16", "u8"),
    ],
    ids=str,
)  # fmt: skip
def test_linears_have_operands_of_their_scheme(name, of, x, w):
    """On the meta device, where nothing runs: problems become launches of what the kernel reads and writes."""
    arguments = launched(name, of).arguments
    assert (dtype_name(arguments["x_ptr"].dtype), dtype_name(arguments["w_ptr"].dtype)) == (x, w)
    assert arguments["w_ptr"].shape == (64, 32 if w == "u8" else 64)
    assert (arguments.get("w_offset_ptr") is not None) == of.offsets
    assert (arguments["up_ptr"] is not None) == of.gated
    assert (arguments.get("up_offset_ptr") is not None) == (of.gated and of.offsets)


def test_attention_has_operands():
    of = AttentionProblem(1, 4, 2, 33, 33, 64, 64, "fp16", "i8", True)
    launch = launched("attention.triton", of)
    values = [launch.arguments.get(n) for n in (*launch.reads, *launch.writes)]
    assert sum(isinstance(v, torch.Tensor) for v in values) >= 4
    rounded = launched("attention.triton", dataclasses.replace(of, kv_dtype="fp16", qk="i8"))
    given = {n: rounded.arguments[f"{n}_ptr"] for n in ("k", "v", "k_scale", "v_scale")}
    assert (given["k"].dtype, given["v"].dtype) == (torch.int8, torch.float16)
    assert (given["k_scale"] is not None, given["v_scale"] is None) == (True, True)


def launched(name, of) -> Launch:
    kernel = KERNELS[name]
    given = operands(kernel.op, of, torch.device("meta"))
    return example(kernel, of, kernel.configs(of, HERE)[0], HERE, given)


@pytest.mark.parametrize("scheme", ["f16", "w8a8"])
def test_results_to_compare_stay_far_below_what_fp16_can_hold(scheme):
    """What is not finite equals nothing, so that no tile would be a candidate."""
    of = LinearProblem(16, 16, 2048, "fp16", scheme, act="silu", gated=True)
    kernel = KERNELS["linear_f16.triton" if scheme == "f16" else "linear_w8a8.triton"]
    launch = example(kernel, of, kernel.configs(of, HERE)[0], HERE, operands(kernel.op, of, CPU))
    run(launch)
    assert 0 < launch.arguments["y_ptr"].abs().max() < 100


def test_explain_says_where_tiles_come_from(monkeypatch, tmp_path):
    monkeypatch.setenv("LLMOPT_TUNE", "1")
    monkeypatch.setenv("LLMOPT_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    linear = torch.nn.Linear(4096, 16).half()
    run = torch.compile(linear, backend="llmopt", options={"target": "cuda:80"})
    text = str(llmopt.explain(run, torch.zeros(1, 4096).half()))
    assert "tiles: 1 default: no GPU of cuda:sm_80 is here" in text
