"""Calls whose operands are keywords take the kernels of those whose operands stand in their places."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from llmopt.compiled import alive
from torch import Tensor, nn
from torch.nn import functional as F

from tests.e2e.compare import assert_same_output


class Net(nn.Module):
    """A linear behind what a case does with its parameters."""

    def __init__(self, inside: Callable) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.bias = (
            nn.Parameter(torch.randn(48, 48) / 7),
            nn.Parameter(torch.randn(48)),
        )
        self.last = nn.Linear(48, 48)
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inside(x, self.weight, self.bias))


def attention(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    scores = torch.matmul(input=x, other=torch.transpose(input=x, dim0=-1, dim1=-2)) / math.sqrt(48)
    scores = torch.masked_fill(input=scores, mask=torch.ones(5, 5).triu(1).bool(), value=-1e9)
    return torch.matmul(input=torch.softmax(input=scores, dim=-1), other=x)


def attention_by_place(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    scores = torch.matmul(x, torch.transpose(x, -1, -2)) / math.sqrt(48)
    scores = torch.masked_fill(scores, torch.ones(5, 5).triu(1).bool(), -1e9)
    return torch.matmul(torch.softmax(scores, -1), x)


def rms_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    squares = torch.mean(input=torch.pow(input=x, exponent=2), dim=-1, keepdim=True)
    return torch.mul(input=x, other=torch.rsqrt(input=squares + 1e-6)) * bias


def rms_norm_as_numpy_says_it(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    squares = torch.pow(x, exponent=2).mean(axis=-1, keepdims=True)
    return torch.mul(x1=x, x2=torch.rsqrt(squares + 1e-6)) * bias


def rms_norm_by_place(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * bias


aten = torch.ops.aten
Function = Callable[[Tensor, Tensor, Tensor], Tensor]
# By keyword and by place.
CASES: dict[str, tuple[Function, Function]] = {
    "linear": (lambda x, w, b: F.linear(bias=b, weight=w, input=x), F.linear),
    "linear, some": (lambda x, w, b: F.linear(x, bias=b, weight=w), F.linear),
    "addmm": (
        lambda x, w, b: torch.addmm(input=b, mat1=x[0], mat2=w),
        lambda x, w, b: torch.addmm(b, x[0], w),
    ),
    "addmm, some": (
        lambda x, w, b: torch.addmm(b, mat2=w, mat1=x[0]),
        lambda x, w, b: torch.addmm(b, x[0], w),
    ),
    "addmm, method": (
        lambda x, w, b: b.addmm(mat1=x[0], mat2=w),
        lambda x, w, b: b.addmm(x[0], w),
    ),
    "addmm, operator": (
        lambda x, w, b: aten.addmm(self=b, mat1=x[0], mat2=w),
        lambda x, w, b: aten.addmm(b, x[0], w),
    ),
    "matmul": (lambda x, w, b: torch.matmul(other=w, input=x), lambda x, w, b: torch.matmul(x, w)),
    "mm": (lambda x, w, b: torch.mm(input=x[0], mat2=w), lambda x, w, b: torch.mm(x[0], w)),
    "mm, operator": (
        lambda x, w, b: aten.mm.default(self=x[0], mat2=w),
        lambda x, w, b: aten.mm.default(x[0], w),
    ),
    "methods": (
        lambda x, w, b: x.matmul(other=w).add(other=b).pow(exponent=2).softmax(dim=-1),
        lambda x, w, b: x.matmul(w).add(b).pow(2).softmax(-1),
    ),
    "operators": (
        lambda x, w, b: aten.silu.default(
            self=aten.add_.Tensor(self=aten.gelu(self=x @ w), other=b)
        ),
        lambda x, w, b: aten.silu.default(aten.add_.Tensor(aten.gelu(x @ w), b)),
    ),
    "gelu": (
        lambda x, w, b: F.gelu(input=F.linear(x, w), approximate="tanh"),
        lambda x, w, b: F.gelu(F.linear(x, w), approximate="tanh"),
    ),
    "silu": (
        lambda x, w, b: torch.mul(other=F.linear(x, w, b), input=F.silu(input=F.linear(x, w))),
        lambda x, w, b: F.silu(F.linear(x, w)) * F.linear(x, w, b),
    ),
    "layer_norm": (
        lambda x, w, b: F.layer_norm(normalized_shape=(48,), input=x, weight=b, bias=b),
        lambda x, w, b: F.layer_norm(x, (48,), b, b),
    ),
    "rms_norm": (rms_norm, rms_norm_by_place),
    "rms_norm, numpy": (rms_norm_as_numpy_says_it, rms_norm_by_place),
    "softmax": (
        lambda x, w, b: F.softmax(input=F.linear(x, w), dim=-1),
        lambda x, w, b: F.softmax(F.linear(x, w), -1),
    ),
    "cat": (
        lambda x, w, b: torch.cat(dim=1, tensors=[F.linear(x, w), x]),
        lambda x, w, b: torch.cat([F.linear(x, w), x], 1),
    ),
    "cat, numpy": (
        lambda x, w, b: torch.cat([F.linear(x, w), x], axis=1),
        lambda x, w, b: torch.cat([F.linear(x, w), x], 1),
    ),
    "where": (
        lambda x, w, b: torch.where(other=x, input=F.linear(x, w), condition=x > 0),
        lambda x, w, b: torch.where(x > 0, F.linear(x, w), x),
    ),
    "attention": (attention, attention_by_place),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_operands_by_keyword(name: str) -> None:
    """The result is that of eager, the steps those of the call whose operands stand in their places."""
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))
    steps = []
    for inside in CASES[name]:
        torch._dynamo.reset()
        net = Net(inside).eval()
        assert_same_output(torch.compile(net, backend="llmopt")(x), net(x))
        plan = alive()[-1].plan
        assert plan is not None
        steps.append([(r.kernel, r.detail) for r in plan.records()])
    assert steps[0] == steps[1]


def test_a_function_of_the_user_gets_what_it_was_given() -> None:
    torch._dynamo.allow_in_graph(scaled)
    x = torch.randn(3, 48)
    assert_same_output(
        torch.compile(lambda x: scaled(by=2.0, input=x) + 1, backend="llmopt")(x), 2 * x + 1
    )


def wrapped(function: Callable) -> Callable:
    @functools.wraps(function)
    def by_keyword(**given: Any) -> Any:
        return function(**given)

    return by_keyword


def test_a_wrapper_that_takes_keywords_alone_gets_them() -> None:
    by_keyword = torch._dynamo.allow_in_graph(wrapped(scaled))
    x = torch.randn(3, 48)
    compiled = torch.compile(lambda x: by_keyword(input=x, by=3.0) + 1, backend="llmopt")
    assert_same_output(compiled(x), 3 * x + 1)


def scaled(by: float, *, input: Tensor) -> Tensor:
    return input * by
