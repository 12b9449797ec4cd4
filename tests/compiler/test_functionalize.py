"""Arithmetic in place on what a graph made: as in eager, and plain arithmetic to the passes wherever that gives the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from llmopt.compiled import alive
from llmopt.graph import is_in_place
from torch import Tensor, nn
from torch.nn import functional as F

from tests.compiler.rewriting import check_memory, outcome

torch.manual_seed(0)
A, B = nn.Linear(8, 8), nn.Linear(8, 8)
X = torch.randn(4, 8)


def residuals(x: Tensor) -> Any:
    h = F.layer_norm(x, (8,))
    h += A(h)
    h += B(F.layer_norm(h, (8,)))
    h *= 0.5
    return h


def by_method(x: Tensor) -> Any:
    h = A(x)
    h.add_(x, alpha=2).mul_(3)
    h.clamp_(-1, max=2)
    return B(h)


def inplace_is_true(x: Tensor) -> Any:
    h = F.silu(A(x), inplace=True)
    h = F.hardtanh(h, -0.5, 0.5, inplace=True)
    return B(F.leaky_relu_(F.relu6(h, inplace=True), 0.1))


def both_names_are_returned(x: Tensor) -> Any:
    h = A(x)
    g = h
    h += 1
    return h, g, B(g)


def read_before_and_after(x: Tensor) -> Any:
    h = A(x)
    before = h * 2
    h += 1
    return before + h, B(h)


def window_of_before(x: Tensor) -> Any:
    h = A(x)
    y = h.view(2, 16).sum(0)
    h += 1
    return B(h), y


def window_of_after(x: Tensor) -> Any:
    h = A(x)
    h += 1
    first, second = h.chunk(2)
    return B(first) + second


def itself(x: Tensor) -> Any:
    h = A(x)
    h += h
    h.mul_(h)
    return B(h)


def filled(x: Tensor) -> Any:
    h = A(x)
    h.masked_fill_(x > 0, -1.0)
    return h.pow_(2).neg_()


def idle_dropout_is_a_name(x: Tensor) -> Any:
    """Outside training dropout gives its argument back: r is written too."""
    h = A(x)
    r = h
    h = F.dropout(h, 0.1, training=False)
    h += 1
    return B(h) + r


def written_twice_under_its_first_name(x: Tensor) -> Any:
    h = A(x)
    g = h
    h += 1
    h *= 2
    return B(h), F.silu(g)


def with_arguments(x: Tensor) -> Any:
    h = torch.ops.aten.elu_(A(x), 1.0, 2.0, 0.5)
    return B(torch.ops.aten.leaky_relu_.default(h, 0.3))


def one_of_several_results(x: Tensor) -> Any:
    values, places = torch.topk(A(x), 3)
    values /= values.sum(-1, keepdim=True)
    return values, places, values.softmax(-1)


def beside_a_branch(x: Tensor) -> Any:
    h = A(x)
    v = torch.cond(x.sum() > 0, lambda h: h.view(2, 16) * 1, lambda h: h.view(2, 16) * 2, (h,))
    h += 1
    return B(h), v


PLAIN = (
    residuals, by_method, inplace_is_true, both_names_are_returned, read_before_and_after, window_of_before, window_of_after, itself,
    filled, idle_dropout_is_a_name, written_twice_under_its_first_name, with_arguments, one_of_several_results, beside_a_branch,
)  # fmt: skip


def window_across(x: Tensor) -> Any:
    h = A(x)
    v = h.view(2, 16)
    h += 1
    return v * 2, B(h)


def pieces_across(x: Tensor) -> Any:
    h = A(x)
    pieces = h.chunk(2, -1)
    h *= 2
    return pieces[0] + 1, pieces[1] * 3


def pieces_picked_later(x: Tensor) -> Any:
    h = A(x)
    pieces = h.split(4, -1)
    h *= 2
    first, second = pieces
    return first.tanh(), second + 3


def window_of_a_window_across(x: Tensor) -> Any:
    h = A(x)
    v = h.view(2, 16).t()
    h += 1
    return v.t().tanh(), B(h)


def wider_than_its_memory(x: Tensor) -> Any:
    h = A(x)[:1, :1].clone()
    h.add_(1).expand(4, 8)
    k = torch.zeros(4, 8)
    torch.add(x, A(x), out=k)
    return h, k


def other_than_its_first_argument(x: Tensor) -> Any:
    h = A(x)
    torch.ops.aten.add.out(x, h, out=h)
    h += 1
    return B(h)


def turned_and_returned(x: Tensor) -> Any:
    k = x.t().contiguous().t().cos()
    k += A(x)
    return k


def idle_dropout_of_an_input(x: Tensor) -> Any:
    h = torch.dropout(x, 0.1, train=False)
    h.mul_(2)
    return A(h)


def idle_rrelu(x: Tensor) -> Any:
    h = A(x)
    F.rrelu(h, training=False, inplace=True)
    return B(h)


def through_a_window(x: Tensor) -> Any:
    h = A(x)
    h[0] += 1
    h.t().mul_(2)
    return B(h)


def window_returned(x: Tensor) -> Any:
    h = A(x)
    v = h[1:]
    h -= 1
    return v


def of_an_input(x: Tensor) -> Any:
    x += 1
    return A(x)


def window_on_an_input(x: Tensor) -> Any:
    v = x.view(2, 16)
    v *= 2
    return A(x)


def copied_into(x: Tensor) -> Any:
    h = A(x)
    h += 1
    h.copy_(x)
    return B(h)


def of_a_weight(x: Tensor) -> Any:
    own = A.weight.detach()
    own *= 1.0
    return F.linear(x, own)


def broadcast_memory(x: Tensor) -> Any:
    h = A(x)[:1].expand(4, 8).contiguous()
    h += 1
    g = torch.zeros(1, 8).expand(4, 8)
    return B(h) + g


def turned(x: Tensor) -> Any:
    h = A(x).t()
    h += 1
    return B(h.t())


def rounded_to_its_dtype(x: Tensor) -> Any:
    h = (A(x) * 4).bfloat16()
    h += x  # the sum is rounded
    counts = torch.arange(4)
    counts *= 3
    return h, counts


KEPT = (
    window_across, pieces_across, through_a_window, window_returned, of_an_input, window_on_an_input, copied_into, of_a_weight,
    rounded_to_its_dtype, turned, pieces_picked_later, window_of_a_window_across, other_than_its_first_argument, turned_and_returned,
    idle_dropout_of_an_input, idle_rrelu,
)  # fmt: skip
OTHERS = (broadcast_memory, wider_than_its_memory)  # whichever way is right


def named(function: Callable) -> str:
    return function.__name__


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("function", [*PLAIN, *KEPT, *OTHERS], ids=named)
def test_as_in_eager(function: Callable, dynamic: bool | None) -> None:
    check_memory(function, X, dynamic)


@pytest.mark.parametrize("function", [*PLAIN, *KEPT], ids=named)
def test_what_is_left_in_place(function: Callable) -> None:
    known = {id(g) for g in alive()}
    outcome(function, X, "llmopt")
    (graph,) = [g for g in alive() if id(g) not in known]
    assert graph.plan is not None
    nodes = [n for level in graph.plan.levels.values() for n in level]
    assert nodes
    assert any(map(is_in_place, nodes)) == (function in KEPT)


def test_residuals_join_their_linears() -> None:
    known = {id(g) for g in alive()}
    outcome(residuals, X, "llmopt")
    (graph,) = [g for g in alive() if id(g) not in known]
    assert graph.plan is not None
    assert len(graph.plan.segments) == 1
    assert sum("residual" in r.detail for r in graph.plan.records()) == 2
