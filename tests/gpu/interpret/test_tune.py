"""The tuner's bench on launches that run, in the interpreter with a clock of the test's own: what differs or fails is no candidate."""

from __future__ import annotations

import dataclasses

import llmopt
import torch
from llmopt.gpu.tune.problems import example, operands
from llmopt.gpu.tune.tuning import LaunchBench
from llmopt.launch import GemmTile, LinearProblem
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


def test_every_tuned_op_has_operands():
    """On the meta device, where nothing runs: problems of all ops become launches with what they read and write."""
    from llmopt.launch import AttentionProblem

    cases = {
        "linear_f16.triton": LinearProblem(16, 64, 64, "bf16", gated=True, norm="layer"),
        "linear_w8a8.triton": LinearProblem(16, 64, 64, "fp16", "w8a8", 32, gated=True),
        "linear_weight_only.triton": LinearProblem(16, 64, 64, "fp16", "w4a16", 32, gated=True),
        "attention.triton": AttentionProblem(1, 4, 2, 33, 33, 64, 64, "fp16", "i8", True),
    }
    for name, of in cases.items():
        kernel = KERNELS[name]
        given = operands(kernel.op, of, torch.device("meta"))
        launch = example(kernel, of, kernel.configs(of, HERE)[0], HERE, given)
        values = [launch.arguments.get(n) for n in (*launch.reads, *launch.writes)]
        assert sum(isinstance(v, torch.Tensor) for v in values) >= 4
        assert launch.kernel.startswith(name.split("_weight")[0].split(".")[0])


def test_explain_says_where_tiles_come_from(monkeypatch, tmp_path):
    monkeypatch.setenv("LLMOPT_TUNE", "1")
    monkeypatch.setenv("LLMOPT_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    linear = torch.nn.Linear(4096, 16).half()
    run = torch.compile(linear, backend="llmopt", options={"target": "cuda:80"})
    text = str(llmopt.explain(run, torch.zeros(1, 4096).half()))
    assert "tiles: 1 default: no GPU of cuda:sm_80 is here" in text
