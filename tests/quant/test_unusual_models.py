"""Models that hold something unusual: hooks on linears, computed weights, linears without tokens, heads that are scaled, odd configs."""

from __future__ import annotations

import copy
import functools
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llmopt
import pytest
import torch
from llmopt.quant.evaluate import divergence
from llmopt.quant.module import QuantizedLinear
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import TensorDataset
from transformers import Mamba2Config, Mamba2ForCausalLM, UMT5Config, UMT5ForConditionalGeneration

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()


def distance(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def with_a_hook(model: nn.Sequential) -> None:
    model[0].register_forward_hook(lambda module, args, output: output * 3)


def with_a_hook_in_front(model: nn.Sequential) -> None:
    model[0].register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0] * 3,), kwargs), with_kwargs=True
    )


@pytest.mark.parametrize("change", [with_a_hook, with_a_hook_in_front])
@torch.no_grad()
def test_hooks_stay(change, tmp_path: Path) -> None:
    model = mlp()
    plain = model(X)
    change(model)
    want = model(X)
    assert distance(plain, want) > 0.3
    twin = llmopt.quantize(model, "w8a16")
    assert isinstance(twin[0], QuantizedLinear)
    assert distance(twin(X), want) < 0.02
    llmopt.save_quantized(twin, tmp_path)
    skeleton = mlp()
    change(skeleton)
    assert torch.equal(llmopt.load_quantized(tmp_path, skeleton)(X), twin(X))


@torch.no_grad()
def test_a_handle_of_a_hook_is_the_twins() -> None:
    model = mlp()
    plain = model(X)
    model.handle = model[0].register_forward_hook(lambda module, args, output: output * 3)
    twin = llmopt.quantize(model, "w8a16")
    copied = copy.deepcopy(twin)
    assert distance(twin(X), model(X)) < 0.02
    for module in (twin, copied):
        module.handle.remove()
        assert distance(module(X), plain) < 0.02
    assert distance(model(X), plain) > 0.3


HOLDERS: dict[str, Callable[[nn.Linear], Any]] = {
    "listed": lambda a: {"some": [(a,)]},
    "queued": lambda a: deque([a]),
    "its method": lambda a: a.forward,
    "partial": lambda a: functools.partial(a),
    "a container of its own": lambda a: [nn.Sequential(a)],
}


class Held(nn.Module):
    """Runs a linear that it finds where no module is looked for."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
        self.held = HOLDERS[where](self.a)

    def forward(self, x: Tensor) -> Tensor:
        held: Any = self.held
        while not callable(held):
            held = held["some"] if isinstance(held, dict) else held[0]
        return self.b(held(x))


@pytest.mark.parametrize("where", HOLDERS)
@pytest.mark.parametrize("calibration", [None, [X, 30 * X]], ids=["round", "smoothquant"])
@torch.no_grad()
def test_linears_that_attributes_hold_are_left(
    where: str, calibration, tmp_path: Path, caplog
) -> None:
    torch.manual_seed(0)
    model = Held(where).eval()
    twin = llmopt.quantize(model, "w8a8", calibration=calibration)
    assert "plain attributes hold them: a" in caplog.text
    assert type(twin.a) is nn.Linear
    assert isinstance(twin.b, QuantizedLinear)
    assert distance(twin(X), model(X)) < 0.02
    llmopt.save_quantized(twin, tmp_path)
    loaded = llmopt.load_quantized(tmp_path, lambda: Held(where).eval())
    assert torch.equal(loaded(X), twin(X))


@torch.no_grad()
def test_linears_with_another_forward_or_computed_weights_are_left(caplog) -> None:
    replaced, pruned = mlp(), mlp()
    replaced[0].forward = lambda x: x * 2
    prune.l1_unstructured(pruned[0], "weight", 0.5)
    with torch.enable_grad():
        pruned(X)  # whose weight has a history now
    for model in (replaced, pruned):
        caplog.clear()
        twin = llmopt.quantize(model, "w8a16")
        assert "left as they are" in caplog.text
        assert [isinstance(twin[i], QuantizedLinear) for i in (0, 2)] == [False, True]
        assert distance(twin(X), model(X)) < 0.02


@torch.no_grad()
def test_calibration_by_a_dataset_that_has_places_only() -> None:
    twin = llmopt.quantize(mlp(), "w8a16", TensorDataset(X[None]), algorithm="gptq")
    assert distance(twin(X), mlp()(X)) < 0.02


class Chosen(nn.Module):
    """A list of linears of which some get no row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.each, self.out = nn.ModuleList(nn.Linear(64, 64) for _ in range(3)), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for i, linear in enumerate(self.each):
            rows = torch.full((x.shape[0],), i == 1)
            y[rows] = linear(x[rows])
        return self.out(y)


class ChosenBlocks(Chosen):
    """Blocks of a norm and a linear, one of which gets all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64)) for _ in range(3)
        )


@pytest.mark.parametrize("cls", [Chosen, ChosenBlocks])
@pytest.mark.parametrize("algorithm", ["smoothquant", "awq", "gptq"])
@torch.no_grad()
def test_linears_that_get_no_rows(cls: type[Chosen], algorithm: str) -> None:
    model = cls().eval()
    twin = llmopt.quantize(model, "w8a16", [X], algorithm=algorithm)
    assert distance(twin(X), model(X)) < 0.02


class Gated(nn.Module):
    """down(gate · up), where down takes the scale of up."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.sigmoid(self.gate(x)) * self.up(x))


class Routed(nn.Module):
    """A gate and experts of which one is never chosen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.experts = nn.Linear(64, 3), nn.ModuleList(Gated() for _ in range(3))
        with torch.no_grad():
            self.gate.bias[2] = -1e9

    def forward(self, x: Tensor) -> Tensor:
        chosen, y = self.gate(x).argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            y[chosen == i] = expert(x[chosen == i])
        return y


@pytest.mark.parametrize("algorithm", ["smoothquant", "awq", "smoothquant+gptq"])
@torch.no_grad()
def test_experts_that_no_sample_chooses(algorithm: str) -> None:
    model = Routed().eval()
    twin = llmopt.quantize(model, "w8a16", [X], algorithm=algorithm)
    assert distance(twin(X), model(X)) < 0.02


@torch.no_grad()
def test_a_head_that_is_scaled_because_it_is_tied() -> None:
    config = UMT5Config(
        vocab_size=131, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4, pad_token_id=0,
        decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = UMT5ForConditionalGeneration(config).eval()
    assert model.config.tie_word_embeddings
    ids = torch.arange(10)[None]
    call = {"input_ids": ids, "decoder_input_ids": ids[:, :4]}
    twin = llmopt.quantize(model, "w8a16")
    assert isinstance(twin.lm_head, QuantizedLinear)
    assert distance(twin(**call).logits, model(**call).logits) < 0.05
    twin.tie_weights()
    assert isinstance(twin.lm_head, QuantizedLinear)


@torch.no_grad()
def test_a_config_with_an_infinite_number(tmp_path: Path) -> None:
    config = Mamba2Config(
        vocab_size=131, hidden_size=64, num_hidden_layers=1, num_heads=8, head_dim=16, state_size=8, n_groups=1, chunk_size=8,
    )  # fmt: skip
    twin = llmopt.quantize(Mamba2ForCausalLM(config).eval(), "w8a16")
    assert twin.config.time_step_limit[1] == float("inf")
    llmopt.save_quantized(twin, tmp_path)
    again = llmopt.load_quantized(tmp_path)
    assert list(again.config.time_step_limit) == list(twin.config.time_step_limit)
    ids = torch.arange(6)[None]
    assert torch.equal(again(ids).logits, twin(ids).logits)


def test_equal_logits_do_not_diverge_by_less_than_nothing() -> None:
    for seed in range(50):
        logits = torch.randn(7, 131, generator=torch.Generator().manual_seed(seed))
        assert 0 <= divergence(logits, logits * (1 + 1e-7)) < 1e-6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"calibration": 5}, "calibration=5 is no iterable of model inputs"),
        ({"calibration": ["hello"]}, "calibration sample 0 is of type str: give an iterable"),
        ({"calibration": [X.numpy()]}, "calibration sample 0 is of type ndarray"),
        ({"calibration": [X], "alpha": "x"}, "alpha='x' is not between 0 and 1"),
        ({"layers": ["0"]}, "is no mapping of name patterns to schemes"),
        ({"model": torch.relu}, "takes a torch.nn.Module, not a builtin"),
        ({"calibration": "random"}, "names no vocabulary: give sample inputs"),
    ],
)
def test_arguments_of_another_type(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        llmopt.quantize(**{"model": mlp(), "scheme": "w8a8", **arguments})
