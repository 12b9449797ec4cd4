"""Attention problems as data, with their float64 reference: what the tests of the attention kernels share."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from hypothesis import strategies as st
from llmopt import _C
from llmopt.program import OneOp, run_op

from tests.tolerance import BF16_PRODUCTS, assert_close

TIERS = _C.tiers()
ROPE_NONE, ROPE_HALF, ROPE_INTERLEAVED = 0, 1, 2
ALL = -1  # of an index: every batch or head


def has_words(tier: str) -> bool:
    """Whether prompts are multiplied as 16-bit fixed point there."""
    return tier == "avx512_vnni"


@dataclass(frozen=True)
class Case:
    """One attention problem; `make` fills it with numbers."""

    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    q_len: int = 5
    kv_len: int = 9
    dim: int = 16
    v_dim: int | None = None
    dtype: torch.dtype = torch.float32
    is_causal: bool = False
    offset: int | None = None  # None: the last query sees the last key
    window: int = 0
    softcap: float = 0.0
    mask: str = ""  # a key of MASKS
    rope: int = ROPE_NONE
    rope_dim: int | None = None
    new: bool = False  # k_new and v_new are given
    positions: bool = False
    seq_first: bool = False  # memory is [B,S,H,D]
    threads: int = 2
    bf16_products: bool = False
    nan_rows: bool = False
    sinks: str = ""  # "heads": one for each, "rows": one for each query of each head

    @property
    def causal_offset(self) -> int:
        return self.kv_len - self.q_len if self.offset is None else self.offset

    @property
    def accuracy(self) -> torch.dtype | str:
        """Of the output."""
        return BF16_PRODUCTS if self.bf16_products else self.dtype


def float_mask(live: torch.Tensor, dead: float) -> torch.Tensor:
    return torch.zeros(live.shape).masked_fill(~live, dead)


def left_padding(c: Case) -> torch.Tensor:
    first = torch.arange(c.batch) * c.kv_len // (2 * c.batch)
    return (torch.arange(c.kv_len) >= first[:, None])[:, None, None, :]


def right_padding(c: Case) -> torch.Tensor:
    return left_padding(c).flip(-1)


def random_bool(c: Case, *dims: int) -> torch.Tensor:
    return torch.rand(*dims, c.kv_len) < 0.6


def alibi(c: Case) -> torch.Tensor:
    slope = 2.0 ** -torch.arange(1.0, c.heads + 1)
    return (slope[:, None] * torch.arange(c.kv_len)).view(1, c.heads, 1, c.kv_len)


MASKS = {
    "left": left_padding,
    "right": right_padding,
    "random": lambda c: random_bool(c, c.batch, 1, c.q_len),
    "per_head": lambda c: random_bool(c, 1, c.heads, c.q_len),
    "no_keys": lambda c: random_bool(c, c.batch, 1, c.q_len) & (torch.rand(c.q_len, 1) < 0.5),
    "causal_float": lambda c: float_mask(
        torch.ones(c.q_len, c.kv_len, dtype=torch.bool).tril(c.kv_len - c.q_len), -math.inf
    )[None, None],
    "finfo_min": lambda c: float_mask(
        random_bool(c, c.batch, 1, c.q_len), torch.finfo(torch.float32).min
    ),
    "all_finfo_min": lambda c: float_mask(
        random_bool(c, c.batch, 1, c.q_len) & (torch.rand(c.q_len, 1) < 0.5),
        torch.finfo(torch.float32).min,
    ),
    "all_inf": lambda c: float_mask(torch.zeros(1, 1, c.q_len, c.kv_len).bool(), -math.inf),
    "bias": lambda c: torch.randn(1, c.heads, c.q_len, c.kv_len) * 2,
    "bias_f16": lambda c: torch.randn(1, c.heads, c.q_len, c.kv_len).half(),
    "bias_bf16": lambda c: torch.randn(c.batch, 1, c.q_len, c.kv_len).bfloat16(),
    "alibi": alibi,
    "per_row": lambda c: torch.rand(c.batch, 1, c.q_len, 1).expand(-1, -1, -1, c.kv_len) < 0.7,
}


@dataclass
class Tensors:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None = None
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    k_new: torch.Tensor | None = None
    v_new: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    sinks: torch.Tensor | None = None


def rows(c: Case, heads: int, length: int, dim: int) -> torch.Tensor:
    if c.seq_first:
        return torch.randn(c.batch, length, heads, dim).to(c.dtype).transpose(1, 2)
    return torch.randn(c.batch, heads, length, dim).to(c.dtype)


def make(c: Case, seed: int = 0) -> Tensors:
    torch.manual_seed(seed)
    v_dim = c.v_dim or c.dim
    t = Tensors(
        rows(c, c.heads, c.q_len, c.dim),
        rows(c, c.kv_heads, c.kv_len, c.dim),
        rows(c, c.kv_heads, c.kv_len, v_dim),
    )
    if c.mask:
        t.mask = MASKS[c.mask](c)
    if c.rope:
        angle = torch.rand(c.batch, 1, c.q_len, c.rope_dim or c.dim) * 6
        t.cos, t.sin = angle.cos().to(c.dtype), angle.sin().to(c.dtype)
    if c.new:
        t.k_new = rows(c, c.kv_heads, c.q_len, c.dim)
        t.v_new = rows(c, c.kv_heads, c.q_len, v_dim)
        if c.positions:
            t.positions = torch.randperm(c.kv_len)[: c.q_len]
    if c.sinks:
        size = (c.batch, c.heads, c.q_len, 1) if c.sinks == "rows" else (1, c.heads, 1, 1)
        t.sinks = (torch.randn(size) * 4).to(c.dtype)
    return t


def run(c: Case, t: Tensors, tier: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The kernel's output, in the case's dtype or this one; writes t.k and t.v when the case has new rows."""
    op, out = prepared(c, t, tier, dtype)
    op()
    return out


def prepared(
    c: Case, t: Tensors, tier: str, dtype: torch.dtype | None = None
) -> tuple[OneOp, torch.Tensor]:
    """The kernel as a call, and what it writes."""
    v_dim = c.v_dim or c.dim
    out = rows(c, c.heads, c.q_len, v_dim).fill_(math.nan).to(dtype or c.dtype)
    mask, bounds = t.mask, None
    if mask is not None:
        bounds = torch.full((*mask.shape[:3], 4), -7, dtype=torch.int32)
        run_op("mask_bounds", [mask, bounds], tier=tier, threads=c.threads)
        shape = (c.batch, c.heads, c.q_len)
        mask, bounds = mask.expand(*shape, c.kv_len), bounds.expand(*shape, 4)
    operands = [t.q, t.k, t.v, out, mask, bounds, t.cos, t.sin, t.k_new, t.v_new, t.positions]
    operands += [None] * 4 + [t.sinks]
    ints = [int(c.is_causal), c.causal_offset, c.window, c.rope, int(c.new)]
    ints += [int(c.bf16_products), int(c.nan_rows)]
    floats = [c.dim**-0.5, c.softcap]
    return OneOp("attention", operands, ints, floats, tier=tier, threads=c.threads), out


def rotate(c: Case, x: torch.Tensor, t: Tensors) -> torch.Tensor:
    if not c.rope:
        return x
    cos, sin = t.cos.double(), t.sin.double()
    r = cos.shape[-1]
    x, rest = x[..., :r], x[..., r:]
    if c.rope == ROPE_HALF:
        turned = torch.cat((-x[..., r // 2 :], x[..., : r // 2]), -1)
    else:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return torch.cat((x * cos + turned * sin, rest), -1)


def allowed_keys(c: Case, mask: torch.Tensor | None) -> torch.Tensor:
    """[B,H,Sq,Skv]: what the contract calls allowed."""
    i, j = torch.arange(c.q_len)[:, None] + c.causal_offset, torch.arange(c.kv_len)
    ok = torch.ones(c.q_len, c.kv_len, dtype=torch.bool)
    if c.is_causal:
        ok &= j <= i
    if c.window:
        ok &= j > i - c.window
    ok = ok.expand(c.batch, c.heads, -1, -1)
    if mask is None:
        return ok
    if mask.dtype == torch.bool:
        return ok & mask
    live = mask > -1e30
    return ok & (live | (~live.any(-1, keepdim=True) & (mask > -math.inf)))


def reference(c: Case, t: Tensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, and k and v after the new rows are written; all in float64."""
    q, k, v = rotate(c, t.q.double(), t), t.k.double(), t.v.double()
    if c.new:
        slots = t.positions if c.positions else torch.arange(c.kv_len - c.q_len, c.kv_len)
        k[:, :, slots] = rotate(c, t.k_new.double(), t).to(c.dtype).double()
        v[:, :, slots] = t.v_new.double()
    group = c.heads // c.kv_heads
    score = q @ k.repeat_interleave(group, 1).transpose(-1, -2) * c.dim**-0.5
    if c.softcap:
        score = c.softcap * torch.tanh(score / c.softcap)
    allowed = allowed_keys(c, t.mask)
    if t.mask is not None and t.mask.dtype != torch.bool:
        # fp32 on purpose: a row of finfo.min swallows its scores
        score = (score.float() + t.mask.float()).double()
    score = score.masked_fill(~allowed, -math.inf)
    if t.sinks is not None:
        score = torch.cat((score, t.sinks.double().expand(*score.shape[:3], 1)), -1)
    weight = torch.softmax(score, -1)[..., : c.kv_len]
    if not c.nan_rows or t.sinks is not None:
        weight = weight.masked_fill(~allowed.any(-1, keepdim=True), 0)
    value = v.repeat_interleave(group, 1)
    if not torch.isfinite(value).all():
        seen = torch.where(allowed[..., None], value[:, :, None], 0)
        return (weight[..., None] * seen).sum(-2), k, v
    return weight @ value, k, v


@cache
def solved(c: Case, seed: int) -> tuple[Tensors, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A problem and its reference, shared by the tiers."""
    t = make(c, seed)
    return t, *reference(c, t)


@cache
def solved_with(
    c: Case, where: str, rows: tuple[tuple[int, ...], ...], value: float
) -> tuple[Tensors, torch.Tensor]:
    """The same with numbers at some indices of q, k or v replaced by `value`."""
    t = make(c)
    for index in rows:
        getattr(t, where)[tuple(slice(None) if i == ALL else i for i in index)] = value
    return t, reference(c, t)[0]


def check(c: Case, tier: str, seed: int = 0) -> None:
    """The kernel against the reference, what it wrote to keys and values included."""
    t, want, k, v = solved(c, seed)
    t = replace(t, k=t.k.clone(), v=t.v.clone())
    assert_close(run(c, t, tier), want, c.accuracy)
    if c.new:
        assert_close(t.k, k, c.dtype)
        assert torch.equal(t.v.double(), v)


def _any_case(
    kv_heads: int, group: int, q_len: int, extra: int, dim: int, rope: int, **fields: Any
) -> Case:
    return Case(
        heads=kv_heads * group,
        kv_heads=kv_heads,
        q_len=q_len,
        kv_len=q_len + extra,
        dim=max(dim // 2 * 2, 2) if rope else dim,
        rope=rope,
        **fields,
    )


def problems(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Case]:
    """Whatever is asked for in whatever combination; `fields` are drawn too."""
    return st.builds(
        _any_case,
        batch=st.integers(1, 3),
        kv_heads=st.integers(1, 3),
        group=st.sampled_from([1, 2, 3, 4, 8]),
        q_len=st.integers(1, 90),
        extra=st.integers(0, 400),
        dim=st.integers(1, 80),
        v_dim=st.integers(1, 80),
        is_causal=st.booleans(),
        window=st.sampled_from([0, 0, 5, 100]),
        softcap=st.sampled_from([0.0, 0.0, 5.0]),
        mask=st.sampled_from(["", *(m for m in MASKS if m != "all_finfo_min")]),
        rope=st.sampled_from([ROPE_NONE, ROPE_HALF, ROPE_INTERLEAVED]),
        new=st.booleans(),
        positions=st.booleans(),
        seq_first=st.booleans(),
        nan_rows=st.booleans(),
        sinks=st.sampled_from(["", "", "heads", "rows"]),
        threads=st.integers(1, 4),
        **fields,
    )
