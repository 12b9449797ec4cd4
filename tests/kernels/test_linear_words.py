"""linear over many rows of 16 bits, which some tiers multiply as 16-bit fixed point: no tier may be further off than its output rounds."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from tests.kernels import test_linear
from tests.kernels.test_linear import Case, randn

# On AMX such rows are on tiles, which count denormals as zeros.
TIERS = [t for t in test_linear.TIERS if t != "amx"]
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


def assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


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
    for low, high in ((-126, 60), (-40, 40), (-126, -90), (-60, 110)):
        c = case(60, 60, 600, torch.bfloat16)
        powers = torch.linspace(low, high, 60)
        c.x *= (2.0**powers)[:, None].bfloat16()
        c.w *= (2.0 ** powers.flip(0))[:, None].bfloat16()
        c.x[::2, 128:256] *= 2.0**-60
        c.x[7] = c.x[8, :128] = c.w[9] = c.w[10, 256:] = 0
        want, got = c.reference(), c.run(tier, 2).double()
        norms = c.x.double().norm(dim=1)[:, None] * c.w.double().norm(dim=1)
        normal = (norms > 2.0**-110) & (norms < 2.0**120)
        off = (got - want).abs() - 2**-8 * want.abs()
        assert (off[normal] <= 2**-12 * norms[normal]).all()
        assert (got[7] == 0).all()
        assert (got[:, 9] == 0).all()


@pytest.mark.parametrize("size", [1e-20, 1e-23, 1e-26])
@pytest.mark.parametrize("tier", TIERS)
def test_weights_whose_squares_are_nothing(tier: str, size: float) -> None:
    """All of a column are as large, so that its norm is what bounds its sums."""
    for k in (64, 128, 200):
        c = Case(
            torch.ones(40, k).bfloat16(), torch.full((40, k), size).bfloat16(), out=torch.bfloat16
        )
        assert (c.run(tier, 2).double() / c.reference() - 1).abs().max() <= 2**-8


@pytest.mark.parametrize("tier", TIERS)
def test_scales_meet_in_the_middle(tier: str) -> None:
    """The smallest weights beside large rows and the largest beside small ones, each alone in its row: exact in every tier."""
    for k in (64, 600):
        for x, w in ((40, -120), (40, -126), (-60, 100), (-110, 110), (49, 60), (3, -99)):
            c = Case(torch.zeros(40, k), torch.zeros(3, k))
            c.x[:, 5], c.w[:, 5] = 2.0**x, 2.0**w
            c = Case(c.x.bfloat16(), c.w.bfloat16(), out=torch.bfloat16)
            off = (c.run(tier, 2).double() - 2.0 ** (x + w)).abs()
            assert off.max() <= 2.0 ** (x + w - 9), f"2^{x} times 2^{w}"
    c = Case(torch.zeros(40, 64), torch.zeros(3, 64), out=torch.bfloat16)
    c.x[:, 0], c.w[:, 1], c.w[:, 0] = 2.0**49, 2.0**110, 2.0**-40
    c.x, c.w = c.x.bfloat16(), c.w.bfloat16()
    assert (c.run(tier, 2) == 512).all()


@pytest.mark.parametrize("tier", TIERS)
def test_tiny_blocks_beside_others(tier: str) -> None:
    """As in weights of attention that fall steeply: little of a row does not send all of it another way, and nothing is lost."""
    c = case(64, 32, 1024, torch.bfloat16)
    c.x = torch.softmax(c.x.float() - 0.1 * torch.arange(1024), -1).bfloat16()
    want, got = c.reference(), c.run(tier, 2).double()
    norms = c.x.double().norm(dim=1)[:, None] * c.w.double().norm(dim=1)
    assert ((got - want).abs() <= 2**-8 * want.abs() + 2**-12 * norms).all()
    c.x[:, :768] = 0  # what is left is tiny, and all there is
    want, got = c.reference(), c.run(tier, 2).double()
    assert want.abs().max() > 0
    assert ((got - want).abs() <= 2**-6 * want.abs().max()).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_what_is_not_finite_stays_in_its_row_and_column(tier: str, dtype: torch.dtype) -> None:
    c = case(70, 70, 600, dtype)
    clean = c.run(tier, 2)
    c.x[3, 5], c.x[20, 599], c.x[60, 0] = float("nan"), float("inf"), -float("inf")
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
    c.x[::17, 3] = float("inf")
    want = c.run(tier, 1)
    for threads in (2, 3, 5):
        assert_same(c.run(tier, threads), want)
    c.x = c.x[100:201]
    assert_same(c.run(tier, 2), want[100:201])
    assert want.isfinite().any(1).sum() > 250
