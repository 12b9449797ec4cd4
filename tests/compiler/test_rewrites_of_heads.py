"""Key and value heads that are repeated: which are grouped attention, and which only look like it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from llmopt.compiled import alive
from torch.nn import functional as F

from tests.compiler.rewriting import check, heads, randn


def repeated(x: torch.Tensor, *view: Any) -> torch.Tensor:
    return (
        x[view].expand(-1, *((2, -1) if view[1] is None else (-1, 2)), -1, -1).reshape(2, 4, 5, 8)
    )


@pytest.mark.parametrize(
    ("view", "is_grouped"),
    [
        ((slice(None), slice(None), None), True),
        ((slice(None), slice(None), None, slice(None), slice(None)), True),
        ((slice(None), None), False),  # heads 0, 1, 0, 1 instead of 0, 0, 1, 1
        ((slice(None), [1, 0], None), False),
        ((slice(None), slice(None), None, [4, 3, 2, 1, 0]), False),
    ],
)
def test_heads_that_are_repeated(view: tuple, is_grouped: bool) -> None:
    k, v = heads(3, number=2), heads(4, number=2)
    plans = {"takes": ["attention"]} if is_grouped else {}
    function = F.scaled_dot_product_attention
    check(
        lambda q, k, v: function(q, repeated(k, *view), repeated(v, *view)),
        heads(number=4),
        k,
        v,
        **plans,
    )


BEHIND_POSITIONS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], bool]] = {
    "one by one": (lambda x: x.repeat_interleave(2, 2), True),
    "by expand": (lambda x: x[:, :, :, None, :].expand(-1, -1, -1, 2, -1).reshape(*x.shape[:2], -1, 8), True),
    "by expand, unsqueezed": (lambda x: x.unsqueeze(3).expand(-1, -1, -1, 2, 8).flatten(2, 3), True),
    "an ellipsis": (lambda x: x[..., None, :].expand(-1, -1, -1, 2, -1).flatten(2, 3), True),
    "as a whole": (lambda x: x.repeat(1, 1, 2, 1), False),
    "as a whole, by expand": (lambda x: x[:, :, None].expand(-1, -1, 2, -1, -1).flatten(2, 3), False),
    "numbers": (lambda x: x[..., None].expand(-1, -1, -1, -1, 2).reshape(*x.shape[:2], -1, 8), False),
}  # fmt: skip


@pytest.mark.parametrize("name", BEHIND_POSITIONS)
def test_heads_behind_positions_that_are_repeated(name: str) -> None:
    """[B,S,H,D], brought to the front afterwards."""
    repeat, is_grouped = BEHIND_POSITIONS[name]

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, repeat(k), repeat(v)))
        return F.scaled_dot_product_attention(q, k, v) + (q @ k.transpose(2, 3)).softmax(-1) @ v

    inputs = (randn(2, 5, 6, 8), randn(2, 5, 3, 8), randn(2, 5, 3, 8, seed=1))
    check(function, *inputs, takes=["attention"])
    plan = str(alive()[-1].plan)
    assert ("[2,3,5,8]" in plan) == is_grouped, plan


def repeats_of_one_head(k: torch.Tensor) -> torch.Tensor:
    t = k[:, :, :, None].expand(2, 5, 1, 4, 8).reshape(2, 5, 4, 8).transpose(1, 2)
    k.mul_(2)
    return t + 0


def writes_under_a_turn(k: torch.Tensor) -> torch.Tensor:
    many = k.repeat_interleave(4, 2)
    turned = many.transpose(1, 2)
    many.mul_(2)
    return turned + 0


def writes_a_turn(k: torch.Tensor) -> torch.Tensor:
    many = k.repeat_interleave(4, 2)
    many.transpose(1, 2).mul_(2)
    return many + 0


def writes_in_front_of_a_turn(k: torch.Tensor) -> torch.Tensor:
    many = k.repeat_interleave(4, 2)
    k.mul_(3)
    turned = many.transpose(1, 2)
    return F.scaled_dot_product_attention(turned, turned, turned)


@pytest.mark.parametrize(
    "f", [repeats_of_one_head, writes_under_a_turn, writes_a_turn, writes_in_front_of_a_turn]
)
def test_heads_that_are_written_around_their_repeats(f: Callable) -> None:
    check(f, randn(2, 5, 1, 8))


def test_heads_that_are_repeated_as_a_whole() -> None:
    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (x.unsqueeze(1).expand(-1, 2, -1, -1, -1).reshape(2, 4, 5, 8) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v)

    check(function, heads(number=4), heads(3, number=2), heads(4, number=2), takes=["attention"])
