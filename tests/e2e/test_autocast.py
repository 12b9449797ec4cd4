"""Models called under torch.autocast("cpu"): their products run in kernels of its dtype, everything else as without it."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from llmopt.compiled import CompiledGraph, alive
from torch import nn

from tests.e2e import zoo
from tests.e2e.compare import assert_same_output

# A decoder, products by addmm, norms in fp32 between linears, a bias of scores, images; and their sizes. With position biases as large as
# by default some softmaxes of T5 are so steep that the last bit of a score decides them.
ROWS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {},
    "bert": {},
    "t5": {"initializer_factor": 0.5},
    "vit": {},
}


def newest(before: list[CompiledGraph]) -> CompiledGraph:
    gc.collect()
    (graph,) = [g for g in alive() if g not in before]
    return graph


def rms(x: torch.Tensor) -> float:
    return x.float().pow(2).mean().sqrt().item()


def products_of(graph: CompiledGraph) -> list[str]:
    """The dtype that each linear of a graph multiplies; empty where all runs in PyTorch."""
    records = [] if graph.plan is None else graph.plan.records()
    return [r.multiplies for r in records if r.op == "linear"]


SHORT = {torch.bfloat16: "bf16", torch.float16: "f16"}


@pytest.mark.parametrize("name", ROWS)
@torch.no_grad()
def test_models_are_as_near_as_eager(name: str, backend: str) -> None:
    eager, compiled = zoo.pair(name, backend, **ROWS[name])
    x = zoo.inputs(name, 1024 if zoo.row(name).kind == "vision" else 33, batch=32)
    exact, before = eager(**x)[0], alive()
    with torch.autocast("cpu", torch.bfloat16):
        want, got = eager(**x)[0], compiled(**x)[0]
    assert got.dtype == want.dtype
    ours, theirs = rms(got - exact), rms(want - exact)
    assert 0 < ours <= 1.02 * theirs, f"RMS error {ours:.3g}, eager's is {theirs:.3g}"
    if backend == "llmopt":
        plan = newest(before).plan
        assert plan is not None
        assert len(plan.segments) == 1, str(plan)
        assert set(products_of(newest(before))) == {"bf16"}


def test_generate(backend: str) -> None:
    """Caches are of eager's dtypes; logits are as near to fp32 as eager's along eager's own text.

    A static cache takes no keys in fp32 and values in bf16, in eager neither.
    """
    eager, compiled = zoo.pair("llama", backend, num_hidden_layers=1)
    prompt = zoo.inputs("llama", 9, batch=4)
    how: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    with torch.autocast("cpu", torch.bfloat16):
        want, got = eager.generate(**prompt, **how), compiled.generate(**prompt, **how)
    with torch.no_grad():
        exact = eager(want.sequences).logits[:, 8:]
    same = (got.sequences == want.sequences).cumprod(1).bool()[:, 9:]
    assert same.float().mean() > 0.5
    ours, theirs = (torch.stack(r.logits, 1) for r in (got, want))
    assert ours.dtype == theirs.dtype
    reads = torch.cat([torch.ones(4, 1, dtype=torch.bool), same[:, :-1]], 1)
    errors = [rms((y - exact[:, :6])[reads]) for y in (ours, theirs)]
    assert 0 < errors[0] <= 1.02 * errors[1]
    for a, b in zip(got.past_key_values.layers, want.past_key_values.layers, strict=True):
        assert (a.keys.dtype, a.values.dtype) == (b.keys.dtype, b.values.dtype)


class Block(nn.Module):
    """A norm in fp32 in front of linears, and attention between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(64)
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.table = nn.Parameter(torch.randn(64, 64) / 8)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        heads = self.qkv(self.norm(x)).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*heads, attn_mask=mask)
        return x + self.out(y.transpose(1, 2).flatten(2)) @ self.table


def block_input(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", [None, torch.float32, torch.bool], ids=str)
@torch.no_grad()
def test_dtypes_and_masks(dtype: torch.dtype, mask: torch.dtype | None, backend: str) -> None:
    net = Block().eval()
    compiled = torch.compile(net, backend=backend)
    allowed = torch.ones(9, 9, dtype=torch.bool).tril()
    given: Any = None
    if mask is not None:
        given = allowed if mask is torch.bool else torch.where(allowed, 0.25, -9.0)
    x = block_input()
    exact, before = net(x, given), alive()
    with torch.autocast("cpu", dtype):
        got, want = compiled(x, given), net(x, given)
    assert got.dtype == want.dtype == torch.float32
    assert rms(got - exact) <= 1.1 * rms(want - exact)
    assert_same_output(got.to(dtype), want.to(dtype))
    if backend == "llmopt":
        assert products_of(newest(before)) == [SHORT[dtype]] * 3


@torch.no_grad()
def test_one_model_with_and_without(backend: str) -> None:
    """Each has packed weights of its own dtype, and both follow an edit."""
    net = Block().eval()
    compiled = torch.compile(net, backend=backend)
    x, before = block_input(), alive()
    for change in (1.0, 3.0):
        net.out.weight.mul_(change)
        net.out.bias.data.add_(change)
        assert_same_output(compiled(x), net(x))
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                assert_same_output(compiled(x).to(dtype), net(x).to(dtype))
        assert_same_output(compiled(x), net(x))
    if backend == "llmopt":
        gc.collect()
        graphs = [g for g in alive() if g not in before]
        assert sorted(map(products_of, graphs)) == [["bf16"] * 3, ["f16"] * 3, ["f32"] * 3]


@torch.no_grad()
@pytest.mark.parametrize("bias", [torch.bfloat16, torch.float16, torch.float32, None], ids=str)
@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_weights_of_another_dtype(
    dtype: torch.dtype, bias: torch.dtype | None, backend: str
) -> None:
    """A model in one short dtype under autocast to the other, biases in a third."""
    for weight in SHORT:
        net = nn.Linear(64, 64, bias=bias is not None).to(weight).eval()
        if bias is not None:
            net.bias.data = net.bias.data.to(bias)
        x, before = block_input(), alive()
        with torch.autocast("cpu", dtype):
            got, want = torch.compile(net, backend=backend)(x), net(x)
        assert_same_output(got, want)
        if backend == "llmopt":
            assert products_of(newest(before)) == [SHORT[dtype]]


@pytest.mark.parametrize("width", [64, 320])
@torch.no_grad()
def test_attention_that_no_kernel_takes(width: int, backend: str) -> None:
    """Scores beyond what f16 holds stay in f32: a mask whose rows are not dense, and heads wider than a kernel takes."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, 2, 8, width, generator=generator) * size for size in (60.0, 60.0, 1.0)
    )
    mask = torch.zeros(8, 8)

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.t())

    with torch.autocast("cpu", torch.float16):
        got = torch.compile(function, backend=backend)(q, k, v)
    assert got.dtype == torch.float16
    want = function(q, k, v)
    if backend == "llmopt":
        assert rms(got - want) <= 2e-3 * rms(want)
    assert got.isfinite().all()


@torch.no_grad()
def test_values_that_are_written_between_two_products(backend: str) -> None:
    linear = nn.Linear(64, 64).eval()

    def function(x: torch.Tensor) -> torch.Tensor:
        x = x * 2
        y = linear(x)
        x.add_(1)
        return y + linear(x)

    before = alive()
    with torch.autocast("cpu", torch.bfloat16):
        got, want = torch.compile(function, backend=backend)(block_input()), function(block_input())
    assert got.dtype == want.dtype
    assert_same_output(got, want)
    if backend == "llmopt":
        assert products_of(newest(before)) == ["bf16"] * 2


@torch.no_grad()
def test_autocast_switched_off_inside(backend: str) -> None:
    linear = nn.Linear(64, 64).eval()

    def function(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = linear(x)
        with torch.autocast("cpu", enabled=False):
            return y, linear(x)

    with torch.autocast("cpu", torch.bfloat16):
        got, want = torch.compile(function, backend=backend)(block_input()), function(block_input())
    assert [t.dtype for t in got] == [torch.bfloat16, torch.float32]
    assert_same_output(got, want)


@torch.no_grad()
def test_operators_that_no_kernel_takes_keep_their_casts(backend: str) -> None:
    convolution, linear = nn.Conv1d(64, 64, 3, padding=1).eval(), nn.Linear(64, 64).eval()

    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = convolution(x.transpose(1, 2)).transpose(1, 2)
        return y, linear(y), torch.einsum("bsi,bti->bst", x, x), torch.cat([y, x], 1)

    with torch.autocast("cpu", torch.bfloat16):
        got, want = torch.compile(function, backend=backend)(block_input()), function(block_input())
    assert [t.dtype for t in got] == [t.dtype for t in want]
    assert_same_output(got, want)


@torch.no_grad()
def test_doubles_stay_doubles(backend: str) -> None:
    linear = nn.Linear(64, 64).double().eval()
    x = block_input().double()
    with torch.autocast("cpu", torch.bfloat16):
        got, want = torch.compile(linear, backend=backend)(x), linear(x)
    assert_same_output(got, want)


@torch.no_grad()
def test_weights_rounded_to_bytes(backend: str) -> None:
    if backend != "llmopt":
        pytest.skip("an option of llmopt's")
    net = Block().eval()
    compiled = torch.compile(net, backend=backend, options={"precision": "w8a8", "group": 32})
    x, before = block_input(), alive()
    with torch.autocast("cpu", torch.bfloat16):
        got, want = compiled(x), net(x)
    assert got.dtype == want.dtype
    assert rms(got - want) < 0.03 * rms(want)
    plan = newest(before).plan
    assert plan is not None
    assert "linear_quantized" in [r.op for r in plan.records()]


@torch.no_grad()
def test_an_attention_layer_that_is_one_call_says_so(backend: str) -> None:
    layer = nn.TransformerEncoderLayer(64, 4, batch_first=True).eval()
    before, x = alive(), block_input()
    with torch.autocast("cpu", torch.bfloat16):
        got, want = torch.compile(layer, backend=backend)(x), layer(x)
    assert got.dtype == want.dtype
    assert_same_output(got, want)
    if backend == "llmopt":
        assert "autocast" in newest(before).reason
