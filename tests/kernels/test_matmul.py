"""The op matmul, products of activations, in every tier this machine runs, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmopt import _C
from llmopt.program import run_op

from tests.tolerance import assert_close

TIERS = _C.tiers()
FLOATS = (torch.float32, torch.float16, torch.bfloat16)

# batch, M, N, K: few rows, which read the second factor where it lies; one register tile and its neighbours; rows that
# each chunk prepares, and that all prepare together; rows cut into blocks; panels too long for a thread's memory.
SIZES = {
    "one": ((1,), 1, 1, 1),
    "a row": ((3,), 1, 300, 64),
    "a long row": ((2,), 1, 70, 2000),
    "four rows": ((2, 3), 4, 33, 17),
    "five rows": ((2, 3), 5, 33, 17),
    "a tile": ((2,), 14, 64, 32),
    "more than a tile": ((2,), 15, 65, 31),
    "odd": ((1,), 129, 3, 31),
    "many products": ((20, 2), 17, 40, 24),
    "blocks of rows": ((1,), 700, 40, 20),
    "blocks that fit": ((17,), 130, 33, 1100),
    "many columns": ((2,), 17, 1100, 48),
    "long panels": ((2,), 40, 70, 9000),
    "no K": ((2, 2), 6, 5, 0),
    "no rows": ((2,), 0, 5, 4),
    "no columns": ((2,), 3, 0, 4),
    "no products": ((0,), 3, 5, 4),
}


def first(batch: tuple[int, ...], m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows with something between them."""
    return torch.randn(*batch, m, k + 3).to(dtype)[..., :k]


def second(layout: str, batch: tuple[int, ...], n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """w [batch.., N, K] as it may lie in memory."""
    if layout == "along K":
        return torch.randn(*batch, n, k).to(dtype)
    if layout == "along N":
        return torch.randn(*batch, k, n).to(dtype).mT
    if layout == "one for all":
        return torch.randn(n, k).to(dtype).expand(*batch, n, k)
    return torch.randn(*batch, n, 2 * k).to(dtype)[..., ::2]


LAYOUTS = ("along K", "along N", "one for all", "neither")


def check(tier: str, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None, threads: int = 2) -> None:  # fmt: skip
    """Against float64; nothing but the result is written."""
    memory = torch.full((*x.shape[:-1], w.shape[-2] + 5), 7.0).to(x.dtype)
    y = memory[..., : w.shape[-2]]
    run_op("matmul", [x, w, bias, y], tier=tier, threads=threads)
    want = x.double() @ w.double().mT
    assert_close(y, want if bias is None else want + bias.double())
    assert (memory[..., w.shape[-2] :] == 7).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tier", TIERS)
def test_matmul(tier: str, size: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batch, m, n, k = SIZES[size]
    x = first(batch, m, k, dtype)
    for threads, layout in enumerate(LAYOUTS):
        w = second(layout, batch, n, k, dtype)
        bias = torch.randn(n).to(dtype) if layout == "along N" else None
        check(tier, x, w, bias, 1 + threads % 3)


@pytest.mark.parametrize("tier", TIERS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_sizes(tier: str, data: st.DataObject) -> None:
    batch = tuple(data.draw(st.lists(st.integers(1, 4), min_size=0, max_size=3)))
    m, n, k = (data.draw(st.integers(0, most)) for most in (70, 90, 80))
    dtype, layout = data.draw(st.sampled_from(FLOATS)), data.draw(st.sampled_from(LAYOUTS))
    torch.manual_seed(m + n + k)
    bias = torch.randn(n).to(dtype) if data.draw(st.booleans()) else None
    check(tier, first(batch, m, k, dtype), second(layout, batch, n, k, dtype), bias)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("tier", TIERS)
def test_infinities_and_nans_stay_in_their_rows(tier: str, rows: int) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(2, rows, 33), torch.randn(2, 40, 33)
    x[0, rows // 2, 3] = torch.inf
    w[1, 7, 5] = torch.nan
    check(tier, x, w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 33])
@pytest.mark.parametrize("tier", TIERS)
def test_threads_change_nothing(tier: str, rows: int, dtype: torch.dtype) -> None:
    """Nor does another product beside it: sums do not depend on how a step is cut. Few rows of bf16 are not on AMX's tiles."""
    if tier == "amx" and dtype == torch.bfloat16:
        pytest.skip("a part of the rows may be few")
    torch.manual_seed(0)
    x, w = torch.randn(5, rows, 200).to(dtype), torch.randn(5, 130, 200).to(dtype)
    results = []
    for threads in (1, 2, 5):
        y = torch.empty(5, rows, 130, dtype=dtype)
        run_op("matmul", [x, w, None, y], tier=tier, threads=threads)
        results.append(y)
    assert all(torch.equal(y, results[0]) for y in results)
