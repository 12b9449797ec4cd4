"""Passes leave alone what only looks like their pattern, and still take what is one: attention, norms, copies, windows.

Each function runs compiled and in eager; `takes` names ops that its plan must hold, `leaves` those it must not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from llmopt.compiled import alive
from torch import nn
from torch.nn import functional as F

from tests.compiler.rewriting import INF, MASK, K, Q, V, check, heads, randn
from tests.e2e.compare import assert_same_output


def softmax_attention(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable:
    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return change(q @ k.transpose(2, 3)).softmax(-1) @ v

    return function


@pytest.mark.parametrize("fill", [0.0, 1.0, -1.0, -100.0, -60000.0, INF])
def test_a_fill_that_counts_is_no_mask(fill: float) -> None:
    check(softmax_attention(lambda s: s.masked_fill(~MASK, fill)), Q, K, V, leaves=["attention"])
    check(softmax_attention(lambda s: torch.where(MASK, s, fill)), Q, K, V, leaves=["attention"])


@pytest.mark.parametrize("fill", [-INF, -65504.0, -1e9, torch.finfo(torch.float32).min])
def test_a_fill_that_never_counts_is_a_mask(fill: float) -> None:
    check(softmax_attention(lambda s: s.masked_fill(~MASK, fill)), Q, K, V, takes=["attention"])
    check(softmax_attention(lambda s: torch.where(MASK, s, fill)), Q, K, V, takes=["attention"])
    check(
        softmax_attention(lambda s: torch.where(~MASK, torch.tensor(fill), s)),
        *(Q, K, V),
        takes=["attention"],
    )


def test_a_fill_from_outside_is_no_constant() -> None:
    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, fill: torch.Tensor) -> Any:
        return torch.where(MASK, q @ k.transpose(2, 3), fill).softmax(-1) @ v

    check(function, Q, K, V, torch.tensor(0.5), leaves=["attention"])


@pytest.mark.parametrize("fill", [-65504.0, -1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("factor", [1.0, 100.0])
def test_a_row_of_nothing_but_fills_is_uniform(fill: float, factor: float) -> None:
    dead = MASK.clone()
    dead[2] = False
    check(
        softmax_attention(lambda s: (s * factor).masked_fill(~dead, fill)),
        *(Q, K, V),
        takes=["attention"],
    )


def test_what_follows_a_fill_may_bring_it_back() -> None:
    bias = 65500 * torch.ones(5, 5)
    check(softmax_attention(lambda s: s.masked_fill(~MASK, -65504.0) + bias), Q, K, V)
    check(softmax_attention(lambda s: s.masked_fill(~MASK, -65504.0) * -1e-4), Q, K, V)
    dead = torch.zeros(5, 5, dtype=torch.bool)
    check(softmax_attention(lambda s: s.masked_fill(~dead, -65504.0) + MASK.float()), Q, K, V)


def test_masks_and_biases_in_a_row() -> None:
    bias, padding = randn(5, 5), torch.arange(5) < 4
    check(
        softmax_attention(
            lambda s: (s + bias).masked_fill(~MASK, -1e9).masked_fill(~padding, -INF)
        ),
        *(Q, K, V),
        takes=["attention"],
    )
    check(softmax_attention(lambda s: (s.masked_fill(~MASK, -1e38) + bias) / 2), Q, K, V)


def sunk(scores: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Scores [B,H,Sq,Skv] with one more a row."""
    return torch.cat((scores, sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)), -1)


def less_largest(x: torch.Tensor) -> torch.Tensor:
    return x - x.max(dim=-1, keepdim=True).values


@pytest.mark.parametrize(
    "weights",
    [
        lambda x, s: sunk(x, s).softmax(-1)[..., :-1],
        lambda x, s: less_largest(sunk(x + MASK.log(), s)).softmax(-1)[..., :-1],
        lambda x, s: sunk(x.masked_fill(~MASK, -INF), s).float().softmax(-1)[..., :-1].to(x.dtype),
        lambda x, s: sunk(x, s).softmax(-1)[:, :, :, :-1],
        lambda x, s: less_largest(x).softmax(-1),
        lambda x, s: (x - x.amax(-1, keepdim=True)).softmax(-1),
    ],
    ids=[
        "sinks",
        "sinks less the largest",
        "masked sinks",
        "all dimensions",
        "less the largest",
        "less amax",
    ],
)
def test_sinks_and_scores_less_their_largest(weights: Callable) -> None:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: Any) -> torch.Tensor:
        return weights(q @ k.transpose(2, 3), sinks) @ v

    check(attention, Q, K, V, randn(3) * 4, takes=["attention"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool])
def test_sinks_of_other_dtypes(dtype: torch.dtype) -> None:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: Any) -> torch.Tensor:
        weights = sunk(q @ k.transpose(2, 3), sinks).softmax(-1)[..., :-1]
        return weights.to(v.dtype) @ v

    check(attention, Q, K, V, (randn(3) * 4).to(dtype), leaves=["attention"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wide", [False, True])
def test_rows_whose_keys_all_have_the_least_bias(wide: bool, dtype: torch.dtype) -> None:
    """In half precision it swallows every score, in a float32 sum that of float16 does not; here alone, and over a fill."""
    least = torch.finfo(dtype).min
    bias = torch.zeros(5, 5, dtype=dtype).masked_fill(torch.arange(5)[:, None] < 3, least)

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: Any) -> torch.Tensor:
        scores = q @ k.transpose(2, 3)
        scores = scores.float() if wide else scores
        return ((scores + bias).softmax(-1).to(v.dtype)) @ v

    def after_a_fill(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: Any) -> torch.Tensor:
        scores = (q @ k.transpose(2, 3)).masked_fill(~MASK, least / 2)
        return (scores + bias / 2).softmax(-1) @ v

    inputs = [t.to(dtype) for t in (Q, K, V)]
    check(attention, *inputs, bias, takes=["attention"])
    if not wide:
        check(after_a_fill, *inputs, bias)


@pytest.mark.parametrize(
    "weights",
    [
        lambda x, s: sunk(x, s).softmax(-1)[..., 1:],  # without the first key, with the sink
        lambda x, s: sunk(x, s).softmax(-1)[..., :-2] @ torch.ones(4, 5),
        lambda x, s: torch.cat((sunk(x, s)[..., 5:], x), -1).softmax(-1)[..., :-1],  # sink in front
        lambda x, s: sunk(sunk(x, s), s).softmax(-1)[..., :-1][..., :-1],
        lambda x, s: (x - x.max(dim=-2, keepdim=True).values).softmax(-1),
        lambda x, s: (x - x.min(dim=-1, keepdim=True).values * 0.5).softmax(-1),
        lambda x, s: (x - (x + s.sum()).amax(-1, keepdim=True) * 2).softmax(-1),
    ],
)
def test_what_looks_like_sinks(weights: Callable) -> None:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: Any) -> torch.Tensor:
        return weights(q @ k.transpose(2, 3), sinks) @ v

    check(attention, Q, K, V, randn(3) * 4, leaves=["attention"])


def test_weights_that_others_read_beside_the_sinks() -> None:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: Any) -> tuple:
        weights = sunk(q @ k.transpose(2, 3), sinks).softmax(-1)
        return weights[..., :-1] @ v, weights

    check(attention, Q, K, V, randn(3) * 4, leaves=["attention"])


def test_heads_split_otherwise_between_softmax_and_product() -> None:
    """Scores [2, 3, 5, 5] seen as [3, 2, 5, 5] take another bias."""
    bias = randn(3, 2, 1, 1)

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = (q @ k.transpose(2, 3)).view(3, 2, 5, 5) * 2
        weights = (scores.masked_fill(~MASK, -INF) + bias * MASK).softmax(-1)
        return weights.view(2, 3, 5, 5) @ v

    check(function, Q, K, V, leaves=["attention"])


def test_weights_reshaped_behind_softmax() -> None:
    """[2, 3, 4, 4] read as [2, 3, 2, 8] multiplies other rows."""
    q, k, v = randn(2, 3, 4, 8), randn(2, 3, 4, 8), randn(2, 3, 8, 8)

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.transpose(2, 3)).softmax(-1).view(2, 3, 2, 8) @ v

    check(function, q, k, v, leaves=["attention"])


def test_scores_that_a_bias_broadcasts_to_more() -> None:
    bias, row = randn(4, 1, 5, 5), randn(5, 1)
    one = (heads(0, batch=1), heads(1, batch=1), heads(2, batch=1))
    check(softmax_attention(lambda s: s + bias), *one, leaves=["attention"])
    check(softmax_attention(lambda s: s + row), Q[:, :, :1], K, V, leaves=["attention"])


def test_values_of_more_heads_or_batches() -> None:
    check(softmax_attention(lambda s: s), Q[:1], K[:1], V, leaves=["attention"])
    check(softmax_attention(lambda s: s), Q[:, :1], K[:, :1], V, leaves=["attention"])


def test_a_factor_of_one_is_a_copy() -> None:
    def returned(x: torch.Tensor) -> Any:
        return x * 1.0, x / 1

    def edited(x: torch.Tensor) -> Any:
        y = x * 1.0
        y.zero_()
        return x + y

    def window(x: torch.Tensor) -> Any:
        return (x * 1.0)[0]

    check(edited, randn(3, 4))
    for function in (returned, window):
        x = randn(3, 4)
        first = torch.compile(function, backend="llmopt")(x)
        first = first[0] if isinstance(first, tuple) else first
        first.zero_()
        assert torch.equal(x, randn(3, 4))


def test_an_index_of_one_is_a_copy() -> None:
    x = randn(3, 4, 5)
    row = torch.compile(lambda x: x[:, [1]], backend="llmopt")(x)
    row.zero_()
    assert torch.equal(x, randn(3, 4, 5))


def test_a_list_of_a_bool_is_a_mask() -> None:
    check(lambda x: x[[True], :1] * 2, randn(1, 4))
    check(lambda x: x[:, [False]] * 2, randn(4, 1))


def test_a_view_as_another_dtype() -> None:
    """Behind a value that a kernel makes in another layout."""

    def function(x: torch.Tensor) -> torch.Tensor:
        y = F.layer_norm(x.transpose(0, 1), (16,)).transpose(0, 1) * 2
        bits = y.contiguous().view(torch.int32)
        return bits.view(dtype=torch.float32) + 1

    def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v).view(torch.int32).view(torch.float32)

    check(function, randn(6, 4, 16), takes=["norm"])
    check(attended, Q, K, V, takes=["attention"])


def test_norms_whose_eps_changes() -> None:
    def layer(x: torch.Tensor, eps: float) -> torch.Tensor:
        return F.layer_norm(x, (16,), eps=eps)

    def rms(x: torch.Tensor, eps: float) -> torch.Tensor:
        return F.rms_norm(x, (16,), eps=eps)

    for function in (layer, rms):
        check(function, randn(4, 16), 0.1, dynamic=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_an_rms_norm_without_eps_takes_that_of_float32(dtype: torch.dtype) -> None:
    x = (randn(4, 64) * 1e-3).to(
        dtype
    )  # so small that the eps of a short dtype would be most of the sum
    check(lambda x: F.rms_norm(x, (64,)), x, takes=["norm"])


class RoundedNorm(nn.Module):
    """RMSNorm as Llama writes it: rounded to the dtype of its input, then times the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + randn(64, seed=1) / 10, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


def test_a_norm_that_rounds_before_a_wider_weight_rounds() -> None:
    x = randn(5, 64).bfloat16()
    norm = RoundedNorm()
    got = torch.compile(norm, backend="llmopt")(x)
    assert got.dtype == torch.float32
    assert (got / norm(x) - 1).abs().max() < 5e-3, (
        "one step of bf16, where the last bit was near the middle"
    )
    assert ((got / norm(x) - 1).abs() < 1e-6).float().mean() > 0.95


def test_an_attention_whose_scale_changes() -> None:
    """A number that has changed once is an input of the graph; tracing an attention ties it to its value again."""

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="llmopt")
    for scale in (0.3, 0.4, 0.5):
        assert_same_output(compiled(Q, K, V, scale), function(Q, K, V, scale))
        (plan,) = [g.plan for g in alive() if g.plan is not None][-1:]
        assert [r.op for r in plan.records()] == ["attention"]


def silu(x: torch.Tensor) -> torch.Tensor:
    return x - 1


def test_a_function_of_the_user_is_known_by_its_module_too() -> None:
    torch._dynamo.allow_in_graph(silu)
    check(lambda x: silu(x * 2) + 1, randn(4, 16))


def test_row_means_of_rows_that_differ_in_width() -> None:
    """Each is a chain of its own: together they would have no shape."""

    def function(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        wide, narrow = (x.pow(2).mean(-1, keepdim=True) for x in (a, b))
        return wide.mul(2).add(1) * narrow

    check(function, randn(2, 5, 64), randn(2, 5, 3))
    check(function, randn(2, 5, 64), randn(2, 5, 64), dynamic=True)


def test_padding_by_a_size_that_changes() -> None:
    """What stands behind a fused chain gets new example values, and PyTorch pads by a symbol in Python only."""

    def function(x: torch.Tensor) -> torch.Tensor:
        y = x.transpose(1, 2).mul(2).add(1)
        return F.pad(y, (0, -y.shape[-1] % 4))

    for length in (6, 9):
        check(function, randn(2, length, 5), dynamic=True)


torch.manual_seed(0)
ONE, TWO = (torch.nn.Linear(12, 12, bias=False).requires_grad_(False) for _ in range(2))


def windows_of_heads(x: torch.Tensor) -> torch.Tensor:
    """Two linears that become one, whose rows then lie further apart than those that were traced."""
    q, k = ONE(x), TWO(x)
    q /= 2.0
    heads = [y.view(6, 2, 2, 6).permute(1, 2, 0, 3).reshape(4, 6, 6) for y in (q, k)]
    size = (4, 2, 4, 6)
    q, k = (y.as_strided(size, (y.stride(0), 2 * y.stride(1), y.stride(1), 1)) for y in heads)
    return q @ k.mT


def test_windows_count_in_the_layout_that_was_traced() -> None:
    check(windows_of_heads, randn(6, 2, 12), takes=["linear"])
    check(lambda x: ONE(x).as_strided((3, 4), (2, 1), 5), randn(6, 12), takes=["linear"])


def beside_its_tensor(x: torch.Tensor) -> torch.Tensor:
    return ONE(x)[2:].as_strided((2, 12), (12, 1), 0)


def written_afterwards(x: torch.Tensor) -> torch.Tensor:
    y = ONE(x)
    window = y.as_strided((3, 4), (2, 1))
    y.mul_(2)
    return window + 1


@pytest.mark.parametrize("function", [beside_its_tensor, written_afterwards])
def test_windows_that_cannot_be_followed_stay_in_pytorch(function: Callable) -> None:
    check(function, randn(6, 12), leaves=["linear"])


def test_a_cap_that_rounds_is_none() -> None:
    cap = softmax_attention(lambda s: 5.0 * torch.tanh(torch.div(s, 5.0, rounding_mode="floor")))
    check(cap, Q, K, V, leaves=["attention"])
    check(softmax_attention(lambda s: 5.0 * torch.tanh(s / 5.0)), Q, K, V, takes=["attention"])


def test_a_bias_of_one_element_is_one_for_all_outputs() -> None:
    weight = nn.Parameter(randn(64, 64), requires_grad=False)
    bias = nn.Parameter(randn(1), requires_grad=False)
    check(lambda x: F.linear(x, weight, bias), randn(3, 64))
    check(lambda x: torch.addmm(bias, x, weight), randn(3, 64))


def test_an_index_out_of_range_is_an_error() -> None:
    compiled = torch.compile(lambda x: x[:, [70]] * 2, backend="llmopt")
    with pytest.raises(Exception, match="70"), torch.no_grad():
        compiled(randn(3, 64))


def test_half_of_an_activation_at_infinity() -> None:
    x = torch.tensor([[-INF, -1.0, 2.0, INF]])
    for chain in (lambda x: torch.relu(x) * x, lambda x: torch.relu(x).square()):
        check(chain, x)


def grown(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *caches: torch.Tensor) -> Any:
    keys, values = (torch.cat(pair, 2) for pair in zip(caches, (k, v), strict=True))
    return F.scaled_dot_product_attention(q, keys, values), keys, values


@pytest.mark.parametrize("which", [slice(0, 2), slice(0, 3, 2), slice(0, 3)])
def test_caches_of_which_one_is_returned(which: slice) -> None:
    inputs = (heads(n)[:, :, :1] for n in range(3))
    caches = (heads(5), heads(6))
    check(lambda *given: grown(*given)[which], *inputs, *caches, takes=["attention"])


@pytest.mark.parametrize("cached", [0, 5])
def test_caches_that_grow_without_a_query_or_a_key(cached: int) -> None:
    caches = (heads(5)[:, :, :cached], heads(6)[:, :, :cached])
    none, some = heads(1)[:, :, :0], heads(2)[:, :, :3]
    check(grown, none, some, some, *caches)
    check(grown, some, none, none, *(heads(5), heads(6)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_rotations_that_kernels_do_not_compute(dtype: torch.dtype) -> None:
    """Nothing but floats of up to 32 bits is rotated in float32."""
    cos, sin = ((100 * randn(1, 1, 5, 8, seed=i)).to(dtype) for i in range(2))

    def whole(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    def halves(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        c, s = cos[..., :4], sin[..., :4]
        return torch.cat((a * c - b * s, b * c + a * s), -1)

    x = (2**30 * heads()).to(dtype)
    for function in (whole, halves):
        torch._dynamo.reset()
        assert torch.equal(torch.compile(function, backend="llmopt")(x), function(x))
