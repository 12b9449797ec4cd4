"""PyTorch's own layers, which are one call each in Dynamo's graph, run in kernels; and what of them does not, says why."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from llmopt.compiled import alive
from llmopt.graph import kind
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


# What PyTorch does to masks before the layers, and the layers to them.
ABOUT_MASKS = {
    "zeros_like",
    "masked_fill",
    "masked_fill_",
    "logical_not",
    "logical_or",
    "to",
    "add",
    "unflatten",
    "full",
    "triu",
}


def check(call: Callable[..., Tensor], *inputs: Tensor, native: bool = True, **how: Any) -> Any:
    """As in eager, also where it lies in memory; all but masks in one native segment, or nothing. Returns the plan."""
    torch._dynamo.reset()
    before = {id(g) for g in alive()}
    compiled, want = torch.compile(call, backend="llmopt", **how), call(*inputs)
    for _ in range(2):
        got = compiled(*inputs)
        assert_close(got, want)
        assert got.shape == want.shape
    (plan,) = [g.plan for g in alive() if id(g) not in before]
    assert len(plan.segments) == native, str(plan)
    assert not native or {kind(f.node) for f in plan.fallbacks} <= ABOUT_MASKS, str(plan)
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
    "of every head": {"mask": (randn(2 * HEADS, LENGTH, LENGTH) < 0) & ~torch.eye(LENGTH).bool()},
}  # fmt: skip


@pytest.mark.parametrize("mask", MASKS)
def test_encoder_with_a_mask(mask: str) -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 76, batch_first=True, norm_first=True)
    encoder = seeded(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    check(lambda x: encoder(x, **MASKS[mask]), randn(2, LENGTH, WIDTH))


@pytest.mark.parametrize("mask", [CAUSAL, CAUSAL < 0, CAUSAL[:, :1].expand(-1, LENGTH) + CAUSAL])
def test_masks_that_come_without_a_hint(mask: Tensor) -> None:
    """PyTorch looks whether they are causal, which is not traced."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 76, batch_first=True)
    encoder = seeded(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    check(lambda x: encoder(x, mask), randn(2, LENGTH, WIDTH))
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 76, batch_first=True)
    decoder, memory = seeded(nn.TransformerDecoder(layer, 2)), randn(2, 5, WIDTH)
    check(lambda x: decoder(x, memory, tgt_mask=mask), randn(2, LENGTH, WIDTH))


def test_a_hint_that_is_given_is_kept() -> None:
    """With it PyTorch looks at no number of the mask."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 76, batch_first=True)
    encoder = seeded(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False))
    for hint in (True, False):
        check(lambda x: encoder(x, CAUSAL, is_causal=hint), randn(2, LENGTH, WIDTH))  # noqa: B023


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


FORWARDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "hint": {"attn_mask": torch.zeros(1, 1), "is_causal": True},  # PyTorch looks at no number of the mask then
    "hint and padding": {"attn_mask": CAUSAL, "is_causal": True, "key_padding_mask": PADDING.float() * -9},
    "bool and float": {"attn_mask": randn(LENGTH, LENGTH), "key_padding_mask": PADDING},
    "float and bool": {"attn_mask": CAUSAL < 0, "key_padding_mask": PADDING.float() * -9},
    "bools": {"attn_mask": CAUSAL < 0, "key_padding_mask": PADDING},
    "of every head": {"attn_mask": randn(2 * HEADS, LENGTH, LENGTH), "key_padding_mask": PADDING.float() * -9},
}  # fmt: skip


@pytest.mark.parametrize("form", FORWARDS)
def test_the_function(form: str) -> None:
    """F.multi_head_attention_forward itself, whose masks nn.MultiheadAttention has not made floats."""
    m = seeded(nn.MultiheadAttention(WIDTH, HEADS))
    own = (m.in_proj_weight, m.in_proj_bias, None, None, False, 0.1, m.out_proj.weight, m.out_proj.bias)  # fmt: skip
    how = {"training": False, "need_weights": False, **FORWARDS[form]}

    def call(x: Tensor) -> Tensor:
        return F.multi_head_attention_forward(x, x, x, WIDTH, HEADS, *own, **how)[0]

    check(call, randn(LENGTH, 2, WIDTH))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 76, batch_first=True, norm_first=True)
    exact = seeded(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    half, x = copy.deepcopy(exact).to(dtype), randn(2, LENGTH, WIDTH).to(dtype)
    want = copy.deepcopy(half).float()(x.float(), CAUSAL, is_causal=True)
    compiled = torch.compile(half, backend="llmopt")
    # A mask in another dtype than the layer's is for the fast path.
    ours, theirs = ((f(x, CAUSAL, is_causal=True).float() - want).norm() for f in (compiled, half))
    assert 0 < ours <= 1.25 * theirs


def writes_to_all(y: Tensor) -> Tensor:
    y.view(-1).mul_(2)
    return y


def writes_to_a_row(y: Tensor) -> Tensor:
    y.view(-1, WIDTH)[3] = 5.0
    return y


def writes_to_a_sum(y: Tensor) -> Tensor:
    z = y + y
    z.view(-1).mul_(2)
    return z


def writes_to_a_head(y: Tensor) -> Tensor:
    y.unflatten(-1, (HEADS, -1))[:, :, 1] = 0.0
    return y


@pytest.mark.parametrize(
    ("write", "batch_first"),
    [(w, False) for w in (writes_to_all, writes_to_a_row, writes_to_a_sum, writes_to_a_head)]
    + [
        (writes_to_a_head, True)
    ],  # whose rows PyTorch lays out so that the other views do not exist
)
def test_a_result_is_written_to(write: Callable[[Tensor], Tensor], batch_first: bool) -> None:
    """It lies in memory as PyTorch's does: what is a view of that is one of this."""
    m = seeded(nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first))
    x = randn(LENGTH, 2, WIDTH)
    call = lambda x: write(m(x, x, x, need_weights=False)[0])  # noqa: E731
    got, want = torch.compile(call, backend="llmopt")(x), call(x)
    assert_close(got, want)
    assert got.stride() == want.stride()


def test_a_result_leaves_the_graph_as_pytorchs() -> None:
    m = seeded(nn.MultiheadAttention(WIDTH, HEADS))
    x = randn(LENGTH, 2, WIDTH)
    compiled = torch.compile(lambda x: m(x, x, x, need_weights=False)[0], backend="llmopt")
    assert compiled(x).stride() == m(x, x, x)[0].stride()


def test_weights_edited_between_calls() -> None:
    m = seeded(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True))
    compiled = torch.compile(lambda x: m(x, x, x, need_weights=False)[0], backend="llmopt")
    x = randn(2, LENGTH, WIDTH)
    for edit in (lambda w: w, lambda w: w.mul_(2), lambda w: w.data[WIDTH : 2 * WIDTH].neg_()):
        edit(m.in_proj_weight)
        assert_close(compiled(x), m(x, x, x, need_weights=False)[0])


def test_weights_that_nobody_reads_are_not_computed() -> None:
    m = seeded(nn.MultiheadAttention(WIDTH, HEADS, bias=False, batch_first=True))
    check(lambda x: m(x, x, x)[0], randn(2, LENGTH, WIDTH))


@pytest.mark.parametrize("masks", [(), ("attn_mask",), ("key_padding_mask",), ("attn_mask", "key_padding_mask")])  # fmt: skip
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("weights", [False, True])
def test_lengths_that_change(masks: tuple[str, ...], per_head: bool, weights: bool) -> None:
    """Batches, too; the masks are inputs."""
    torch._dynamo.reset()
    m = seeded(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True))

    def call(x: Tensor, given: dict[str, Tensor]) -> Tensor:
        return m(x, x, x, need_weights=weights, **given)[0]

    before = {id(g) for g in alive()}
    compiled = torch.compile(call, backend="llmopt")
    for batch, length in ((2, 9), (2, 4), (3, 30), (5, 11), (1, 1)):
        x = randn(batch, length, WIDTH)
        shapes = {
            "attn_mask": (batch * HEADS, length, length) if per_head else (length, length),
            "key_padding_mask": (batch, length),
        }
        given = {name: randn(*shapes[name]) for name in masks}
        assert_close(compiled(x, given), call(x, given))
    plans = [g.plan for g in alive() if id(g) not in before]
    assert all(len(p.segments) == 1 for p in plans), plans


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
    before = {id(g) for g in alive()}
    got, want = torch.compile(model, backend="llmopt", options=options)(x, y), model(x, y)
    assert 0 < (got - want).norm() < 0.03 * want.norm()
    (plan,) = [g.plan for g in alive() if id(g) not in before]
    assert Counter(r.op for r in plan.records() if "linear" in r.op) == {"linear_quantized": 11}


NO_KEYS = torch.tensor(
    [[False] * LENGTH, [True] * LENGTH]
)  # what the second sequence asks for is NaN
FULL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mask": ({}, {"attn_mask": CAUSAL}),
    "mask with a hint": ({}, {"attn_mask": CAUSAL, "is_causal": True}),
    "bools": ({}, {"attn_mask": CAUSAL < 0}),
    "numbers": ({}, {"attn_mask": randn(LENGTH, LENGTH)}),
    "of every head": ({}, {"attn_mask": randn(2 * HEADS, LENGTH, LENGTH)}),
    "padding": ({}, {"key_padding_mask": PADDING}),
    "nothing left": ({}, {"key_padding_mask": NO_KEYS}),
    "both": ({}, {"attn_mask": CAUSAL < 0, "key_padding_mask": PADDING}),
    "learnt keys": ({"add_bias_kv": True}, {"key_padding_mask": PADDING}),
    "a zero": ({"add_zero_attn": True}, {"attn_mask": CAUSAL < 0}),
    "more keys": ({"add_zero_attn": True, "add_bias_kv": True}, {"attn_mask": randn(2 * HEADS, LENGTH, LENGTH)}),
    "more keys, no mask": ({"add_zero_attn": True, "add_bias_kv": True}, {}),
    "no biases": ({"bias": False}, {"key_padding_mask": PADDING}),
}  # fmt: skip


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("form", FULL)
def test_attention_as_its_defaults_are(
    form: str, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default weights are asked for, though few read them: a row without keys is NaN then, and zeros otherwise."""
    if form == "nothing left" and not asked:
        monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
    more, how = FULL[form]
    m = seeded(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **more))
    call = lambda x: m(x, x, x, need_weights=asked, **how)[0]  # noqa: E731
    if (
        "a zero" in form or "more" in form or "learnt" in form
    ):  # PyTorch fills what is behind the keys
        got = torch.compile(call, backend="llmopt")(randn(2, LENGTH, WIDTH))
        assert_close(got, call(randn(2, LENGTH, WIDTH)))
    else:
        check(call, randn(2, LENGTH, WIDTH))


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("form", FULL)
def test_weights_that_are_read(form: str, average: bool) -> None:
    more, how = FULL[form]
    m = seeded(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **more))
    call = lambda x: m(x, x, x, average_attn_weights=average, **how)  # noqa: E731
    x = randn(2, LENGTH, WIDTH)
    before = {id(g) for g in alive()}
    (got, weights), (want, wanted) = torch.compile(call, backend="llmopt")(x), call(x)
    assert_close(got, want)
    assert_close(weights, wanted)
    assert weights.stride() == wanted.stride()
    (plan,) = [g.plan for g in alive() if id(g) not in before]
    assert sum("linear" in r.op for r in plan.records()) == 2, str(plan)


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("mask", [None, CAUSAL, CAUSAL < 0, randn(HEADS, LENGTH, LENGTH)])
@pytest.mark.parametrize("padding", [None, PADDING[1]])
def test_one_sequence_without_a_batch(
    mask: Tensor | None, padding: Tensor | None, weights: bool
) -> None:
    m, x = seeded(nn.MultiheadAttention(WIDTH, HEADS)), randn(LENGTH, WIDTH)
    if mask is not None and padding is not None and mask.dtype != padding.dtype:
        padding = torch.zeros(LENGTH).masked_fill(padding, -torch.inf)
    masks = {"attn_mask": mask, "key_padding_mask": padding}
    call = lambda x: m(x, x, x, need_weights=weights, **masks)[0]  # noqa: E731
    assert check(call, x)
    for got, want in zip(
        torch.compile(m, backend="llmopt")(x, x, x, **masks), m(x, x, x, **masks), strict=True
    ):
        assert_close(got, want)


@pytest.mark.parametrize("bias", [True, False])
def test_keys_and_values_of_other_widths(bias: bool) -> None:
    m = nn.MultiheadAttention(WIDTH, HEADS, kdim=32, vdim=24, bias=bias, batch_first=True)
    key, value = randn(2, 5, 32), randn(2, 5, 24)
    check(lambda x: seeded(m)(x, key, value)[0], randn(2, LENGTH, WIDTH))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("read", [True, False])
def test_weights_in_half_precision(dtype: torch.dtype, read: bool) -> None:
    exact = seeded(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True))
    half, x = copy.deepcopy(exact).to(dtype), randn(2, LENGTH, WIDTH).to(dtype)

    def run(m: Callable[..., Any], x: Tensor) -> Tensor:
        y, weights = m(x, x, x, key_padding_mask=PADDING)
        return torch.cat((y, weights), -1) if read else y

    want = run(copy.deepcopy(half).float(), x.float())
    compiled = torch.compile(lambda x: run(half, x), backend="llmopt")
    ours, theirs = ((y.float() - want).norm().item() for y in (compiled(x), run(half, x)))
    assert 0 < ours <= 1.25 * theirs


def of_given_keys(m: nn.MultiheadAttention, x: Tensor) -> Tensor:
    keys = randn(LENGTH * HEADS, 5, WIDTH // HEADS)
    own = (m.in_proj_weight, m.in_proj_bias, None, None, False, 0.0, m.out_proj.weight, m.out_proj.bias)  # fmt: skip
    how = {"training": False, "static_k": keys, "static_v": keys}
    return F.multi_head_attention_forward(x, x, x, WIDTH, HEADS, *own, **how)[0]


LEFT: dict[str, tuple[Callable[..., Tensor], str]] = {
    "dropout": (lambda m, x: m.train()(x, x, x)[0], "dropout"),  # all of it: nothing is random
    "given keys": (of_given_keys, "static_k"),
}


@pytest.mark.parametrize("what", LEFT)
def test_what_stays_pytorchs_says_why(what: str) -> None:
    call, reason = LEFT[what]
    m = seeded(nn.MultiheadAttention(WIDTH, HEADS, dropout=1.0, batch_first=True))
    plan = check(lambda x: call(m, x), randn(2, LENGTH, WIDTH), native=False)
    assert any(re.search(reason, f.reason) for f in plan.fallbacks), plan.fallbacks


def test_a_layer_whose_sizes_are_symbols() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 76, batch_first=True)
    encoder = seeded(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False))
    plan = check(encoder, randn(2, LENGTH, WIDTH), native=False, dynamic=True)
    assert any("width changes from call to call" in f.reason for f in plan.fallbacks)


def test_an_exported_program() -> None:
    """Its nodes name modules by strings, where Dynamo's hold the classes."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 76, batch_first=True)
    model = seeded(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False))
    x = randn(2, LENGTH, WIDTH)
    program = torch.export.export(model, (x,))
    check(program.module(), x)
    decomposed = (
        program.run_decompositions().module()
    )  # norms and softmax in parts that are PyTorch's
    assert_close(torch.compile(decomposed, backend="llmopt")(x), model(x))


@pytest.mark.parametrize("more", [{"add_zero_attn": True}, {"add_bias_kv": True}], ids=str)
def test_attention_to_no_keys_but_its_own(more: dict[str, Any]) -> None:
    m = seeded(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **more))
    q, empty = randn(2, LENGTH, WIDTH), torch.empty(2, 0, WIDTH)
    torch._dynamo.reset()
    got = torch.compile(m, backend="llmopt")(q, empty, empty)[0]
    assert_close(got, m(q, empty, empty)[0])


def test_results_that_share_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
    m = seeded(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True))

    def function(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = m(x, x, x, need_weights=False)[0]
        return y, y.transpose(0, 1).view(-1, WIDTH)

    torch._dynamo.reset()
    y, rows = torch.compile(function, backend="llmopt")(randn(2, LENGTH, WIDTH))
    assert y.data_ptr() == rows.data_ptr()
