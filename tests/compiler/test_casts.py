"""Casts that change values stay: of integers, of float8, and to a shorter float and back. Others join what stands around them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.compiler.rewriting import K, Q, V, check, randn

LOSSY = (torch.int32, torch.float8_e4m3fn)
ROUNDING = (torch.float16, torch.bfloat16)
WEIGHT = nn.Parameter(randn(16) * 3, requires_grad=False)
X = randn(4, 16) * 3


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize("dtype", LOSSY, ids=str)
def test_casts_to_what_no_kernel_computes_in(dtype: torch.dtype) -> None:
    check(lambda x: (rms(x) * WEIGHT).to(dtype).float(), X, takes=["norm"])
    check(lambda x: rms(x.to(dtype).float()), X)
    check(lambda x: rms(x) * WEIGHT.to(dtype).float(), X)
    check(lambda x: rms(x) * (1 + WEIGHT.to(dtype).float()), X)
    check(lambda x: (x + 1).to(dtype).float() * 2, X)

    def weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.mT).softmax(-1) * 4).to(dtype).float() @ v

    def scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).to(dtype).float().softmax(-1) @ v

    for function in (weights, scores):
        check(function, Q, K, V, leaves=["attention"])


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@torch.no_grad()
def test_casts_to_a_shorter_float_and_back_round(dtype: torch.dtype) -> None:
    """To the bit, which the tolerance of a comparison would not show."""
    chains: list[Callable[[Tensor], Tensor]] = [
        lambda x: (x * 3).to(dtype).float() - x * 3,
        lambda x: (x * 3).to(dtype).to(torch.float32).neg().to(dtype),
        lambda x: (x.exp().to(dtype) * 0.5).float(),
    ]
    for chain in chains:
        torch._dynamo.reset()
        assert torch.equal(torch.compile(chain, backend="llmopt")(X / 4), chain(X / 4))


def test_numbers_that_a_shorter_float_cannot_hold() -> None:
    large = X * 1e5
    check(lambda x: rms(x.half().float().nan_to_num(0.0)), large)
    check(lambda x: rms(x.half().float()), X * 1e4)
    check(lambda x: (x * 1e5).half().float() * 2 + 1, X)


def test_casts_that_lose_nothing_join() -> None:
    for dtype in ROUNDING:
        x, weight = X.to(dtype), nn.Parameter(WEIGHT.to(dtype), requires_grad=False)

        def llama(x: Tensor, weight: Tensor = weight) -> Tensor:
            return weight * rms(x.float()).to(x.dtype)

        def gemma(x: Tensor, weight: Tensor = weight) -> Tensor:
            return (rms(x.float()) * (1.0 + weight.float())).type_as(x)

        for function in (llama, gemma):
            check(function, x, takes=["norm"], leaves=["pointwise"])
