"""mask_bounds: the live interval of every mask row, for every mask dtype and CPU tier."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmopt import _C
from llmopt.program import run_op

TIERS = _C.tiers()
DTYPES = (torch.bool, torch.float32, torch.float16, torch.bfloat16)


def bounds_of(mask: torch.Tensor, tier: str, threads: int = 1) -> torch.Tensor:
    bounds = torch.full((*mask.shape[:3], 4), -7, dtype=torch.int32)
    run_op("mask_bounds", [mask, bounds], tier=tier, threads=threads)
    return bounds


def expected_row(row: torch.Tensor) -> list[int]:
    if row.dtype == torch.bool:
        live = row.nonzero().flatten()
        if len(live) == 0:
            return [0, 0, 1, 0]
    else:
        dead = -65504.0 if row.dtype == torch.float16 else -1e30
        live = (~(row <= dead)).nonzero().flatten()
        if len(live) == 0:
            return [0, len(row), int(len(row) == 0), 0]
    lo, hi = int(live[0]), int(live[-1]) + 1
    between = row[lo:hi]
    dense = between.all() if row.dtype == torch.bool else (between == 0).all()
    return [lo, hi, int(dense), 0]


def check(mask: torch.Tensor, tier: str, threads: int = 1) -> None:
    got = bounds_of(mask, tier, threads).view(-1, 4).tolist()
    want = [expected_row(row) for row in mask.reshape(len(got), mask.shape[-1])]
    assert got == want


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest) -> str:
    return request.param


def to_mask(live: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.bool:
        return live
    return torch.zeros(live.shape).masked_fill(~live, torch.finfo(dtype).min).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_interval(tier: str, dtype: torch.dtype) -> None:
    """All [lo, hi) of a row of 300 in steps that are no multiple of any vector, and with one hole in the middle."""
    n = 300
    live = torch.zeros(0, n, dtype=torch.bool)
    for lo in range(0, n, 7):
        ends = torch.arange(lo, n + 1, 11)
        key = torch.arange(n)
        block = (key >= lo) & (key < ends[:, None])
        holed = block.clone()
        holed[torch.arange(len(ends)), (lo + ends) // 2 % n] = False
        live = torch.cat((live, block, holed))
    check(to_mask(live, dtype)[None, None], tier, threads=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kv_len", [1, 2, 7, 8, 63, 64, 65, 127, 129, 1000])
def test_lengths(tier: str, kv_len: int, dtype: torch.dtype) -> None:
    torch.manual_seed(kv_len)
    rows = [torch.rand(3, 2, 5, kv_len) < chance for chance in (0.0, 0.02, 0.5, 0.98, 1.0)]
    for live in rows:
        check(to_mask(live, dtype), tier)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_bias_values(tier: str, dtype: torch.dtype) -> None:
    """A finite bias is live but not dense; so is NaN; -inf and finfo.min are dead; -0 is no bias."""
    n = 200
    for value in (0.0, -0.0, 1.0, -5.0, math.nan, math.inf, -math.inf, torch.finfo(dtype).min):
        for at in (0, 3, 70, n - 1):
            mask = torch.zeros(1, 1, 2, n, dtype=dtype)
            mask[..., 0, at] = value
            mask[..., 1, :] = -math.inf
            mask[..., 1, at] = value
            check(mask, tier)


def test_true_may_be_any_nonzero_byte(tier: str) -> None:
    raw = torch.tensor([0, 0, 255, 1, 128, 2, 64, 1, 1, 1, 127, 0, 0], dtype=torch.uint8)
    got = bounds_of(raw.view(torch.bool)[None, None, None], tier)
    assert got.flatten().tolist() == [2, 11, 1, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(tier: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    live = to_mask(torch.rand(2, 3, 50, 40) < 0.9, dtype)
    check(live.transpose(1, 2), tier)
    check(live[:, :, ::3, 5:33], tier)
    per_row = live[..., :1].expand(-1, -1, -1, 77)
    assert per_row.stride(-1) == 0
    check(per_row, tier)


def test_empty(tier: str) -> None:
    for shape in ((1, 1, 3, 0), (0, 1, 3, 5), (2, 1, 0, 5)):
        check(torch.ones(shape, dtype=torch.bool), tier)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    tier=st.sampled_from(TIERS),
    dtype=st.sampled_from(DTYPES),
    runs=st.lists(st.tuples(st.booleans(), st.integers(1, 200)), min_size=1, max_size=6),
)
def test_any_row(tier: str, dtype: torch.dtype, runs: list[tuple[bool, int]]) -> None:
    live = torch.cat([torch.full((length,), value) for value, length in runs])
    check(to_mask(live, dtype)[None, None, None], tier)
