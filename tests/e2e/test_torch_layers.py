"""PyTorch's own layers, which are one call each in Dynamo's graph, run in kernels; and what of them does not, says why."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from llmopt.compiled import alive
from torch import Tensor, nn

from tests.tolerance import assert_close

WIDTH, HEADS, LENGTH = 48, 4, 9  # an odd number of heads is not for the fast path
PADDING = torch.arange(LENGTH) >= torch.tensor([LENGTH, 5])[:, None]  # True: not allowed
CAUSAL = nn.Transformer.generate_square_subsequent_mask(LENGTH)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(module: nn.Module) -> nn.Module:
    """In eval mode, with weights and biases that all matter."""
    gen = torch.Generator().manual_seed(0)
    for p in module.parameters():
        p.copy_(torch.randn(p.shape, generator=gen) * (p.shape[-1] ** -0.5 if p.dim() > 1 else 0.5))
    return module.eval()


def check(call: Callable[..., Tensor], *inputs: Tensor, native: bool = True, **how: Any) -> Any:
    """As in eager; all of it in one native segment, or none. Returns the plan."""
    torch._dynamo.reset()
    before = {id(g) for g in alive()}
    got, want = torch.compile(call, backend="llmopt", **how)(*inputs), call(*inputs)
    assert_close(got, want)
    assert got.shape == want.shape
    (plan,) = [g.plan for g in alive() if id(g) not in before]
    assert len(plan.segments) == native, str(plan)
    layers = [f for f in plan.fallbacks if "forward" in f.node.name or "layer" in f.node.name]
    assert not (native and layers), layers
    return plan


ENCODERS = {
    "norm behind": {},
    "norm in front": {"norm_first": True},
    "gelu": {"activation": "gelu", "norm_first": True},
    "no biases": {"bias": False},
}


@pytest.mark.parametrize("form", ENCODERS)
def test_encoder(form: str) -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 76, batch_first=True, **ENCODERS[form])
    encoder = seeded(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    check(encoder, randn(2, LENGTH, WIDTH))


MASKS: dict[str, dict[str, Any]] = {
    "padding": {"src_key_padding_mask": PADDING},
    "causal": {"mask": CAUSAL, "is_causal": True},
    "causal, of bools": {"mask": CAUSAL < 0, "is_causal": True},
    "both": {"is_causal": True, "mask": CAUSAL, "src_key_padding_mask": torch.zeros(2, LENGTH).masked_fill(PADDING, -torch.inf)},
    "of every head": {"mask": randn(2 * HEADS, LENGTH, LENGTH).sign().clamp(max=0) * torch.inf},
}  # fmt: skip
MASKS["of every head"]["mask"] = torch.where(
    torch.eye(LENGTH).bool(), 0.0, MASKS["of every head"]["mask"].nan_to_num(0.0, neginf=-torch.inf)
)


@pytest.mark.parametrize("mask", MASKS)
def test_encoder_with_a_mask(mask: str) -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 76, batch_first=True, norm_first=True)
    encoder = seeded(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    check(lambda x: encoder(x, **MASKS[mask]), randn(2, LENGTH, WIDTH))


def test_numbers_in_a_mask_are_added() -> None:
    """PyTorch's fast path counts every number but 0 as "not allowed"; its other path, and ours, add them."""
    encoder = seeded(nn.TransformerEncoderLayer(WIDTH, HEADS, 76, batch_first=True))
    x, bias = randn(2, LENGTH, WIDTH), randn(LENGTH, LENGTH)
    got = torch.compile(lambda x: encoder(x, bias), backend="llmopt")(x)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert_close(got, encoder(x, bias))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("what", ["self", "cross", "padding", "causal", "bools", "of every head"])
def test_attention(what: str, batch_first: bool) -> None:
    m = seeded(nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first))
    other = randn(2, 5, WIDTH) if batch_first else randn(5, 2, WIDTH)
    how: dict[str, Any] = {
        "self": {},
        "cross": {},
        "padding": {"key_padding_mask": PADDING},
        "causal": {"attn_mask": CAUSAL, "is_causal": True},
        "bools": {"attn_mask": CAUSAL < 0, "key_padding_mask": PADDING},
        "of every head": {"attn_mask": randn(2 * HEADS, LENGTH, LENGTH)},
    }[what]

    def call(x: Tensor) -> Tensor:
        kv = other if what == "cross" else x
        return m(x, kv, kv, need_weights=False, **how)[0]

    check(call, randn(2, LENGTH, WIDTH) if batch_first else randn(LENGTH, 2, WIDTH))


def test_weights_that_nobody_reads_are_not_computed() -> None:
    m = seeded(nn.MultiheadAttention(WIDTH, HEADS, bias=False, batch_first=True))
    check(lambda x: m(x, x, x)[0], randn(2, LENGTH, WIDTH))


def test_lengths_that_change() -> None:
    m = seeded(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True))
    compiled = torch.compile(lambda x: m(x, x, x, need_weights=False)[0], backend="llmopt")
    for length in (9, 4, 30):
        x = randn(2, length, WIDTH)
        assert_close(compiled(x), m(x, x, x)[0])


@pytest.mark.parametrize("precision", ["exact", "w8a8"])
def test_encoder_and_decoder(precision: str) -> None:
    """In 8 bits every linear is, and the result is near."""
    layers = (WIDTH, HEADS, 1, 1, 64)
    model = seeded(nn.Transformer(*layers, batch_first=True))
    x, y = randn(2, LENGTH, WIDTH), randn(2, 5, WIDTH, seed=2)
    if precision == "exact":
        check(lambda x, y: model(x, y), x, y)
        return
    options = {"precision": "w8a8", "group": "channel"}
    got, want = torch.compile(model, backend="llmopt", options=options)(x, y), model(x, y)
    assert 0 < (got - want).norm() < 0.03 * want.norm()
    plan = next(g.plan for g in reversed(alive()) if g.plan is not None)
    assert not any(r.op == "linear" for r in plan.records())


LEFT: dict[str, tuple[dict[str, Any], Callable[..., Any], str]] = {
    "weights": ({}, lambda m, x: sum(t.sum() for t in m(x, x, x)), "weights .* are read"),
    "a mask and weights": ({}, lambda m, x: m(x, x, x, attn_mask=CAUSAL)[0], "need_weights=False"),
    "more keys": ({"add_bias_kv": True}, lambda m, x: m(x, x, x)[0], "bias_k, bias_v"),
    "other widths": ({"kdim": 48, "vdim": 24}, lambda m, x: m(x, x, x[..., :24])[0], "separate"),
    "one sequence": ({}, lambda m, x: m(x[0], x[0], x[0])[0], r"not over \[L, N, E\]"),
}


@pytest.mark.parametrize("what", LEFT)
def test_what_stays_pytorchs_says_why(what: str) -> None:
    more, call, reason = LEFT[what]
    m = seeded(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **more))
    plan = check(lambda x: call(m, x), randn(2, LENGTH, WIDTH), native=False)
    assert any(re.search(reason, f.reason) for f in plan.fallbacks), plan.fallbacks


def test_a_layer_whose_sizes_are_symbols() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 76, batch_first=True)
    encoder = seeded(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False))
    plan = check(encoder, randn(2, LENGTH, WIDTH), native=False, dynamic=True)
    assert any("change from call to call" in f.reason for f in plan.fallbacks)


@pytest.mark.parametrize("decompose", [False, True])
def test_an_exported_program(decompose: bool) -> None:
    """Its nodes name modules by strings, where Dynamo's hold the classes."""
    block = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 76), nn.GELU())
    model = seeded(nn.Sequential(block, nn.Linear(76, WIDTH)))
    x = randn(2, LENGTH, WIDTH)
    program = torch.export.export(model, (x,))
    program = program.run_decompositions() if decompose else program
    assert_close(torch.compile(program.module(), backend="llmopt")(x), model(x))
