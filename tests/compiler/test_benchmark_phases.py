"""The benchmark's phases: which there are, and what one pass of each does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from llmopt.benchmark import systems
from llmopt.benchmark.phases import CAUSAL, Phase, phases_of, run_once, sample, token_ids
from llmopt.benchmark.systems import ModuleRunner
from llmopt.models import ModelError

from tests.compiler.toy import VOCAB, llama

DECODE = Phase("decode", "tokens/s", tokens=4, new=2)


def test_phases_are_chosen_by_kind_and_name():
    assert phases_of("causal") == CAUSAL
    assert [p.name for p in phases_of("causal", ["decode", "prefill"])] == ["decode", "prefill"]
    (static,) = phases_of("causal", ["static-8192"])
    assert static.describe() == "decode of 64 after 300 in a static cache of 8,192"
    assert phases_of("encoder", ["3x17"]) == (Phase("3x17", "ms", batch=3, tokens=17),)
    assert [p.name for p in phases_of("encoder")] == ["8x128", "1x128"]
    assert phases_of("call")[0].name == "call"


def test_static_caches_are_for_systems_that_take_them() -> None:
    (static,) = phases_of("causal", ["static-512"])
    loaded = llama(tied=True)
    model = loaded.model
    slots = []

    class Watched(ModuleRunner):
        def step(self, ids, cache):
            result = super().step(ids, cache)
            slots.append(cache.layers[0].keys.shape[2])
            return result

    with torch.inference_mode():
        assert run_once(Watched(model, {}), loaded, static) > 0
        assert slots == [512] * 65
        with pytest.raises(ModelError, match="static-512 needs a system"):
            run_once(SimpleNamespace(step=None), loaded, static)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("causal", "prefil"), ("encoder", "8"), ("encoder", "0x4"), ("encoder", "8x"), ("call", "x")],
)
def test_unknown_phases_are_errors(kind, name):
    with pytest.raises(ModelError, match="unknown phase"):
        phases_of(kind, [name])


def test_units():
    assert Phase("prefill", "tokens/s", tokens=100).value(0.5) == 200
    assert Phase("decode", "tokens/s", tokens=100, new=10).value(0.5) == 20
    assert Phase("first-token", "ms", tokens=100).value(0.5) == 500


def test_decode_is_greedy_generation():
    """The loop feeds each token it chose back, with a cache: the same tokens generate() gives."""
    loaded = llama(tied=False)
    fed = []

    class Recorder:
        def __init__(self, runner):
            self.runner = runner

        def step(self, ids, cache):
            fed.append(ids)
            return self.runner.step(ids, cache)

    with torch.inference_mode():
        run_once(Recorder(systems.SYSTEMS["eager"].build(loaded, [])), loaded, DECODE)
        model = loaded.model
        want = model.generate(fed[0], max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert torch.equal(torch.cat(fed[1:], 1), want[:, 4:])


def test_samples_of_equal_systems_are_equal():
    loaded = llama(tied=True)
    runner = systems.SYSTEMS["eager"].build(loaded, [])
    with torch.inference_mode():
        first = sample(runner, loaded, DECODE)
        assert first.shape == (2, 1, VOCAB)
        assert torch.equal(first, sample(runner, loaded, DECODE))


def loaded_of(vocabulary: int, positions: int, kind: str) -> Any:
    config = SimpleNamespace(vocab_size=vocabulary, max_position_embeddings=positions)
    return SimpleNamespace(model=SimpleNamespace(config=config), kind=kind)


@pytest.mark.parametrize(("vocabulary", "first"), [(97, 0), (100, 0), (101, 100), (5000, 100)])
def test_tokens_are_of_the_vocabulary_without_its_special_ones(vocabulary, first):
    ids = token_ids(loaded_of(vocabulary, 64, "causal"), 3, 50)
    assert ids.min() >= first
    assert ids.max() < vocabulary


def test_an_encoder_is_not_given_more_tokens_than_it_has_positions():
    assert token_ids(loaded_of(300, 64, "encoder"), 2, 64).shape == (2, 64)
    with pytest.raises(
        ModelError, match="128 tokens: this encoder has 64 positions; --phase 2x64 is"
    ):
        token_ids(loaded_of(300, 64, "encoder"), 2, 128)
