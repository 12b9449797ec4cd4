"""Calls whose operands are keywords take the kernels of those whose operands stand in their places."""

from __future__ import annotations

import math
from collections.abc import Callable

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


def rms_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    squares = torch.mean(input=torch.pow(input=x, exponent=2), dim=-1, keepdim=True)
    return torch.mul(input=x, other=torch.rsqrt(input=squares + 1e-6)) * bias


CASES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w, b: F.linear(bias=b, weight=w, input=x),
    "linear, some": lambda x, w, b: F.linear(x, bias=b, weight=w),
    "addmm": lambda x, w, b: torch.addmm(input=b, mat1=x[0], mat2=w),
    "addmm, some": lambda x, w, b: torch.addmm(b, mat2=w, mat1=x[0]),
    "matmul": lambda x, w, b: torch.matmul(other=w, input=x),
    "mm": lambda x, w, b: torch.mm(input=x[0], mat2=w),
    "method": lambda x, w, b: x.matmul(other=w).add(other=b).pow(exponent=2).softmax(dim=-1),
    "gelu": lambda x, w, b: F.gelu(input=F.linear(x, w), approximate="tanh"),
    "silu": lambda x, w, b: torch.mul(other=F.linear(x, w, b), input=F.silu(input=F.linear(x, w))),
    "layer_norm": lambda x, w, b: F.layer_norm(normalized_shape=(48,), input=x, weight=b, bias=b),
    "rms_norm": rms_norm,
    "softmax": lambda x, w, b: F.softmax(input=F.linear(x, w), dim=-1),
    "cat": lambda x, w, b: torch.cat(dim=1, tensors=[F.linear(x, w), x]),
    "where": lambda x, w, b: torch.where(other=x, input=F.linear(x, w), condition=x > 0),
    "attention": attention,
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_operands_by_keyword(name: str) -> None:
    torch._dynamo.reset()
    net, x = Net(CASES[name]).eval(), torch.randn(2, 5, 48, generator=torch.Generator())
    assert_same_output(torch.compile(net, backend="llmopt")(x), net(x))
    plan = alive()[-1].plan
    assert plan is not None
    assert "linear" in [r.op for r in plan.records()]


def test_a_function_of_the_user_gets_what_it_was_given() -> None:
    torch._dynamo.allow_in_graph(scaled)
    x = torch.randn(3, 48)
    assert_same_output(
        torch.compile(lambda x: scaled(by=2.0, input=x) + 1, backend="llmopt")(x), 2 * x + 1
    )


def scaled(by: float, *, input: Tensor) -> Tensor:
    return input * by
