"""Running a function compiled and in eager, and asking its plan which ops took it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from llmopt.compiled import alive
from llmopt.graph import kind

from tests.e2e.compare import assert_same_output

INF = float("inf")


@torch.no_grad()
def check(
    function: Callable[..., Any],
    *inputs: Any,
    takes: Collection[str] = (),
    leaves: Collection[str] = (),
    dynamic: bool | None = None,
    in_pytorch: Collection[str] | None = None,
) -> None:
    """The compiled function gives what eager gives, and leaves the same in its inputs.

    in_pytorch: all kinds of operations that have no kernel.
    """
    torch._dynamo.reset()
    known = {id(g) for g in alive()}
    ours, theirs = copied(inputs), copied(inputs)
    got = torch.compile(function, backend="llmopt", dynamic=dynamic)(*ours)
    assert_same_output(got, function(*theirs))
    assert_same_output(ours, theirs, "inputs afterwards")
    plans = [g.plan for g in alive() if id(g) not in known]
    ops = {r.op for p in plans if p is not None for r in p.records()}
    assert ops >= set(takes), f"taken: {ops}"
    assert not ops & set(leaves), f"taken: {ops}"
    if in_pytorch is not None:
        assert {kind(f.node) for p in plans if p is not None for f in p.fallbacks} == set(
            in_pytorch
        )


def copied(inputs: tuple) -> tuple:
    return tuple(i.clone() if isinstance(i, torch.Tensor) else i for i in inputs)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def heads(seed: int = 0, batch: int = 2, number: int = 3) -> torch.Tensor:
    return randn(batch, number, 5, 8, seed=seed)
