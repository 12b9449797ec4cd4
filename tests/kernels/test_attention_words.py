"""Prompts that some tiers multiply as 16-bit fixed point: none may be much further off than f16 rounds, whatever the sizes of numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.kernels.attention_problem import TIERS, Case, Tensors, make, reference, run
from tests.tolerance import WORDS, assert_close

pytestmark = pytest.mark.usefixtures("one_torch_thread")
# On AMX f16 is split into terms, which have bounds of their own.
NO_TILES = [t for t in TIERS if t != "amx"]
PROMPT = Case(heads=6, q_len=130, kv_len=300, dim=64, is_causal=True, dtype=torch.float16)


@pytest.fixture(params=NO_TILES)
def tier(request: pytest.FixtureRequest) -> str:
    return request.param


def compare(c: Case, t: Tensors, tier: str) -> None:
    """An output in f32 shows what one in f16 would hide."""
    assert_close(run(c, t, tier, torch.float32), reference(c, t)[0], WORDS)


@pytest.mark.parametrize("dim", [2, 31, 32, 33, 64, 130, 512])
@pytest.mark.parametrize("kv_len", [41, 127, 128, 129, 385])
def test_sizes(tier: str, kv_len: int, dim: int) -> None:
    """Blocks of 128 keys, pairs of keys and dimensions, steps of 32 dimensions: whole and not."""
    c = replace(PROMPT, heads=3, kv_heads=1, q_len=41, kv_len=kv_len, dim=dim, v_dim=dim // 3 + 1)
    compare(c, make(c), tier)
    c = replace(c, is_causal=False, seq_first=True, threads=1)
    compare(c, make(c), tier)


@pytest.mark.parametrize("period", [1, 2, 7, 64])
def test_sums_as_large_as_can_be(tier: str, period: int) -> None:
    """All products have one sign, and a row and a column every share of their norm: one value, some, all."""
    c = replace(PROMPT, is_causal=False, kv_len=256)
    t = make(c)
    signs = torch.where(torch.randn(64) > 0, 1.0, -1.0) * (torch.arange(64) % period == 0)
    t.q.copy_(signs.expand_as(t.q)).mul_(0.5)
    t.k.copy_(signs.expand_as(t.k))
    t.v.copy_((torch.arange(256) % period == 0).half()[:, None].expand_as(t.v)).mul_(-3.0)
    compare(c, t, tier)
    t.k[:, :, 1::2] *= -1  # every second key has no weight
    compare(c, t, tier)


@pytest.mark.parametrize("score", [3, 6, 9, 12])
def test_a_key_that_takes_nearly_all(tier: str, score: int) -> None:
    """What lies beside it in a block keeps few bits: errors are small beside values, not beside what is left of them. Weights
    too small to be rounded to anything still take their share of what is divided by their sum."""
    c = replace(PROMPT, is_causal=False, kv_len=384)
    t = make(c)
    t.q[..., 0], t.k[..., 0] = 8.0, 0.0
    t.k[:, :, 0, 0] = score  # the others have about 0
    for value in (1.0, 0.0):
        t.v[:, :, 0] = value
        error = run(c, t, tier, torch.float32) - reference(c, t)[0]
        assert error.abs().max() < 1e-3
        assert error.pow(2).mean().sqrt() < 2e-4


def test_maxima_that_grow_and_fall_from_block_to_block(tier: str) -> None:
    c = replace(PROMPT, is_causal=False, kv_len=640)
    t = make(c)
    t.q[..., 0] = 8.0
    for block, height in enumerate((0, 9, 3, 14, -20)):
        t.k[:, :, block * 128 : (block + 1) * 128, 0] = height
    compare(c, t, tier)
    compare(replace(c, softcap=4.0), t, tier)


@pytest.mark.parametrize("bias", ["steep", "far", "half"])
def test_biases(tier: str, bias: str) -> None:
    """Weights that fall to nothing, scores beside which those of the products vanish, and masks in f16."""
    c = replace(PROMPT, is_causal=False)
    t = make(c)
    distance = torch.arange(c.kv_len) - (torch.arange(c.q_len)[:, None] + c.causal_offset)
    t.mask = {
        "steep": -0.5 * distance.abs().float(),
        "far": torch.full((c.q_len, c.kv_len), -3e4),
        "half": torch.randn(c.q_len, c.kv_len).half(),
    }[bias][None, None]
    if bias == "far":
        t.mask[..., 17] = 0.0
    compare(c, t, tier)


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e-12, 1e12, 1e17])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_numbers_of_any_size(tier: str, where: str, size: float) -> None:
    """Rows and columns far from 1 have scales or are multiplied as floats; the other side brings the scores back."""
    c = replace(PROMPT, dtype=torch.bfloat16)
    t = make(c)
    getattr(t, where).mul_(size)
    if where != "v":
        (t.k if where == "q" else t.q).mul_(1 / size)
    compare(c, t, tier)
    if where == "v":
        t.v[:, :, ::2].mul_(1e-8)  # small beside large in a column
        compare(c, t, tier)


@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_rows_and_columns_of_zeros(tier: str, where: str) -> None:
    c = replace(PROMPT, mask="random")
    t = make(c)
    getattr(t, where)[:, :, 5:40] = 0.0
    getattr(t, where)[:, 1] = 0.0
    compare(c, t, tier)
    t.mask = None
    compare(replace(c, mask=""), t, tier)


@pytest.mark.parametrize("score", [0, 5, 10])
def test_weights_add_up_to_one(tier: str, score: int) -> None:
    """Values that are all alike, and values that alternate beside a key that takes nearly all, whose other weights are small."""
    c = replace(PROMPT, q_len=90, kv_len=300, is_causal=False)
    t = make(c)
    t.q.fill_(1.0)
    t.k.fill_(0.0)
    t.k[:, :, ::64] = score / 8
    t.v.fill_(0.7)
    assert (run(c, t, tier, torch.float32) / t.v[0, 0, 0, 0] - 1).abs().max() < 1e-4
    t.v.copy_(torch.where(torch.arange(300) % 2 == 0, 1.0, -1.0)[:, None].expand_as(t.v))
    t.v[:, :, ::64] = 0.0
    assert (run(c, t, tier, torch.float32) - reference(c, t)[0]).abs().max() < 5e-5


def test_tiny_numbers_are_no_zeros(tier: str) -> None:
    """Their squares are none in f32, and they are all that a column, or a row, has."""
    c = replace(PROMPT, dtype=torch.bfloat16)
    t = make(c)
    t.v[:, 0] *= 1e-35
    t.k[:, 1, 17] *= 1e-30
    t.q[:, 3] *= 1e30
    want = reference(c, t)[0]
    got = run(c, t, tier, torch.float32)
    for head in range(c.heads):
        assert_close(got[:, head], want[:, head], WORDS)


@pytest.mark.parametrize("value", [math.nan, math.inf, 6e4, 1e-30, 1e15])
@pytest.mark.parametrize("where", ["k", "v"])
def test_keys_that_nobody_may_see(tier: str, where: str, value: float) -> None:
    c = replace(PROMPT, mask="left", batch=2, is_causal=False, dtype=torch.bfloat16)
    t = make(c)
    assert t.mask is not None
    dead = ~t.mask[:, 0, 0]
    want = reference(c, t)[0]
    getattr(t, where).masked_fill_(dead[:, None, :, None], value)
    assert_close(run(c, t, tier, torch.float32), want, WORDS)


@pytest.mark.parametrize("value", [3e2, 6e4])
@pytest.mark.parametrize("where", ["k", "v"])
def test_keys_that_few_rows_see(tier: str, where: str, value: float) -> None:
    """The others, in the same panel and block, are what they are without them."""
    t, want = make(PROMPT), reference(PROMPT, make(PROMPT))[0]
    getattr(t, where)[:, :, -5:] = value
    got, rows = run(PROMPT, t, tier, torch.float32), slice(0, PROMPT.q_len - 5)
    assert_close(got[:, :, rows], want[:, :, rows], WORDS)


@pytest.mark.parametrize("value", [1e3, 6e4])
def test_values_that_get_no_weight(tier: str, value: float) -> None:
    c = replace(PROMPT, is_causal=False)
    t = make(c)
    t.q[..., 0], t.k[..., 0] = 8.0, 0.0
    t.k[:, :, 50, 0], t.v[:, :, 50] = -30.0, value
    compare(c, t, tier)


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-7, 0.0])
def test_dimensions_far_smaller_than_others(tier: str, size: float) -> None:
    """They are results of their own: none is rounded to what another one leaves."""
    c = replace(PROMPT, dtype=torch.bfloat16, v_dim=50)
    t = make(c)
    t.v[..., 7] *= size
    t.v[..., 40:] *= size
    got, want = run(c, t, tier, torch.float32), reference(c, t)[0]
    for d in range(50):
        error, rms = (got - want)[..., d].abs().max(), want[..., d].pow(2).mean().sqrt()
        assert error <= 1e-2 * rms, d


def test_what_earlier_calls_left_in_scratch_memory(tier: str) -> None:
    """Rows are padded to steps of 32, whatever lay there."""
    large = replace(PROMPT, dim=512, mask="bias", is_causal=False)
    t = make(large)
    t.k.fill_(6e4)
    t.mask.fill_(3e4)
    small = replace(PROMPT, dim=16)
    for _ in range(3):
        run(large, t, tier)
        compare(small, make(small), tier)


@pytest.mark.parametrize(
    "c",
    [
        replace(PROMPT, heads=48, kv_heads=48, q_len=60, kv_len=90),
        replace(PROMPT, heads=4, kv_heads=4, q_len=256, kv_len=256),
        replace(PROMPT, heads=32, kv_heads=4, q_len=200, kv_len=200),
    ],
    ids=["48x60", "4x256", "32x200"],
)
@pytest.mark.parametrize("threads", [1, 3, 4])
def test_threads_change_nothing(tier: str, c: Case, threads: int) -> None:
    """As long as they do not split keys: there are chunks enough. How many panels are in one depends on them."""
    t = make(c)
    want = run(replace(c, threads=2), t, tier, torch.float32)
    assert torch.equal(run(replace(c, threads=threads), t, tier, torch.float32), want)


def test_later_tokens_change_nothing(tier: str) -> None:
    c = replace(PROMPT, heads=8, kv_heads=8, q_len=130, kv_len=130)
    t = make(c)
    n = 100
    short = Tensors(t.q[:, :, :n], t.k[:, :, :n], t.v[:, :, :n])
    want = run(replace(c, q_len=n, kv_len=n), short, tier)
    assert torch.equal(run(c, t, tier)[:, :, :n], want)
