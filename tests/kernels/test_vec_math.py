"""Accuracy of the elementary functions over all of fp32, in every tier, through the VM."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from llmopt import _C
from llmopt.native.vm import VmProgram
from llmopt.program import run_op

from tests.kernels.activations import EXACT

pytestmark = pytest.mark.parametrize("tier", _C.tiers())


@cache
def every_kind_of_float() -> torch.Tensor:
    """All exponents, both signs, denormals, zeros, infinities, NaN; dense near changes of form."""
    step = 4999  # odd, so that all low mantissa bits occur
    bits = torch.arange(0, 0x7F800000, step, dtype=torch.int32)
    positive = bits.view(torch.float32)
    special = torch.tensor([0.0, 1e-45, 1.1754944e-38, 3.4028235e38, math.inf, math.nan])
    dense = torch.linspace(0, 12, 50_001)
    ends = torch.cat([torch.linspace(lo, lo + 8, 4001) for lo in (84.0, 100.0, 124.0, 144.0)])
    x = torch.cat([positive, special, dense, ends])
    return torch.cat([x, -x])


def apply(name: str, x: torch.Tensor, tier: str) -> torch.Tensor:
    program = VmProgram(1, 1)
    program.store(0, program.unary(name, program.load(0)))
    y = torch.empty_like(x)
    run_op("vm", [x, y], *program.encode(), tier=tier)
    return y


def ulp(reference: torch.Tensor) -> torch.Tensor:
    """Distance between neighbouring floats at the reference, denormals included."""
    exponent = torch.frexp(reference.abs().clamp_min(2.0**-126))[1]
    return torch.ldexp(torch.ones_like(reference), exponent - 24)


def split_special(got: torch.Tensor, want: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Checks NaN and infinities of the fp32 result; returns the rest."""
    as_float = want.float()
    assert torch.equal(torch.isnan(got), torch.isnan(as_float))
    infinite = torch.isinf(as_float)
    # At the edge of the range a rounding error decides between the largest float and infinity.
    edge = want.abs() > 3.4028e38
    assert torch.equal(torch.isinf(got) | edge, infinite | edge)
    both = infinite & torch.isinf(got)
    assert torch.equal(got[both].sign(), as_float[both].sign())
    keep = ~(torch.isnan(as_float) | infinite | torch.isinf(got))
    return got.double()[keep], want[keep]


ULPS = {  # name: (float64 function, largest error in ulp)
    "exp": (torch.exp, 2.0),
    "exp2": (torch.exp2, 2.2),
    "log": (torch.log, 1.5),
    "log1p": (torch.log1p, 2.0),
    "sqrt": (torch.sqrt, 0.51),
    "rsqrt": (torch.rsqrt, 1.6),
    "reciprocal": (torch.reciprocal, 0.51),
    "square": (torch.square, 0.51),
}


@pytest.mark.parametrize("name", ULPS)
def test_within_ulps(tier, name):
    reference, bound = ULPS[name]
    x = every_kind_of_float()
    got, want = split_special(apply(name, x, tier), reference(x.double()))
    assert ((got - want).abs() / ulp(want)).max() <= bound


@pytest.mark.parametrize("name", ["tanh", "erf"])
def test_relative_error(tier, name):
    """Relative also near zero, where these functions are close to a multiple of x."""
    x = every_kind_of_float()
    got, want = split_special(apply(name, x, tier), getattr(torch, name)(x.double()))
    error = (got - want).abs() / want.abs().clamp_min(2.0**-126)
    assert error.max() <= 4e-7
    assert got.abs().max() <= 1.0


GATES = ("silu", "gelu_erf", "gelu_tanh", "quick_gelu")


@pytest.mark.parametrize("name", GATES)
def test_gates(tier, name):
    """Relative where the result is of the size of x, absolute in the negative tail."""
    x = every_kind_of_float()
    x = x[torch.isfinite(x)]
    want = EXACT[name](x.double())
    error = (apply(name, x, tier).double() - want).abs()
    body = x > -1
    assert (error[body] <= 4e-7 * want[body].abs() + 1e-44).all()
    assert error[~body].max() <= 2.5e-7
    if name in ("silu", "quick_gelu"):  # no cancellation: relative down to where e^-x overflows
        tail = (want < -1e-34) & ~body
        assert (error[tail] <= 1e-5 * want[tail].abs()).all()


def test_gelu_of_minus_infinity_is_pytorchs(tier):
    x = torch.tensor([-math.inf])
    assert torch.isnan(torch.nn.functional.gelu(x)).all()
    assert torch.isnan(apply("gelu_erf", x, tier)).all()


@pytest.mark.parametrize("name", ["silu", "gelu_erf", "gelu_tanh", "quick_gelu", "relu", "relu2"])
def test_activations_keep_nan_and_plus_infinity(tier, name):
    x = torch.tensor([math.nan, math.inf])
    got = apply(name, x, tier)
    assert torch.isnan(got[0])
    assert got[1] == math.inf


def test_sigmoid(tier):
    x = every_kind_of_float()
    got, want = split_special(apply("sigmoid", x, tier), torch.sigmoid(x.double()))
    # The result underflows where e^-x overflows, one step before the true value does.
    assert ((got - want).abs() <= 2.5e-7 * want + 1.2e-38).all()


@pytest.mark.parametrize("name", ["sin", "cos"])
def test_sine_and_cosine_at_any_size(tier, name):
    x = every_kind_of_float()
    x = torch.cat(
        [x[torch.isfinite(x)], torch.arange(0, 100_001).float(), torch.tensor([-1e5, 1e5])]
    )
    got, want = apply(name, x, tier).double(), getattr(torch, name)(x.double())
    assert (got - want).abs().max() <= 1.5e-7
    assert torch.isnan(apply(name, torch.tensor([math.inf, -math.inf, math.nan]), tier)).all()


@pytest.mark.parametrize("name", ["tanh", "erf"])
def test_zero_keeps_its_sign(tier, name):
    got = apply(name, torch.tensor([0.0, -0.0]), tier)
    assert torch.equal(torch.signbit(got), torch.tensor([False, True]))
    assert torch.equal(got, torch.zeros(2))


@pytest.mark.parametrize("name", ["exp", "exp2"])
def test_exp_of_zero_is_one(tier, name):
    assert torch.equal(apply(name, torch.tensor([0.0, -0.0]), tier), torch.ones(2))


@pytest.mark.parametrize(
    ("name", "dtype"), [("round_f16", torch.float16), ("round_bf16", torch.bfloat16)]
)
def test_rounding_to_half_types_is_torch_s(tier, name, dtype):
    x = every_kind_of_float()
    want = x.to(dtype).float()
    got = apply(name, x, tier)
    nan = torch.isnan(want)
    assert torch.equal(torch.isnan(got), nan)
    assert torch.equal(got[~nan].view(torch.int32), want[~nan].view(torch.int32))


def test_round_and_floor(tier):
    x = torch.cat([every_kind_of_float(), torch.arange(-20, 20) / 4])
    x = x[~torch.isnan(x)]
    assert torch.equal(apply("round", x, tier), torch.round(x))
    assert torch.equal(apply("floor", x, tier), torch.floor(x))
