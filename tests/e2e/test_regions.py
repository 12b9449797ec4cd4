"""What `torch.compiler.nested_compile_region` marks: traced once, compiled as if it stood in every place."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from llmopt.compiled import alive
from torch import Tensor, nn

from tests.e2e.blocks import build
from tests.e2e.compare import assert_same_output

Mark = Callable[[Callable], Callable]


def model(mark: Mark) -> nn.Module:
    """Three layers, with a region in a region; a layer gives its keys too, which are a view, and writes a cache."""

    class FeedForward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(48), nn.Linear(48, 80), nn.Linear(80, 48)

        @mark
        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.gelu(self.up(self.norm(x))))

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.qkv, self.out = nn.RMSNorm(48), nn.Linear(48, 144), nn.Linear(48, 48)
            self.feed_forward = FeedForward()
            self.register_buffer("cache", torch.zeros(1, 3, 12, 16))

        @mark
        def forward(self, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
            parts = self.qkv(self.norm(x)).chunk(3, -1)
            q, k, v = (t.unflatten(-1, (3, 16)).transpose(1, 2) for t in parts)
            self.cache.index_copy_(2, at, v)
            attended = F.scaled_dot_product_attention(q, k, self.cache[:, :, : k.shape[2]])
            x = x + self.out(attended.transpose(1, 2).flatten(2))
            return x + self.feed_forward(x), k

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(3))

        def forward(self, x: Tensor, at: Tensor) -> tuple[Tensor, list[Tensor]]:
            keys = []
            for layer in self.layers:
                x, k = layer(x, at)
                keys.append(k)
            return x, keys

    return build(Model)


def steps() -> list[str]:
    plan = alive()[-1].plan
    assert plan is not None
    return [r.detail for r in plan.records()]


@torch.no_grad()
def test_a_marked_layer_is_compiled_where_it_is_called(backend: str) -> None:
    """The steps of the same model unmarked, each layer with its own weights and its own cache, which is written."""
    eager, unmarked, marked = (
        model(mark) for mark in (lambda f: f, lambda f: f, torch.compiler.nested_compile_region)
    )
    compiled = [torch.compile(m, backend=backend) for m in (unmarked, marked)]
    for length in (7, 5, 12):
        x = torch.randn(1, length, 48), torch.arange(length).flip(0)
        want, wanted_steps = eager(*x), []
        for each in compiled:
            assert_same_output(each(*x), want)
            if backend == "llmopt":
                wanted_steps.append(steps())
        assert len({tuple(s) for s in wanted_steps}) <= 1
        for a, b in zip(eager.layers, marked.layers, strict=True):
            assert_same_output(b.cache, a.cache)
    for each in (eager, marked):
        each.layers[1].feed_forward.up.weight.mul_(3)
    assert_same_output(compiled[1](*x), eager(*x))


@torch.no_grad()
def test_a_branch_in_a_region(backend: str) -> None:
    """What is PyTorch's stays so, with the graphs it brings."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = step(layer, x)
            return x

    @torch.compiler.nested_compile_region
    def step(layer: nn.Module, x: Tensor) -> Tensor:
        y = layer(x)
        return torch.cond(y.sum() > 0, lambda t: t.relu(), lambda t: t - 1, (y,))

    eager = build(Model)
    compiled = torch.compile(eager, backend=backend)
    for seed in range(4):
        x = torch.randn(3, 32, generator=torch.Generator().manual_seed(seed))
        assert_same_output(compiled(x), eager(x))


def test_gradients_through_a_region(backend: str) -> None:
    marked = model(torch.compiler.nested_compile_region)
    layer = marked.layers[0].feed_forward
    grads = []
    for module in (layer, torch.compile(layer, backend=backend)):
        x = torch.ones(2, 48, requires_grad=True)
        module(x).pow(2).sum().backward()
        grads.append(x.grad)
    assert_same_output(grads[1], grads[0])
