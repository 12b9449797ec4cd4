"""Results that their readers round anyway are bf16; all others keep the model's dtype."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from llmopt import backend
from llmopt.compiled import alive
from torch import Tensor, nn
from torch.nn import functional as F

W8A8 = {"precision": "w8a8", "group": "channel"}


class Layer(nn.Module):
    """Attention and a feed-forward network, as an encoder has them."""

    def __init__(self, change: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(64)
        self.q, self.k, self.v, self.out = (nn.Linear(64, 64) for _ in range(4))
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (4, 16)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, self.change(k), v).transpose(1, 2).flatten(2)
        x = self.norm(x + self.out(y))
        return x + self.down(F.gelu(self.up(x)))


@pytest.fixture(autouse=True)
def every_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    tiers = ("scalar", "avx2", "avx512", "avx512_vnni", "amx")
    monkeypatch.setattr(backend, "_NARROWS", tiers)


@torch.no_grad()
def dtypes_of(net: nn.Module, x: Tensor, **options: str) -> list[tuple[str, str]]:
    """What its linears and attentions read and give; the result is near that of plain rounding."""
    torch._dynamo.reset()
    got = torch.compile(net, backend="llmopt", options=W8A8 | options)(x)
    want = net(x)
    assert got.dtype == want.dtype
    assert (got - want).norm() < 0.02 * want.norm()
    plan = alive()[-1].plan
    assert plan is not None
    assert len(plan.segments) == 1
    found = [r for r in plan.records() if r.op in ("linear_quantized", "attention")]
    return [(dtype(r.inputs[0]), dtype(r.outputs[0])) for r in found]


def dtype(operand: str) -> str:
    return operand.rsplit("]", 1)[1]


def x_of(seed: int = 0) -> Tensor:
    return torch.randn(2, 48, 64, generator=torch.Generator().manual_seed(seed))


def test_an_encoder_layer() -> None:
    """q, k, v and what attention makes of them; what the activation gives. Sums with a residual stay f32."""
    found = dtypes_of(Layer().eval(), x_of())
    assert found == [
        ("f32", "bf16"),
        ("bf16", "bf16"),
        ("bf16", "f32"),
        ("f32", "bf16"),
        ("bf16", "f32"),
    ]


def test_what_another_operation_reads_stays() -> None:
    """Keys that are scaled on their way are no result of a linear: then attention reads f32, and gives it."""
    found = dtypes_of(Layer(lambda k: k * 0.9).eval(), x_of())
    assert found[-2:] == [("f32", "bf16"), ("bf16", "f32")]
    assert {pair for pair in found[:-2]} == {("f32", "f32")}


def test_exact_attention_keeps_all() -> None:
    assert set(dtypes_of(Layer().eval(), x_of(), attention="exact")) == {("f32", "f32")}


@torch.no_grad()
def test_what_is_seen_elsewhere_stays() -> None:
    """Returned, read by a norm in front of the linear, added as a residual, written in place."""
    up, down, norm = nn.Linear(64, 128), nn.Linear(128, 128), nn.LayerNorm(128)

    def returned(x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.gelu(up(x))
        return h, down(h)

    def normed(x: Tensor) -> Tensor:
        return down(norm(F.gelu(up(x))))

    def added(x: Tensor) -> Tensor:
        h = F.gelu(up(x))
        return h + down(h)

    def written(x: Tensor) -> Tensor:
        h = up(x)
        h.clamp_(-0.5, 0.5)
        return down(h)

    for function in (returned, normed, added, written):
        torch._dynamo.reset()
        compiled = torch.compile(function, backend="llmopt", options=W8A8)
        got, want = compiled(x_of()), function(x_of())
        plan = alive()[-1].plan
        assert plan is not None
        assert "bf16" not in [dtype(o) for r in plan.records() for o in r.outputs], str(plan)
        for a, b in zip(*((y if isinstance(y, tuple) else (y,)) for y in (got, want)), strict=True):
            assert a.dtype == torch.float32
            assert (a - b).norm() < 0.03 * b.norm()


@torch.no_grad()
def test_a_model_in_half_precision_stays_in_it() -> None:
    net = Layer().half().eval()
    x = x_of().half()
    got = torch.compile(net, backend="llmopt", options=W8A8)(x)
    assert got.dtype == torch.float16
    plan = alive()[-1].plan
    assert plan is not None
    assert "bf16" not in [dtype(o) for r in plan.records() for o in r.outputs]


@torch.no_grad()
def test_views_that_need_f32_keep_it() -> None:
    """Complex numbers and bits of a float exist in f32 only; so little as a few rows stay too."""
    first, second = nn.Linear(64, 64), nn.Linear(64, 64)

    def turned(x: Tensor) -> Tensor:
        z = torch.view_as_complex(first(x).unflatten(-1, (-1, 2)))
        return second(torch.view_as_real(z).flatten(-2))

    def bits(x: Tensor) -> Tensor:
        return second(first(x).view(torch.int32).view(torch.float32))

    def few(x: Tensor) -> Tensor:
        return second(first(x[0, :5]))

    for function in (turned, bits, few):
        torch._dynamo.reset()
        got = torch.compile(function, backend="llmopt", options=W8A8)(x_of())
        want = function(x_of())
        assert (got - want).norm() < 0.03 * want.norm()
        plan = alive()[-1].plan
        assert plan is not None
        assert "bf16" not in str(plan)
