"""Which layer alone feeds which: modules called with keywords, results that cannot be read, statistics that must stay."""

from __future__ import annotations

import logging
from collections.abc import Callable

import llmopt
import pytest
import torch
from llmopt.quant import flow
from llmopt.quant.layers import linears_of
from torch import Tensor, nn

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))


class Keywords(nn.Module):
    """A norm and a linear that are called with keywords."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.linear = nn.LayerNorm(64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(input=self.norm(input=x))


class Slots:
    """A result whose tensors no generic code can find."""

    __slots__ = ("value",)

    def __init__(self, value: Tensor) -> None:
        self.value = value


class Box:
    """A result that holds tensors as attributes, itself among them."""

    def __init__(self, **values: object) -> None:
        vars(self).update(values, itself=self, nested=[values])


class Several(list):
    """A container of a type of its own."""


class Returning(nn.Module):
    """A norm whose output is read by a linear and handed out in some object."""

    def __init__(self, wrap) -> None:
        super().__init__()
        self.norm, self.linear, self.wrap = nn.LayerNorm(64), nn.Linear(64, 32), wrap

    def forward(self, x: Tensor) -> object:
        h = self.norm(x)
        return self.wrap(h, self.linear(h))


def feeds(model: nn.Module) -> list[flow.Feed]:
    return flow.feeds_of(model.eval(), [X], linears_of(model))


def test_modules_called_with_keywords() -> None:
    assert feeds(Keywords()) == [flow.Feed("norm", ("linear",), 0.0)]


def test_a_second_reader_called_with_a_keyword_counts() -> None:
    class Two(Keywords):
        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            return self.linear(h) + self.other(input=h).sum(-1, keepdim=True)

    model = Two()
    model.other = nn.LayerNorm(64)  # a module that is watched too, and no linear
    assert feeds(model) == []


@pytest.mark.parametrize("held", [True, False])
def test_tensors_in_a_result_of_another_class(held: bool) -> None:
    """A tensor that leaves the model in an object's attributes has a reader that is not known."""
    wrap = (
        (lambda h, y: Box(h=Several([h]), y=y))
        if held
        else (lambda h, y: Box(y=y, flag=True, name="y"))
    )
    assert [f.source for f in feeds(Returning(wrap))] == ([] if held else ["norm"])


@pytest.mark.parametrize("wrap", [lambda h, y: (Slots(h), y), lambda h, y: lambda: h])
def test_a_result_that_cannot_be_looked_through(wrap, caplog) -> None:
    with caplog.at_level(logging.WARNING, "llmopt"):
        assert feeds(Returning(wrap)) == []
    assert "tensors in a result of type" in caplog.text


def test_statistics_of_a_training_model_stay() -> None:
    model = nn.Sequential(nn.BatchNorm1d(64), nn.Linear(64, 32)).train()
    before = model[0].running_mean.clone()
    twin = llmopt.quantize(model, "w8a8", [X], algorithm="smoothquant")
    assert torch.equal(model[0].running_mean, before)
    assert int(model[0].num_batches_tracked) == 0
    assert twin.training
    assert [f.source for f in feeds(model)] == ["0"]


class Read(nn.Module):
    """A norm in front of a linear, and something else that its subclasses do with either."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.linear, self.out = nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 64)
        nn.init.uniform_(self.norm.weight, 0.1, 4.0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.out(torch.relu(self.linear(h))) + self.also(x, h)

    def also(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.zeros_like(x)


class Kept(Read):
    def also(self, x: Tensor, h: Tensor) -> Tensor:
        kept = torch.zeros_like(x)
        kept[:] = h
        return kept


class ReadsTheNormsWeight(Read):
    def also(self, x: Tensor, h: Tensor) -> Tensor:
        return x * self.norm.weight


class ReadsTheLinearsWeight(Read):
    def also(self, x: Tensor, h: Tensor) -> Tensor:
        return x @ self.linear.weight.t()


@torch.jit.script
def doubled(x: Tensor) -> Tensor:
    return x * 2.0


class InAScript(Read):
    def also(self, x: Tensor, h: Tensor) -> Tensor:
        return doubled(h)


class Mapped(Read):
    def also(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.vmap(torch.cos)(h)


class Written(Read):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        h[:, 0] = 1.5
        return self.out(torch.relu(self.linear(h)))


def test_a_norm_that_nobody_else_reads() -> None:
    assert [f.source for f in feeds(Read())] == ["norm"]


@pytest.mark.parametrize(
    "cls", [Kept, ReadsTheNormsWeight, ReadsTheLinearsWeight, InAScript, Mapped, Written]
)
def test_what_reads_unseen_shows_in_the_result(cls: type[Read], caplog) -> None:
    with caplog.at_level(logging.WARNING, "llmopt"):
        assert feeds(cls()) == []
    assert "are read where nobody sees it, and keep their scale: norm" in caplog.text


def test_only_the_layer_that_is_read_unseen_keeps_its_scale() -> None:
    model = nn.Sequential(Read(), Mapped(), Read())
    assert [f.source for f in feeds(model)] == ["0.norm", "2.norm"]
    before = {name: p.clone() for name, p in model.named_parameters()}
    feeds(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_norm_that_is_given_more_than_its_input() -> None:
    class Scaled(nn.LayerNorm):
        def forward(self, input: Tensor, scale: Tensor) -> Tensor:
            return super().forward(input) * scale

    class Model(Read):
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.norm(x, x.abs().mean()))

    model = Model()
    model.norm = Scaled(64)
    assert feeds(model) == []


class Hidden(Read):
    """Reads the norm's weight; subclasses return something that could hide it."""

    def also(self, x: Tensor, h: Tensor) -> Tensor:
        return 0.001 * x * self.norm.weight


class HiddenByConstants(Hidden):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return torch.cat((y, torch.full_like(y, -1e9)), -1)


class HiddenInMemoryOfItsOwn(Hidden):
    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.kept.append(self.kept[0] if self.kept else torch.empty_like(y))
        return self.kept[0].copy_(y)


# How much of a result the smallest reader has that shows: in float32, and where numbers are rounded to 8 bits.
LEAST = {torch.float32: 2e-4, torch.bfloat16: 0.01}


@pytest.mark.parametrize("cls", [Hidden, HiddenByConstants, HiddenInMemoryOfItsOwn])
@pytest.mark.parametrize("dtype", LEAST, ids=str)
def test_what_a_result_could_hide(cls: type[Read], dtype: torch.dtype) -> None:
    model = cls().eval().to(dtype)
    model.also = lambda x, h: LEAST[dtype] * x * model.norm.weight
    assert flow.feeds_of(model, [X.to(dtype)], linears_of(model)) == []
    plain = Read().eval().to(dtype)
    assert [f.source for f in flow.feeds_of(plain, [X.to(dtype)], linears_of(plain))] == ["norm"]


class OneMore(nn.Module):
    """Gemma's norm, whose weight counts from 1: a scale makes that round, in bfloat16 by much."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, generator=torch.Generator().manual_seed(0)) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return (nn.functional.rms_norm(x.float(), (64,)) * (1 + self.weight.float())).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("returned", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden", [False, True])
def test_norms_whose_weight_counts_from_one(
    dtype: torch.dtype, returned: torch.dtype, hidden: bool
) -> None:
    """What rounds is the weight, whatever the result is widened or shortened to."""

    class Model(Read):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).to(returned)

        def also(self, x: Tensor, h: Tensor) -> Tensor:
            return 0.3 * x * (1 + self.norm.weight) if hidden else torch.zeros_like(x)

    model = Model()
    model.norm = OneMore()
    model.eval().to(dtype)
    found = flow.feeds_of(model, [X.to(dtype)], linears_of(model))
    assert [(f.source, f.norm_offset) for f in found] == ([] if hidden else [("norm", 1.0)])


def largest(y: Tensor) -> Tensor:
    return y.argmax(-1)


RESULTS: dict[str, Callable[[Tensor], object]] = {
    "a list": Tensor.tolist,
    "a number": lambda y: y.mean().item(),
    "nothing": lambda y: None,
    "places": largest,
    "places by name": lambda y: {"ids": largest(y), "name": "ids"},
    "no floats": lambda y: (largest(y), y[:0]),
}


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize("first", [True, False])
def test_a_result_that_shows_nothing(name: str, first: bool, caplog) -> None:
    """Of the first sample, or of one that takes another way."""

    class Model(Read):
        def forward(self, x: Tensor, show: bool) -> object:
            y = super().forward(x) + x * self.norm.weight
            return y if show else RESULTS[name](y)

    model, samples = Model().eval(), [(X, not first), (X, False)]
    with caplog.at_level(logging.WARNING, "llmopt"):
        assert flow.feeds_of(model, samples, linears_of(model)) == []
    assert "Model gives a result without floats, which shows nobody who reads what" in caplog.text


class WithAnImage(Read):
    """Reads the norm's output a second time where there is an image."""

    def forward(self, x: Tensor, image: Tensor | None = None) -> Tensor:
        h = self.norm(x)
        y = self.out(torch.relu(self.linear(h)))
        return y if image is None else y + torch.tanh(h @ self.out.weight.T) * image


@pytest.mark.parametrize("samples", [[(X,), (X, X)], [(X, X), (X,)], [(X, None)] * 3 + [(X, X)]])
@pytest.mark.parametrize("algorithm", ["smoothquant", "awq"])
def test_what_only_some_samples_show(samples: list, algorithm: str) -> None:
    model = WithAnImage().eval()
    with torch.no_grad():
        model.norm.weight[3] = 30.0
    assert flow.feeds_of(model, samples[:1], linears_of(model)) or len(samples[0]) == 2
    twin = llmopt.quantize(model, "w8a16", samples, algorithm=algorithm)
    for sample in samples:
        assert (twin(*sample) - model(*sample)).norm() < 0.02 * model(*sample).norm()


def test_a_model_that_gives_another_result_each_time(caplog) -> None:
    class Random(Read):
        def also(self, x: Tensor, h: Tensor) -> Tensor:
            return torch.rand_like(x)

    with caplog.at_level(logging.WARNING, "llmopt"):
        assert feeds(Random()) == []
    assert "Random gives another result at each call" in caplog.text


def test_samples_that_cannot_be_copied() -> None:
    model, sample = Read().eval(), X.clone().requires_grad_() * 1
    assert [f.source for f in flow.feeds_of(model, [sample], linears_of(model))] == ["norm"]
