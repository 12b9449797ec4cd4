"""Contexts that a model enters and leaves inside its forward: what holds in one must neither leak out of it nor get lost."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from llmopt.compiled import alive
from torch import nn

from tests.e2e.compare import assert_same_output


class Around(nn.Module):
    """Linears before, inside and behind what a case does in a context."""

    def __init__(self, inside: Callable) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.within, self.behind = (nn.Linear(48, 48) for _ in range(3))
        self.inside = inside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.gelu(self.before(x))
        return self.behind(self.inside(self.within, h).float() + h)


def autocast(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return linear(x)


def autocast_off(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", enabled=False):
        return linear(x)


def autocast_off_in_autocast(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x)
        with torch.autocast("cpu", enabled=False):
            return y + linear(y.float())


def vmap(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.vmap(lambda row: linear(row) * row.amax(-1, keepdim=True))(x)


def vmap_in_vmap(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.vmap(torch.vmap(lambda row: linear(row) + row[0]))(x)


def vmap_of_a_transposed_result(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = linear(x).transpose(0, 1)
    return torch.vmap(lambda row: row.reshape(-1).cumsum(0).view(-1, 48))(y).transpose(0, 1)


def written_in_autocast(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = linear(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y[:, 0] = linear(x)[:, 1].float()
    return y


def no_grad(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return linear(x)


def derivative(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.func.grad(lambda y: linear(y).sin().sum())(x)


@pytest.mark.parametrize(
    ("inside", "segments"),
    [
        (autocast, 2),
        (autocast_off, 1),
        (autocast_off_in_autocast, 2),
        (vmap, 2),
        (vmap_in_vmap, 2),
        (vmap_of_a_transposed_result, 2),
        (written_in_autocast, None),  # the whole graph runs as in PyTorch
        (no_grad, 1),
        (derivative, None),
    ],
)
@torch.no_grad()
def test_context(inside: Callable, segments: int | None, backend: str) -> None:
    eager, x = Around(inside).eval(), torch.randn(3, 5, 48, generator=torch.Generator())
    torch._dynamo.reset()
    compiled = torch.compile(eager, backend=backend, fullgraph=True)
    assert_same_output(compiled(x), eager(x))
    assert_same_output(compiled(x[:2]), eager(x[:2]))
    if backend == "llmopt":
        gc.collect()
        plan = alive()[-1].plan
        assert (plan and len(plan.segments)) == segments


def test_gradients_switched_on_inside(backend: str) -> None:
    """The result needs grad as in eager, though the caller switched gradients off."""

    def enable_grad(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            return linear(x)

    eager, x = Around(enable_grad).eval(), torch.randn(3, 48)
    compiled = torch.compile(eager, backend=backend)
    with torch.no_grad():
        assert_same_output(compiled(x), eager(x))
    with torch.enable_grad():
        (got,) = torch.autograd.grad(compiled(x).sum(), eager.within.weight)
        (want,) = torch.autograd.grad(eager(x).sum(), eager.within.weight)
    assert_same_output(got, want)


def test_no_grad_counts_where_a_gradient_is_computed() -> None:
    """torch.func.grad does not differentiate what is computed under no_grad, whether the caller wants gradients or not."""

    def f(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            c = x * 2
        return (c * x).sum()

    x = torch.arange(3.0)
    compiled = torch.compile(lambda x: torch.func.grad(f)(x), backend="llmopt")
    assert torch.equal(compiled(x), 2 * x)
    with torch.no_grad():
        assert torch.equal(compiled(x), torch.func.grad(f)(x))


def test_a_gradient_mode_that_is_left_changed_stays_changed() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        torch.set_grad_enabled(False)
        return x + 1

    assert torch.is_grad_enabled()
    try:
        torch.compile(f, backend="llmopt")(torch.ones(3))
        assert not torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)
