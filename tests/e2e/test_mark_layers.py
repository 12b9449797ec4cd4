"""llmopt.mark_layers: the results of a model without marks, from one trace of each kind of layer."""

from __future__ import annotations

import copy
import io
from typing import Any

import llmopt
import pytest
import torch
from llmopt import layers, messages
from torch import nn
from torch._dynamo.utils import compilation_time_metrics
from transformers.cache_utils import StaticCache

from tests.e2e import zoo
from tests.e2e.compare import assert_same_generation, assert_same_output

THREE = {"num_hidden_layers": 3}
GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def reused() -> int:
    """How often a traced layer stood for another one."""
    return len(compilation_time_metrics.get("invoke_subgraph_reuse_stamp_out", ()))


def marked_pair(name: str, backend: str, **sizes: Any) -> tuple[Any, Any]:
    eager = zoo.make(name, **sizes)
    compiled = copy.deepcopy(eager)
    assert llmopt.mark_layers(compiled) == sizes["num_hidden_layers"]
    compiled.compile(backend=backend)
    return eager, compiled


def test_a_decoder_is_traced_once_a_graph(backend: str) -> None:
    """Forwards with growing lengths, then prompts and tokens: sizes that are symbols in some inputs and numbers in others."""
    eager, compiled = marked_pair("llama", backend, **THREE)
    before = reused()
    with torch.no_grad():
        for length in (11, 5):
            x = zoo.inputs("llama", length)
            assert_same_output(compiled(**x), eager(**x))
    assert reused() - before == 2 * 2, "two graphs, two of three layers in each"
    for length in (9, 6):
        x = zoo.inputs("llama", length)
        x["attention_mask"][0, :3] = 0
        want = eager.generate(**x, max_new_tokens=5, **GREEDY)
        assert_same_generation(compiled.generate(**x, max_new_tokens=5, **GREEDY), want)
    graphs, rest = divmod(reused() - before, 2)
    assert graphs >= 4
    assert rest == 0
    for model in (eager, compiled):
        with torch.no_grad():
            model.model.layers[2].mlp.up_proj.weight.mul_(2)
    with torch.no_grad():
        assert_same_output(compiled(**x), eager(**x))


def test_an_encoder_is_traced_once(backend: str) -> None:
    eager, compiled = marked_pair("bert", backend, **THREE)
    before = reused()
    x = zoo.inputs("bert", 12)
    with torch.no_grad():
        assert_same_output(compiled(**x), eager(**x))
    assert reused() - before == 2


@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "after-a-change"])
@torch.no_grad()
def test_numbers_that_are_symbols(dynamic: bool | None, backend: str) -> None:
    """Those of the first layer, which Dynamo then hands over as tensors: all with dynamic=True, else one that changed."""
    if backend != "llmopt":
        pytest.skip("torch 2.13 itself calls a region with a number where it traced a tensor")
    eager = zoo.make("llama", num_hidden_layers=2)
    eager.model.layers[1].input_layernorm.variance_epsilon = 0.5 if dynamic else 1e-6
    marked = copy.deepcopy(eager)
    llmopt.mark_layers(marked)
    compiled = torch.compile(marked, backend=backend, dynamic=dynamic)
    x = zoo.inputs("llama", 7)
    for _ in range(2):
        assert_same_output(compiled(**x), eager(**x))
        for model in (eager, marked):
            model.model.layers[0].self_attn.scaling *= 3


def test_other_calls_are_traced_as_before(backend: str) -> None:
    """A static cache, a window, gradients in training mode."""
    before = reused()
    eager, compiled = marked_pair("llama", backend, num_hidden_layers=2)
    ids = zoo.inputs("llama", 9)["input_ids"]
    with torch.no_grad():
        got, want = (
            m(ids, past_key_values=StaticCache(config=m.config, max_cache_len=16)).logits
            for m in (compiled, eager)
        )
    assert_same_output(got, want)
    losses = [m.train()(ids, labels=ids).loss for m in (compiled, eager)]
    for loss in losses:
        loss.backward()
    assert_same_output(*losses)
    assert_same_output(*(m.model.layers[1].mlp.up_proj.weight.grad for m in (compiled, eager)))
    eager, compiled = marked_pair("mistral-window", backend, num_hidden_layers=2)
    with torch.no_grad():
        assert_same_output(compiled(ids), eager(ids))
    assert reused() == before


def test_copies_keep_the_marks_and_files_do_not() -> None:
    model = zoo.make("llama", num_hidden_layers=2)
    llmopt.mark_layers(model)
    same = copy.deepcopy(model)
    assert all(layer.forward.__self__ is layer for layer in same.model.layers)
    assert all(layer.forward.__func__ is layers.forward for layer in same.model.layers)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert all(layer.forward.__func__ is not layers.forward for layer in loaded.model.layers)
    x = zoo.inputs("llama", 5)
    with torch.no_grad():
        for other in (model, same, loaded):
            assert_same_output(
                other(**x).logits, zoo.make("llama", num_hidden_layers=2)(**x).logits
            )


class Other(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return x, None


def test_what_cannot_be_marked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(messages, "_said", set())
    assert llmopt.mark_layers(nn.Sequential(nn.ModuleList([Other(), Other()]))) == 0
    assert "mark_layers found no layers in Sequential" in caplog.text
    model = zoo.make("llama", num_hidden_layers=2)
    assert llmopt.mark_layers(model) == 2
    assert llmopt.mark_layers(model) == 0, "they have been marked"
    for change in CHANGES:
        other = zoo.make("llama", num_hidden_layers=2)
        change(*other.model.layers, other.model)
        assert llmopt.mark_layers(other) == 0


# What would make one trace wrong for another layer.
CHANGES = (
    lambda first, second, model: setattr(second, "forward", lambda x, **_: x),
    lambda first, second, model: setattr(second.mlp, "forward", lambda x: x),
    lambda first, second, model: second.mlp.register_forward_hook(lambda *_: None),
    lambda first, second, model: setattr(first.mlp.up_proj, "weight", first.mlp.gate_proj.weight),
    lambda first, second, model: setattr(first, "input_layernorm", first.post_attention_layernorm),
    lambda first, second, model: setattr(model, "norm", first.input_layernorm),
    lambda first, second, model: setattr(second.mlp.up_proj, "bias", nn.Parameter(torch.ones(76))),
    lambda first, second, model: setattr(second.mlp, "up_proj", nn.Identity()),
)


class Twice(nn.Module):
    """The first layer gets its input twice, the second two different tensors; the last gives its input."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(48, 48)
            self.skip = False

        def forward(self, x: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
            return x if self.skip else self.linear(x) + 2 * first

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Twice.Layer() for _ in range(4))
        self.layers[3].skip = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = x
        for layer in self.layers:
            x = layer(x, first)
        return x


@torch.no_grad()
def test_a_tensor_given_twice_and_one_given_back(backend: str) -> None:
    eager = Twice().eval()
    marked = copy.deepcopy(eager)
    assert llmopt.mark_layers(marked) == 4
    x = torch.randn(2, 5, 48)
    assert_same_output(torch.compile(marked, backend=backend)(x), eager(x))


@torch.no_grad()
def test_attentions_are_given_out(backend: str) -> None:
    """transformers warns of them inside a layer, where Dynamo breaks the graph."""
    eager, compiled = marked_pair("llama", backend, num_hidden_layers=2)
    x = zoo.inputs("llama", 7)
    assert_same_output(compiled(**x, output_attentions=True), eager(**x, output_attentions=True))
