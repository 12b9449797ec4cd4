"""Every architecture of the zoo against eager PyTorch: forward at several lengths, generation, half precision."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
import torch
from llmopt.compiled import CompiledGraph, alive

from tests.e2e import zoo
from tests.e2e.architectures import CORE, ROWS, Row
from tests.e2e.compare import assert_same_generation, assert_same_output

# Static shapes first, then the same graph with a symbolic length, then the length Dynamo specialises.
LENGTHS = (17, 3, 1)
# One of each way to know a position, and of each kind of model.
EVERY_LENGTH = ("llama", "mistral-window", "gpt2", "bloom", "bert", "t5", "whisper", "vit", "clip")
# As bert, or as t5 with another activation or position: test_generate runs them at other lengths.
ONE_LENGTH = ("roberta", "distilbert", "albert", "flan-t5", "marian", "lfm2-conv")
HALF = (
    *(
        (name, dtype)
        for name in ("llama", "gemma2", "gpt2", "bert", "t5")
        for dtype in ("float16", "bfloat16")
    ),
    *((name, "bfloat16") for name in ("qwen3-moe", "vit", "bloom")),
)


def params(rows: Iterable[Row]) -> list:
    return [pytest.param(r, id=r.name, marks=[pytest.mark.slow] if r.rare else []) for r in rows]


@pytest.mark.parametrize("row", params(r for r in ROWS if r.matters))
def test_the_zoo_would_notice(row: Row) -> None:
    """The feature a row is there for changes its output by far more than the tolerance."""
    with torch.no_grad():
        want = zoo.make(row)(**zoo.inputs(row, 17))[0]
        for name, value in row.matters.items():
            other = zoo.make(row, **{name: value})(**zoo.inputs(row, 17))[0]
            assert (other - want).std() > 0.1 * want.std(), name


def has_own_forward(row: Row) -> bool:
    """Whether test_forward traces it; test_generate looks at the prompt of the others."""
    return row.kind != "causal" or row.name in (*CORE, "lfm2-conv")


@pytest.mark.parametrize("row", params(filter(has_own_forward, ROWS)))
@torch.no_grad()
def test_forward(row: Row, backend: str) -> None:
    eager, compiled = zoo.pair(row, backend)
    before = alive()
    lengths = lengths_of(row)
    for length in lengths:
        x = zoo.inputs(row, length)
        assert_same_output(compiled(**x), eager(**x))
        if length == lengths[0] and backend == "llmopt":
            assert_stays_native(row, before)
    if row.name in CORE and row.kind in ("causal", "encoder", "seq2seq"):
        for side in ("left", "right"):
            assert_padding_is_ignored(eager, compiled, row, side)


def lengths_of(row: Row) -> tuple[int, ...]:
    """Every length is a graph to trace. A cache with single tokens has a symbol of its own in every test_generate."""
    if row.name in EVERY_LENGTH:
        return LENGTHS
    return LENGTHS[:1] if row.name in ONE_LENGTH else LENGTHS[:2]


def assert_padding_is_ignored(eager: Any, compiled: Any, row: Row, side: str) -> None:
    """What stands at real tokens is eager's; at padding a row may have no key at all, and nobody reads it."""
    x = zoo.inputs(row, LENGTHS[0])  # the shapes of the first call: no new graph
    real = torch.arange(LENGTHS[0]) < torch.tensor([9, 1])[:, None]
    x["attention_mask"] = (real if side == "right" else real.flip(1)).long()
    got, want = compiled(**x)[0], eager(**x)[0]
    if row.kind != "seq2seq":  # whose result is of the decoder, which has no padding
        got, want = (y[x["attention_mask"].bool()] for y in (got, want))
    assert_same_output(got, want, f"{side} padding")


def assert_stays_native(row: Row, before: list[CompiledGraph]) -> None:
    """The one graph made since has the segments the row promises; more would mean that something fell back to PyTorch."""
    (plan,) = [g.plan for g in alive() if g not in before]
    assert plan is not None
    assert len(plan.segments) == row.segments, str(plan)


@pytest.mark.parametrize(
    "row", params(r for r in ROWS if r.kind in ("causal", "seq2seq", "whisper"))
)
def test_generate(row: Row, backend: str) -> None:
    """A prompt, then tokens that read its cache; the prompt's logits at every position too, where test_forward does not."""
    eager, compiled = zoo.pair(row, backend)
    prompt = zoo.inputs(row, 11)
    prompt.pop("decoder_input_ids", None)
    how = {
        "max_new_tokens": 8,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    if not has_own_forward(row):
        if "logits_to_keep" in inspect.signature(compiled.forward).parameters:
            how["logits_to_keep"] = (
                0  # all; where test_forward sees them generate asks for the last
            )
        check = partial(assert_prompt, row, eager, prompt, backend, alive())
        zoo.after_first_call(compiled, check)
    assert_same_generation(compiled.generate(**prompt, **how), eager.generate(**prompt, **how))


@torch.no_grad()
def assert_prompt(
    row: Row, eager: Any, prompt: dict, backend: str, before: list[CompiledGraph], got: Any
) -> None:
    assert_same_output(got.logits, eager(**prompt).logits)
    if backend == "llmopt":
        assert_stays_native(row, before)


@pytest.mark.parametrize(("name", "dtype"), HALF)
def test_half_precision_is_as_near_as_eager(name: str, dtype: str, backend: str) -> None:
    """Our distance to the fp32 result of the same rounded weights is at most eager's."""
    half, compiled = zoo.pair(name, backend, getattr(torch, dtype))
    exact = copy.deepcopy(half).float()
    # The logits of a few images are a sample too small to say so: 256 of them.
    x = zoo.inputs(name, 1024 if zoo.row(name).kind == "vision" else 33, batch=4)
    halved = {k: v.to(half.dtype) if v.is_floating_point() else v for k, v in x.items()}
    widened = {k: v.float() if v.is_floating_point() else v for k, v in halved.items()}
    with torch.no_grad():
        want, eager, got = exact(**widened)[0], half(**halved)[0], compiled(**halved)[0]
    assert got.dtype == eager.dtype
    ours, theirs = (rms(o.float() - want) / rms(want) for o in (got, eager))
    assert theirs > 0
    assert ours <= theirs, f"RMS error {ours:.3g}, eager's is {theirs:.3g}"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@torch.no_grad()
def test_decoding_in_half_precision_is_as_near_as_eager(dtype: str, backend: str) -> None:
    """The same for single tokens that read a cache, which run in other kernels."""
    half, compiled = zoo.pair("llama", backend, getattr(torch, dtype))
    ids = zoo.inputs("llama", 24, batch=8)["input_ids"]
    want = copy.deepcopy(half).float()(ids).logits[:, 20:]
    errors = []
    for model in (compiled, half):
        cache = model(ids[:, :20], use_cache=True).past_key_values
        steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(20, 24)]
        errors.append(rms(torch.cat(steps, dim=1).float() - want))
    assert 0 < errors[0] <= errors[1]


def rms(x: torch.Tensor) -> float:
    return x.pow(2).mean().sqrt().item()
