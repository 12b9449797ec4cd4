"""Peers of `llmopt bench` beside eager on small models, where they are installed: a prompt, then one token a step."""

from __future__ import annotations

import pytest
import torch
from llmopt.benchmark import accuracy
from llmopt.benchmark.phases import Phase
from llmopt.benchmark.systems import SYSTEMS
from llmopt.models import LoadedModel
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from tests.tolerance import PEER_ERROR

PEERS = ("onnxruntime", "onnxruntime-int8", "openvino", "openvino-int8", "torchao", "torchao-w8a16")


def causal() -> tuple[LoadedModel, Phase]:
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    return LoadedModel("small", model, "causal"), Phase("decode", "tokens/s", tokens=12, new=4)


def encoder() -> tuple[LoadedModel, Phase]:
    config = BertConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256
    )
    model = BertModel(config).eval()
    return LoadedModel("small", model, "encoder"), Phase("2x16", "ms", batch=2, tokens=16)


@pytest.mark.slow
@pytest.mark.parametrize("make", [causal, encoder], ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", PEERS)
def test_outputs_are_those_of_eager(name, make, monkeypatch):
    system = SYSTEMS[name]
    if system.missing():
        pytest.skip(system.missing())
    monkeypatch.setattr(accuracy, "WINDOWS", 2)
    monkeypatch.setattr(accuracy, "NEW_TOKENS", 4)
    torch.manual_seed(0)
    loaded, phase = make()
    with torch.inference_mode():
        eager = SYSTEMS["eager"].build(loaded, [phase])
        want = torch.from_numpy(accuracy.outputs(eager, loaded, [phase]))
        runner = system.build(loaded, [phase])
        got = torch.from_numpy(accuracy.outputs(runner, loaded, [phase]))
    assert (got - want).norm() < PEER_ERROR["int8" if system.quantised else "float"] * want.norm()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama.cpp", "llama.cpp-q4_0", "llama.cpp-f16"])
def test_llama_cpp_predicts_what_the_model_does(name, monkeypatch):
    """On real weights: wrong rows of q and k, or a wrong step, would leave no agreement."""
    from llmopt.models import load

    system = SYSTEMS[name]
    if system.missing():
        pytest.skip(system.missing())
    monkeypatch.setattr(accuracy, "WINDOWS", 1)
    monkeypatch.setattr(accuracy, "NEW_TOKENS", 16)
    loaded = load("smollm2")
    phase = Phase("decode", "tokens/s", tokens=32, new=4)
    with torch.inference_mode():
        eager = accuracy.outputs(SYSTEMS["eager"].build(loaded, [phase]), loaded, [phase])
        got = accuracy.outputs(system.build(loaded, [phase]), loaded, [phase])
    assert accuracy.compare("causal", eager, got).divergence < PEER_ERROR["divergence"]
