"""Tensors whose elements are not what lies in their memory: PyTorch reads them, and kernels what PyTorch made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llmopt
import pytest
import torch
import torch.nn.functional as F
from llmopt.compiled import alive
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tests.tolerance import assert_close


class Doubled(torch.Tensor):
    """Twice the tensor it holds; has no memory of its own, as the weights of quantisation libraries."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Doubled:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict, meta: Any, size: Any, stride: Any) -> Doubled:
        return Doubled(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Doubled(args[0].inner)
        plain = tree_map(lambda a: a.inner * 2 if isinstance(a, Doubled) else a, args)
        return func(*plain, **(kwargs or {}))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def negated(*shape: int) -> Tensor:
    """A tensor that PyTorch negates whenever it reads it."""
    value = randn(*shape, dtype=torch.complex64).conj().imag
    assert value.is_neg()
    return value


def sparse(*shape: int) -> Tensor:
    return (randn(*shape) * (randn(*shape) > 0.5)).to_sparse_csr()


def with_weight(weight: Tensor) -> Block:
    block = Block()
    block.up.weight = nn.Parameter(weight, requires_grad=False)
    return block


@torch.no_grad()
def check(call: Callable[..., Tensor], x: Tensor, native: int, **how: Any) -> Any:
    """As in eager, twice; `native`: how many steps run in kernels. Returns the plan."""
    torch._dynamo.reset()
    before = {id(g) for g in alive()}
    compiled, want = torch.compile(call, backend="llmopt", **how), call(x)
    for _ in range(2):
        assert_close(compiled(x), want)
    (plan,) = [g.plan for g in alive() if id(g) not in before]
    assert len(list(plan.records())) == native, str(plan)
    return plan


@pytest.mark.parametrize("make", [Doubled, None], ids=["no memory", "negated"])
def test_as_input(make: Callable | None) -> None:
    """The first linear is PyTorch's, the second a kernel's."""
    plan = check(Block(), negated(5, 64) if make is None else make(randn(5, 64)), native=1)
    why = "PyTorch reads it" if make is None else "a Doubled, which has no memory of its own"
    assert any(why in f.reason for f in plan.fallbacks)


WEIGHTS = {
    "no memory": lambda *shape: Doubled(randn(*shape) / 8),
    "negated": negated,
    "sparse": sparse,  # Dynamo leaves its linear out of the graph
}


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("weight", WEIGHTS)
def test_as_weight(weight: str) -> None:
    check(with_weight(WEIGHTS[weight](128, 64)), randn(5, 64), native=1)


@pytest.mark.parametrize("weight", ["no memory", "negated"])
def test_a_precision_leaves_it_exact_and_says_so(
    weight: str, caplog: pytest.LogCaptureFixture
) -> None:
    block = with_weight(WEIGHTS[weight](128, 64))
    block.down.weight.data = (block.down.weight > 0) * 0.125  # which codes hold exactly, as signs
    precision = {"options": {"precision": "w8a8"}}
    check(lambda x: block.down(block.up(x).sign()), randn(5, 64), native=1, **precision)
    assert "up.weight: its weight is" in caplog.text


def test_made_inside_the_graph() -> None:
    """Also where views of it reach the kernels."""
    block = Block()

    def call(z: Tensor) -> Tensor:
        return block(z.conj().imag) + block(torch.cat(z.conj().imag.split(32, -1), -1))

    check(call, randn(5, 64, dtype=torch.complex64), native=3)


@torch.no_grad()
def test_another_kind_than_at_first_is_another_graph() -> None:
    block = Block()
    compiled = torch.compile(block, backend="llmopt")
    for x in (randn(5, 64), negated(5, 64), Doubled(randn(5, 64)), randn(5, 64)):
        assert_close(compiled(x), block(x))


@torch.no_grad()
def test_nested_tensors_are_left_to_pytorch() -> None:
    block = Block()
    x = torch.nested.nested_tensor([randn(3, 64), randn(7, 64)], layout=torch.jagged)
    compiled = torch.compile(block, backend="llmopt")
    assert_close(compiled(x).values(), block(x).values())
    assert any("nested" in g.reason for g in alive())


def test_quantize_names_a_layer_whose_weight_is_sparse() -> None:
    block = with_weight(sparse(128, 64))
    with pytest.raises(ValueError, match=r"up cannot be quantised.*sparse_csr.*strided"):
        llmopt.quantize(block, "w8a8")


@torch.no_grad()
@pytest.mark.parametrize("weight", ["no memory", "negated"])
def test_quantize_reads_what_pytorch_reads(weight: str) -> None:
    block = with_weight(WEIGHTS[weight](128, 64))
    x = randn(5, 64)
    want, got = block(x), llmopt.quantize(block, "w8a8")(x)
    assert (got - want).norm() < 0.02 * want.norm()
