"""Attention over floats beside which codes are kept: decoding reads the codes, whoever wrote the floats, and knows which are up to date."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmopt.mirrors import MirrorLayout
from llmopt.ops.kv_codes import SCALE_BYTES, dequantize_rows, quantize_rows
from llmopt.program import OneOp, run_op

from tests.kernels.attention_problem import TIERS, Case, Tensors, reference, rows
from tests.tolerance import assert_close

pytestmark = pytest.mark.usefixtures("one_torch_thread")
DECODED, PREFILLED = (
    1,
    40,
)  # queries that every tier decodes, with up to three heads a key; and that none does


@dataclass
class Cache:
    """Keys and values [B,Hkv,capacity,·] of a case, of which a call sees the slots [first, first + kv_len), and their mirrors."""

    case: Case
    capacity: int
    first: int = 0
    floats: list[torch.Tensor] = field(init=False)
    codes: list[torch.Tensor] = field(init=False)
    states: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        c = self.case
        dims = (c.dim, c.v_dim or c.dim)
        self.floats = [rows(c, c.kv_heads, self.capacity, d) for d in dims]
        self.codes, self.states = [], []
        for d in dims:
            layout = MirrorLayout(c.batch, c.kv_heads, self.capacity, d)
            memory = torch.zeros(layout.num_bytes, dtype=torch.int8)
            state = memory[: layout.state_bytes].view(torch.int64)
            size, row = (c.batch, c.kv_heads, self.capacity), d + SCALE_BYTES
            strides = (size[1] * size[2] * row, size[2] * row, row, 1)
            if c.seq_first:
                strides = (size[1] * row, row, size[0] * size[1] * row, 1)
            behind = memory[layout.state_bytes :]
            behind.fill_(-99)
            self.codes.append(behind.as_strided((*size, row), strides, behind.storage_offset()))
            self.states.append(state[: c.batch * c.kv_heads * 2].view(c.batch, c.kv_heads, 2))

    def seen(self, whole: list[torch.Tensor], kv_len: int) -> list[torch.Tensor]:
        return [t[:, :, self.first : self.first + kv_len] for t in whole]

    def attend(
        self,
        tier: str,
        c: Case,
        new: list[torch.Tensor] | None = None,
        mask: torch.Tensor | None = None,
        written: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Tensors]:
        """The kernel's output; what it was over, as floats. new: keys and values to write. written: slots that were written in front."""
        q = rows(c, c.heads, c.q_len, c.dim)
        out = torch.full((*q.shape[:3], c.v_dim or c.dim), torch.nan, dtype=c.dtype)
        k, v = self.seen(self.floats, c.kv_len)
        k_codes, v_codes = self.seen(self.codes, c.kv_len)
        wide = bounds = None
        if mask is not None:
            bounds = torch.zeros(*mask.shape[:3], 4, dtype=torch.int32)
            run_op("mask_bounds", [mask, bounds], tier=tier)
            shape = (c.batch, c.heads, c.q_len)
            wide, bounds = mask.expand(*shape, c.kv_len), bounds.expand(*shape, 4)
        operands = [q, k, v, out, wide, bounds, None, None, *(new or [None, None]), written]
        operands += [k_codes, self.states[0], v_codes, self.states[1]]
        ints = [int(c.is_causal), c.causal_offset, c.window, 0, int(new is not None), 0, 0]
        OneOp("attention", operands, ints, [c.dim**-0.5, 0.0], tier=tier, threads=c.threads)()
        return out, Tensors(q, k.clone(), v.clone(), mask)


def over(c: Case, t: Tensors) -> torch.Tensor:
    """The reference: over what codes of the floats stand for where queries are few."""
    if c.q_len == DECODED:
        t = replace(t, k=rounded(t.k), v=rounded(t.v))
    return reference(c, t)[0]


def rounded(x: torch.Tensor) -> torch.Tensor:
    return dequantize_rows(quantize_rows(x))


def check(c: Case, cache: Cache, tier: str, **how) -> None:
    got, t = cache.attend(tier, c, **how)
    assert_close(got, over(c, t), c.dtype)


def new_rows(c: Case) -> list[torch.Tensor]:
    return [rows(c, c.kv_heads, c.q_len, d) for d in (c.dim, c.v_dim or c.dim)]


def token(c: Case, kv_len: int) -> Case:
    return replace(c, q_len=DECODED, kv_len=kv_len)


CASES = [
    Case(2, 6, 2, PREFILLED, 90, 64, is_causal=True),
    Case(2, 6, 2, PREFILLED, 90, 20, v_dim=33, is_causal=True, seq_first=True),
    Case(1, 3, 3, PREFILLED, 90, 64, dtype=torch.bfloat16, is_causal=True, seq_first=True),
    Case(1, 2, 1, PREFILLED, 90, 16, dtype=torch.float16, is_causal=True, threads=1),
]


@pytest.mark.parametrize("c", CASES, ids=range(len(CASES)))
def test_a_prompt_then_tokens(tier: str, c: Case) -> None:
    torch.manual_seed(0)
    cache = Cache(c, 200)
    check(c, cache, tier, new=new_rows(c))
    assert not any(s.any() for s in cache.states), "a prompt rounds nothing"
    for length in range(91, 96):
        check(token(c, length), cache, tier, new=new_rows(token(c, length)))
        for state, codes, floats in zip(cache.states, cache.codes, cache.floats, strict=True):
            assert (state == torch.tensor([0, length])).all()
            assert torch.equal(codes[:, :, :length], quantize_rows(floats[:, :, :length]))
            assert (codes[:, :, length:] == -99).all(), "rows that nobody asked for"


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_long_keys(tier: str, threads: int) -> None:
    """Several blocks and splits, each of which rounds its part."""
    torch.manual_seed(0)
    c = Case(1, 3, 1, DECODED, 2500, 64, is_causal=True, seq_first=True, threads=threads)
    cache = Cache(c, 2600)
    for length in (2500, 2501, 2502):
        check(token(c, length), cache, tier, new=new_rows(c))
        assert all((s == torch.tensor([0, length])).all() for s in cache.states)


def test_only_new_rows_are_rounded(tier: str) -> None:
    """What is up to date is not looked at again: floats that change behind its back do not show."""
    torch.manual_seed(0)
    c = Case(1, 2, 2, DECODED, 50, 16)
    cache = Cache(c, 60)
    cache.attend(tier, c)
    cache.floats[0][:, :, 7].mul_(3)
    kept = cache.codes[0].clone()
    cache.attend(tier, c)
    assert torch.equal(cache.codes[0], kept)
    cache.states[0].zero_()
    check(c, cache, tier)
    assert not torch.equal(cache.codes[0], kept)


@pytest.mark.parametrize("queries", [DECODED, PREFILLED])
def test_slots_that_a_step_in_front_wrote(tier: str, queries: int) -> None:
    """A static cache: positions say which; those behind them are rounded again."""
    torch.manual_seed(0)
    c = Case(2, 2, 2, DECODED, 120, 16)
    cache = Cache(c, 120)
    live = torch.arange(120)[None, None, None] < 60
    check(c, cache, tier, mask=live)
    slots = torch.arange(5, 5 + queries)
    for t in cache.floats:
        t[:, :, slots] = torch.randn(t[:, :, slots].shape)
    check(replace(c, q_len=queries), cache, tier, mask=live, written=slots)
    wanted = 60 if queries == DECODED else 5
    assert all((s == torch.tensor([0, wanted])).all() for s in cache.states)
    check(c, cache, tier, mask=live)


def test_a_window_moves_on(tier: str) -> None:
    """Calls see slots from a later one on, of which those that fell out count no more."""
    torch.manual_seed(0)
    c = Case(2, 4, 2, DECODED, 40, 16, seq_first=True)
    cache = Cache(c, 100)
    for first in (0, 1, 2, 30, 80, 3):
        cache.first = first
        check(token(c, min(40, 100 - first)), cache, tier, new=new_rows(c))
    cache.first, whole = 0, token(c, 100)
    check(whole, cache, tier)


def test_padding_differs_by_sequence(tier: str) -> None:
    torch.manual_seed(0)
    c = Case(3, 2, 2, DECODED, 70, 16)
    cache = Cache(c, 80)
    first = torch.tensor([0, 33, 69])
    mask = (torch.arange(70) >= first[:, None])[:, None, None]
    check(c, cache, tier, mask=mask)
    assert torch.equal(cache.states[0][:, 0, 0], first)
    check(c, cache, tier)  # all of them


@pytest.mark.parametrize("where", [0, 1])
def test_nan_stays_one(tier: str, where: int) -> None:
    torch.manual_seed(0)
    c = Case(1, 1, 1, DECODED, 30, 16)
    cache = Cache(c, 30)
    cache.floats[where][0, 0, 4, 2] = torch.nan
    assert cache.attend(tier, c)[0].isnan().all()
    dead = torch.ones(1, 1, 1, 30, dtype=torch.bool)
    dead[..., 4] = False
    assert cache.attend(tier, c, mask=dead)[0].isfinite().all()


STEPS = st.lists(
    st.tuples(st.sampled_from(["token", "prompt", "edit", "first", "mask"]), st.integers(0, 10**6)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(STEPS, st.booleans(), st.integers(1, 4))
@pytest.mark.parametrize("tier", TIERS)
def test_whatever_happens(tier: str, steps: list, seq_first: bool, threads: int) -> None:
    """Tokens, prompts, edits, windows and masks in any order: each token is over the codes of the floats of that moment."""
    torch.manual_seed(0)
    c = Case(2, 4, 2, DECODED, 300, 16, is_causal=True, seq_first=seq_first, threads=threads)
    cache, length, mask = Cache(c, 300), 1, None
    for what, number in steps:
        if what == "edit":
            cache.floats[0][:, :, number % 300].mul_(-1.5)
            for state in cache.states:
                state.zero_()
        elif what == "first":
            length += cache.first
            cache.first = number % length
            length -= cache.first
        elif what == "mask":
            mask = number
        else:
            new = DECODED if what == "token" else PREFILLED
            if cache.first + length + new > 300:
                continue
            length += new
            call = replace(c, q_len=new, kv_len=length)
            live = None
            if mask is not None:
                live = torch.arange(length) >= torch.tensor([[mask % length], [0]])
                live = live[:, None, None].expand(2, 1, new, length).contiguous()
            check(call, cache, tier, new=new_rows(call), mask=live)


def test_codes_that_are_not_of_the_cache_are_refused(tier: str) -> None:
    c = Case(1, 1, 1, DECODED, 30, 16)
    cache = Cache(c, 30)
    cache.codes[1] = cache.codes[1][..., :-1]
    with pytest.raises(ValueError, match="the codes beside k and v are not theirs"):
        cache.attend(tier, c)
