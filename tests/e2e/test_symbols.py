"""Sizes and numbers that Dynamo hands over as symbols: the graph has the kernels that it has with numbers."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from llmopt.compiled import CompiledGraph, alive
from llmopt.graph import kind
from llmopt.plan import Plan

from tests.e2e import zoo
from tests.e2e.compare import assert_same_generation, assert_same_output

# Tanh-GELU by `math.pi`; a cut of the logits by an argument; the frames a convolution leaves of a sound.
ROWS = ("gpt2", "falcon", "wav2vec2")


def new_plan(before: list[CompiledGraph]) -> Plan:
    """Of the one graph made since."""
    gc.collect()
    (graph,) = [g for g in alive() if g not in before]
    assert graph.plan is not None
    return graph.plan


@pytest.mark.parametrize("name", ROWS)
@torch.no_grad()
def test_every_size_a_symbol(name: str, backend: str) -> None:
    eager = zoo.make(name)
    compiled = torch.compile(eager, backend=backend, dynamic=True)
    before = alive()
    x = zoo.inputs(name, 9)
    assert_same_output(compiled(**x), eager(**x))
    if backend == "llmopt":
        plan = new_plan(before)
        assert len(plan.segments) == zoo.row(name).segments, str(plan)
        assert "item" not in [kind(f.node) for f in plan.fallbacks]
    made = alive()
    x = zoo.inputs(name, 14, batch=3)
    assert_same_output(compiled(**x), eager(**x))
    gc.collect()
    assert len(alive()) == len(made), "another size, another graph"


@torch.no_grad()
def test_sounds_of_two_durations(backend: str) -> None:
    """The second makes one size of the input a symbol, and the frames left of it an expression that may be none."""
    eager, compiled = zoo.pair("wav2vec2", backend)
    for length in (17, 12):
        before = alive()
        x = zoo.inputs("wav2vec2", length)
        assert_same_output(compiled(**x), eager(**x))
        if backend == "llmopt":
            assert len(new_plan(before).segments) == zoo.row("wav2vec2").segments


def test_generate_with_every_size_a_symbol(backend: str) -> None:
    """A prompt and tokens behind it, with the eps of RMSNorm and a scale of attention."""
    eager, compiled, before = zoo.make("llama"), zoo.make("llama"), alive()
    compiled.compile(backend=backend, dynamic=True)
    how: dict[str, Any] = {
        "max_new_tokens": 8,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    prompt = zoo.inputs("llama", 11)
    assert_same_generation(compiled.generate(**prompt, **how), eager.generate(**prompt, **how))
    if backend == "llmopt":
        plans = [g.plan for g in alive() if g not in before]
        assert [len(p.segments) for p in plans if p is not None] == [1] * len(plans) != []


class Scaled(torch.nn.Module):
    """A norm and a factor whose numbers are the module's own, and one that its caller passes."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = 1e-5
        self.factor = 0.5

    def forward(self, x: torch.Tensor, shift: float) -> torch.Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return torch.nn.functional.silu(x * (self.factor / math.pi)) + shift


@torch.no_grad()
def test_numbers_of_modules_are_constants_until_they_change(backend: str) -> None:
    net = Scaled().eval()
    compiled = torch.compile(net, backend=backend, dynamic=True)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    before = alive()
    assert_same_output(compiled(x, 0.25), net(x, 0.25))
    if backend == "llmopt":
        names = [kind(f.node) for f in new_plan(before).fallbacks]
        assert names.count("item") == 1, f"the caller's number alone is a symbol: {names}"
    net.eps = 3.0
    assert_same_output(compiled(x, 0.25), net(x, 0.25))
    gc.collect()
    graphs = len(alive())
    for shift in (0.5, 0.75, 1.25):
        assert_same_output(compiled(x, shift), net(x, shift))
    gc.collect()
    assert len(alive()) == graphs, "a number of the caller's makes no graphs"


@torch.no_grad()
def test_a_number_that_keeps_changing_becomes_a_symbol(backend: str) -> None:
    if backend != "llmopt":
        pytest.skip("PyTorch's own backends decide otherwise")
    net = Scaled().eval()
    compiled = torch.compile(net, backend=backend, dynamic=True)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    before = alive()
    for step in range(8):
        net.eps = 0.01 * (step + 1)
        assert_same_output(compiled(x, 0.5), net(x, 0.5))
    gc.collect()
    assert len([g for g in alive() if g not in before]) == 5


@torch.no_grad()
def test_other_functions_do_not_count(backend: str) -> None:
    """Numbers of one name in functions that have nothing to do with each other; in a closure; after a reset."""
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))

    def norm(eps: float) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: torch.nn.functional.silu(
            x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        )

    net = Scaled().eval()
    for factor in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
        net.factor = factor
        torch.compile(net, backend=backend, dynamic=True)(x, 0.5)
    for function in (norm(1e-3), norm(1e-4), Other().eval()):
        torch._dynamo.reset()
        before = alive()
        assert_same_output(torch.compile(function, backend=backend, dynamic=True)(x), function(x))
        if backend == "llmopt":
            assert "item" not in [kind(f.node) for f in new_plan(before).fallbacks]


class Other(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = 0.7

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(x * self.factor).exp()


@torch.no_grad()
def test_models_of_one_class_with_other_numbers(backend: str) -> None:
    """Dynamo makes a number a symbol once two models of a class differ in it."""
    for eps in (1e-5, 0.3, 0.1):
        eager, compiled = zoo.pair("llama", backend, rms_norm_eps=eps, num_hidden_layers=1)
        before = alive()
        x = zoo.inputs("llama", 7)
        assert_same_output(compiled(**x), eager(**x))
        if backend == "llmopt":
            assert len(new_plan(before).segments) == 1
