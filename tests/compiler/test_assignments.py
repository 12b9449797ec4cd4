"""Rows assigned into caches that the caller holds: which are a kernel's, and that all of them land where eager's do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from llmopt.compiled import alive
from torch import Tensor, nn
from torch.nn import functional as F

from tests.compiler.rewriting import check, randn

SLOTS, HEADS, WIDTH = 12, 3, 8
BEHIND, IN_FRONT = (4, SLOTS, HEADS, WIDTH), (4, HEADS, SLOTS, WIDTH)
LINEAR = nn.Linear(HEADS * WIDTH, HEADS * WIDTH)
AT = torch.tensor([3, 4, 5])


def rows(x: Tensor) -> Tensor:
    """[B,S,H,D] that a kernel makes."""
    return LINEAR(x).unflatten(-1, (HEADS, WIDTH))


def assigned(
    shape: tuple[int, ...], write: Callable[[Tensor, Tensor], Any]
) -> tuple[Callable, Tensor, Tensor]:
    """A function that writes the rows of 2 prompts of 3 tokens into a cache, and what it takes."""

    in_front = shape == IN_FRONT

    def function(x: Tensor, cache: Tensor) -> Tensor:
        new = rows(x).transpose(1, 2) if in_front else rows(x)
        write(cache, new)
        return cache[:2].sum(-1) * 2

    return function, randn(2, 3, HEADS * WIDTH), randn(*shape)


def put(index: Any) -> Callable[[Tensor, Tensor], Any]:
    def write(cache: Tensor, new: Tensor) -> None:
        cache[index] = new

    return write


S = slice
TAKEN: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Any], str]] = {
    "slices": (BEHIND, put((S(0, 2), S(4, 7))), "copy"),
    "slices, heads in front": (IN_FRONT, put((S(2, 4), S(None), S(-3, None), S(None))), "copy"),
    "an ellipsis": (IN_FRONT, put((S(2), ..., S(1, 4), S(None))), "copy"),
    "every second": (BEHIND, put((S(0, 4, 2), S(1, 7, 2))), "copy"),
    "positions": (BEHIND, put((S(0, 2), AT)), "index_copy"),
    "positions, heads in front": (IN_FRONT, put((S(1, 3), S(None), AT)), "index_copy"),
    "positions from the end": (IN_FRONT, put((S(2, None), S(None), AT - SLOTS)), "index_copy"),
    "index_copy_": (BEHIND, lambda c, n: c[:2].index_copy_(1, AT, n), "index_copy"),
    "index_copy_ from the end": (BEHIND, lambda c, n: c[2:].index_copy_(-3, AT.flip(0), n), "index_copy"),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_write(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, write, op = TAKEN[name]
    monkeypatch.setitem(globals(), "LINEAR", LINEAR.to(dtype))
    function, x, cache = assigned(shape, write)
    try:
        check(function, x.to(dtype), cache.to(dtype), takes=["linear", op])
    finally:
        LINEAR.float()


OTHERS: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Any]]] = {
    "one number": (BEHIND, lambda c, n: put((S(0, 2), S(4, 7)))(c, 0.5)),
    "a row for all": (BEHIND, lambda c, n: put((S(0, 2), S(4, 7)))(c, n[:1, :1])),
    "another dtype": (BEHIND, lambda c, n: put((S(0, 2), S(4, 7)))(c, n.double())),
    "a mask": (BEHIND, lambda c, n: put(torch.arange(4) < 2)(c, n[:, :1].expand(2, SLOTS, -1, -1))),
    "positions of each prompt": (BEHIND, lambda c, n: put((torch.arange(2)[:, None], AT[None].expand(2, -1)))(c, n)),
    "one prompt": (BEHIND, lambda c, n: put((1, S(4, 7)))(c, n[0])),
    "one prompt, positions": (IN_FRONT, lambda c, n: put((1, S(None), AT))(c, n[0])),
    "two positions": (IN_FRONT, lambda c, n: put((S(0, 2), S(None), AT[:1]))(c, n[:, :, :1])),
    "positions in int32": (BEHIND, put((S(0, 2), AT.int()))),
    "prompts by numbers": (BEHIND, lambda c, n: put((torch.tensor([2, 0]), S(4, 7)))(c, n)),
    "into what the graph makes": (BEHIND, lambda c, n: put((S(0, 2), S(4, 7)))(c * 2, n)),
    "its own rows": (BEHIND, lambda c, n: put((S(0, 2), S(4, 7)))(c, c[:2, :3])),
    "a copy of its own rows": (BEHIND, lambda c, n: put((S(0, 2), S(1, 4)))(c, c[:2, :3].clone())),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_whatever_writes_it_lands_where_eagers_does(name: str) -> None:
    check(*assigned(*OTHERS[name]))


def test_positions_beyond_the_cache_are_an_error() -> None:
    function, x, cache = assigned(BEHIND, put((S(0, 2), AT + 8)))
    torch._dynamo.reset()
    before = cache.clone()
    with pytest.raises((IndexError, RuntimeError), match=r"out of (bounds|range)"), torch.no_grad():
        torch.compile(function, backend="llmopt")(x, cache)
    assert torch.equal(cache, before)


def test_positions_that_move_between_two_writes() -> None:
    def function(x: Tensor, cache: Tensor, at: Tensor) -> Tensor:
        cache[:2, at] = rows(x)
        at.add_(3)
        cache[:2, at] = rows(x * 2)
        return cache.sum(1)

    check(function, randn(2, 3, HEADS * WIDTH), randn(*BEHIND), AT.clone(), takes=["index_copy"])


class Cached(nn.Module):
    """Layers that keep keys and values in buffers."""

    def __init__(self, by_positions: bool) -> None:
        super().__init__()
        self.by_positions = by_positions
        self.layers = nn.ModuleList(nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH) for _ in range(3))
        for i in range(6):
            self.register_buffer(f"cache{i}", torch.zeros(2, SLOTS, HEADS, WIDTH))

    def forward(self, x: Tensor, start: int, at: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            q, *new = layer(x).unflatten(-1, (3, HEADS, WIDTH)).unbind(2)
            caches = [getattr(self, f"cache{2 * i + j}") for j in range(2)]
            for cache, part in zip(caches, new, strict=True):
                if self.by_positions:
                    cache[: x.shape[0], at] = part
                else:
                    cache[: x.shape[0], start : start + x.shape[1]] = part
            k, v = (c[: x.shape[0], : start + x.shape[1]] for c in caches)
            mask = torch.arange(start + x.shape[1])[None] <= at[:, None]
            y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), mask)
            x = x + y.transpose(1, 2).flatten(2)
        return x


@pytest.mark.parametrize("by_positions", [False, True])
@torch.no_grad()
def test_decoding_with_caches_in_buffers(by_positions: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    ours, theirs = Cached(by_positions).eval(), Cached(by_positions).eval()
    theirs.load_state_dict(ours.state_dict())
    compiled = torch.compile(ours, backend="llmopt")
    start = 0
    for length in (4, 1, 1, 1, 3):
        x, at = randn(2, length, HEADS * WIDTH), torch.arange(start, start + length)
        torch.testing.assert_close(compiled(x, start, at), theirs(x, start, at))
        start += length
    torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))
    assert len(alive()[-1].plan.segments) == 1, alive()[-1].plan
