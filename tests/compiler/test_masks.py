"""Masks that models count off: what is a window on the padding mask, what is always true, and what stays PyTorch's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from llmopt.compiled import alive
from llmopt.graph import kind
from torch import Tensor
from torch.nn import functional as F

from tests.compiler.rewriting import check, check_memory, randn

BATCH, KEYS = 2, 5
PADDING = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def looked_up(padding: Tensor, keys: int) -> Tensor:
    """[B,1,1,K] of a padding mask [B,K], element by element, as transformers does it."""
    batch = torch.arange(padding.shape[0])[:, None, None, None]
    return padding.bool()[batch, (torch.arange(keys) + 0)[None, None, None, :]]


def attend(x: Tensor, mask: Tensor, keys: int = KEYS) -> Tensor:
    """x [B,Q,8]: two heads over `keys` keys."""
    q = x.unflatten(-1, (2, 4)).transpose(1, 2)
    k = (
        torch.linspace(-1, 1, keys * 4).view(1, 1, keys, 4).expand(x.shape[0], 2, keys, 4)
        * q[:, :, :1]
    )
    return F.scaled_dot_product_attention(q, k, k, attn_mask=mask)


def encoder(x: Tensor, padding: Tensor) -> Tensor:
    q = (torch.arange(x.shape[1]) + 0)[None, None, :, None]
    seen = q.new_ones((), dtype=torch.bool) & (q >= 0)
    mask = seen & looked_up(padding, padding.shape[1])
    return attend(x, mask.expand(x.shape[0], -1, x.shape[1], padding.shape[1]), padding.shape[1])


def decoder(x: Tensor, padding: Tensor) -> Tensor:
    """The queries are the last of the keys."""
    keys = padding.shape[1]
    q = (torch.arange(x.shape[1]) + (keys - x.shape[1]))[None, None, :, None]
    seen = q.new_ones((), dtype=torch.bool) & (torch.arange(keys)[None, None, None, :] <= q)
    return attend(x, seen & looked_up(padding, keys), keys)


def in_pytorch(function: Callable, *inputs: Tensor, dynamic: bool | None = None) -> list[str]:
    """What is left to PyTorch of a function, which gives what eager gives."""
    check(function, *inputs, takes=["attention"], dynamic=dynamic)
    return [kind(f.node) for f in alive()[-1].plan.fallbacks]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("queries", [KEYS, 3])
def test_an_encoder_reads_its_padding_mask(queries: int, dynamic: bool) -> None:
    left = in_pytorch(encoder, randn(BATCH, queries, 8), PADDING, dynamic=dynamic)
    assert not {"ge", "and_", "new_ones", "getitem", "arange"} & set(left)


@pytest.mark.parametrize("dynamic", [False, True])
def test_one_token_sees_all_keys(dynamic: bool) -> None:
    left = in_pytorch(decoder, randn(BATCH, 1, 8), PADDING, dynamic=dynamic)
    assert not {"le", "and_", "new_ones", "getitem", "arange"} & set(left)


def test_several_tokens_do_not() -> None:
    left = in_pytorch(decoder, randn(BATCH, 3, 8), PADDING)
    assert left.count("and_") == 1
    assert "le" in left


@pytest.mark.parametrize("batch", [1, BATCH])
@pytest.mark.parametrize("function", [encoder, decoder])
def test_lengths_that_change(function: Callable, batch: int) -> None:
    """A graph for every length, whether or not they were equal when it was made."""
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="llmopt", dynamic=True)
    for queries, keys in ((1, 5), (1, 6), (4, 9), (9, 9), (1, 1), (2, 2), (1, 12)):
        x, padding = randn(batch, queries, 8), torch.ones(batch, keys, dtype=torch.int64)
        padding[0, : keys // 2] = 0
        torch.testing.assert_close(compiled(x, padding), function(x, padding))


COMPARED: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "not before the first": (lambda k: k >= 0, True),
    "behind the one before the first": (lambda k: k > -1, True),
    "not behind the last": (lambda k: k <= KEYS - 1, True),
    "before the end": (lambda k: k < KEYS, True),
    "each other": (lambda k: torch.arange(2, 5)[:, None] < torch.arange(5, 10), True),
    "and both": (lambda k: torch.logical_and(k >= 0, k < 9), True),
    "the first is none": (lambda k: k > 0, False),
    "the last is none": (lambda k: k < KEYS - 1, False),
    "unequal": (lambda k: k != 7, False),
    "every second": (lambda k: torch.arange(0, 2 * KEYS, 2) < 2 * KEYS, False),
    "of floats": (lambda k: torch.arange(0.0, KEYS) >= 0, False),
}


@pytest.mark.parametrize("name", COMPARED)
def test_comparisons(name: str) -> None:
    compare, is_true = COMPARED[name]

    def function(x: Tensor, padding: Tensor) -> Tensor:
        mask = padding.bool()[:, None, None, :]
        return attend(x, mask & compare(torch.arange(KEYS)[None, None, None, :]))

    left = in_pytorch(function, randn(BATCH, 3, 8), PADDING)
    assert ("and_" not in left) == is_true


INDICES: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "all": (lambda p: p[torch.arange(2)[:, None], torch.arange(5)], True),
    "further apart": (lambda p: p[torch.arange(2)[:, None, None], torch.arange(5)][:, 0], True),
    "lengths of the mask": (lambda p: p[torch.arange(p.shape[0])[:, None], torch.arange(p.shape[1])], True),
    "transposed": (lambda p: p[torch.arange(2), torch.arange(5)[:, None]].mT, False),
    "a diagonal": (lambda p: p[torch.arange(2), torch.arange(2)][:, None].expand(2, 5), False),
    "from the second on": (lambda p: F.pad(p[torch.arange(2)[:, None], torch.arange(1, 5)], (1, 0)), False),
    "all but the last": (lambda p: F.pad(p[torch.arange(2)[:, None], torch.arange(4)], (1, 0)), False),
    "some rows": (lambda p: p[torch.arange(1)[:, None], torch.arange(5)].expand(2, 5), False),
    "rows alone": (lambda p: p[torch.arange(2)], False),
    "backwards": (lambda p: p[torch.arange(2)[:, None], torch.arange(4, -1, -1)], False),
    "repeated": (lambda p: p[torch.arange(2)[:, None, None], torch.arange(5)[:, None].expand(5, 5)][..., 0], False),
}  # fmt: skip


@pytest.mark.parametrize("name", INDICES)
def test_indices(name: str) -> None:
    pick, is_window = INDICES[name]
    left = in_pytorch(
        lambda x, p: attend(x, pick(p.bool())[:, None, None]), randn(BATCH, 3, 8), PADDING
    )
    assert ("getitem" not in left) == is_window


def test_what_is_looked_up_is_a_copy_where_somebody_can_tell() -> None:
    def given_back(x: Tensor) -> tuple[Tensor, ...]:
        mask = x > 0
        i = torch.arange(2)[:, None], torch.arange(8)
        return mask, mask[i], mask & (i[1] >= 0), x.cos()

    def edited(x: Tensor) -> Tensor:
        mask = x > 0
        copy = mask[torch.arange(2)[:, None], torch.arange(8)]
        joined = mask & (torch.arange(8) >= 0)
        mask[:, 3] = True
        return x.masked_fill(copy, 2.0) + x.masked_fill(joined, 3.0)

    def counters(x: Tensor) -> Tensor:
        k = torch.arange(8)
        k[2] = -1
        return x.masked_fill((x > 0) & (k >= 0), 2.0)

    for function in (given_back, edited, counters):
        check_memory(function, randn(2, 8))


def test_a_count_beyond_the_mask_is_pytorchs_error() -> None:
    compiled = torch.compile(
        lambda x, p: attend(x, looked_up(p, x.shape[1]), x.shape[1]), backend="llmopt", dynamic=True
    )
    torch._dynamo.reset()
    assert compiled(randn(BATCH, KEYS, 8), PADDING).shape == (BATCH, 2, KEYS, 4)
    with pytest.raises(IndexError):
        compiled(randn(BATCH, KEYS + 1, 8), PADDING)
    with pytest.raises(IndexError):
        compiled(randn(BATCH, KEYS, 8), PADDING[:, :1])
