"""Running a function compiled and in eager, and asking its plan which ops took it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from llmopt.compiled import alive
from llmopt.graph import kind
from torch import Tensor

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


@torch.no_grad()
def outcome(
    function: Callable[[Tensor], Any], x: Tensor, backend: str, dynamic: bool | None = None
) -> list[Tensor]:
    """The results for a copy of x, and that copy afterwards."""
    torch._dynamo.reset()
    x = x.clone()
    got = torch.compile(function, backend=backend, dynamic=dynamic)(x)
    return [*(got if isinstance(got, tuple) else (got,)), x]


def check_memory(function: Callable[[Tensor], Any], x: Tensor, dynamic: bool | None = None) -> None:
    """As in eager: values, their layout, and which of them are the same memory."""
    got, want = (outcome(function, x, backend, dynamic) for backend in ("llmopt", "eager"))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, check_stride=True)
    same = [[a.data_ptr() == b.data_ptr() for a in some for b in some] for some in (got, want)]
    assert same[0] == same[1], "windows on the same memory"


def copied(inputs: tuple) -> tuple:
    return tuple(i.clone() if isinstance(i, torch.Tensor) else i for i in inputs)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def heads(seed: int = 0, batch: int = 2, number: int = 3) -> torch.Tensor:
    return randn(batch, number, 5, 8, seed=seed)


MASK = torch.arange(5)[:, None] >= torch.arange(5)
Q, K, V = heads(0), heads(1), heads(2)
