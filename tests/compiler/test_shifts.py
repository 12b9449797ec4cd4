"""roll and pad: what kernels copy, and what stays PyTorch's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from llmopt.compiled import alive
from torch import Tensor, nn
from torch.nn import functional as F

from tests.compiler.rewriting import check, check_memory, randn

LINEAR = nn.Linear(6, 6).requires_grad_(False)

TAKEN: dict[str, Callable[[Tensor], Tensor]] = {
    "one dimension": lambda x: x.roll(1, 1),
    "back": lambda x: torch.roll(x, -2, dims=-1),
    "two dimensions": lambda x: torch.roll(x, shifts=(-2, 3), dims=(1, 2)),
    "further than it is long": lambda x: x.roll(11, 1),
    "not at all": lambda x: x.roll((0, 4), (1, 1)),
    "one dimension twice": lambda x: x.roll((1, 2), (1, 1)),
    "padded by nothing": lambda x: F.pad(x, (0, 0, 0, 0)),
    "in front": lambda x: F.pad(x, (0, 0, 1, 0)),
    "around": lambda x: F.pad(x, (1, 2, 0, 3, 1, 0), value=-0.5),
    "and cut": lambda x: F.pad(x, (0, 0, 1, 0))[:, :-1],
}


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_copy(name: str, dtype: torch.dtype) -> None:
    linear = nn.Linear(6, 6).to(dtype)
    x = randn(2, 4, 6).to(dtype)
    in_pytorch = ["full"] if name in ("in front", "around", "and cut") else []
    check(lambda x: TAKEN[name](linear(x)) * 2, x, takes=["copy"], in_pytorch=in_pytorch)
    if dtype == torch.float32:
        check_memory(lambda x: TAKEN[name](LINEAR(x)), x)


LEFT: dict[str, Callable[[Tensor], Tensor]] = {
    "all numbers in a row": lambda x: x.roll(3),
    "other modes": lambda x: F.pad(x, (1, 1), mode="reflect") + F.pad(x, (2, 0), mode="circular"),
    "less": lambda x: F.pad(x, (-1, 0)),
    "more and less": lambda x: F.pad(x, (-1, 2)),
    "transposed": lambda x: F.pad(x.mT.roll(1, 1), (0, 0, 0, 0)),
    "integers": lambda x: (x > 0).long().roll(1, 1) + F.pad((x > 0).long(), (1, 0))[..., 1:],
}


@pytest.mark.parametrize("name", LEFT)
def test_what_stays_pytorchs(name: str) -> None:
    check(lambda x: LEFT[name](LINEAR(x)) * 2, randn(2, 4, 6))


@pytest.mark.parametrize("move", [lambda x: x.roll(0, 1), lambda x: F.pad(x, (0, 0))])
def test_what_does_not_move_is_a_copy_all_the_same(move: Callable[[Tensor], Tensor]) -> None:
    def function(x: Tensor) -> Tensor:
        y = LINEAR(x)
        z = move(y)
        z.mul_(2)
        return y + z

    check_memory(function, randn(2, 4, 6))


@torch.no_grad()
def test_lengths_that_change() -> None:
    torch._dynamo.reset()

    def function(x: Tensor) -> Tensor:
        return F.pad(LINEAR(x), (0, 0, 0, 0)).roll(2, -1) + F.pad(LINEAR(x), (0, 0, 1, 0))[:, :-1]

    compiled = torch.compile(function, backend="llmopt")
    for length in (4, 7, 1, 9):
        x = randn(2, length, 6)
        torch.testing.assert_close(compiled(x), function(x))
    assert not any("pad" in str(g.plan) for g in alive()[-3:])


@torch.no_grad()
def test_borders_as_long_as_what_changes_are_pytorchs() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: F.pad(LINEAR(x), (1, 0)), backend="llmopt")
    for length in (4, 7, 9):
        x = randn(2, length, 6)
        torch.testing.assert_close(compiled(x), F.pad(LINEAR(x), (1, 0)))
    assert "pad" in str(alive()[-1].plan)
