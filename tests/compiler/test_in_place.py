"""Graphs that write memory in place: a pass never reads a value earlier or later than the model did."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.compiler.rewriting import MASK, K, Q, V, check, randn

torch.library.define("llmopt_tests::double_second", "(Tensor x, Tensor(a!) y) -> ()")
torch.library.impl("llmopt_tests::double_second", "CPU", lambda x, y: y.mul_(2) is None or None)
torch.library.impl("llmopt_tests::double_second", "Meta", lambda x, y: None)


@torch.library.custom_op("llmopt_tests::add", mutates_args=["ys"])
def add_to_all(x: Tensor, ys: list[Tensor]) -> None:
    for y in ys:
        y.add_(x)


@add_to_all.register_fake
def _(x: Tensor, ys: list[Tensor]) -> None:
    return None


def double_operator(x: Tensor) -> None:
    torch.ops.llmopt_tests.double_second(torch.ones(1), x)


def double_in_a_list(x: Tensor) -> None:
    torch._foreach_mul_([x], 2.0)


def double_by_out_of_several(x: Tensor) -> None:
    torch.frexp(x, out=(x, torch.empty(x.shape, dtype=torch.int32)))


def double_list_argument(x: Tensor) -> None:
    torch.ops.llmopt_tests.add(torch.ones(1), [x])


def double_with_an_operator(x: Tensor) -> None:
    x **= 2


def double_method(x: Tensor) -> None:
    x.mul_(2)


WRITES = [
    double_operator,
    double_in_a_list,
    double_by_out_of_several,
    double_list_argument,
    double_with_an_operator,
    double_method,
]
written = pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)


@written
def test_a_slice_for_a_list_is_a_copy(write: Any) -> None:
    def function(x: Tensor) -> Tensor:
        row = x[:, [1]]
        write(x)
        return row * 3 + x

    check(function, randn(4, 6))


def test_a_sum_in_place_keeps_its_dtype() -> None:
    """x += y of a wider dtype is rounded to x's; x + y would be y's."""

    def function(x: Tensor, wide: Tensor) -> Tensor:
        scores = x @ x.T
        scores += wide
        return scores.add_(other=wide) @ x

    check(function, randn(4, 4).bfloat16(), randn(4, 4))


@written
def test_repeated_work(write: Any) -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        before = (x + 1).cos()
        write(x)
        return before * 2, (x + 1).cos() * 2

    check(function, randn(4, 6))


@written
def test_norm(write: Any) -> None:
    """The sum of squares is read before the write, x after it, and the other way round."""
    weight = nn.Parameter(randn(16))

    def early(x: Tensor) -> Tensor:
        r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        write(x)
        return x * r * weight

    def late(x: Tensor) -> Tensor:
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        write(x)
        return normed * weight

    check(early, randn(4, 16))
    check(late, randn(4, 16))


@written
def test_rotation(write: Any) -> None:
    cos, sin = randn(1, 1, 5, 8), randn(1, 1, 5, 8, seed=1)

    def function(x: Tensor) -> Tensor:
        straight = x * cos
        write(x)
        return straight + torch.cat((-x[..., 4:], x[..., :4]), -1) * sin

    check(function, randn(2, 3, 5, 8))


@written
def test_rotary_tables(write: Any) -> None:
    frequencies = randn(1, 1, 4)

    def function(positions: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        half = positions[:, :, None] * frequencies
        write(positions)
        angles = torch.cat((half, half), -1)
        return angles.cos() * x, angles.sin() * x

    check(function, randn(2, 5), randn(2, 5, 8))


@written
def test_embedding(write: Any) -> None:
    def function(ids: Tensor, table: Tensor) -> Tensor:
        rows = F.embedding(ids, table)
        write(table)
        return rows * 3.0

    check(function, torch.arange(6).view(2, 3), randn(8, 16))


@written
def test_activation(write: Any) -> None:
    def function(x: Tensor) -> Tensor:
        gate = torch.sigmoid(x)
        write(x)
        return x * gate

    check(function, randn(4, 16))


@written
def test_spelled_out_attention(write: Any) -> None:
    def late_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.transpose(2, 3)).masked_fill(~MASK, float("-inf")).softmax(-1)
        write(k)
        return weights @ v

    def late_mask(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        weights = (q @ k.transpose(2, 3) + bias).softmax(-1)
        write(bias)
        return weights @ v

    check(late_values, Q, K, V, leaves=["attention"])
    check(late_mask, Q, K, V, randn(5, 5), leaves=["attention"])


@written
def test_repeated_heads(write: Any) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys = k[:, :, None].expand(2, 1, 3, 5, 8).reshape(2, 3, 5, 8)
        write(k)
        return F.scaled_dot_product_attention(q, keys, v)

    check(function, Q, K[:, :1].contiguous(), V)


@written
def test_what_stands_around_a_linear(write: Any) -> None:
    linear, up = nn.Linear(16, 16), nn.Linear(16, 16)

    def activated(x: Tensor) -> Tensor:
        y = linear(x)
        write(x)
        return F.gelu(y)

    def gated(x: Tensor) -> Tensor:
        gate = F.silu(linear(x))
        write(x)
        return gate * up(x)

    def residual(x: Tensor) -> Tensor:
        y = linear(x)
        write(x)
        return y + x

    def scaled(x: Tensor) -> Tensor:
        y = F.linear(x, linear.weight)
        write(x)
        return y * 3.0

    def side_by_side(x: Tensor) -> tuple[Tensor, Tensor]:
        first = linear(x)
        write(x)
        return first, up(x)

    def normed(x: Tensor) -> Tensor:
        h = F.layer_norm(x, (16,))
        write(x)
        return linear(h)

    def sliced_norm(x: Tensor) -> Tensor:
        h = F.layer_norm(x, (16,))
        write(x)
        return linear(h[-1:])

    for function in (activated, gated, residual, scaled, side_by_side, normed, sliced_norm):
        check(function, randn(4, 16))


@written
def test_a_flattened_product(write: Any) -> None:
    """GPT-2's linear between two views."""
    weight, bias = nn.Parameter(randn(16, 24)), nn.Parameter(randn(24))

    def function(x: Tensor) -> Tensor:
        y = torch.addmm(bias, x.view(-1, 16), weight)
        write(x)
        return y.view(2, 3, 24)

    check(function, randn(2, 3, 16))


@written
def test_elementwise_chains(write: Any) -> None:
    def function(x: Tensor) -> Tensor:
        y = x.exp() + 1
        write(x)
        return (y * x).tanh() / 3

    check(function, randn(4, 16))


@written
def test_a_copy_for_a_layout(write: Any) -> None:
    """The transposed x is copied in front of each of its readers, not once for all."""
    norm = nn.LayerNorm(6)

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        turned = x.transpose(0, 1)
        before = norm(turned)
        write(x)
        return before, norm(turned)

    check(function, randn(6, 8), takes=["norm"])


def test_appending_to_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, cache: Tensor) -> tuple[Tensor, ...]:
        keys, values = torch.cat((cache, k), 2), torch.cat((cache, v), 2)
        k.mul_(2)
        return F.scaled_dot_product_attention(q, keys, values), keys, values

    check(function, Q, K, V, randn(2, 3, 4, 8))


def test_a_result_edited_in_place_moves_with_its_memory() -> None:
    """What an in-place operation returns is the value it wrote, also where a kernel made that value."""
    linear = nn.Linear(16, 16)

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.layer_norm(x.transpose(0, 1), (16,))
        edited = h.add_(1)
        early = linear(edited)
        h.mul_(3)
        return early, linear(edited)

    check(function, randn(16, 4, 16))


def test_a_static_cache_still_runs_natively() -> None:
    """A read behind the write stays where it is, so that writes elsewhere forbid nothing."""
    at = torch.tensor([3])

    def function(q: Tensor, k: Tensor, v: Tensor, cache: Tensor) -> Tensor:
        cache.index_copy_(2, at, k)
        weights = (q @ cache.transpose(2, 3)).softmax(-1)
        return weights @ v

    check(function, Q, K[:, :, :1].contiguous(), V, randn(2, 3, 5, 8), takes=["attention"])


def test_a_counter_that_was_edited_is_not_counted_anew() -> None:
    linear = torch.nn.Linear(8, 8)

    def edited(x: torch.Tensor) -> torch.Tensor:
        p = torch.arange(x.shape[0])
        p[0] = 7
        return linear(x) + (p + 3)[:, None]

    def by_name(x: torch.Tensor) -> torch.Tensor:
        return linear(x) + (torch.arange(0, end=x.shape[0]) + 3)[:, None]

    x = torch.randn(5, 8)
    with torch.no_grad():
        for f in (edited, by_name):
            torch.testing.assert_close(torch.compile(f, backend="llmopt")(x), f(x))
