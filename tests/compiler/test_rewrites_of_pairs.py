"""Rotations of pairs of neighbours, as models write them with complex numbers and with stacks; and what only looks like one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from llmopt.compiled import alive
from torch import Tensor, nn

from tests.compiler.rewriting import check, randn

WIDTH = 8


def turns(length: int = 5) -> Tensor:
    angles = torch.outer(torch.arange(length).float(), 0.3 ** torch.arange(WIDTH // 2))
    return torch.polar(torch.ones_like(angles), angles)


def as_complex(x: Tensor, turns: Tensor) -> Tensor:
    """Llama's own code: heads behind positions."""
    numbers = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    turns = turns.view(1, x.shape[1], 1, numbers.shape[-1])
    return torch.view_as_real(numbers * turns).flatten(3).type_as(x)


def as_complex_in_front(x: Tensor, turns: Tensor) -> Tensor:
    """DeepSeek-V2's: heads in front, one table for each prompt."""
    numbers = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
    turned = torch.view_as_real(numbers * turns[None].expand(x.shape[0], -1, -1).unsqueeze(1))
    return turned.reshape(x.shape).to(x.dtype)


def stacked(x: Tensor, turns: Tensor) -> Tensor:
    """gpt-fast's: a table of cosines and sines side by side."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    table = torch.view_as_real(turns).view(1, pairs.size(1), 1, pairs.size(3), 2)
    first = pairs[..., 0] * table[..., 0] - pairs[..., 1] * table[..., 1]
    second = pairs[..., 1] * table[..., 0] + pairs[..., 0] * table[..., 1]
    return torch.stack([first, second], -1).flatten(3).type_as(x)


def unbound(x: Tensor, turns: Tensor) -> Tensor:
    """x · cos + rotate(x) · sin, the pairs by unbind."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((-b, a), -1).flatten(-2)
    cos, sin = (
        t.repeat_interleave(2, -1)[None, :, None].to(x.dtype) for t in (turns.real, turns.imag)
    )
    return x * cos + rotated * sin


def even_and_odd(x: Tensor, turns: Tensor) -> Tensor:
    cos, sin = turns.real[:, None], turns.imag[:, None]
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)


def backwards(x: Tensor, turns: Tensor) -> Tensor:
    """By the negative angles."""
    cos, sin = turns.real[:, None], turns.imag[:, None]
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack((a * cos + b * sin, b * cos - a * sin), -1).flatten(-2).to(x.dtype)


SPELLINGS = (as_complex, stacked, unbound, even_and_odd, backwards)


@pytest.mark.parametrize("rotate", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_spellings(rotate: Callable[..., Tensor], dtype: torch.dtype) -> None:
    x = randn(2, 5, 3, WIDTH).to(dtype)
    check(rotate, x, turns(), takes=["rope"])
    check(lambda x, t: rotate(x[:, :1], t[2:3]), x, turns(), takes=["rope"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_in_front(dtype: torch.dtype) -> None:
    check(as_complex_in_front, randn(2, 3, 5, WIDTH).to(dtype), turns(), takes=["rope"])


class Layers(nn.Module):
    """Every layer makes its own views of the buffer of turns."""

    def __init__(self, rotate: Callable[..., Tensor]) -> None:
        super().__init__()
        self.rotate = rotate
        self.layers = nn.ModuleList(nn.Linear(3 * WIDTH, 3 * WIDTH) for _ in range(4))
        self.register_buffer("turns", turns(32))

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        for layer in self.layers:
            rows = layer(x).unflatten(-1, (3, WIDTH))
            x = x + self.rotate(rows, self.turns[start : start + x.shape[1]]).flatten(2)
        return x


@pytest.mark.parametrize("rotate", [as_complex, stacked])
@torch.no_grad()
def test_layers_share_what_is_made_of_the_table(rotate: Callable[..., Tensor]) -> None:
    torch._dynamo.reset()
    model = Layers(rotate).eval()
    compiled = torch.compile(model, backend="llmopt")
    for start, length in ((0, 5), (5, 1), (6, 1), (2, 9)):
        x = randn(2, length, 3 * WIDTH)
        torch.testing.assert_close(compiled(x, start), model(x, start), rtol=1e-4, atol=1e-5)
    plan = alive()[-1].plan
    assert len(plan.segments) == 1, plan
    assert sum(r.op == "rope" for r in plan.records()) == 4, plan
    assert sum(f.node.name.startswith("stack") for f in plan.fallbacks) == 2, plan


def complexly(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def function(x: Tensor, turns: Tensor) -> Tensor:
        numbers = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(change(numbers, turns)).flatten(-2)

    return function


def test_conjugates_turn_backwards() -> None:
    function = complexly(lambda z, t: z * t.conj().view(1, 5, 1, -1))
    check(function, randn(2, 5, 3, WIDTH), turns(), takes=["rope"])


def test_a_table_written_between_two_layers() -> None:
    def function(x: Tensor, turns: Tensor) -> Tensor:
        x = as_complex(x, turns) + x
        turns.mul_(1j)
        return as_complex(x, turns) + stacked(x, turns)

    check(function, randn(2, 5, 3, WIDTH), turns())


@pytest.mark.parametrize("rotate", [as_complex, stacked])
def test_a_table_written_before_the_first_layer(rotate: Callable[..., Tensor]) -> None:
    def function(x: Tensor, turns: Tensor) -> Tensor:
        some = turns[:5]
        turns.mul_(1j)
        return rotate(x, some) + rotate(x, turns[1:6])

    takes = ["rope"] if rotate is as_complex else []
    check(function, randn(2, 5, 3, WIDTH), turns(8), takes=takes)


def test_x_written_before_the_product() -> None:
    def function(x: Tensor, turns: Tensor) -> Tensor:
        numbers = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        x.mul_(2)
        return torch.view_as_real(numbers * turns.view(1, 5, 1, -1)).flatten(3)

    check(function, randn(2, 5, 3, WIDTH), turns())


def stacks(change: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Tensor, Tensor], Tensor]:
    def function(x: Tensor, turns: Tensor) -> Tensor:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = turns.real[:, None], turns.imag[:, None]
        return torch.stack(change(a, b, cos, sin), -1).flatten(-2)

    return function


LEFT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a sum": complexly(lambda z, t: z + t.view(1, 5, 1, -1)),
    "a square": complexly(lambda z, t: z * z),
    "more rows than x": complexly(lambda z, t: z[:, :1] * t.view(1, 5, 1, -1)),
    "one turn for all pairs": complexly(lambda z, t: z * t[:, :1].view(1, 5, 1, 1)),
    "one turn for all": complexly(lambda z, t: z * t[1, 1]),
    "a reflection": stacks(lambda a, b, c, s: (a * c + b * s, a * s - b * c)),
    "two sums": stacks(lambda a, b, c, s: (a * c + b * s, b * c + a * s)),
    "two numbers": stacks(lambda a, b, c, s: (a * c - b * s, a * c + b * s)),
    "the other order": stacks(lambda a, b, c, s: (b * c + a * s, a * c - b * s)),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_only_looks_like_one(name: str) -> None:
    check(LEFT[name], randn(2, 5, 3, WIDTH), turns(), leaves=["rope"])


def test_heads_that_turn_each_by_its_own() -> None:
    """In the place of positions."""
    check(complexly(lambda z, t: z * t[None, None, :3]), randn(2, 5, 3, WIDTH), turns())
