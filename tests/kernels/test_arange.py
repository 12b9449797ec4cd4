"""arange: counting in int64, every tier, against torch."""

from __future__ import annotations

import pytest
import torch
from llmopt import _C
from llmopt.program import run_op


@pytest.mark.parametrize("tier", _C.tiers())
@pytest.mark.parametrize(
    ("n", "start", "step"), [(0, 3, 1), (1, 0, 1), (17, 2**40, 1), (129, 5, -3)]
)
def test_it_counts(tier: str, n: int, start: int, step: int) -> None:
    y = torch.full((n + 1,), -7)
    run_op("arange", [y[:n]], [start, step], tier=tier, threads=2)
    assert torch.equal(y[:n], torch.arange(n) * step + start)
    assert y[n] == -7


def test_other_dtypes_and_strides_are_refused() -> None:
    for y in (torch.zeros(4), torch.zeros(8, dtype=torch.int64)[::2]):
        with pytest.raises(ValueError, match="y is not int64"):
            run_op("arange", [y], [0, 1])
