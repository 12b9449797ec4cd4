"""What has its place among other operations: which draw random numbers, which are told to, and that results stay each its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from llmopt.effects import DRAWS_IN_TRAINING, has_place, is_idle_dropout
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tests.compiler.rewriting import check, randn


@pytest.mark.parametrize("name", DRAWS_IN_TRAINING)
def test_the_place_of_training(name: str) -> None:
    """As PyTorch's own signature has it, where it has one."""
    function = getattr(F, name, None) or getattr(torch, name)
    try:
        names = [*inspect.signature(function, follow_wrapped=False).parameters]
    except ValueError:  # a builtin says in its documentation: dropout(input, p, train)
        names = ["input", "p", "train"]
    word = "training" if "training" in names else "train"
    assert names.index(word) == DRAWS_IN_TRAINING[name]


def call(target: Callable, *args: Any, **kwargs: Any) -> fx.Node:
    graph = fx.Graph()
    x = graph.placeholder("x")
    return graph.call_function(target, (x, *args), kwargs)


IDLE = [
    call(F.dropout, 0.1, False),
    call(F.dropout, 0.1, training=False),
    call(F.dropout, p=0.0),
    call(torch.dropout, 0.1, False),
    call(torch.dropout, 0.1, train=False),
    call(torch.ops.aten.dropout.default, 0.1, False),
    call(torch.ops.aten.dropout, 0.1, train=False),
    call(F.alpha_dropout, 0.1, False),
]
DRAWING = [
    call(F.dropout, 0.1),
    call(F.dropout, 0.1, True),
    call(torch.dropout, 0.1, train=True),
    call(F.rrelu, 0.1, 0.3, True),
    call(F.multi_head_attention_forward, *[None] * 12, True),
    call(torch.svd_lowrank, 2),
    call(torch.pca_lowrank, 2),
    call(torch.ops.aten.rrelu_with_noise, None, 0.1, 0.3, True),
    call(torch.ops.aten._scaled_dot_product_attention_math, None, None, None, 0.1),
    call(F.scaled_dot_product_attention, None, None, dropout_p=0.1),
]
NEITHER = [
    call(F.rrelu, 0.1, 0.3, False),
    call(F.rrelu, 0.1, 0.3, training=False),
    call(F.multi_head_attention_forward, *[None] * 12, False),
    call(F.multi_head_attention_forward, *[None] * 10, training=False),
    call(torch.ops.aten._scaled_dot_product_attention_math, None, None),
    call(F.scaled_dot_product_attention, None, None),
    call(F.silu),
]


@pytest.mark.parametrize("node", [*IDLE, *DRAWING, *NEITHER], ids=str)
def test_who_has_a_place(node: fx.Node) -> None:
    assert is_idle_dropout(node) == (node in IDLE)
    assert has_place(node) == (node in DRAWING or (node in IDLE and "p" in node.kwargs))


# ---- equal operations with several results

LINEAR = nn.Linear(8, 8)


def largest_twice(x: Tensor) -> Any:
    h = LINEAR(x)
    a, b = h.max(-1, keepdim=True)[0], h.max(-1, keepdim=True)[0]
    a.mul_(2)
    return a, b


def sorted_twice(x: Tensor) -> Any:
    h = LINEAR(x)
    a, b = h.sort()[0], h.sort()[0]
    a[0] = 1
    return a, b, LINEAR(h)


def halves_twice(x: Tensor) -> Any:
    h = LINEAR(x)
    a, b = h.chunk(2, -1), h.chunk(2, -1)
    a[0].mul_(2)
    return a[0] + 1, b[0] + 2


@pytest.mark.parametrize(
    "function", [largest_twice, sorted_twice, halves_twice], ids=lambda f: f.__name__
)
def test_equal_operations_that_are_written(function: Callable) -> None:
    check(function, randn(4, 8))


@torch.no_grad()
def test_equal_results_that_are_returned_stay_apart() -> None:
    def twice(x: Tensor) -> tuple[Tensor, Tensor]:
        h = LINEAR(x)
        return h.sort()[0], h.sort()[0]

    torch._dynamo.reset()
    first, second = torch.compile(twice, backend="llmopt")(randn(4, 8))
    assert first.data_ptr() != second.data_ptr()


@torch.no_grad()
def test_a_batch_norm_that_writes_without_saying_so() -> None:
    def function(x: Tensor, mean: Tensor, var: Tensor) -> Any:
        h = LINEAR(x)
        y = torch.ops.aten.native_batch_norm(h, None, None, mean, var, True, 0.1, 1e-5)[0]
        return F.layer_norm(mean, (8,)), y

    check(function, randn(4, 8), torch.zeros(8), torch.ones(8))
