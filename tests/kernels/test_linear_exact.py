"""Weights of f32 that are stored in fewer bits and lose none: results are as those of f32, whatever the activations are."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from llmopt import _C
from llmopt.quant.rounding import exact_codes
from llmopt.quant.schemes import CodeForm

from tests.kernels.test_linear import TIERS, Case, randn
from tests.kernels.test_linear_quantized import QuantizedCase, Weights, weights
from tests.tolerance import assert_close

FORMS = ((4, True), (4, False), (8, False))  # bits, offsets
HEIGHTS = (1, 2, 5, 7, 8, 15, 40, 95, 96, 130)  # on either side of where the kernel changes


def case(m: int, n: int, k: int, bits: int, offsets: bool, **options) -> QuantizedCase:
    w = weights(n, k, bits, 32, offsets)
    return QuantizedCase(randn(m, k, seed=1), w.dense(), weights=w, planes=3, exact=True, **options)


def rms_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).pow(2).mean().sqrt() / want.pow(2).mean().sqrt())


def as_floats(c: QuantizedCase) -> Case:
    """The same product over f32 weights."""
    return Case(c.x, c.w.float(), norm=c.norm, norm_weight=c.norm_weight)


@pytest.mark.parametrize(("bits", "offsets"), FORMS, ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_codes_err_as_floats_do(tier: str, bits: int, offsets: bool) -> None:
    """Sixteen bits of either side would err ten times as much."""
    for m in HEIGHTS:
        c = case(m, 75, 576, bits, offsets)
        want = c.reference()
        ours, floats = rms_error(c.run(tier, 2), want), rms_error(as_floats(c).run(tier, 2), want)
        assert ours <= 2 * floats + 1e-7, (m, ours, floats)


@pytest.mark.parametrize("norm", [0, 1])
@pytest.mark.parametrize(("bits", "offsets"), FORMS, ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_rows_that_planes_cannot_stand_for(tier: str, bits: int, offsets: bool, norm: int) -> None:
    """NaN, infinities and values near the ends of f32 give what they give with f32 weights, and rows beside them what they gave."""
    for m in (1, 3, 20, 120):
        for bad in (float("nan"), float("inf"), -float("inf"), 1e37, 1e-37, 3e-39):
            c = case(m, 43, 160, bits, offsets, norm=norm)
            plain = c.run(tier, 2)
            c.x[m - 1, 33] = bad
            if abs(bad) < 1:
                c.x[m - 1] = bad * (torch.arange(160) % 7 - 3)
            got, want = c.run(tier, 2), as_floats(c).run(tier, 2).double()
            assert torch.equal(got[: m - 1], plain[: m - 1])
            up = 2.0**100 if abs(bad) < 1 else 1.0  # to where they count beside the least bound
            assert_close(got[m - 1] * up, want[m - 1] * up)


@pytest.mark.parametrize(("bits", "offsets"), FORMS[1:], ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_an_outlier_whose_weights_are_zero(tier: str, bits: int, offsets: bool) -> None:
    """Planes keep 23 bits of the largest in a group: beside one that is much larger, the others would be lost, and are all that counts."""
    for outlier, m in product((1e2, 1e4, 1e6, 1e20), (1, 2, 8, 15)):
        w = weights(75, 256, bits, 32, False)
        dense = w.dense()
        zeroed = w.codes.clone()
        if bits == 8:
            zeroed[:, 12] = 0
        else:
            zeroed[:, 6] = (zeroed[:, 6] & 0xF0) | 8
        w.codes, dense[:, 12] = zeroed, 0
        assert torch.equal(w.dense(), dense)
        c = QuantizedCase(randn(m, 256, seed=1), dense, weights=w, planes=3, exact=True)
        c.x[:, 12] = outlier
        assert rms_error(c.run(tier, 2), c.reference()) < 2e-5, (outlier, m)


@pytest.mark.parametrize("tier", TIERS)
def test_groups_of_zeros_and_huge_weights(tier: str) -> None:
    for (bits, offsets), m in product(FORMS, (1, 20, 120)):
        c = case(m, 43, 128, bits, offsets)
        c.x[:, :32] = 0
        assert_close(c.run(tier, 2), c.reference())
        c.weights.scale[:] *= 2.0**20
        c.w = c.weights.dense()
        assert_close(c.run(tier, 2), c.reference())
        c.x[:] = 0
        assert (c.run(tier, 2) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_sixteen_bits_beside_rows_of_f32(tier: str, dtype: torch.dtype) -> None:
    """Weights that became 16 bits without loss: no bit of a row is lost either."""
    for m, k in product(HEIGHTS, (576, 90)):
        c = Case(randn(m, k, seed=1), (randn(75, k, seed=2) / k**0.5).to(dtype))
        wide = Case(c.x, c.w.float())
        want = c.reference()
        ours, floats = rms_error(c.run(tier, 2), want), rms_error(wide.run(tier, 2), want)
        assert ours <= 1.5 * floats + 1e-7, (m, ours, floats)
        c.x[m - 1, 3], c.x[0, 5] = float("inf"), float("nan")
        assert_close(c.run(tier, 2), c.reference())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_an_infinite_weight_of_sixteen_bits(tier: str, dtype: torch.dtype) -> None:
    for m in (1, 20, 130):
        c = Case(randn(m, 64, seed=1), randn(40, 64, seed=2).to(dtype))
        c.w[7, 9] = -float("inf")
        assert_close(c.run(tier, 2), c.reference())


def floats_of(n: int, k: int, bits: int, offsets: bool) -> tuple[torch.Tensor, Weights]:
    """A weight as a file's codes become floats, whose codes go from end to end in every group."""
    w = weights(n, k, bits, 32, offsets)
    if bits == 8:
        w.codes[:, ::32] = 127
    else:
        w.codes[:, ::16] = 0xF0
    return dequantized_in_f32(w), w


def dequantized_in_f32(w: Weights) -> torch.Tensor:
    return w.dense().float()


@pytest.mark.parametrize(("bits", "offsets"), FORMS, ids=str)
def test_codes_are_found_again(bits: int, offsets: bool) -> None:
    floats, w = floats_of(70, 192, bits, offsets)
    found = exact_codes(floats, CodeForm(bits, 32, symmetric=not offsets))
    assert found is not None
    assert torch.equal(found.weight(bits), floats)
    if bits == 8 or offsets:
        assert torch.equal(found.codes, w.codes)
    for place, other in ((0, 0), (69, 191), (33, 100)):
        near = floats.clone()
        near[place, other] = torch.nextafter(near[place, other], torch.tensor(9e9))
        assert exact_codes(near, CodeForm(bits, 32, symmetric=not offsets)) is None


@pytest.mark.parametrize(("bits", "offsets"), FORMS, ids=str)
def test_what_has_no_exact_codes(bits: int, offsets: bool) -> None:
    form = CodeForm(bits, 32, symmetric=not offsets)
    floats, _ = floats_of(6, 64, bits, offsets)
    for bad in (float("nan"), float("inf"), -float("inf")):
        spoilt = floats.clone()
        spoilt[5, 63] = bad
        assert exact_codes(spoilt, form) is None
    assert exact_codes(randn(6, 64), form) is None
    assert exact_codes(floats[:, :48], form) is None
    assert exact_codes(torch.empty(0, 64), form) is None
    assert exact_codes(floats.to_sparse(), form) is None
    if bits == 4:  # factors of a channel further apart than f16 reaches beside a power of two
        far = floats.clone()
        far[2, :32] *= 2.0**-30
        assert exact_codes(far, form) is None
    assert exact_codes(floats.T.contiguous().T, form) is not None


def test_exact_steps_are_of_three_planes_in_whole_steps() -> None:
    for planes, group in ((1, 32), (3, 4)):
        c = case(3, 8, 64, 8, False)
        c.planes, c.weights = planes, weights(8, 64, 8, group, False)
        with pytest.raises(ValueError, match="exact"):
            c.run(_C.tiers()[0], 1)
