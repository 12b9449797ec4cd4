"""What calibration reads samples from, which of them differ in form, and what it leaves as it was."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator
from typing import Any

import llmopt
import pytest
import torch
from llmopt.auto import module
from llmopt.quant import flow
from llmopt.quant.calibration import forms_of, samples_of
from llmopt.quant.layers import buffers_of, linears_of, twin_of
from llmopt.quant.module import QuantizedLinear
from torch import Tensor, nn
from torch.utils.data import Dataset

from tests.quant import models

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
ALGORITHMS = ["smoothquant", "awq", "gptq"]


class Endless(Dataset):
    """A data set that never says that an index is too large."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        assert index < 4
        return X + index


def test_a_data_set_is_read_as_far_as_it_goes() -> None:
    samples = samples_of(Endless())
    assert [torch.equal(sample, X + i) for i, sample in enumerate(samples)] == [True] * 4


def test_errors_of_what_makes_samples_are_its_own() -> None:
    def broken() -> Iterator[Tensor]:
        yield X
        raise TypeError("no such addition")

    with pytest.raises(TypeError, match="no such addition"):
        llmopt.quantize(models.mlp(), "w8a16", broken(), algorithm="gptq")


FORMS: dict[str, tuple[Any, Any]] = {
    "another name": ({"x": X}, {"y": X}),
    "another name in a mapping": (UserDict(x=X), UserDict(y=X)),
    "one more": ((X,), (X, X)),
    "one tensor, one in a tuple": (X, (X,)),
    "None": ((X, None), (X, X)),
    "a flag": ((X, True), (X, False)),
    "a word": ((X, "sum"), (X, "mean")),
    "zero": ((X, 0), (X, 7)),
    "another type": ((X, 1), (X, 1.0)),
    "dimensions": (X, X[None, None]),
    "one row": (X, X[:1]),
    "dtype": (X, X.half()),
    "inside": ({"x": (X, [X, None])}, {"x": (X, [X, X])}),
}


@pytest.mark.parametrize("name", FORMS)
def test_samples_of_two_forms(name: str) -> None:
    a, b = FORMS[name]
    assert [id(sample) for sample in forms_of([a, b, a, b])] == [id(a), id(b)]


@pytest.mark.parametrize(
    ("a", "b"), [(X, X[:3]), ((X, 3), (X, 4)), ({"x": X, "k": 0.5}, {"x": X + 1, "k": 0.7})]
)
def test_samples_of_one_form(a: Any, b: Any) -> None:
    assert forms_of([a, b]) == [a]


class Keeps(nn.Module):
    """Writes what it computes into its buffers, in place and by assignment, and reads them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.linear = nn.LayerNorm(64), nn.Linear(64, 64)
        self.register_buffer("cache", torch.zeros(8, 64))
        self.register_buffer("grown", torch.zeros(0, 64))
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(64))
        self.calls = 0

    def forward(self, x: Tensor, kept: list[Tensor] | None = None) -> Tensor:
        y = self.linear(self.norm(x)) + self.cache[: len(x)] + self.grown.sum() + self.filled
        if kept is not None:
            kept.append(y)
        self.cache[: len(x)] = y
        self.grown = torch.cat((self.grown, y))
        self.filled += len(x)
        self.mean.data = y.double().mean()
        self.calls += 1
        self.last = y
        return y


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers() if "linear" not in name}


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, None])
@torch.no_grad()
def test_buffers_stay_as_they_were(algorithm: str | None) -> None:
    model = Keeps().eval()
    model(X)
    before = buffers(model)
    samples = [(X[:3],), (X[:2], [])]
    twin = llmopt.quantize(model, "w8a16", samples if algorithm else None, algorithm=algorithm)
    for one in (model, twin):
        assert all(torch.equal(value, before[name]) for name, value in buffers(one).items())
    assert (model.calls, twin.calls) == (1, 1)
    assert torch.equal(twin.last, model.last)
    twin(X)
    assert all(torch.equal(value, before[name]) for name, value in buffers(model).items())


def test_scales_move_in_a_model_that_counts_its_calls() -> None:
    """Every trial begins with the buffers that the first call began with, and its samples follow each other."""
    model = Keeps().eval()
    found = flow.feeds_of(model, [(X,), (X, [])], linears_of(model))
    assert [feed.source for feed in found] == ["norm"]
    assert model.calls == 0
    assert not hasattr(model, "last")


@torch.no_grad()
def test_buffers_of_every_kind_have_twins() -> None:
    model = nn.Sequential(torch.jit.script(nn.BatchNorm1d(64)), nn.Linear(64, 64))
    model.register_buffer("wide", torch.zeros(1).expand(64))
    with torch.enable_grad():
        model.register_buffer("computed", torch.ones(64, requires_grad=True) * 2)
    twin = llmopt.quantize(model, "w8a16", [X], algorithm="gptq")
    assert torch.equal(twin.computed, model.computed)
    assert torch.equal(twin[0].running_mean, model[0].running_mean)
    assert twin[0].training
    own, of_model = ({b.data_ptr() for b in m.buffers() if b.numel()} for m in (twin, model))
    assert own & of_model == {model.wide.data_ptr()}  # nobody can write one of its elements


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_buffers_that_are_no_memory_of_their_own_are_shared(algorithm: str) -> None:
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64))
    model.register_buffer("sparse", torch.eye(4).to_sparse())
    model.register_buffer("rows", torch.eye(4).to_sparse_csr())
    model.register_buffer("wide", torch.tensor([torch.nan]).expand(64))
    model.register_buffer("nowhere", torch.empty(3, device="meta"))
    model.register_buffer(
        "quantised", torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    )
    model.register_buffer("numbers", torch.tensor([torch.nan, 1.0]))
    twin = llmopt.quantize(model.eval(), "w8a8", [X], algorithm=algorithm)
    assert all(getattr(twin, n) is getattr(model, n) for n in ("sparse", "rows", "wide", "nowhere"))
    assert torch.equal(twin.numbers.isnan(), model.numbers.isnan())
    assert torch.isfinite(twin(X)).all()


def test_codes_are_not_copied() -> None:
    once = llmopt.quantize(models.mlp(), "w8a16", layers={"3": None})
    assert twin_of(once)[1].codes.data_ptr() == once[1].codes.data_ptr()
    assert buffers_of(once) == []


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_samples_stay_as_they_were(algorithm: str) -> None:
    kept: list[Tensor] = []
    llmopt.quantize(Keeps().eval(), "w8a16", [(X, kept)], algorithm=algorithm)
    assert kept == []


@torch.no_grad()
def test_a_choice_leaves_model_and_samples_as_they_were(monkeypatch) -> None:
    def seconds(shape: object, scheme: object) -> float:
        return 2.0 if scheme is None else 1.0

    monkeypatch.setattr(module, "LayerClock", lambda: seconds)
    model, kept = Keeps().eval(), []
    model(X)
    before = buffers(model)
    twin = llmopt.quantize(model, "auto", [(X, kept)], accuracy_budget=1.0)
    assert isinstance(twin.linear, QuantizedLinear)
    for one in (model, twin):
        assert all(torch.equal(value, before[name]) for name, value in buffers(one).items())
    assert kept == []
