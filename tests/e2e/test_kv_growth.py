"""Caches that grow in place: what is copied, what is not, and that no cache writes into what another one reads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from llmopt import kv
from llmopt.exchange import exchange_of
from llmopt.native.segment import KvSpec

LAYERS, BATCH, HEADS, WIDTH = 3, 2, 4, 8


@pytest.fixture(params=["exchange", "views"], autouse=True)
def maker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors over slabs are made by PyTorch's exchange functions, and as views where it has none or others."""
    of = torch.Tensor if request.param == "exchange" else object
    monkeypatch.setattr(kv, "EXCHANGE", exchange_of(of))
    assert (kv.EXCHANGE is None) == (request.param == "views")
    with torch.no_grad():
        yield


def group(filled: bool = True) -> kv.KvGroup:
    """Of caches that are arguments 0, 1, 2 of a call."""
    specs = [
        KvSpec(i if filled else None, BATCH, HEADS, 1, WIDTH, torch.float32) for i in range(LAYERS)
    ]
    return kv.KvGroup(list(enumerate(specs)))


def grown(caches: list[torch.Tensor], new: int) -> list[torch.Tensor]:
    """The caches with `new` positions of random numbers behind them."""
    result = list(group(bool(caches)).grow(caches, BATCH, HEADS, new))
    for cache in result:
        cache[:, :, cache.shape[2] - new :] = torch.randn(BATCH, HEADS, new, WIDTH)
    return result


def copies(caches: list[torch.Tensor]) -> list[torch.Tensor]:
    return [c.clone() for c in caches]


def assert_begins(caches: list[torch.Tensor], begin: list[torch.Tensor]) -> None:
    for cache, b in zip(caches, begin, strict=True):
        assert torch.equal(cache[:, :, : b.shape[2]], b)


def same_memory(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return [t.data_ptr() for t in a] == [t.data_ptr() for t in b]


def test_a_cache_grows_in_place_until_its_slab_is_full() -> None:
    caches = grown([], 5)
    moves = 0
    for _ in range(100):
        before, kept = caches, copies(caches)
        caches = grown(caches, 1)
        moves += not same_memory(before, caches)
        assert_begins(caches, kept)
        assert_begins(before, kept)
        assert all(c.storage_offset() == 0 for c in caches)
    assert caches[0].shape == (BATCH, HEADS, 105, WIDTH)
    assert moves == 1


def test_the_second_branch_of_a_fork_is_a_copy() -> None:
    trunk = grown([], 6)
    kept = copies(trunk)
    left = grown(trunk, 2)
    left_kept = copies(left)
    right = grown(trunk, 3)
    assert same_memory(trunk, left)
    assert not same_memory(trunk, right)
    for caches in (left, right, trunk):
        assert_begins(caches, kept)
    assert_begins(left, left_kept)


def test_a_cache_whose_first_positions_were_dropped_goes_on_in_place() -> None:
    """As the layers of a window do: each step keeps the last positions."""
    caches = grown([], 9)
    for _ in range(20):
        window = [c[:, :, 2:] for c in caches]
        kept = copies(window)
        caches = grown(window, 2)
        assert same_memory(window, caches)
        assert_begins(caches, kept)
        assert caches[0].shape[2] == 9


@pytest.mark.parametrize(
    "change",
    {
        "cropped": lambda caches: [c[:, :, :-2] for c in caches],
        "reordered": lambda caches: [c[[1, 0]] for c in caches],
        "layers in another order": lambda caches: caches[::-1],
        "one layer of somebody else": lambda caches: [caches[0], caches[1].clone(), caches[2]],
        "all of somebody else": lambda caches: [c.clone() for c in caches],
    }.items(),
    ids=lambda change: change[0],
)
def test_other_caches_are_copied(change: tuple) -> None:
    caches = grown([], 7)
    kept = copies(caches)
    given = change[1](caches)
    wanted = copies(given)
    after = grown(given, 2)
    assert_begins(after, wanted)
    assert_begins(caches, kept)
    assert not same_memory(after, given)


def test_memory_of_a_conversation_that_ended_is_forgotten() -> None:
    ended, other = grown([], 4), grown([], 4)
    kept = copies(other)
    slab = kv._slab_around(ended[0].data_ptr())
    assert slab is not None
    assert slab in kv._slabs
    del ended
    assert slab.storage.expired()
    grown([], 4)
    assert slab not in kv._slabs
    assert_begins(grown(other, 1), kept)
