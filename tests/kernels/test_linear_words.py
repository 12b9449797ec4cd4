"""linear over many rows of 16 bits, which some tiers multiply as 16-bit fixed point: no tier may be further off than its output rounds."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from tests.kernels.test_linear import TIERS, Case, randn

HALVES = (torch.float16, torch.bfloat16)
# Sums end in blocks of 128 k, row tiles in 14 rows.
SIZES = (
    (40, 1, 3),
    (41, 2, 33),
    (47, 127, 70),
    (56, 128, 64),
    (57, 129, 31),
    (97, 300, 5),
    (211, 576, 100),
)


def case(m: int, n: int, k: int, dtype: torch.dtype, **options) -> Case:
    return Case(randn(m, k, dtype=dtype), randn(n, k, dtype=dtype, seed=1), out=dtype, **options)


def rms(x: torch.Tensor) -> float:
    return x.double().pow(2).mean().sqrt().item()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_results_are_little_more_off_than_rounding_them(tier: str, dtype: torch.dtype) -> None:
    for m, k, n in SIZES:
        c = case(m, n, k, dtype)
        want = c.reference()
        error, rounding = rms(c.run(tier, 2) - want), rms(want.to(dtype) - want)
        assert error <= 1.2 * rounding + 2**-14 * rms(want), (
            f"{m}x{k}x{n}: {error / rounding:.3f} times"
        )


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_sums_as_large_as_can_be(tier: str, dtype: torch.dtype) -> None:
    """All products of a block have one sign, and every share of its norm: one value, some, all."""
    for k, period in product((128, 256, 333), (1, 2, 7, 64, 128)):
        signs = torch.where(randn(k) > 0, 1.0, -1.0) * (torch.arange(k) % period == 0)
        x = signs.repeat(50, 1) * torch.where(torch.arange(50) % 2 == 0, 3.0, -0.25)[:, None]
        w = signs.repeat(40, 1) * torch.linspace(0.125, 1, 40)[:, None]
        c = Case(x.to(dtype), w.to(dtype), out=dtype)
        want = c.reference()
        off = (c.run(tier, 2).double() - want).abs() / want.abs()
        assert off.max() <= 1.1 * torch.finfo(dtype).eps, (
            f"{k} k, every {period}-th: {off.max():.3g}"
        )


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_outliers(tier: str, dtype: torch.dtype) -> None:
    """A channel some thousand times its neighbours takes no more from their sums than its own rounding would."""
    c = case(64, 48, 256, dtype)
    c.x[:, 17] *= 2000
    c.w[5] *= 4
    want, got = c.reference(), c.run(tier, 2).double()
    norms = c.x.double().norm(dim=1)[:, None] * c.w.double().norm(dim=1)
    off = (got - want).abs() - 0.51 * torch.finfo(dtype).eps * want.abs()
    assert (off / norms).max() <= 2**-13


@pytest.mark.parametrize("tier", TIERS)
def test_magnitudes(tier: str) -> None:
    """bf16 has the exponents of f32: rows, columns and blocks of any size, and of nothing but zeros."""
    c = case(60, 60, 300, torch.bfloat16)
    powers = torch.linspace(-110, 60, 60)
    c.x *= (2.0**powers)[:, None].bfloat16()
    c.w *= (2.0 ** powers.flip(0))[:, None].bfloat16()
    c.x[:, 128:256] *= 2.0**-60
    c.x[7] = c.x[8, :128] = c.w[9] = c.w[10, 256:] = 0
    want, got = c.reference(), c.run(tier, 2).double()
    norms = c.x.double().norm(dim=1)[:, None] * c.w.double().norm(dim=1)
    normal = norms > 2.0**-110
    off = (got - want).abs() - 2**-8 * want.abs()
    assert (off[normal] <= 2**-12 * norms[normal]).all()
    assert (got[7] == 0).all()
    assert (got[:, 9] == 0).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_what_is_not_finite_stays_in_its_row_and_column(tier: str, dtype: torch.dtype) -> None:
    c = case(70, 70, 150, dtype)
    clean = c.run(tier, 2)
    c.x[3, 5], c.x[20, 149], c.x[60, 0] = float("nan"), float("inf"), -float("inf")
    c.w[11, 7], c.w[40, 100] = float("inf"), float("nan")
    got, want = c.run(tier, 2), c.reference()
    special = ~torch.isfinite(want)
    assert torch.equal(torch.isnan(got), torch.isnan(want))
    assert torch.equal(
        got[special & ~torch.isnan(want)].double(), want[special & ~torch.isnan(want)]
    )
    far = torch.ones(70, 70, dtype=torch.bool)
    far[[3, 20, 60]] = False
    far[:, 0:64] = False  # panels of weights that hold one are multiplied in another way
    assert torch.equal(got[far], clean[far])
    near = ~special
    assert (got[near].double() - want[near]).abs().max() <= 4 * torch.finfo(dtype).eps * want[
        near
    ].abs().max()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_rows_do_not_see_each_other(tier: str, dtype: torch.dtype) -> None:
    """Bits of a row depend neither on the tile it is in nor on threads."""
    c = case(300, 90, 200, dtype, gated=True, act=4)
    c.norm, c.norm_weight = 1, randn(200, dtype=dtype)
    want = c.run(tier, 1)
    for threads in (2, 3, 5):
        assert torch.equal(c.run(tier, threads), want)
    c.x = c.x[100:201]
    assert torch.equal(c.run(tier, 2), want[100:201])
