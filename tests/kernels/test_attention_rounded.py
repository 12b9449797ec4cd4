"""Prompts whose operands are not multiplied as they are: by tiles f16 is the sum of two bf16 numbers, others are rounded where that is
allowed; as 16-bit fixed point all of them are."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmopt.ops.kv_codes import dequantize_rows, quantize_rows

from tests.kernels.attention_problem import (
    ALL,
    MASKS,
    ROPE_HALF,
    ROPE_INTERLEAVED,
    TIERS,
    Case,
    check,
    has_words,
    make,
    problems,
    reference,
    run,
    solved,
    solved_with,
)
from tests.tolerance import BF16_PRODUCTS, SPLIT_F16, WORDS, assert_close

pytestmark = pytest.mark.usefixtures("one_torch_thread")
TIER = TIERS[0]
SPLIT = Case(dtype=torch.float16)
FORMS = {
    "f16": SPLIT,
    "f16 rounded": replace(SPLIT, bf16_products=True),
    "f32 rounded": Case(bf16_products=True),
}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> Case:
    """What is multiplied; the tests say which problem."""
    return FORMS[request.param]


@pytest.mark.parametrize("dim", [16, 33, 64, 200])
@pytest.mark.parametrize("q_len", [32, 65, 129])
@pytest.mark.parametrize("group", [1, 3])
def test_shapes(form: Case, group: int, q_len: int, dim: int) -> None:
    c = replace(form, batch=2, heads=2 * group, q_len=q_len, kv_len=q_len + 30, dim=dim)
    check(replace(c, is_causal=True), TIER)
    check(replace(c, kv_len=q_len + 300, v_dim=dim // 2 + 1, threads=1), TIER)


@pytest.mark.parametrize("mask", MASKS)
def test_masks(form: Case, mask: str) -> None:
    c = replace(form, batch=2, heads=6, q_len=70, kv_len=280, dim=48, mask=mask)
    check(c, TIER)
    check(replace(c, window=30, softcap=5.0), TIER)


@pytest.mark.parametrize("rope", [ROPE_HALF, ROPE_INTERLEAVED])
@pytest.mark.parametrize(("dim", "rope_dim"), [(64, 64), (20, 12)])
def test_rope_and_new_rows(form: Case, rope: int, dim: int, rope_dim: int) -> None:
    c = replace(form, heads=6, q_len=66, kv_len=90, dim=dim, rope=rope, rope_dim=rope_dim, new=True)
    check(replace(c, is_causal=True, seq_first=True), TIER)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nonfinite_numbers_reach_the_rows_that_see_them(
    form: Case, where: str, value: float
) -> None:
    """A number of a key of a row's own past makes what exact arithmetic does of it."""
    c = replace(form, batch=2, heads=6, q_len=70, kv_len=300, dim=36, is_causal=True)
    for mask in ("", "random"):
        for row in (0, 69):
            places = ((0, ALL, row), (1, 1, row, 5))
            t, want = solved_with(replace(c, mask=mask), where, places, value)
            assert not torch.isfinite(want).all()
            assert_close(run(replace(c, mask=mask), t, TIER), want, c.accuracy)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1])
def test_a_nan_in_a_mask_is_one_whatever_its_bits(form: Case, bits: int) -> None:
    """Rounding to bf16 by adding half a unit carries out of the largest ones."""
    c = replace(form, batch=1, heads=4, q_len=70, kv_len=140, dim=48, mask="causal_float")
    t = make(c)
    assert t.mask is not None
    t.mask = t.mask.float()
    t.mask.view(torch.int32)[0, 0, 40, 5] = bits
    rows = run(c, t, TIER).isnan().all(-1)[0].all(0)
    assert rows.nonzero().flatten().tolist() == [40]
    assert torch.isfinite(run(c, t, TIER)[0, :, torch.arange(70) != 40]).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_scores_far_from_zero(form: Case, sign: int) -> None:
    """Of 10^9 and more, f32 keeps the difference of two that are equal, and no more."""
    c = replace(form, heads=4, q_len=70, kv_len=300, dim=64)
    t = make(c)
    t.q.fill_(6e4)
    t.k.fill_(-6e4 if sign < 0 else -3e4)
    t.k[:, :, 11], t.k[:, :, 200] = sign * 3e4, sign * 3e4
    assert_close(run(c, t, TIER), reference(c, t)[0], c.accuracy)


@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_numbers_that_bf16_cannot_hold_are_no_infinities(where: str) -> None:
    """The largest f32 rounds to infinity in bf16: what holds one is multiplied as it is."""
    c = replace(FORMS["f32 rounded"], heads=4, q_len=40, kv_len=100, dim=32)
    largest = torch.finfo(torch.float32).max
    t = make(c)
    getattr(t, where)[0, 1, 7, 3] = largest
    if where != "v":  # such scores are finite where the other side is small
        other = t.k if where == "q" else t.q
        other.mul_(1e-30)
    want = reference(c, t)[0]
    assert torch.isfinite(want).all()
    assert_close(run(c, t, TIER), want, BF16_PRODUCTS)


@pytest.mark.parametrize("mask", ["", "random", "causal_float"])
def test_rounded_weights_add_up_to_one(mask: str) -> None:
    """They are divided by their own sum: values that are all alike come out as they are, or as what words make of them."""
    c = replace(FORMS["f32 rounded"], heads=4, q_len=90, kv_len=300, dim=64, mask=mask)
    c = replace(c, is_causal=not mask)
    t = make(c)
    t.v.fill_(1.0)
    # Words of values have one scale for each dimension in 128 keys.
    assert (run(c, t, TIER) - 1).abs().max() < (1e-4 if has_words(TIER) else 1e-6)


@pytest.mark.parametrize("dim", [32, 80])
def test_f16_keeps_both_of_its_terms(dim: int) -> None:
    """An output in f32 shows what one in f16 would hide."""
    c = replace(SPLIT, heads=4, q_len=90, kv_len=200, dim=dim, is_causal=True)
    t, want, _, _ = solved(c, 0)
    assert_close(run(c, t, TIER, torch.float32), want, WORDS if has_words(TIER) else SPLIT_F16)


def test_tiles_and_words_round_and_nothing_else_does(tier: str) -> None:
    c = replace(FORMS["f32 rounded"], heads=4, q_len=40, kv_len=200, dim=64)
    exact = run(replace(c, bf16_products=False), make(c), tier)
    error = (run(c, make(c), tier) - exact).norm() / exact.norm()
    if has_words(tier):
        assert 1e-5 < error < 1e-3
    else:
        assert 1e-4 < error < 1e-2 if tier == "amx" else error == 0


@pytest.mark.parametrize("where", ["first", "last"])
def test_a_part_of_the_keys_that_leaves_tiles(form: Case, where: str) -> None:
    """Keys are split between threads, and only one part holds a number that has no terms."""
    c = replace(form, heads=1, kv_heads=1, q_len=64, kv_len=700, dim=40, is_causal=True)
    t = make(c)
    key = 0 if where == "first" else 636  # the last that all rows see
    t.k[0, 0, key, 3] = math.inf
    t.q[..., 3] = 0.25
    want = reference(c, t)[0]
    assert_close(run(c, t, TIER), want, c.accuracy)
    t.k[0, 0, key] = 0.0
    t.k[0, 0, key, 3] = 6e4 if c.dtype == torch.float16 else torch.finfo(torch.float32).max
    t.q[..., 3] = 0.0  # the score is finite
    assert_close(run(c, t, TIER), reference(c, t)[0], c.accuracy)


@pytest.mark.parametrize("group", [33, 40])
def test_one_query_is_never_rounded(group: int) -> None:
    c = replace(FORMS["f32 rounded"], heads=group, kv_heads=1, q_len=1, kv_len=200, dim=64)
    t, want, _, _ = solved(c, 0)
    assert_close(run(c, t, TIER), want, torch.float32)


def test_few_rows_are_never_rounded() -> None:
    c = replace(FORMS["f32 rounded"], heads=4, q_len=15, kv_len=200, dim=64)
    t, want, _, _ = solved(c, 0)
    assert_close(run(c, t, TIER), want, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes_are_rounded_like_any_other_numbers(dtype: torch.dtype) -> None:
    c = Case(2, 6, 2, 80, 200, 64, dtype=dtype, is_causal=True, bf16_products=True)
    t = make(c)
    codes = replace(t, k=quantize_rows(t.k), v=quantize_rows(t.v))
    want = reference(c, replace(t, k=dequantize_rows(codes.k), v=dequantize_rows(codes.v)))[0]
    assert_close(run(c, codes, TIER), want, BF16_PRODUCTS)


ANY = problems(dtype=st.sampled_from((torch.float32, torch.float16)), bf16_products=st.booleans())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(c=ANY, seed=st.integers(0, 1000))
def test_any_problem(c: Case, seed: int) -> None:
    check(c, TIER, seed)
