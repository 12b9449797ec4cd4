"""Every architecture of the zoo against eager PyTorch: forward at several lengths, generation, half precision."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.e2e import zoo
from tests.e2e.compare import assert_same_generation, assert_same_output

LENGTHS = (17, 3, 1)  # static shapes first, then the same graph with a symbolic length, then the length of decode
HALF = ("llama", "gemma2", "gpt2", "bloom", "bert", "t5", "vit", "qwen3-moe")
GENERATING = [r for r in zoo.ROWS if r.kind in ("causal", "seq2seq", "whisper")]


@pytest.mark.parametrize("row", [r for r in zoo.ROWS if r.matters], ids=str)
def test_the_zoo_would_notice(row: zoo.Row) -> None:
    """The feature a row is there for changes its output by far more than the tolerance."""
    with torch.no_grad():
        want = zoo.make(row)(**zoo.inputs(row, 17))[0]
        for name, value in row.matters.items():
            other = zoo.make(row, **{name: value})(**zoo.inputs(row, 17))[0]
            assert (other - want).std() > 0.1 * want.std(), name


@pytest.mark.parametrize("row", zoo.ROWS, ids=str)
def test_forward(row: zoo.Row, backend: str) -> None:
    eager = zoo.make(row)
    compiled = copy.deepcopy(eager)
    compiled.compile(backend=backend)
    with torch.no_grad():
        for length in LENGTHS:
            x = zoo.inputs(row, length)
            assert_same_output(compiled(**x), eager(**x))


@pytest.mark.parametrize("row", GENERATING, ids=str)
def test_generate(row: zoo.Row, backend: str) -> None:
    eager = zoo.make(row)
    compiled = copy.deepcopy(eager)
    compiled.compile(backend=backend)
    prompt = zoo.inputs(row, 11)
    prompt.pop("decoder_input_ids", None)
    how = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    assert_same_generation(compiled.generate(**prompt, **how), eager.generate(**prompt, **how))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", HALF)
def test_half_precision_is_as_near_as_eager(name: str, dtype: torch.dtype, backend: str) -> None:
    """Our distance to the fp32 result of the same rounded weights is at most eager's (a quarter is luck)."""
    half = zoo.make(name, dtype)
    exact = copy.deepcopy(half).float()
    compiled = copy.deepcopy(half)
    compiled.compile(backend=backend)
    x = zoo.inputs(name, 33, batch=4)
    halved = {k: v.to(dtype) if v.is_floating_point() else v for k, v in x.items()}
    widened = {k: v.float() if v.is_floating_point() else v for k, v in halved.items()}
    with torch.no_grad():
        want, eager, got = exact(**widened)[0], half(**halved)[0], compiled(**halved)[0]
    assert got.dtype == eager.dtype
    ours, theirs = (rms(o.float() - want) / rms(want) for o in (got, eager))
    assert theirs > 0
    assert ours <= 1.25 * theirs + 1e-6, f"RMS error {ours:.3g}, eager's is {theirs:.3g}"


def rms(x: torch.Tensor) -> float:
    return x.pow(2).mean().sqrt().item()
