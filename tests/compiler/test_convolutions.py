"""Short depthwise convolutions, which are chains, and others, which are PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from llmopt.compiled import alive
from torch import Tensor, nn

from tests.compiler.rewriting import check, check_memory, randn

WIDTH = 8


class Mixer(nn.Module):
    """Looks back over some positions between two linears."""

    def __init__(self, length: int, in_front: bool = False, **how: Any) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.conv = nn.Conv1d(
            WIDTH, WIDTH, length, **{"groups": WIDTH, "padding": length - 1} | how
        )
        self.in_front = in_front

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).mT
        y = self.conv(h.contiguous() if self.in_front else h)[..., : x.shape[1]]
        return self.last(torch.nn.functional.silu(y).mT)


TAKEN: dict[str, dict[str, Any]] = {
    "two": {"length": 2},
    "three": {"length": 3, "bias": False},
    "four": {"length": 4},
    "one": {"length": 1},
    "no zeros": {"length": 3, "padding": 0},
    "zeros on both sides": {"length": 3, "padding": 1},
    "channels in front": {"length": 4, "in_front": True},
}


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_chains(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    mixer = Mixer(**TAKEN[name]).to(dtype).eval()
    in_pytorch = ["full"] if mixer.conv.padding[0] else []
    check(mixer, randn(2, 9, WIDTH).to(dtype), takes=["pointwise"], in_pytorch=in_pytorch)


LEFT: dict[str, dict[str, Any]] = {
    "five": {"length": 5},
    "groups of two": {"length": 3, "groups": WIDTH // 2},
    "dense": {"length": 3, "groups": 1},
    "strides": {"length": 3, "stride": 2},
    "holes": {"length": 3, "dilation": 2},
    "as long": {"length": 3, "padding": "same"},
}


@pytest.mark.parametrize("name", LEFT)
def test_what_stays_pytorchs(name: str) -> None:
    torch.manual_seed(0)
    mixer = Mixer(**LEFT[name]).eval()
    check(lambda x: mixer.conv(mixer.first(x).mT), randn(2, 9, WIDTH), leaves=["pointwise"])


def written_through_a_view(y: Tensor) -> Tensor:
    y.view(-1).mul_(2)
    return y


def written_under_a_view(y: Tensor) -> Tensor:
    flat = y.view(2, -1)
    y.mul_(2)
    return flat


def written_where_it_is_contiguous(y: Tensor) -> Tensor:
    y.contiguous().view(-1).mul_(2)
    return y


@pytest.mark.parametrize(
    "write", [written_through_a_view, written_under_a_view, written_where_it_is_contiguous]
)
def test_results_that_are_written(write: Callable[[Tensor], Tensor]) -> None:
    mixer = Mixer(3).eval()
    check(lambda x: write(mixer.conv(mixer.first(x).mT)), randn(2, 9, WIDTH))


@torch.no_grad()
def test_under_autocast() -> None:
    mixer = Mixer(3).eval()

    def function(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return mixer.conv(x)

    x = randn(2, WIDTH, 9)
    got, want = torch.compile(function, backend="llmopt")(x), function(x)
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_zeros_that_are_none() -> None:
    mixer = Mixer(3, padding_mode="circular").eval()
    check(lambda x: mixer.conv(mixer.first(x).mT), randn(2, 9, WIDTH), in_pytorch=["pad"])


def test_one_row_without_a_batch() -> None:
    mixer = Mixer(3).eval()
    check(lambda x: mixer.conv(mixer.first(x).mT), randn(9, WIDTH))


@torch.no_grad()
def test_lengths_that_change() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    mixer = Mixer(4).eval()
    compiled = torch.compile(mixer, backend="llmopt")
    for length in (5, 9, 1, 12):
        x = randn(2, length, WIDTH)
        torch.testing.assert_close(compiled(x), mixer(x), rtol=1e-4, atol=1e-5)
    assert all("conv1d" not in str(g.plan) for g in alive()[-3:])


def test_windows_on_results() -> None:
    """Memory that two results share stays so."""
    weight = randn(8, 1, 4)

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.conv1d(x, weight, padding=3, groups=8)
        return y, y.view(2, -1)

    check_memory(function, randn(2, 8, 5))
