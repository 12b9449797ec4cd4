"""linear_quantized of integers: its sums are exact at every size, and the same in every tier."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from llmopt import _C

from tests.kernels.test_linear import randn
from tests.kernels.test_linear_quantized import (
    FORMS,
    TIERS,
    QuantizedCase,
    Weights,
    case,
    weights,
)

# K and groups (None: one a channel): odd counts of groups, and K that is no power of two, no vector, no quad.
AWKWARD = (
    (96, 32),
    (352, 32),
    (192, 64),
    (448, 64),
    (384, 128),
    (640, 128),
    (130, None),
    (774, None),
)


def integers(m: int, n: int, k: int, bits: int, group: int, offsets: bool) -> QuantizedCase:
    """Scales of one and activations that are their own codes, all extremes among them."""
    w = weights(n, k, bits, group, offsets)
    w.scale[:] = 1
    if offsets:
        w.offset = torch.randint(-8, 9, w.offset.shape).float()
    x = torch.randint(-127, 128, (m, k))
    x.view(m, -1, group)[..., 0] = 127
    x[0, 1::2], x[0, 0::2] = -127, 127
    if m > 2:  # the largest sums of either sign
        x[-1], x[-2] = 127, -127
    if bits == 8:
        w.codes[0, 0::2], w.codes[0, 1::2] = 127, -128
        w.codes[-1, :] = -128
    else:
        w.codes[0, :], w.codes[-1, :] = 0x0F, 0xFF
    return QuantizedCase(x.float(), w.dense(), weights=w)


def check(c: QuantizedCase, tier: str, threads: int) -> None:
    """Scales of one: the result is the integer product."""
    want = c.x.long() @ c.w.long().T
    assert want.abs().max() < 2**24  # float32 holds every integer up to there
    assert torch.equal(c.run(tier, threads).long(), want)


@pytest.mark.parametrize(("bits", "group", "offsets"), FORMS, ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_integer_sums_are_exact(tier, bits, group, offsets):
    for m, n in product((1, 2, 3, 17), (1, 3, 31, 70)):
        check(integers(m, n, 256, bits, group or 256, offsets), tier, 1 + m % 2)


@pytest.mark.parametrize(("k", "group"), AWKWARD, ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_integer_sums_of_awkward_sizes_are_exact(tier, k, group):
    """Around the height of the register tile, and more rows than a stream takes; a panel that is not full."""
    rows, n = _C.tile_rows(tier, "linear_quantized"), _C.panel_width(tier) + 3
    heights = (rows - 1, rows, rows + 1, 3 * rows - 1)
    for m, bits, offsets in product(heights, (8, 4), (False, True)):
        check(integers(m, n, k, bits, group or k, offsets), tier, 1 + m % 2)
    if group is None:  # bytes may be of odd number
        check(integers(rows, n, k - 1, 8, k - 1, False), tier, 1)


@pytest.mark.parametrize("tier", TIERS)
def test_a_long_group_does_not_overflow(tier):
    k = 65536
    w = Weights(torch.full((1, k), 127, dtype=torch.int8), torch.ones(1, 1), None, 8)
    c = QuantizedCase(torch.full((1, k), 127.0), w.dense(), weights=w)
    assert c.run(tier, 1).item() == 127 * 127 * k


def test_codes_and_ones_are_exact_on_terms():
    """Scales of one: bf16 holds every code, and float32 their sums."""
    for bits, offsets in product((8, 4), (False, True)):
        k = 256
        w = weights(70, k, bits, 64, offsets)
        w.scale[:] = 1
        if offsets:
            w.offset = torch.randint(-8, 9, w.offset.shape).float()
        x = torch.randint(-127, 128, (64, k))
        x.view(64, -1, 64)[..., 0] = 127  # then integer kernels round nothing either
        c = QuantizedCase(x.float(), w.dense(), weights=w)
        assert torch.equal(c.run(TIERS[0], 2).long(), x @ w.dense().long().T)


def powers_of_two(*shape: int) -> torch.Tensor:
    return 2.0 ** torch.randint(-1, 2, shape)


@pytest.mark.parametrize("offsets", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tier", [t for t in TIERS if t != "scalar"])
def test_tiers_agree(tier, bits, offsets):
    """The same integers in every tier: scales are powers of two, so that no float sum rounds, in whatever order."""
    for m, (k, group) in product(
        (1, 5, _C.tile_rows(tier, "linear_quantized") + 1), ((320, 64), (256, 256))
    ):
        torch.manual_seed(m)
        w = weights(70, k, bits, group, offsets)
        w.scale = powers_of_two(*w.scale.shape)
        if offsets:
            w.offset = torch.randint(-8, 9, w.offset.shape) * powers_of_two(*w.offset.shape)
        x = torch.randint(-127, 128, (m, k)).float()
        x.view(m, -1, group)[..., 0] = 127
        x.view(m, -1, group).mul_(powers_of_two(m, k // group, 1))
        c = QuantizedCase(x, w.dense(), weights=w)
        got, want = c.run(tier, 1), c.reference()
        assert want.abs().max() < 2**21  # in quarters, less than float32 holds
        assert torch.equal(got, c.run("scalar", 1))
        assert torch.equal(got.double(), want)


@pytest.mark.parametrize("planes", [1, 3])
@pytest.mark.parametrize(("bits", "group", "offsets"), FORMS, ids=str)
@pytest.mark.parametrize("tier", [t for t in TIERS if t != "amx"])
def test_rows_in_blocks_give_the_bits_of_few_rows(tier, bits, group, offsets, planes):
    """With enough rows every chunk prepares its own; few rows are prepared once for all panels. On AMX many run on tiles."""
    k = 256
    for m, threads in ((61, 1), (130, 2), (203, 3)):
        c = case(m, 70, k, bits, group, offsets, planes, norm=1 + m % 2, gated=m == 203)
        c.bias, c.residual = randn(70), randn(m, 35 if c.gated else 70, seed=2)
        got = c.run(tier, threads)
        pieces = m // 24 if c.on_words(tier) else m // 20  # of few rows, which go the same way
        for rows in torch.arange(m).tensor_split(pieces):
            few = replace(c, x=c.x[rows], residual=c.residual[rows])
            assert torch.equal(got[rows], few.run(tier, threads))
