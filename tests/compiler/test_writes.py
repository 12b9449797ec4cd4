"""Kernels that write in place: caches that slide, copies into memory that is given; and what they may not take over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.compiler.test_rewrites import K, Q, check, randn

CACHE, NEW = randn(2, 3, 5, 8), randn(2, 3, 1, 8)


def slid(cache: Tensor, new: Tensor, where: Any = slice(-1, None)) -> Tensor:
    moved = cache.roll(-1, dims=-2)
    moved[:, :, where] = new
    return moved


def test_a_full_cache_slides_natively() -> None:
    def function(q: Tensor, new: Tensor, cache: Tensor) -> Tensor:
        index = torch.tensor([-1], dtype=int)
        cache.copy_(slid(cache, F.layer_norm(new, (8,)), index))
        return F.scaled_dot_product_attention(q, cache, cache)

    check(function, Q, NEW, CACHE, takes=["slide", "attention"], leaves=["copy"])


def test_a_roll_that_is_more_than_a_cache_that_slides() -> None:
    """Read on its own, assigned elsewhere, by what would have moved, of two positions, after a write in between."""

    def rolled_is_read(q: Tensor, new: Tensor, cache: Tensor) -> Tensor:
        moved = slid(cache, new)
        cache.copy_(moved)
        cache.mul_(2)
        return F.scaled_dot_product_attention(q, cache, moved)

    def elsewhere(q: Tensor, new: Tensor, cache: Tensor) -> Tensor:
        cache.copy_(slid(cache, new, slice(0, 1)))
        return F.scaled_dot_product_attention(q, cache, cache)

    def by_itself(q: Tensor, new: Tensor, cache: Tensor) -> Tensor:
        cache.copy_(slid(cache, cache[:, :, :1]))
        return F.scaled_dot_product_attention(q, cache, cache)

    def broadcast(q: Tensor, new: Tensor, cache: Tensor) -> Tensor:
        cache.copy_(slid(cache, new[:, :, :, :1]))
        return F.scaled_dot_product_attention(q, cache, cache)

    def written_between(q: Tensor, new: Tensor, cache: Tensor) -> Tensor:
        moved = slid(cache, new)
        cache.mul_(3)
        early = F.scaled_dot_product_attention(q, cache, cache)
        cache.copy_(moved)
        return early + F.scaled_dot_product_attention(q, cache, cache)

    def new_is_written(q: Tensor, new: Tensor, cache: Tensor) -> Tensor:
        moved = slid(cache, new)
        new.mul_(3)
        cache.copy_(moved)
        return F.scaled_dot_product_attention(q, cache, cache)

    def assigned_later(q: Tensor, new: Tensor, cache: Tensor) -> Tensor:
        moved = cache.roll(-1, dims=-2)
        cache.copy_(moved)
        moved[:, :, -1:] = new
        return F.scaled_dot_product_attention(q, cache, cache)

    def index_is_written(q: Tensor, new: Tensor, cache: Tensor) -> Tensor:
        moved, index = cache.roll(-1, dims=-2), torch.tensor([-1])
        index.add_(2)
        moved[:, :, index] = new
        cache.copy_(moved)
        return F.scaled_dot_product_attention(q, cache, cache)

    for function in (
        rolled_is_read,
        elsewhere,
        by_itself,
        broadcast,
        written_between,
        new_is_written,
        assigned_later,
        index_is_written,
    ):
        check(function, Q, NEW, CACHE, leaves=["slide"])


def test_copies_into_memory_that_is_given() -> None:
    """Whole, part of it, in another dtype, of fewer dimensions, between two reads."""

    def whole(x: Tensor, y: Tensor) -> Tensor:
        y.copy_(F.layer_norm(x, (8,)))
        return F.layer_norm(y, (8,))

    def part(x: Tensor, y: Tensor) -> Tensor:
        y[:, :, 1:3].copy_(F.layer_norm(x, (8,))[:, :, -2:])
        return F.layer_norm(y, (8,))

    def row(x: Tensor, y: Tensor) -> Tensor:
        y.copy_(F.layer_norm(x, (8,))[0, 0, 0])
        return F.layer_norm(y, (8,))

    def between(x: Tensor, y: Tensor) -> Tensor:
        before = F.layer_norm(y, (8,))
        y.copy_(F.layer_norm(x, (8,)))
        return before + F.layer_norm(y, (8,))

    for function in (whole, part, row, between):
        check(function, Q, K, takes=["copy"])
        check(function, Q, K.bfloat16().float(), takes=["copy"])
    check(whole, Q, K.to(torch.float16), takes=["copy"])


def test_what_a_kernel_writes_counts_as_written() -> None:
    """Autograd and packed weights tell edits by a tensor's version, inference tensors have none."""
    linear = nn.Linear(8, 8)

    def set_rows(x: Tensor, y: Tensor) -> Tensor:
        y.copy_(F.layer_norm(x, (8,)))
        return F.layer_norm(y, (8,))

    with torch.no_grad():
        apply, write = (torch.compile(f, backend="llmopt") for f in (linear, set_rows))
        before = apply(Q)
        version = linear.weight._version
        write(Q[0, 0, :1].expand(8, 8), linear.weight.detach())
        assert linear.weight._version == version + 1
        after = apply(Q)
        assert not torch.equal(before, after)
        torch.testing.assert_close(after, linear(Q))
    with torch.inference_mode():
        y = torch.zeros(8, 8)
        write(Q[0, 0, :1].expand(8, 8), y)
        assert y.abs().sum() > 0


def test_copies_that_pytorch_must_make() -> None:
    """A parameter that is packed elsewhere, memory that overlaps, numbers that are no floats."""
    linear = nn.Linear(8, 8)

    def weight(x: Tensor) -> Tensor:
        early = linear(x)
        linear.weight.copy_(F.layer_norm(x[0, 0, :1].expand(8, 8), (8,)))
        return early + linear(x)

    def within(x: Tensor) -> Tensor:
        y = F.layer_norm(x, (8,))
        y[:, :, :2].copy_(y[:, :, 3:])
        return F.layer_norm(y, (8,))

    def counted(x: Tensor, y: Tensor) -> Tensor:
        y.copy_(F.layer_norm(x, (8,)) * 5)
        return F.layer_norm(x, (8,)) + y

    with torch.no_grad():
        kept = linear.weight.clone()
        want = weight(Q)
        linear.weight.copy_(kept)
        torch.testing.assert_close(torch.compile(weight, backend="llmopt")(Q), want)
    check(within, Q, leaves=["copy"])
    check(counted, Q, K.long(), leaves=["copy"])


class Memory(nn.Module):
    """A buffer that a linear reads as its weight, written by what a case does with it."""

    def __init__(self, write: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self.register_buffer("rows", randn(1, 1, 8, 8))
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.rows[0, 0])
        self.write(self.rows, h[None, None, :1])
        return F.linear(x, self.rows[0, 0])


@torch.no_grad()
def test_a_weight_that_is_written_between_two_linears() -> None:
    """Packed weights are those at the segment's start: such a write stays between two segments."""

    def slide(rows: Tensor, new: Tensor) -> None:
        rows.copy_(slid(rows, new))

    def index_copy(rows: Tensor, new: Tensor) -> None:
        rows.index_copy_(2, torch.tensor([1]), new)

    def copy(rows: Tensor, new: Tensor) -> None:
        rows[:, :, 2:3].copy_(new)

    for write in (slide, index_copy, copy):
        torch._dynamo.reset()
        ours, theirs, x = Memory(write), Memory(write), randn(8, 8)
        compiled = torch.compile(ours, backend="llmopt")
        for _ in range(3):
            torch.testing.assert_close(compiled(x), theirs(x), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(ours.rows, theirs.rows, rtol=1e-4, atol=1e-4)


def test_what_is_written_to_out_is_not_dropped() -> None:
    """A call that gives its result to `out` has an effect, whoever reads what it returns."""

    def function(x: Tensor, y: Tensor) -> Tensor:
        h = F.layer_norm(x, (8,))
        torch.ops.aten.add.out(h, h, out=y)
        return F.layer_norm(y, (8,))

    check(function, Q, K)
