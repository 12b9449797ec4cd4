"""The elementwise VM: one program for what PyTorch does op by op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from llmopt.native.vm import VmProgram
from llmopt.program import OneOp

from bench.conftest import copies_beyond_cache
from bench.shapes import ROWS


@dataclass(frozen=True)
class Chain:
    """One chain of operations on two inputs of a shape, in both spellings."""

    name: str
    program: Callable[[], VmProgram]
    torch: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def silu_times() -> VmProgram:
    vm = VmProgram(2, 1)
    vm.store(0, vm.binary("mul", vm.unary("silu", vm.load(0)), vm.load(1)))
    return vm


def add_rms_norm() -> VmProgram:
    vm = VmProgram(2, 1)
    total = vm.binary("add", vm.load(0), vm.load(1))
    mean = vm.reduce("mean", vm.unary("square", total))
    scale = vm.unary("rsqrt", vm.binary("add", mean, vm.const(1e-5)))
    vm.store(0, vm.binary("mul", total, scale))
    return vm


def gelu_add() -> VmProgram:
    vm = VmProgram(2, 1)
    vm.store(0, vm.binary("add", vm.unary("gelu_tanh", vm.load(0)), vm.load(1)))
    return vm


def torch_add_rms_norm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    total = a + b
    return total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-5)


CHAINS = (
    Chain("silu-times", silu_times, lambda a, b: F.silu(a) * b),
    Chain("gelu-add", gelu_add, lambda a, b: F.gelu(a, approximate="tanh") + b),
    Chain("add-rms-norm", add_rms_norm, torch_add_rms_norm),
)


@pytest.mark.parametrize("system", ["llmopt", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: chain.name)
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_chain(timed, shape, chain, dtype, system):
    num_bytes = shape.num_bytes(3, dtype.itemsize)
    first = torch.randn(2, shape.rows, shape.width).to(dtype)
    pairs = [first.clone() for _ in range(copies_beyond_cache(num_bytes))]
    if system == "torch":
        calls = [lambda a=a, b=b: chain.torch(a, b) for a, b in pairs]
    else:
        outs = [torch.empty(shape.rows, shape.width, dtype=dtype) for _ in pairs]
        code = chain.program().encode()
        calls = [OneOp("vm", [a, b, y], *code) for (a, b), y in zip(pairs, outs, strict=True)]
        calls[0]()  # never the time of a wrong result
        want = chain.torch(*pairs[0].float())
        torch.testing.assert_close(outs[0].float(), want, atol=3e-2, rtol=3e-2)
    timed(system, f"vm {chain.name} {shape}", dtype, calls, 0.0, num_bytes)
