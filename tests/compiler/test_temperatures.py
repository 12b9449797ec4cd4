"""Scores that a tensor scales: by a number, or by one for each head, q is scaled instead; anything else is no such thing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.compiler.rewriting import MASK, K, Q, V, check, randn

INF = torch.inf
TAKEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "of heads": lambda s, t: s * t,
    "of heads, first": lambda s, t: t.exp() * s,
    "of heads, four dimensions": lambda s, t: s * t[None],
    "a number": lambda s, t: s * t[1, 0, 0],
    "one element": lambda s, t: s * t[1, 0],
    "divided": lambda s, t: s / t,
    "divided by a number": lambda s, t: s / t[1, 0, 0],
    "with a scale": lambda s, t: s * 0.3 * t / 2,
    "twice": lambda s, t: s * t / t[0, 0, 0],
    "a mask behind": lambda s, t: (s * t).masked_fill(~MASK, -INF),
    "a bias behind": lambda s, t: s * t + MASK.to(s.dtype),
}


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_q_is_scaled_instead(name: str, dtype: torch.dtype) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
        return TAKEN[name](F.normalize(q, dim=-1) @ k.mT, t).softmax(-1) @ v

    temperatures = randn(3, 1, 1).abs() + 0.5
    check(function, *(x.to(dtype) for x in (Q, K, V, temperatures)), takes=["attention"])


LEFT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "of keys": lambda s, t: s * torch.linspace(0.5, 2, 5),
    "of queries": lambda s, t: s * torch.linspace(0.5, 2, 5)[:, None],
    "of prompts and keys": lambda s, t: s * torch.linspace(0.5, 2, 5).expand(2, 1, 1, 5),
    "behind a bias": lambda s, t: (s + MASK.float()) * t,
    "behind a mask": lambda s, t: s.masked_fill(~MASK, -INF) * t,
    "in front of a cap": lambda s, t: 5.0 * torch.tanh(s * (t / 0.0) / 5.0),
    "behind a cap": lambda s, t: 5.0 * torch.tanh(s / 5.0) * t,
    "a number over the scores": lambda s, t: t / s,
    "of themselves": lambda s, t: s / s.amax((-1, -2), keepdim=True),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_else_multiplies_scores(name: str) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
        return LEFT[name](q @ k.mT, t).softmax(-1) @ v

    check(function, Q, K, V, randn(3, 1, 1).abs() + 0.5, leaves=["attention"])


def test_products_that_only_q_makes_too_large() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
        return (q @ k.mT * t).softmax(-1) @ v

    q, k, v = Q.half() * 300, K.half() / 300, V.half()
    check(function, q, k, v, torch.full((3, 1, 1), 500.0).half(), leaves=["attention"])


def test_scores_that_are_wider_than_q() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
        return (q.float() @ k.float().mT * t).softmax(-1).to(v.dtype) @ v

    q, k, v = (x.bfloat16() for x in (Q, K, V))
    check(function, q, k, v, torch.tensor(3.3), leaves=["attention"])


def test_a_temperature_that_changes_in_between() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
        scores = q @ k.mT * t
        t.mul_(2)
        return scores.softmax(-1) @ v * t

    check(function, Q, K, V, randn(3, 1, 1).abs() + 0.5)
