"""Codes of a weight: layout, exactness on a grid, error bounds, and what cannot be rounded."""

from __future__ import annotations

import itertools

import pytest
import torch
from llmopt.quant.gptq import gptq
from llmopt.quant.rounding import full_grid, round_weight
from llmopt.quant.schemes import GROUPS, SCHEMES, Scheme, of_head, scheme_of

ALL = [
    scheme_of(name, group or "channel", symmetric)
    for name, group, symmetric in itertools.product(SCHEMES, GROUPS, (True, False))
]


def weight(n: int = 17, k: int = 128, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scheme", ALL, ids=str)
def test_layout_and_error(scheme: Scheme) -> None:
    w = weight()
    codes = round_weight(w, scheme)
    groups = 128 // scheme.group_of(128)
    assert codes.codes.shape == (17, 128 * scheme.bits // 8)
    assert codes.codes.dtype == (torch.int8 if scheme.bits == 8 else torch.uint8)
    assert codes.scales.shape == (17, groups)
    assert (codes.offsets is None) == scheme.symmetric
    if scheme.bits == 8:
        assert codes.codes.abs().max() <= 127
    values = w.view(17, groups, -1)
    step = full_grid(values, scheme, 1.0).scale.abs()[..., None]
    error = (codes.weight(scheme.bits) - w).view_as(values)
    plain = step**2 / 4 * values.shape[-1]  # if every weight were half a step off
    assert (error**2).sum(-1, keepdim=True).le(plain + 1e-9).all()


@pytest.mark.parametrize("scheme", [s for s in ALL if not s.symmetric and s.bits == 4], ids=str)
def test_weights_on_a_grid_come_back(scheme: Scheme) -> None:
    group = scheme.group_of(128)
    g = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (9, 128 // group, group), generator=g)
    codes[..., 0], codes[..., 1] = 0, 15
    scale = (torch.rand(9, 128 // group, 1, generator=g) + 0.5).half().float()
    w = (codes * scale - 3).flatten(1)
    assert torch.equal(round_weight(w, scheme).weight(4), w)


@pytest.mark.parametrize("scheme", [s for s in ALL if s.bits == 4], ids=str)
def test_factors_beside_4_bit_codes_are_what_packing_keeps(scheme: Scheme) -> None:
    """Half precision times a power of two: the codes are those for the scale that the kernel reads."""
    w = weight() * torch.logspace(-9, 9, 17)[:, None]
    for codes in (round_weight(w, scheme), gptq(w, torch.eye(128), scheme)):
        for factors in (codes.scales, codes.offsets):
            if factors is not None:
                power = 2.0 ** (factors.abs().amax(-1, keepdim=True).log2().floor() - 14)
                assert torch.equal((factors / power).half().float() * power, factors)


@pytest.mark.parametrize("scheme", ALL, ids=str)
def test_groups_of_equal_weights(scheme: Scheme) -> None:
    w = torch.tensor([0.0, 3.0, -2.0, 1e-38])[:, None].expand(4, 128)
    torch.testing.assert_close(
        round_weight(w, scheme).weight(scheme.bits), w, rtol=1e-6, atol=1e-37
    )


def test_the_even_input_is_in_the_low_half() -> None:
    w = torch.arange(32.0)[None] % 16
    codes = round_weight(w, SCHEMES["w4a16"]).codes
    assert codes[0, :8].tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", SCHEMES)
def test_bad_weights_are_refused(name: str, bad: float) -> None:
    w = weight()
    w[3, 5] = bad
    with pytest.raises(ValueError, match=r"1 of its 2176 weights are NaN or infinite"):
        round_weight(w, SCHEMES[name])
    with pytest.raises(ValueError, match="NaN or infinite"):
        gptq(w, torch.eye(128), SCHEMES[name])


def test_a_group_that_does_not_divide_the_inputs() -> None:
    with pytest.raises(
        ValueError, match=r"groups of 64 do not divide its 96 inputs; possible: channel, 32"
    ):
        round_weight(weight(k=96), SCHEMES["w8a8"])
    with pytest.raises(ValueError, match="odd"):
        round_weight(weight(k=33), scheme_of("w4a16", "channel"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("w8a9",), "w8a9.*possible: w8a8, w8a16, w4a16, w4a8"),
        (("w8a8", 48), "group=48.*'channel', 32, 64, 128"),
        (("w8a8", 0), "group=0"),
        (("w8a8", "row"), "group='row'"),
        ((8,), "scheme 8 does not exist; possible: w8a8"),
        ((["w8a8"],), r"scheme \['w8a8'\] does not exist"),
    ],
)
def test_unknown_names(arguments: tuple, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        scheme_of(*arguments)


def test_the_head_keeps_groups_and_a_symmetry_that_was_asked_for() -> None:
    assert of_head(SCHEMES["w8a8"]) == scheme_of("w8a16", 64, True)
    assert of_head(SCHEMES["w4a8"]) == scheme_of("w8a16", 32, True)
    assert of_head(scheme_of("w8a8", 64, False)) == scheme_of("w8a16", 64, False)
    assert of_head(scheme_of("w4a16", "channel"), False) == scheme_of("w8a16", "channel", False)


@pytest.mark.parametrize("scheme", [s for s in ALL if s.bits == 4], ids=str)
def test_gptq_beats_plain_rounding_on_its_inputs(scheme: Scheme) -> None:
    g = torch.Generator().manual_seed(2)
    mix = torch.randn(128, 128, generator=g) / 128**0.5 + torch.randn(128, 1, generator=g) / 4
    x = torch.randn(512, 128, generator=g) @ mix.T
    w = weight()
    plain, better = round_weight(w, scheme), gptq(w, x.T @ x, scheme)
    assert [t if t is None else (t.shape, t.dtype) for t in better] == [
        t if t is None else (t.shape, t.dtype) for t in plain
    ]

    def loss(codes):
        return float((x @ (codes.weight(4) - w).T).square().sum())

    assert loss(better) < 0.7 * loss(plain)


def test_gptq_without_any_input_is_plain_rounding() -> None:
    w, scheme = weight(), SCHEMES["w4a16"]
    got = gptq(w, torch.zeros(128, 128), scheme).weight(4)
    assert torch.equal(got, round_weight(w, scheme).weight(4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gptq_refuses_moments_that_are_no_numbers(bad: float) -> None:
    moments = torch.eye(128)
    moments[3, 3] = bad
    with pytest.raises(ValueError, match="second moments of the inputs are NaN or infinite"):
        gptq(weight(), moments, SCHEMES["w4a16"])


def test_weights_that_float32_or_nothing_holds() -> None:
    scheme = scheme_of("w8a16", 32)
    huge = torch.full((4, 64), 1e300, dtype=torch.float64)
    with pytest.raises(ValueError, match="256 of its 256 weights are NaN or infinite in float32"):
        round_weight(huge, scheme)
    with pytest.raises(ValueError, match="on the meta device"):
        round_weight(torch.empty(4, 64, device="meta"), scheme)
