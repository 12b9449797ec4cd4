"""Samples of memory: an edit of all of it shows at once, one of a few elements within 16 looks."""

from __future__ import annotations

import pytest
import torch
from llmopt import _C

LOOKS = 16


def samples_of(*tensors: torch.Tensor) -> _C.Samples:
    return _C.Samples(
        [t.data_ptr() for t in tensors], [t.numel() * t.element_size() for t in tensors]
    )


@pytest.mark.parametrize("size", [0, 1, 7, 64, 65, 4096, 100_003])
def test_an_edit_of_everything_shows_at_once(size: int) -> None:
    memory = torch.arange(size, dtype=torch.int64).to(torch.uint8)
    other = torch.ones(80)
    samples = samples_of(memory, other)
    for _ in range(2 * LOOKS):
        samples.fetch()
        assert samples.unchanged()
    memory += 1
    assert all(samples.unchanged() == (size == 0) for _ in range(LOOKS))


@pytest.mark.parametrize("place", [0, -1])
def test_an_edit_of_an_end_shows_soon(place: int) -> None:
    memory = torch.zeros(1000)
    samples = samples_of(memory)
    memory[place] = 1
    assert not all(samples.unchanged() for _ in range(LOOKS))


def test_each_range_needs_a_size() -> None:
    with pytest.raises(ValueError, match="as many sizes"):
        _C.Samples([1, 2], [3])
