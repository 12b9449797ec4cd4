"""Methods that change the shape of a tensor in place give what they give in eager, and what reads the tensor still runs in kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from llmopt.compiled import alive
from llmopt.graph import kind
from torch import Tensor, nn
from torch.nn import functional as F

from tests.compiler.rewriting import check_memory, outcome, randn

X = randn(6, 8)
with torch.random.fork_rng():
    torch.manual_seed(0)
    LINEAR, SQUARE = nn.Linear(8, 8), nn.Linear(6, 6)


def returned(x: Tensor) -> Any:
    h = LINEAR(x)
    h.unsqueeze_(0)
    return h


def result_of_the_method(x: Tensor) -> Any:
    h = LINEAR(x)
    return h.unsqueeze_(0).squeeze_(0).transpose_(0, 1).contiguous(), h


def read_later(x: Tensor) -> Any:
    h = LINEAR(x)
    h.unsqueeze_(1)
    return F.layer_norm(h, (8,)) + h.mean(0)


def summed(x: Tensor) -> Any:
    h = LINEAR(x)
    h.unsqueeze_(0)
    return h.sum(0)


def multiplied(x: Tensor) -> Any:
    h = LINEAR(x)
    h.t_()
    return SQUARE(h)


def copied(x: Tensor) -> Any:
    h = LINEAR(x)
    h.swapaxes_(0, 1)
    return h.contiguous(), h.reshape(-1)


def seen_before(x: Tensor) -> Any:
    h = LINEAR(x)
    v = h.view(-1)
    v.mul_(2)
    h.swapdims_(0, 1)
    v[3:9] += 1
    return h, v


def written_before_and_after(x: Tensor) -> Any:
    h = LINEAR(x)
    h.add_(1)
    h.unsqueeze_(0)
    h.mul_(2)
    h[:, 2:4] = 7
    return h, F.gelu(h)


def under_another_name(x: Tensor) -> Any:
    h = LINEAR(x)
    same, also = h.add_(1), F.relu(h, inplace=True)
    h.unsqueeze_(0)
    return same, also, F.layer_norm(same, (8,))


def dropped(x: Tensor) -> Any:
    h = LINEAR(x[:1])
    h.squeeze_()
    return F.layer_norm(h, (8,)), h


def piece(x: Tensor) -> Any:
    p, q = LINEAR(x).chunk(2, -1)
    p.unsqueeze_(0)
    return p + q, F.layer_norm(q, (4,))


def one_of_two_results(x: Tensor) -> Any:
    h = torch.max(LINEAR(x), 0)[0]
    h.unsqueeze_(0)
    return F.layer_norm(h, (8,)), h


def of_a_clone(x: Tensor) -> Any:
    y = x.clone()
    y.t_()
    y.add_(1)
    return F.layer_norm(y, (6,))


def strided(x: Tensor) -> Any:
    h = LINEAR(x)
    h.as_strided_((4, 4), (1, 2))
    return F.layer_norm(h, (4,))


def by_operator(x: Tensor) -> Any:
    h = LINEAR(x)
    torch.ops.aten.t_.default(h)
    torch.ops.aten.unsqueeze_(h, 0)
    return h


def other_memory(x: Tensor) -> Any:
    h, y = LINEAR(x), F.gelu(x)
    h.set_(y.t())
    y.mul_(2)
    return F.layer_norm(h, (6,)), y


def of_an_input(x: Tensor) -> Any:
    x.unsqueeze_(0)
    return F.layer_norm(x, (8,)), LINEAR(x)


@torch.compiler.nested_compile_region
def region(x: Tensor) -> Tensor:
    h = LINEAR(x)
    v = h.t()
    h.unsqueeze_(0)
    return F.layer_norm(h, (8,)) + v.t()


@torch.compiler.nested_compile_region
def region_by_keyword(x: Tensor) -> Tensor:
    h = LINEAR(x)
    torch.as_strided_(input=h, size=(4, 4), stride=(1, 2))
    return F.layer_norm(h, (4,))


def in_a_region(x: Tensor) -> Any:
    """One graph for both calls."""
    return region(x), region(x * 2)


def in_a_region_by_keyword(x: Tensor) -> Any:
    return region_by_keyword(x), region_by_keyword(x * 2)


FUNCTIONS = (
    returned, result_of_the_method, read_later, summed, multiplied, copied, seen_before, written_before_and_after, under_another_name,
    dropped, piece, one_of_two_results, of_a_clone, strided, by_operator, other_memory, of_an_input,
)  # fmt: skip


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_as_in_eager(function: Callable, dynamic: bool | None) -> None:
    check_memory(function, X, dynamic)


@pytest.mark.parametrize(
    "function", [in_a_region, in_a_region_by_keyword], ids=lambda f: f.__name__
)
def test_in_a_region(function: Callable) -> None:
    check_memory(function, X)


@torch.no_grad()
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_kernels_read_them(function: Callable) -> None:
    """But for `set_` no change of a shape is left to PyTorch, nor a linear or a norm that reads one."""
    known = {id(g) for g in alive()}
    outcome(function, X, "llmopt")
    graphs = [g for g in alive() if id(g) not in known]
    assert graphs
    for graph in graphs:
        left = function is other_memory
        assert left == bool(graph.reason)
        if left:
            continue
        named = function.__code__.co_names
        wanted = {
            op for name, op in (("LINEAR", "linear"), ("layer_norm", "norm")) if name in named
        }
        assert wanted
        assert {r.op for r in graph.plan.records()} >= wanted
        in_pytorch = {kind(f.node).rstrip("_") for f in graph.plan.fallbacks}
        assert not in_pytorch & {"as_strided", "squeeze", "t", "transpose", "unsqueeze"}
