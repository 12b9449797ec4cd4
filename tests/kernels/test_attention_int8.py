"""Attention over int8 keys and values, every CPU tier: exact codes, and the output against float64 over what the codes stand for."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmopt.ops.kv_codes import dequantize_rows, quantize_rows

from tests.kernels.attention_problem import (
    MASKS,
    ROPE_HALF,
    ROPE_INTERLEAVED,
    ROPE_NONE,
    TIERS,
    Case,
    Tensors,
    allowed_keys,
    make,
    problems,
    reference,
    rotate,
    run,
)
from tests.tolerance import assert_close

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def codes_of(c: Case, x: torch.Tensor) -> torch.Tensor:
    """x [B,Hkv,S,D] as rows of codes in the memory order of the case."""
    rows = quantize_rows(x)
    return rows.transpose(1, 2).contiguous().transpose(1, 2) if c.seq_first else rows


@cache
def encoded(c: Case, seed: int) -> tuple[Tensors, torch.Tensor, torch.Tensor]:
    """A problem and the codes of its keys and values, shared by the tiers."""
    t = make(c, seed)
    return t, codes_of(c, t.k), codes_of(c, t.v)


@cache
def solved(c: Case, seed: int) -> torch.Tensor:
    """The reference over the codes of a problem that writes none."""
    t, k, v = encoded(c, seed)
    return over_codes(c, replace(t, k=k, v=v))


def over_codes(c: Case, t: Tensors) -> torch.Tensor:
    attended = replace(t, k=dequantize_rows(t.k), v=dequantize_rows(t.v))
    return reference(replace(c, new=False), attended)[0]


def check(c: Case, tier: str, seed: int = 0) -> None:
    """Runs the case over codes; checks what was written and what came out."""
    t, k, v = encoded(c, seed)
    held = replace(t, k=copy_of(k), v=copy_of(v))
    got = run(c, held, tier)
    if c.new:
        check_written(c, t, held, (k, v))
    assert_close(got, over_codes(c, held) if c.new else solved(c, seed), c.dtype)


def copy_of(rows: torch.Tensor) -> torch.Tensor:
    """The same in the same memory order."""
    return torch.empty_strided(rows.shape, rows.stride(), dtype=rows.dtype).copy_(rows)


def coded(c: Case, t: Tensors) -> tuple[Tensors, torch.Tensor]:
    """Numbers of a test's own as codes, and the reference over them."""
    held = replace(t, k=codes_of(c, t.k), v=codes_of(c, t.v))
    return held, over_codes(c, held)


def check_written(
    c: Case, t: Tensors, held: Tensors, before: tuple[torch.Tensor, torch.Tensor]
) -> None:
    slots = t.positions if c.positions else torch.arange(c.kv_len - c.q_len, c.kv_len)
    others = torch.ones(c.kv_len, dtype=torch.bool).index_fill(0, slots, False)
    for now, old, new in ((held.k, before[0], t.k_new), (held.v, before[1], t.v_new)):
        assert torch.equal(now[:, :, others], old[:, :, others]), (
            "a row beside the new ones changed"
        )
        if now is held.v or not c.rope:
            assert torch.equal(now[:, :, slots], quantize_rows(new)), "codes and scales are exact"
    turned = rotate(c, t.k_new.double(), t)
    half_step = turned.abs().amax(-1, keepdim=True) / 127 / 2
    error = (dequantize_rows(held.k[:, :, slots], torch.float64) - turned).abs()
    assert (error <= half_step * (1 + 1e-4)).all(), "further from the rotated key than half a step"


@pytest.mark.parametrize("dim", [1, 16, 20, 64, 67, 80, 128, 512])
@pytest.mark.parametrize("q_len", [1, 3, 17, 70])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_shapes(tier: str, group: int, q_len: int, dim: int) -> None:
    c = Case(2, 2 * group, 2, q_len, q_len + 60, dim, is_causal=True)
    check(c, tier)
    check(replace(c, seq_first=True, v_dim=33), tier)


@pytest.mark.parametrize("q_len", [1, 3, 40])
@pytest.mark.parametrize("kv_len", [1, 255, 1300])
@pytest.mark.parametrize("seq_first", [False, True])
def test_long_keys(tier: str, seq_first: bool, kv_len: int, q_len: int) -> None:
    """Several blocks and, with more threads, splits of the keys."""
    c = Case(1, 6, 2, q_len, max(kv_len, q_len), 64, is_causal=True, seq_first=seq_first)
    for threads in (1, 2, 5):
        check(replace(c, threads=threads), tier)


@pytest.mark.parametrize("q_len", [1, 19])
@pytest.mark.parametrize("mask", MASKS)
def test_masks(tier: str, mask: str, q_len: int) -> None:
    check(Case(3, 6, 2, q_len, q_len + 210, 20, mask=mask), tier)


@pytest.mark.parametrize("q_len", [1, 33])
def test_window_and_softcap(tier: str, q_len: int) -> None:
    check(Case(1, 3, 1, q_len, 500, 16, is_causal=True, window=64), tier)
    check(Case(1, 4, 2, q_len, 90, 64, softcap=0.7, is_causal=True, window=7), tier)


@pytest.mark.parametrize("q_len", [1, 2, 34])
@pytest.mark.parametrize("rope", [ROPE_NONE, ROPE_HALF, ROPE_INTERLEAVED])
@pytest.mark.parametrize("seq_first", [False, True])
def test_append(tier: str, seq_first: bool, rope: int, q_len: int) -> None:
    for dim, kv_len, dtype in ((20, 60, torch.float32), (64, 1500, torch.float32), (64, 60, torch.bfloat16)):  # fmt: skip
        c = Case(2, 6, 2, q_len, kv_len, dim, dtype=dtype, rope=rope, new=True, seq_first=seq_first)
        check(replace(c, is_causal=True), tier)
        check(replace(c, positions=True), tier)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("q_len", [1, 70])
def test_queries_of_other_dtypes(tier: str, q_len: int, dtype: torch.dtype) -> None:
    check(Case(2, 6, 2, q_len, 300, 64, dtype=dtype, is_causal=True), tier)


@pytest.mark.parametrize("q_len", [1, 40])
def test_keys_and_values_may_differ(tier: str, q_len: int) -> None:
    c = Case(1, 4, 2, q_len, 80, 64)
    t = make(c)
    for k, v in ((codes_of(c, t.k), t.v), (t.k.half(), codes_of(c, t.v))):
        kf, vf = (dequantize_rows(x) if x.dtype == torch.int8 else x for x in (k, v))
        want, _, _ = reference(c, replace(t, k=kf, v=vf))
        assert_close(run(c, replace(t, k=k, v=v), tier), want)


SPECIAL = torch.tensor(
    [
        [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5],  # ties to even
        [0.0] * 7,
        [-0.0] * 7,
        [1e-40, -1e-40, 0, 0, 0, 0, 0],  # denormals
        [1e-37, 1e-37, -1e-37, 0, 0, 0, 0],  # a scale without a finite reciprocal
        [2e-36, 1e-36, 0, 0, 0, 0, 0],
        [3e38, -3e38, 1.0, 0, 0, 0, 0],
        [math.nan, 1, 2, 3, 4, 5, 6],
        [1, 2, 3, 4, 5, 6, math.inf],
        [1, 2, 3, -math.inf, 4, math.nan, math.inf],
    ]
)


def test_codes_of_special_rows_are_exact(tier: str) -> None:
    """Written by the kernel and by the reference, byte for byte."""
    n = len(SPECIAL)
    c = Case(1, 1, 1, n, n, 7, new=True)
    t = make(c)
    t.k_new = t.v_new = SPECIAL[None, None]
    held = replace(t, k=codes_of(c, t.k), v=codes_of(c, t.v))
    run(c, held, tier)
    want = quantize_rows(SPECIAL)[None, None]
    for rows in (held.k, held.v):
        assert torch.equal(rows[..., :-4], want[..., :-4])
        scale, wanted = (r[..., -4:].contiguous().view(torch.float32) for r in (rows, want))
        assert torch.equal(scale.nan_to_num(-1), wanted.nan_to_num(-1))


@pytest.mark.parametrize("q_len", [1, 3, 40])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_of_a_live_key_are_seen(tier: str, value: float, q_len: int) -> None:
    for where in ("k", "v"):
        for key in (0, 100, 299):
            for mask in ("", "random", "left"):
                c = Case(2, 4, 2, q_len, 300, 20, is_causal=True, mask=mask)
                held, want = with_a_number(c, where, key, value)
                got = run(c, held, tier)
                assert_close(got, want, c.dtype)
                sees = allowed_keys(c, held.mask)[..., key]
                assert got[sees].isnan().all()
                assert got[~sees].isfinite().all()


@cache
def with_a_number(c: Case, where: str, key: int, value: float) -> tuple[Tensors, torch.Tensor]:
    t = make(c)
    getattr(t, where)[:, :, key, 3] = value
    return coded(c, t)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("mask", ["", "left", "finfo_min"])
@pytest.mark.parametrize("q_len", [1, 3, 40])
def test_dead_slots_do_not_leak(tier: str, q_len: int, mask: str, value: float) -> None:
    c = Case(2, 4, 2, q_len, 300, 20, is_causal=True, offset=90, mask=mask)
    held, want = with_dead_slots(c, value)
    got = run(c, held, tier)
    assert_close(got, want, c.dtype)
    assert got.isfinite().all()


@cache
def with_dead_slots(c: Case, value: float) -> tuple[Tensors, torch.Tensor]:
    t = make(c)
    dead = ~allowed_keys(c, t.mask)[:, :1].any(-2).expand(-1, 2, -1)
    t.k[dead] = t.v[dead] = value
    assert dead.any()
    return coded(c, t)


@pytest.mark.parametrize("q_len", [1, 40])
def test_near_the_attention_over_floats(tier: str, q_len: int) -> None:
    """Half a step of each key moves a score by at most d = scale · |q|₁ · step / 2: weights by e^2d, values by half a step."""
    c = Case(2, 6, 2, q_len, 300, 64, is_causal=True)
    t = make(c)
    want, _, _ = reference(c, t)
    got = run(c, replace(t, k=codes_of(c, t.k), v=codes_of(c, t.v)), tier).double()
    k_step, v_step = (x.abs().amax() / 127 for x in (t.k, t.v))
    moved = c.dim**-0.5 * t.q.abs().sum(-1).max() * k_step / 2
    bound = v_step / 2 + (torch.exp(2 * moved) - 1) * t.v.abs().max()
    assert (got - want).abs().max() <= bound
    assert (got - want).pow(2).mean().sqrt() <= v_step, "an error is far below the bound on average"


@settings(max_examples=40, deadline=None, derandomize=True)
@given(c=problems(), seed=st.integers(0, 1000))
def test_any_problem(c: Case, seed: int) -> None:
    for tier in TIERS:
        check(c, tier, seed)
