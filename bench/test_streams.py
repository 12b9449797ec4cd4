"""A linear of one row over 1 to 4 panels side by side (docs/adr/0008), against the read probe."""

from __future__ import annotations

import pytest
import torch
from llmopt.native.probe import measure
from llmopt.target import target
from llmopt.tune.candidates import Machine
from llmopt.tune.measure import LinearBench, WeightMemory, weight_bytes
from llmopt.types import LinearConfig, LinearProblem

N, K = 49152, 576
WEIGHTS = {
    "f32": (torch.float32, 0),
    "bf16": (torch.bfloat16, 0),
    "q8": (torch.int8, 64),
    "q4": (torch.uint8, 32),
}


@pytest.fixture(scope="module")
def machine() -> Machine:
    threads = torch.get_num_threads()
    return Machine(target(), threads, measure(threads))


@pytest.mark.parametrize("panels", [1, 2, 3, 4])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_panels_side_by_side(timed, machine, weight, panels):
    dtype, group = WEIGHTS[weight]
    if group:
        problem = LinearProblem(
            "linear_quantized", 1, N, K, "f32", weight, "f32", group=group, planes=1
        )
    else:
        problem = LinearProblem("linear", 1, N, K, weight, weight, weight)
    bench = LinearBench(problem, machine, WeightMemory())
    config = LinearConfig("stream", span=panels)
    num_bytes = weight_bytes(problem, machine.target.panel_width)
    what = f"linear 1x{K} {N}x{K} {weight}, {panels} side by side"
    timed("llmopt", what, dtype, [lambda: bench(config)], 2.0 * N * K, num_bytes)
