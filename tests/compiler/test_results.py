"""What a graph returns can be seen through the windows that eager's result can be seen through, whatever kernels made of its layout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from llmopt.compiled import alive
from torch import Tensor, nn
from torch.nn import functional as F

from tests.compiler.rewriting import K, Q, V, check, check_memory

LEFT, RIGHT = nn.Linear(8, 8), nn.Linear(8, 8)


def spelled_out(x: Tensor) -> Tensor:
    return (x @ x.mT).softmax(-1) @ x


def masked(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, attn_mask=torch.ones(5, 5).tril().bool())


def attended_by_head(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x).unsqueeze(2)


def side_by_side(x: Tensor) -> tuple[Tensor, Tensor]:
    return LEFT(x).unflatten(-1, (2, 4)), RIGHT(x).unflatten(-1, (2, 4))


def turned(x: Tensor) -> Tensor:
    rotated = torch.cat((-x[..., 4:], x[..., :4]), -1)
    return (x * 0.6 + rotated * 0.8).transpose(1, 2) * 2


def with_a_window(x: Tensor) -> tuple[Tensor, ...]:
    y = F.scaled_dot_product_attention(x, x, x).transpose(1, 2)
    return y.narrow(2, 1, 2), y, y.chunk(2, 3)[1]


def as_another_dtype(x: Tensor) -> tuple[Tensor, Tensor]:
    y = F.scaled_dot_product_attention(x, x, x).half()
    return y.flatten(1).t(), y


def written_with_a_window(x: Tensor) -> tuple[Tensor, Tensor]:
    y = F.scaled_dot_product_attention(x, x, x)
    window = y.permute(1, 3, 0, 2)
    y += y
    return window, y


CASES = (
    written_with_a_window,
    with_a_window,
    as_another_dtype,
    spelled_out,
    masked,
    attended_by_head,
    side_by_side,
    turned,
)


@pytest.mark.parametrize("function", CASES)
@pytest.mark.parametrize("dynamic", [None, True], ids=["", "dynamic"])
def test_layouts_of_results(function: Callable[[Tensor], Tensor], dynamic: bool | None) -> None:
    check_memory(function, Q, dynamic=dynamic)


def test_a_view_behind_a_break_in_the_graph() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(q, k, v)
        torch._dynamo.graph_break()
        return y.view(2, -1)

    check(function, Q, K, V, takes=["attention"])


@torch.no_grad()
def test_attention_writes_its_result_where_it_belongs() -> None:
    torch._dynamo.reset()
    known = {id(g) for g in alive()}
    got = torch.compile(F.scaled_dot_product_attention, backend="llmopt")(Q, K, V)
    assert got.is_contiguous()
    (plan,) = [g.plan for g in alive() if id(g) not in known]
    assert [r.op for r in plan.records()] == ["attention"]
