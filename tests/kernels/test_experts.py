"""Kernels of mixtures of experts: topk, the ways of tokens to experts and back, and grouped linears, in every tier this machine runs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmopt import _C, ops
from llmopt.native.experts import TABLE_INTS
from llmopt.packing import float_bytes
from llmopt.program import DTYPE_CODES, run_op

from tests.kernels.test_linear import pack, randn
from tests.kernels.test_linear_quantized import pack as pack_codes
from tests.kernels.test_linear_quantized import weights as codes_of
from tests.tolerance import assert_close

TIERS = _C.tiers()
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SILU = 2
FACTORS = [0.0, 1.0, 0.0]  # eps, alpha, norm offset

# How many rows each expert has. Many are enough for every kernel there is: one row, few, whole tiles and more.
ROWS = [
    (1,),
    (0, 0, 0),
    (2, 0, 1, 5),
    (0, 17, 0, 3),
    (1, 1, 1, 1, 1, 1, 1, 1),
    (33, 7, 0, 64),
    (130, 1, 97, 31),
]


def ends_of(rows: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(rows).cumsum(0).to(torch.int32)


@dataclass
class Grouped:
    """A grouped op on the packed weights of all experts, and the same by the linear of each alone."""

    op: str  # of one expert
    x: torch.Tensor
    packed: list[torch.Tensor]
    ends: torch.Tensor
    ints: list[int]
    outputs: int
    bias: torch.Tensor | None = None

    def together(self, tier: str, threads: int = 2) -> torch.Tensor:
        y, weights = self.result(), beyond(self.packed)
        table = torch.full((len(self.packed) + 2, TABLE_INTS), -1, dtype=torch.int64)
        operands = [self.x, weights, self.bias, None, y, None, None, self.ends, table]
        run_op(f"grouped_{self.op}", operands, self.ints, FACTORS, tier, threads)
        return y

    def one_by_one(self, tier: str) -> torch.Tensor:
        y, begin, ends = self.result(), 0, self.ends.cummax(0).values.clamp(0, len(self.x))
        for expert, end in enumerate(ends.tolist()):
            own = None if self.bias is None else self.bias[expert]
            if end > begin:
                rows, weights = slice(begin, end), beyond(self.packed[expert : expert + 1])
                operands = [self.x[rows], weights, own, None, y[rows], None, None]
                run_op(self.op, operands, self.ints, FACTORS, tier, 2)
            begin = end
        y[begin:] = 0.0
        return y

    def result(self) -> torch.Tensor:
        """Memory that shows what nobody wrote."""
        return torch.full((self.x.shape[0], self.outputs), 7.0, dtype=self.x.dtype)


def beyond(packed: list[torch.Tensor]) -> torch.Tensor:
    """Packed weights one behind the other, and what a prefetch may touch behind them."""
    return torch.cat([*packed, torch.zeros(8192, dtype=torch.uint8)])


def float_experts(experts: int, n: int, k: int, dtype: torch.dtype, gated: bool, tier: str):
    """Weights [E,N,K], and each packed, exactly as long as it is."""
    w = (randn(experts, n, k, seed=3) / k**0.5).to(dtype)
    size = float_bytes(n, k, dtype, _C.panel_width(tier))
    halves = [own.chunk(2) if gated else [own] for own in w]
    return w, [pack(list(h), tier, interleave=gated)[:size] for h in halves]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_grouped_linear_is_the_linear_of_each_expert(tier, rows, dtype):
    for (n, k), gated, threads in product(((40, 96), (66, 35)), (False, True), (1, 2)):
        ends, x = ends_of(rows), randn(sum(rows), k, dtype=dtype, seed=5)
        w, packed = float_experts(len(rows), n, k, dtype, gated, tier)
        bias = randn(len(rows), n, dtype=dtype, seed=6) if threads == 2 else None
        ints = [n, k, DTYPE_CODES[dtype], SILU if gated else 0, int(gated), 0]
        case = Grouped("linear", x, packed, ends, ints, n // 2 if gated else n, bias)
        y = case.together(tier, threads)
        assert torch.equal(y, case.one_by_one(tier))
        halves = list(w.double().chunk(2, 1)) if gated else [w.double()]
        biases = None if bias is None else list(bias.double().chunk(len(halves), 1))
        act = "silu" if gated else "none"
        want = ops.grouped_linear(x.double(), halves, ends, biases, act, gated)
        assert_close(y, want)


@pytest.mark.parametrize(
    ("bits", "group", "offsets"), [(8, 96, False), (8, 32, True), (4, 32, True), (4, 96, False)]
)
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_grouped_linear_quantized_is_the_linear_of_each_expert(tier, rows, bits, group, offsets):
    n, k = 72, 96
    ends = ends_of(rows)
    parts = [codes_of(n, k, bits, group, offsets) for _ in rows]
    forms = ((torch.float32, 1, False), (torch.bfloat16, 3, False), (torch.float32, 3, True))
    for threads, (dtype, planes, exact) in enumerate(forms, 1):
        x = randn(sum(rows), k, dtype=dtype, seed=5)
        packed = [pack_codes([w], tier)[:-4096] for w in parts]
        form = [bits, group, int(offsets), planes, int(exact)]
        ints = [n, k, DTYPE_CODES[torch.uint8], 0, 0, 0, *form]
        case = Grouped("linear_quantized", x, packed, ends, ints, n)
        y = case.together(tier, threads)
        assert torch.equal(y, case.one_by_one(tier))
        assert sum(rows) == 0 or not (y == 7.0).all(1).any()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.one_of(st.integers(0, 3), st.integers(0, 140)), min_size=1, max_size=9),
    st.sampled_from(FLOATS),
    st.integers(1, 70),
    st.sampled_from((8, 31, 64, 200)),
    st.integers(0, 5),
)
def test_any_shares_of_rows(rows, dtype, n, k, unrouted):
    """Memory for prepared rows is enough however they are shared out; rows behind the last end are zeros."""
    for tier in TIERS:
        ends = ends_of(tuple(rows))
        x = randn(sum(rows) + unrouted, k, dtype=dtype, seed=7)
        _, packed = float_experts(len(rows), n, k, dtype, False, tier)
        ints = [n, k, DTYPE_CODES[dtype], 0, 0, 0]
        case = Grouped("linear", x, packed, ends, ints, n)
        y = case.together(tier)
        assert torch.equal(y, case.one_by_one(tier))
        assert (y[sum(rows) :] == 0.0).all()


@pytest.mark.parametrize("tier", TIERS)
def test_ends_that_make_no_sense_touch_nothing_outside(tier):
    n, k = 16, 32
    _, packed = float_experts(4, n, k, torch.float32, False, tier)
    x = randn(6, k)
    ints = [n, k, DTYPE_CODES[torch.float32], 0, 0, 0]
    for ends in ([-3, 2, 1, 90], [9, 1, 1, 6], [0, 0, 0, -1]):
        wrong = torch.tensor(ends, dtype=torch.int32)
        case = Grouped("linear", x, packed, wrong, ints, n)
        assert torch.equal(case.together(tier), case.one_by_one(tier))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_sort_by_expert(tier, dtype):
    generator = torch.Generator().manual_seed(0)
    for places, experts in product((0, 1, 7, 1000), (1, 4, 130)):
        ids = torch.randint(-1, experts + 2, (places,), generator=generator).to(dtype)
        want = ops.sort_by_expert(ids, experts)
        made = [torch.full_like(t, -5) for t in want]
        run_op("sort_by_expert", [ids, *made], tier=tier)
        order, ends, in_order, inverse = made
        assert torch.equal(ends - ends[:1], want[1] - want[1][:1])
        assert torch.equal(order, want[0])
        assert torch.equal(in_order, ids[order])
        assert torch.equal(order[inverse], torch.arange(places))
        only = [torch.full_like(t, -5) for t in want[:2]]
        run_op("sort_by_expert", [ids, *only, None, None], tier=tier)
        assert torch.equal(only[0], order)
        assert torch.equal(only[1], ends)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_tokens_go_and_come_back(tier, dtype):
    for tokens, k, width in product((1, 5, 65), (1, 2, 8), (1, 17, 64)):
        x = randn(tokens, width + 3, dtype=dtype)[:, :width]
        ids = torch.randint(0, 9, (tokens * k,), generator=torch.Generator().manual_seed(k))
        order, _, _, inverse = ops.sort_by_expert(ids, 9)
        rows = torch.full((tokens * k, width), 7.0, dtype=dtype)
        run_op("gather_tokens", [x, order, rows], [k], tier=tier)
        assert torch.equal(rows, ops.gather_tokens(x, order, k))
        for of_weights in (dtype, torch.float32):
            weights = randn(k, tokens, dtype=of_weights, seed=2).T
            y = torch.full((tokens, width), 7.0, dtype=dtype)
            run_op("combine_experts", [rows, inverse, weights, y], tier=tier)
            want = ops.combine_experts(rows.double(), inverse, weights, torch.float64)
            assert_close(y, want)


@pytest.mark.parametrize("tier", TIERS)
def test_places_out_of_range_are_read_as_the_nearest(tier):
    x = randn(3, 8)
    far = torch.tensor([-9, 4, 1 << 40, 5])
    rows = torch.empty(4, 8)
    run_op("gather_tokens", [x, far, rows], [2], tier=tier)
    assert torch.equal(rows, x[[0, 2, 2, 2]])
    y = torch.empty(2, 8)
    run_op("combine_experts", [rows, far, torch.ones(2, 2), y], tier=tier)
    assert_close(y, torch.stack([rows[0] + rows[3], 2 * rows[3]]))
    picked = torch.empty(3, 2)
    run_op("pick", [x, torch.tensor([[-9, 7], [8, 1 << 40], [0, 5]]), picked], tier=tier)
    assert torch.equal(picked, torch.stack([x[0, [0, 7]], x[1, [7, 7]], x[2, [0, 5]]]))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_topk(tier, dtype):
    for m, n in product((1, 3, 70), (1, 5, 64, 130)):
        x = randn(m, n + 2, dtype=dtype, seed=n)[:, :n]
        for k in {1, min(n, 8), min(n, 64)}:
            values = torch.empty(m, k, dtype=dtype)
            indices = torch.full((m, k), -1)
            run_op("topk", [x, values, indices], [k], tier=tier)
            assert torch.equal(values, x.topk(k).values)
            assert torch.equal(x.gather(1, indices), values)
            assert (indices.sort(1).values.diff(dim=1) > 0).all()  # none twice
            alone = [torch.zeros_like(values), torch.zeros_like(indices)]
            run_op("topk", [x, alone[0], None], [k], tier=tier)
            run_op("topk", [x, None, alone[1]], [k], tier=tier)
            assert torch.equal(alone[0], values)
            assert torch.equal(alone[1], indices)
            picked = torch.zeros_like(values)
            run_op("pick", [x, indices, picked], tier=tier)
            assert torch.equal(picked, values)


@pytest.mark.parametrize("tier", TIERS)
def test_limit_groups(tier):
    for m, (groups, each) in product((1, 3, 70), ((1, 4), (4, 3), (8, 32), (64, 1))):
        x = randn(m, groups * each + 2, seed=groups)[:, : groups * each]
        for best, kept in product({1, min(2, each), each}, {1, groups // 2 or 1, groups}):
            y = torch.full(x.shape, 7.0)
            run_op("limit_groups", [x, y], [groups, best, kept], [-torch.inf], tier=tier)
            assert torch.equal(y, ops.limit_groups(x, groups, best, kept, -torch.inf))


@pytest.mark.parametrize("tier", TIERS)
def test_limit_groups_of_nan_and_of_equal_groups(tier):
    """A NaN is larger than any number, and so is its group; of equal groups the first is kept."""
    nan = float("nan")
    y = torch.empty(2, 6)
    x = torch.tensor([[1.0, 1, 5, 5, nan, 0], [2, 2, 2, 2, 1, 3]])
    run_op("limit_groups", [x, y], [3, 2, 1], [0.0], tier=tier)
    assert_close(y, torch.tensor([[0, 0, 0, 0, nan, 0], [2.0, 2, 0, 0, 0, 0]]))


@pytest.mark.parametrize("tier", TIERS)
def test_topk_of_equal_numbers_and_of_none(tier):
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([[2.0, 3.0, 3.0, -inf, 2.0], [nan, 1.0, inf, nan, -1.0], [-inf] * 5])
    values, indices = torch.empty(3, 3), torch.full((3, 3), -1)
    run_op("topk", [x, values, indices], [3], tier=tier)
    assert torch.equal(indices, torch.tensor([[1, 2, 0], [0, 3, 2], [0, 1, 2]]))
    assert_close(values.nan_to_num(nan=99.0), x.gather(1, indices).nan_to_num(nan=99.0))
