"""round_weight: every tier this machine runs, against the same in PyTorch."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from llmopt import _C
from llmopt.program import run_op
from llmopt.quant.rounding import Codes, by_reference
from llmopt.quant.schemes import CodeForm

from tests.kernels.test_linear import randn

TIERS = _C.tiers()
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FORMS = [CodeForm(*form) for form in product((8, 4), (2, 14, 32, 64, 0), (True, False))]


def rounded(w: torch.Tensor, form: CodeForm, tier: str, threads: int = 2) -> Codes:
    n, k = w.shape
    group = form.group_of(k)
    dtype = torch.int8 if form.bits == 8 else torch.uint8
    codes = torch.full((n, k * form.bits // 8), 77, dtype=dtype)
    scales = torch.full((n, k // group), 7.0)
    offsets = None if form.symmetric else torch.full((n, k // group), 7.0)
    run_op("round_weight", [w, codes, scales, offsets, None], [form.bits, group], [], tier, threads)
    return Codes(codes, scales, offsets)


def errors(codes: Codes, w: torch.Tensor, form: CodeForm) -> torch.Tensor:
    return (codes.weight(form.bits).double() - w.double()).pow(2).sum(1)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_as_in_pytorch(tier: str, form: CodeForm) -> None:
    """The same codes and factors but where two ranges are about equally good; 8 bits have one range."""
    for dtype in FLOATS:
        w = randn(33, 450, dtype=torch.float32)[:, : 448 if form.group in (32, 64, 14, 2) else 446]
        w = (w * torch.logspace(-2, 2, 33)[:, None]).to(dtype)
        got, want = rounded(w, form, tier), by_reference(w, form)
        if form.bits == 8:
            assert torch.equal(got.codes, want.codes)
        assert (got.codes != want.codes).float().mean() < 0.01
        ours, theirs = errors(got, w, form), errors(want, w, form)
        assert (ours <= 1.05 * theirs + 1e-12).all()
        assert ours.sum() <= 1.002 * theirs.sum()


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_rows_that_say_little(tier: str, form: CodeForm) -> None:
    """Zeros, one value, tiny ones, one that stands out, the largest there are."""
    k = 448
    w = torch.zeros(7, k)
    w[1], w[2], w[3] = 3.0, -1e-38, 2e-45
    w[4, 5], w[5, ::2], w[6] = -4.0, 1.0, 1e38
    got = rounded(w, form, tier)
    assert all(t is None or t.isfinite().all() for t in got)
    want = by_reference(w, form)
    torch.testing.assert_close(got.weight(form.bits), want.weight(form.bits), rtol=1e-3, atol=1e-38)


@pytest.mark.parametrize("tier", TIERS)
def test_rows_apart_in_memory_and_none(tier: str) -> None:
    form = CodeForm(4, 32, False)
    wide = randn(9, 100)
    got, want = (
        rounded(wide[:, 3:67], form, tier),
        rounded(wide[:, 3:67].contiguous(), form, tier, 1),
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    empty = rounded(wide[:0, :64], form, tier)
    assert empty.codes.shape == (0, 32)
