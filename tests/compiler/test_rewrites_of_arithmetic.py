"""Rotations, and elementwise arithmetic: what passes take, and what only looks like it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.compiler.rewriting import INF, check, heads, randn


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def test_rotations_with_tables_of_fewer_dimensions_than_heads() -> None:
    x, tables = heads(), (randn(5, 8), randn(5, 8, seed=1))
    check(rotary, x, *tables, takes=["rope"])
    check(rotary, x, *(t[None] for t in tables), takes=["rope"])
    check(rotary, x.transpose(1, 2), *(t[:, None] for t in tables), takes=["rope"])
    check(
        lambda x, a: rotary(x, a.cos(), a.sin()) + rotary(-x, a.cos(), a.sin()),
        x,
        tables[0],
        takes=["rope"],
    )


def test_tables_that_x_is_broadcast_to() -> None:
    """Of more batches, or of more positions than x: the result is larger than x."""
    one_batch, one_position = heads(batch=1), heads()[:, :, :1]
    check(rotary, one_batch, randn(2, 1, 5, 8), randn(2, 1, 5, 8, seed=1))
    check(rotary, one_position, randn(5, 8), randn(5, 8, seed=1))

    def partial(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        turned, rest = rotary(x[..., :4], cos, sin), x[..., 4:]
        return torch.cat((turned, rest.expand(*turned.shape)), -1)

    check(partial, one_position, randn(5, 4), randn(5, 4, seed=1))


def test_a_table_for_each_head_is_no_rotation_by_position() -> None:
    check(rotary, heads(), randn(3, 5, 8), randn(3, 5, 8, seed=1), leaves=["rope"])
    check(rotary, heads(), randn(5, 8), randn(3, 5, 8), leaves=["rope"])


def by_halves(first: Callable, second: Callable) -> Callable:
    def function(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat((first(a, b, cos, sin), second(a, b, cos, sin)), -1)

    return function


@pytest.mark.parametrize(
    "function",
    [
        by_halves(lambda a, b, c, s: a * c - b * s, lambda a, b, c, s: b * c + a * s),
        by_halves(lambda a, b, c, s: c * a - s * b, lambda a, b, c, s: s * a + c * b),
        by_halves(lambda a, b, c, s: a * c + b * s, lambda a, b, c, s: a * (-s) + b * c),
        by_halves(lambda a, b, c, s: a * c + b * -s, lambda a, b, c, s: a * s + b * c),
    ],
)
def test_rotations_written_for_halves(function: Callable) -> None:
    x, tables = heads(), (randn(5, 4), randn(5, 4, seed=1))
    check(function, x, *tables, takes=["rope"])
    check(function, x.transpose(1, 2), *(t[:, None] for t in tables), takes=["rope"])

    def halves_of_slices(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        a, b = x[..., :4], x[..., 4:]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        return turned + function(x, cos, sin)

    check(halves_of_slices, x, *tables, takes=["rope"])

    def partly(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return torch.cat((function(x[..., :8], cos, sin), x[..., 8:]), -1)

    check(partly, randn(2, 3, 5, 12), *tables, takes=["rope"])


def test_halves_with_tables_that_are_written() -> None:
    turn = by_halves(lambda a, b, c, s: a * c - b * s, lambda a, b, c, s: b * c + a * s)

    def between(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first = turn(x, cos, sin)
        cos.mul_(2)
        sin[0].zero_()
        return first + turn(x, cos, sin)

    def before(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        table = torch.empty(5, 4)
        table.copy_(cos)
        return turn(x, table, sin)

    for function in (between, before):
        check(function, heads(), randn(5, 4), randn(5, 4, seed=1), takes=["rope"])


def test_tables_of_one_column_broadcast() -> None:
    check(rotary, heads(), randn(5, 1), randn(5, 1, seed=1), leaves=["rope"])


@pytest.mark.parametrize(
    "function",
    [
        by_halves(lambda a, b, c, s: a * c + b * s, lambda a, b, c, s: b * c + a * s),
        by_halves(lambda a, b, c, s: a * c - b * s, lambda a, b, c, s: b * s + a * c),
        by_halves(lambda a, b, c, s: b * c - a * s, lambda a, b, c, s: a * c + b * s),
        by_halves(lambda a, b, c, s: a * c - b * s, lambda a, b, c, s: b * c + a * c),
        by_halves(lambda a, b, c, s: s * s - b * c, lambda a, b, c, s: b * c + a * s),
        by_halves(lambda a, b, c, s: -a * c - b * s, lambda a, b, c, s: -b * c + a * s),
    ],
)
def test_halves_that_do_not_rotate(function: Callable) -> None:
    check(function, heads(), randn(5, 4), randn(5, 4, seed=1), leaves=["rope"])


@pytest.mark.parametrize(
    "bend",
    [
        lambda x: x.clamp(-0.5, 0.7),
        lambda x: torch.clamp(x, max=0.3),
        lambda x: torch.clip(x, 0.1, None),
        lambda x: x.clamp_min(0.2).clamp_max(0.4),
        lambda x: x.clamp(1.0, -1.0),  # the largest wins
        F.relu6,
        F.hardtanh,
        lambda x: F.hardtanh(x, -0.1, max_val=0.2),
        F.leaky_relu,
        lambda x: F.leaky_relu(x, negative_slope=0.3),
    ],
)
def test_limits_and_slopes(bend: Callable) -> None:
    x = randn(6, 16) * 3
    x[0, :3] = torch.tensor([float("nan"), INF, -INF])
    linear = nn.Linear(16, 16)
    check(lambda x, y: bend(x + linear(y)) + 1, x, x[1], takes=["linear"], in_pytorch=[])


def test_slopes_without_end_stay_in_pytorch() -> None:
    linear = nn.Linear(16, 16)
    check(lambda x: F.leaky_relu(linear(x), INF), randn(6, 16), in_pytorch=["leaky_relu"])


@pytest.mark.parametrize(
    "bend",
    [
        lambda x: x.clamp(max=1e39),
        lambda x: x.clamp_min(1e39),
        lambda x: F.leaky_relu(x, 1e39),
        lambda x: x.half().clamp(max=7e4),
    ],
)
@torch.no_grad()
def test_numbers_that_the_dtype_cannot_hold_are_refused_as_in_eager(bend: Callable) -> None:
    linear, x = nn.Linear(16, 16), randn(6, 16)
    torch._dynamo.reset()
    for call in (bend, torch.compile(lambda x: bend(linear(x)), backend="llmopt")):
        with pytest.raises(RuntimeError, match="without overflow"):
            call(x)


def test_limits_that_are_tensors() -> None:
    linear, high = nn.Linear(16, 16), randn(6, 1, seed=2)
    clamped = lambda x, low: linear(x).clamp(min=low, max=high)  # noqa: E731
    check(clamped, randn(6, 16), randn(16), takes=["linear", "pointwise"], in_pytorch=[])
    check(clamped, randn(6, 16), randn(16).double(), in_pytorch=["clamp"])


def test_gated_linear_units() -> None:
    linear, back = nn.Linear(16, 24), nn.Linear(12, 16)
    check(lambda x: back(F.glu(linear(x))), randn(2, 6, 16), takes=["linear"], in_pytorch=[])
    check(
        lambda x: F.glu(linear(x), 1), randn(2, 6, 16), takes=["linear", "pointwise"], in_pytorch=[]
    )
    check(lambda x: nn.GLU(dim=0)(linear(x)), randn(2, 6, 16), takes=["linear"], in_pytorch=[])


def test_a_mask_of_a_buffer_is_made_by_a_kernel() -> None:
    """Of each layer's own, as in GPTs written by hand."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(24, 72)
            self.register_buffer("bias", torch.tril(torch.ones(1, 1, 9, 9)))
            self.register_buffer("allowed", torch.ones(9, 9, dtype=torch.bool).tril())

        def forward(self, x: torch.Tensor, by_number: bool) -> torch.Tensor:
            q, k, v = (t.unflatten(-1, (3, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            size = x.shape[1]
            hidden = (
                self.bias[:, :, :size, :size] == 0 if by_number else ~self.allowed[:size, :size]
            )
            scores = (q @ k.transpose(-2, -1) * 0.3).masked_fill(hidden, -torch.inf)
            return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    layers = nn.ModuleList(Layer() for _ in range(2)).eval()
    for by_number in (True, False):
        both = lambda x, n=by_number: layers[1](layers[0](x, n), n)  # noqa: E731
        check(both, randn(2, 5, 24), takes=["attention", "pointwise"], in_pytorch=[])


@pytest.mark.parametrize(
    "function",
    [
        lambda h, x: torch.ops.aten.atan(h) + x,
        lambda h, x: torch.ops.aten.elu(h) + h,
        lambda h, x: torch.ops.aten.gelu(h) * x,
        lambda h, x: torch.ops.aten.rrelu_with_noise(h, torch.empty(6, 16), 0.2, 0.2, True) + x,
        lambda h, x: torch.cos(h, out=torch.empty(6, 16)) + x,
        lambda h, x: F.batch_norm(h, x[0] * 0, x[0] * 0 + 1, training=True) + x,
    ],
    ids=["atan", "elu", "gelu", "rrelu", "out", "batch_norm"],
)
def test_operators_with_overloads_that_write(function: Callable) -> None:
    """Their result is their own, though an overload of theirs, or noise and statistics, are written; h moves into a wider product."""
    first, second = nn.Linear(16, 16), nn.Linear(16, 16)
    check(lambda x: function(first(x), x) + second(x), randn(6, 16), takes=["linear"])
