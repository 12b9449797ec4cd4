"""The prepared weights of a GPU segment: made once, again after an edit that counts, and again when told to."""

from __future__ import annotations

import torch
from llmopt.gpu.weights import WeightCache
from llmopt.native.segment import PackedSpec, WeightView


def test_an_edit_that_does_not_count_is_seen_after_forget() -> None:
    views = tuple(WeightView(i, (4, 8), (8, 1), 0) for i in range(2))
    cache = WeightCache([PackedSpec(views, (None, None), False, torch.float32)])
    first, second = torch.randn(4, 8), torch.randn(4, 8)
    (made,) = cache.get((first, second))
    assert torch.equal(made.weight, torch.cat((first, second)))
    first += 1
    (counted,) = cache.get((first, second))
    assert torch.equal(counted.weight, torch.cat((first, second)))
    second.data += 1
    assert cache.get((first, second))[0] is counted
    cache.forget()
    assert torch.equal(cache.get((first, second))[0].weight, torch.cat((first, second)))
