"""Row kernels (norm, softmax, embedding, index_copy, slide, copy, rope) against float64, in every tier."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmopt import _C
from llmopt.program import run_op

from tests.tolerance import assert_close

TIERS = _C.tiers()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [(1, 1), (3, 17), (2, 64), (5, 576), (7, 1000), (1, 4096)]  # (rows, width)

pytestmark = pytest.mark.parametrize("tier", TIERS)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def spaced_rows(x: torch.Tensor, extra: int = 5) -> torch.Tensor:
    """The same values in rows that lie further apart; the gaps hold NaN."""
    wide = torch.full((x.shape[0], x.shape[1] + extra), float("nan"), dtype=x.dtype)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


def norm_reference(x, residual, weight, bias, kind, eps, offset):
    total = x.double() + (0 if residual is None else residual.double())
    centred = total - (total.mean(-1, keepdim=True) if kind == 2 else 0)
    y = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    if weight is not None:
        y = y * (offset + weight.double())
    return total, y if bias is None else y + bias.double()


@pytest.mark.parametrize("kind", [1, 2], ids=["rms", "layer"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm(tier, kind, dtype):
    for rows, width in SIZES:
        check_norm(tier, kind, dtype, rows, width)


def check_norm(tier, kind, dtype, rows, width):
    x, residual = randn(rows, width, dtype=dtype), randn(rows, width, dtype=dtype, seed=1)
    weight, bias = randn(width, dtype=dtype, seed=2), randn(width, seed=3)
    for given_residual, given_weight, given_bias, offset in [
        (None, None, None, 0.0),
        (None, weight, None, 1.0),
        (residual, weight.float(), bias, 0.0),
    ]:
        y = spaced_rows(torch.zeros(rows, width, dtype=dtype))
        total = torch.zeros(rows, width, dtype=dtype) if given_residual is not None else None
        operands = [spaced_rows(x), given_residual, given_weight, given_bias, y, total]
        run_op("norm", operands, [kind], [1e-5, offset], tier)
        want_sum, want = norm_reference(
            x, given_residual, given_weight, given_bias, kind, 1e-5, offset
        )
        assert_close(y, want)
        if total is not None:
            assert_close(total, want_sum)


def test_norm_mixes_dtypes_and_writes_in_place(tier):
    x, residual, weight = randn(6, 100), randn(6, 100, dtype=torch.float16, seed=1), randn(100)
    want_sum, want = norm_reference(x, residual, weight, None, 1, 1e-6, 0.0)
    y = torch.zeros(6, 100, dtype=torch.bfloat16)
    run_op("norm", [x, residual, weight, None, y, x], [1], [1e-6, 0.0], tier)  # sum into x
    assert_close(y, want)
    assert_close(x, want_sum)
    _, again = norm_reference(x, None, weight, None, 1, 1e-6, 0.0)
    run_op("norm", [x, None, weight, None, x, None], [1], [1e-6, 0.0], tier)  # y into x
    assert_close(x, again)


def test_norm_of_heads_cut_out_of_a_projection(tier):
    """Rows at two strides or more: y's row m is the m-th row of x in the order of x's own dimensions."""
    fused = randn(2, 5, 7 * 24)
    heads = fused[..., 24 : 4 * 24].unflatten(-1, (3, 24))
    for x in (heads, heads.transpose(1, 2), heads[:1], heads[:, :1], heads[..., :1, :]):
        y = torch.zeros(x.numel() // 24, 24)
        run_op("norm", [x, None, randn(24), None, y, None], [1], [1e-6, 0.0], tier)
        rows = x.reshape(-1, 24)
        assert_close(y, norm_reference(rows, None, randn(24), None, 1, 1e-6, 0.0)[1])


def test_layer_norm_with_a_large_mean(tier):
    x = randn(4, 768) + 1000.0
    y = torch.empty_like(x)
    run_op("norm", [x, None, None, None, y, None], [2], [1e-5, 0.0], tier)
    _, want = norm_reference(x, None, None, None, 2, 1e-5, 0.0)
    assert_close(y, want)


def test_norm_keeps_nan_and_inf_in_their_rows(tier):
    x = randn(4, 33)
    x[1, 32] = float("nan")
    x[2, 5] = float("inf")
    y = torch.empty_like(x)
    run_op("norm", [x, None, None, None, y, None], [1], [1e-5, 0.0], tier)
    _, want = norm_reference(x, None, None, None, 1, 1e-5, 0.0)
    assert torch.isnan(y[1]).all()
    assert torch.equal(torch.isnan(y[2]), torch.isnan(want[2]))
    assert_close(y[[0, 3]], want[[0, 3]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax(tier, dtype):
    for width in (1, 3, 16, 17, 129, 1000):
        check_softmax(tier, dtype, width)


def check_softmax(tier, dtype, width):
    x = (randn(2, 3, 5, width, dtype=dtype) * 4).transpose(1, 2)
    y = torch.empty(2, 3, 5, width, dtype=dtype).transpose(1, 2)
    run_op("softmax", [x, y], tier=tier)
    assert_close(y, torch.softmax(x.double(), -1))
    run_op("softmax", [x, x], tier=tier)
    assert torch.equal(x, y)


def test_softmax_special_rows(tier):
    inf, nan = float("inf"), float("nan")
    x = torch.zeros(6, 40)
    x[0] = -inf
    x[1, 3] = nan
    x[2, 39] = inf
    x[3, :39] = -inf
    x[4] = 3e38
    x[5, 20] = nan
    x[5, 21:] = 7.0
    y = torch.empty_like(x)
    run_op("softmax", [x, y], tier=tier)
    assert_close(y, torch.softmax(x.double(), -1))


def test_softmax_row_longer_than_the_scratch(tier):
    x = randn(1, 300_000)
    y = torch.empty_like(x)
    run_op("softmax", [x, y], tier=tier)
    assert_close(y, torch.softmax(x.double(), -1))


@pytest.mark.parametrize("table_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding(tier, table_dtype, dtype):
    table = spaced_rows(randn(50, 37, dtype=table_dtype))
    ids = torch.randint(0, 50, (40,), generator=torch.Generator().manual_seed(0))[::2]
    for scale in (1.0, 24.0):
        y = spaced_rows(torch.zeros(20, 37, dtype=dtype))
        run_op("embedding", [ids, table, y], floats=[scale], tier=tier)
        assert_close(y, table[ids].double() * scale)


def test_embedding_of_ids_in_any_layout(tier):
    table = randn(50, 8)
    ids = torch.randint(0, 50, (6, 4, 10), generator=torch.Generator().manual_seed(0))
    for view in (ids.transpose(0, 1), ids[:, ::2, 1:7], ids[0, 0, :1].expand(5), ids.int().mT):
        y = torch.zeros(view.numel(), 8)
        run_op("embedding", [view, table, y], floats=[1.0], tier=tier)
        assert torch.equal(y, table[view.long()].flatten(0, -2))


@pytest.mark.parametrize("bad", [-1, 4, 1 << 40, -(1 << 62)])
def test_embedding_refuses_ids_outside_the_table(tier, bad):
    table, y = randn(4, 8), torch.full((3, 8), 7.0)
    with pytest.raises(IndexError, match="out of range"):
        run_op("embedding", [torch.tensor([0, bad, 2]), table, y], floats=[1.0], tier=tier)
    assert torch.equal(y, torch.full((3, 8), 7.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_index_copy(tier, dtype):
    cache = torch.zeros(40, 2, 3, 20, dtype=dtype).permute(1, 2, 0, 3)
    x = randn(2, 5, 3, 20).transpose(1, 2)
    index = torch.tensor([3, 39, 0, 7, 21])
    want = cache.clone().index_copy(2, index, x.to(dtype))
    run_op("index_copy", [cache, index, x], tier=tier)
    assert torch.equal(cache, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 40, 20), (1, 1, 33, 128), (1, 1, 7, 5)], ids=str)
def test_slide(tier, dtype, shape):
    """Caches as they are, and with positions in front of heads; fewer heads than threads cut a head by columns."""
    batch, heads, length, width = shape
    for new in (1, 3, length):
        x = randn(batch, new, heads, width, seed=1).to(dtype).transpose(1, 2)
        dense = randn(*shape).to(dtype)
        for cache in (dense, dense.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)):
            want = torch.cat((cache[:, :, new:], x), 2)
            run_op("slide", [cache, x], tier=tier)
            assert torch.equal(cache, want)


def rope_reference(x, cos, sin, kind):
    x, cos, sin = x.double(), cos.double(), sin.double()
    dims = cos.shape[-1]
    turned, rest = x[..., :dims], x[..., dims:]
    if kind == 1:
        low, high = turned.chunk(2, -1)
        rotated = torch.cat([-high, low], -1)
    else:
        rotated = torch.stack([-turned[..., 1::2], turned[..., ::2]], -1).flatten(-2)
    return torch.cat([turned * cos + rotated * sin, rest], -1)


@pytest.mark.parametrize("kind", [1, 2], ids=["half", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope(tier, kind, dtype):
    for width, rotary in [(64, 64), (80, 32), (20, 10), (256, 128), (2, 2)]:
        check_rope(tier, kind, dtype, width, rotary)


def check_rope(tier, kind, dtype, width, rotary):
    x = randn(2, 5, 3, width, dtype=dtype).transpose(1, 2)
    cos, sin = (randn(2, 1, 5, rotary, dtype=dtype, seed=s) for s in (1, 2))
    for c, s in [(cos, sin), (cos[:1].float(), sin[:1].float())]:
        want = rope_reference(x, c, s, kind)
        y = torch.zeros_like(x)
        run_op("rope", [x, c, s, y], [kind], tier=tier)
        assert_close(y, want)
    same = x.clone()
    run_op("rope", [same, cos, sin, same], [kind], tier=tier)
    assert_close(same, rope_reference(x, cos, sin, kind))


def test_rope_with_broadcast_tables_of_two_rows(tier):
    x = randn(2, 3, 4, 16)
    cos, sin = (randn(1, 1, 1, 16, seed=s).expand(2, 1, 4, 16) for s in (1, 2))
    y = torch.empty_like(x)
    run_op("rope", [x, cos, sin, y], [1], tier=tier)
    assert_close(y, rope_reference(x, cos, sin, 1))


COPY_VIEWS = {
    "plain": lambda x: x,
    "last two": lambda x: x.transpose(-1, -2),
    "heads": lambda x: x.transpose(1, 2),
    "reversed": lambda x: x.permute(3, 2, 1, 0),
    "outer": lambda x: x.permute(1, 0, 2, 3),
    "sliced": lambda x: x[:, 1:, ::2, 1:],
    "expanded": lambda x: x[:, :1].expand(-1, 4, -1, -1),
    "expanded last": lambda x: x[..., :1].expand(-1, -1, -1, 9),
}


@pytest.mark.parametrize(
    "dtypes",
    [(d, d) for d in (*DTYPES, torch.int64, torch.int32, torch.bool, torch.int8)]
    + [(a, b) for a in DTYPES for b in DTYPES if a is not b],
    ids=str,
)
def test_copy(tier, dtypes):
    for name, view in COPY_VIEWS.items():
        for shape in [(2, 3, 5, 7), (3, 4, 33, 65)]:
            x = view(randn(*shape).mul(50).to(dtypes[0]))
            for y in (
                torch.zeros(x.shape, dtype=dtypes[1]),
                torch.zeros(x.shape[::-1], dtype=dtypes[1]).permute(3, 2, 1, 0),
            ):
                run_op("copy", [x, y], tier=tier)
                assert torch.equal(y, x.to(dtypes[1])), (name, shape, y.stride())


def test_copy_moves_every_bit_of_a_float(tier):
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32)
    wide = (bits * 65537 + 12345).view(256, 256)
    x = wide.view(torch.float32).t()
    y = torch.empty(256, 256)
    run_op("copy", [x, y], tier=tier)
    assert torch.equal(y.view(torch.int32), wide.t())
    for dtype in (torch.float16, torch.bfloat16):
        x = bits.to(torch.int16).view(dtype).view(256, 256).t()
        y = torch.empty(256, 256, dtype=dtype)
        run_op("copy", [x, y], tier=tier)
        finite = ~torch.isnan(x)
        assert torch.equal(y.view(torch.int16)[finite], x.contiguous().view(torch.int16)[finite])
        assert torch.isnan(y[~finite]).all()


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_copy_of_any_view(tier, data):
    ndim = data.draw(st.integers(0, 6))
    shape = data.draw(st.lists(st.sampled_from([1, 2, 3, 5, 17]), min_size=ndim, max_size=ndim))
    order_x = data.draw(st.permutations(range(ndim)))
    order_y = data.draw(st.permutations(range(ndim)))
    repeated = data.draw(st.sets(st.sampled_from(range(ndim)), max_size=2) if ndim else st.just(()))
    base = randn(*(shape[d] for d in order_x)) if ndim else randn(1)[0]
    x = base.permute([order_x.index(d) for d in range(ndim)])
    for d in repeated:
        x = x.narrow(d, 0, 1).expand_as(x)
    y = torch.zeros([shape[d] for d in order_y]).permute([order_y.index(d) for d in range(ndim)])
    run_op("copy", [x, y], tier=tier)
    assert torch.equal(x, y)


def test_nothing_to_do(tier):
    """Zero-size operands run no chunk and touch nothing."""
    empty = torch.empty(0, 8)
    run_op("norm", [empty, None, randn(8), None, empty.clone(), None], [1], [1e-5, 0.0], tier)
    run_op("softmax", [empty, empty.clone()], tier=tier)
    run_op("softmax", [torch.empty(4, 0), torch.empty(4, 0)], tier=tier)
    run_op("copy", [torch.empty(3, 0, 2), torch.empty(3, 0, 2)], tier=tier)
    ids = torch.empty(0, dtype=torch.int64)
    run_op("embedding", [ids, randn(4, 8), empty], floats=[1.0], tier=tier)
    cache = randn(1, 2, 4, 8)
    before = cache.clone()
    run_op("index_copy", [cache, ids, torch.empty(1, 2, 0, 8)], tier=tier)
    assert torch.equal(cache, before)
    heads, angles = torch.empty(1, 2, 0, 8), torch.empty(1, 1, 0, 8)
    run_op("rope", [heads, angles, angles.clone(), heads.clone()], [1], tier=tier)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_agree_bit_for_bit(tier, threads):
    x, weight = randn(301, 97), randn(97)
    one, many = torch.empty_like(x), torch.empty_like(x)
    run_op("norm", [x, None, weight, None, one, None], [2], [1e-5, 0.0], tier, threads=1)
    run_op("norm", [x, None, weight, None, many, None], [2], [1e-5, 0.0], tier, threads=threads)
    assert torch.equal(one, many)
    run_op("copy", [x.t(), many.view(97, 301)], tier=tier, threads=threads)
    assert torch.equal(many.view(97, 301), x.t())
