"""stack, repeat, tile and repeat_interleave: what kernels copy, and what stays PyTorch's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.compiler.rewriting import check, check_memory, randn

LINEAR = nn.Linear(6, 6).requires_grad_(False)

TAKEN: dict[str, Callable[[Tensor], Tensor]] = {
    "stacked": lambda x: torch.stack([x, x * 2], -1),
    "stacked in front": lambda x: torch.stack((x, x + 1, x)),
    "stacked in between": lambda x: torch.stack(tensors=(x, x), dim=1),
    "alone": lambda x: torch.stack([x], 1),
    "repeated": lambda x: x.repeat(1, 2, 1),
    "repeated with more dimensions": lambda x: x.repeat(2, 1, 1, 3),
    "repeated as a list says": lambda x: x.repeat([1, 1, 4]),
    "once": lambda x: x.repeat(1, 1, 1),
    "tiled": lambda x: torch.tile(x, (2,)),
    "each": lambda x: x.repeat_interleave(2, 1),
    "each value": lambda x: torch.repeat_interleave(x, repeats=3, dim=-1),
    "each once": lambda x: x.repeat_interleave(1, dim=0),
    "each of one": lambda x: x[:, :1].contiguous().repeat_interleave(4, 1),
}


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_copy(name: str, dtype: torch.dtype) -> None:
    linear = nn.Linear(6, 6).to(dtype)
    x = randn(2, 4, 6).to(dtype)
    check(lambda x: TAKEN[name](linear(x)) * 2, x, takes=["copy"], in_pytorch=())
    if dtype == torch.float32:
        check_memory(lambda x: TAKEN[name](LINEAR(x)), x)
        check_memory(lambda x: (y := LINEAR(x), TAKEN[name](y).add_(1), y.mul_(2)), x)


@pytest.mark.parametrize("name", TAKEN)
def test_lengths_that_change(name: str) -> None:
    check(lambda x: TAKEN[name](LINEAR(x)) * 2, randn(2, 4, 6), takes=["copy"], dynamic=True)


LEFT: dict[str, Callable[[Tensor], Tensor]] = {
    "all values in a row": lambda x: x.repeat_interleave(2),
    "none": lambda x: x.repeat(1, 0, 1),
    "many": lambda x: x.repeat(1, 40, 1),
    "numbers in a tensor": lambda x: x.repeat_interleave(torch.tensor([2, 0, 1, 1]), 1),
    "transposed": lambda x: torch.stack([x.mT, x.mT]) + x.mT.repeat(1, 1, 1),
    "integers": lambda x: torch.stack([(x > 0).long(), (x > 0).long()]).sum(),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_stays_pytorchs(name: str) -> None:
    check(lambda x: LEFT[name](LINEAR(x)) * 2, randn(2, 4, 6))
