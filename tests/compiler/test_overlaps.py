"""Inputs that share bytes in a later call: kernels run where that makes no difference, PyTorch where it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llmopt
import pytest
import torch
from llmopt import messages, overlaps
from llmopt.compiled import Run, profiling
from torch import Tensor, nn
from torch.nn import functional as F

from tests.compiler.rewriting import randn

Parts = Callable[[Tensor], tuple[Tensor, Tensor]]  # of one tensor: what is read, what is written


def function(x: Tensor, y: Tensor) -> Tensor:
    before = F.layer_norm(x, (8,))
    y.copy_(before.flip(0) * 2)
    return before + F.layer_norm(x, (8,))


@torch.no_grad()
def called(compiled: Callable, eager: Callable, ours: tuple, theirs: tuple) -> Run:
    """Both on equal inputs: they give the same, and leave the same in them."""
    with profiling() as runs:
        got = compiled(*ours)
    torch.testing.assert_close(got, eager(*theirs))
    torch.testing.assert_close(ours, theirs)
    (run,) = runs
    assert bool(run.segments) != bool(run.reason), "either kernels ran or there is a reason"
    return run


def compile_anew(model: Any) -> Callable:
    torch._dynamo.reset()
    return torch.compile(model, backend="llmopt", dynamic=False)


def of_numpy(x: Any, y: Any) -> Parts:
    """Storages of their own, which begin where the part does."""

    def parts(whole: Tensor) -> tuple[Tensor, Tensor]:
        memory = whole.numpy()
        return torch.from_numpy(memory[x]), torch.from_numpy(memory[y])

    return parts


LEFT, MIDDLE, RIGHT = (
    (slice(0, 8), slice(0, 8)),
    (slice(0, 8), slice(4, 12)),
    (slice(0, 8), slice(8, 16)),
)
SHARING: dict[str, Parts] = {
    "all": lambda t: (t[:8, :8], t.t()[:8, :8].t()),
    "rows": lambda t: (t[2:10, :8], t[:8, :8]),
    "columns": lambda t: (t[LEFT], t[MIDDLE]),
    "crossing": lambda t: (t.view(-1)[:128].view(16, 8)[::2], t[:8, 6:14]),
    "foreign": of_numpy((slice(2, 10), slice(0, 8)), LEFT),
}
APART: dict[str, Parts] = {
    "rows": lambda t: (t[:8, :8], t[8:, :8]),
    "columns": lambda t: (t[LEFT], t[RIGHT]),
    "every second row": lambda t: (t[::2, :8], t[1::2, :8]),
    "foreign columns": of_numpy(LEFT, RIGHT),
}


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Callable:
    monkeypatch.setattr(messages, "_said", set())
    return lambda: [r.getMessage() for r in caplog.records if r.name == "llmopt"]


def parts_of_one(parts: Parts, size: int = 16) -> tuple[Run, Run]:
    """The call that is compiled, on parts of two tensors, and one on parts of one."""
    compiled = compile_anew(function)
    apart = [(parts(randn(size, size))[0], parts(randn(size, size))[1]) for _ in range(2)]
    first = called(compiled, function, *apart)
    return first, called(compiled, function, *(parts(randn(size, size)) for _ in range(2)))


@pytest.mark.parametrize("name", SHARING)
def test_inputs_that_share_memory_later(name: str, warned: Callable) -> None:
    """Compiled with inputs apart: they run as in PyTorch, which a warning says."""
    first, later = parts_of_one(SHARING[name])
    assert later.graph is first.graph
    assert not first.reason
    assert "share memory that the graph writes into" in later.reason
    (warning,) = warned()
    assert later.reason in warning


@pytest.mark.parametrize("name", APART)
def test_parts_of_one_tensor_without_a_common_byte(name: str, warned: Callable) -> None:
    first, later = parts_of_one(APART[name])
    assert later.graph is first.graph
    assert not later.reason
    assert not warned()


def test_what_takes_too_long_to_find_out(warned: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def crossing(t: Tensor) -> tuple[Tensor, Tensor]:
        return t.as_strided((8, 8), (256, 215)), t.as_strided((8, 8), (163, 252), 12)

    monkeypatch.setattr(overlaps, "_WORK", 1)
    _, later = parts_of_one(crossing, 64)
    assert "takes too long" in later.reason
    assert later.reason in "".join(warned())


def test_sizes_that_change() -> None:
    """Compared again at another size, though all begins where it did."""
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="llmopt", dynamic=True)
    assert not called(compiled, function, *((randn(4, 8), randn(4, 8)) for _ in range(2))).reason
    ours, theirs = randn(16, 8), randn(16, 8)
    reasons = []
    for rows in (4, 8, 6, 7):
        both = [(whole[6 : 6 + rows], whole[:rows]) for whole in (ours, theirs)]
        reasons.append(called(compiled, function, *both).reason)
    assert [bool(reason) for reason in reasons] == [False, True, False, True]


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("rows", torch.zeros(8, 8))


class WritesAnInput(Weights):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        before = self.linear(x)
        y.copy_(before.flip(0))
        return before + self.linear(x)


class WritesABuffer(Weights):
    def forward(self, x: Tensor) -> Tensor:
        before = F.layer_norm(x, (8,))
        self.rows.copy_(before.flip(0) * 2)
        return before + self.linear(x)


class WritesStatistics(Weights):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        before = F.layer_norm(y, (8,))
        return self.norm(x) + before + F.layer_norm(y, (8,))


X = randn(8, 8)
WEIGHTS: dict[str, tuple[type[Weights], tuple, Callable[[Any], tuple]]] = {
    "matrix": (WritesAnInput, (X, randn(8, 8)), lambda m: (X, m.linear.weight.detach().view(8, 8))),
    "data": (WritesAnInput, (X, randn(8, 8)), lambda m: (X, m.linear.weight.data)),
    "buffer": (WritesABuffer, (X,), lambda m: (m.rows.view(64).view(8, 8),)),
    "statistics": (
        WritesStatistics,
        (X, randn(1, 8)),
        lambda m: (X, m.norm.running_mean.view(1, 8)),
    ),
}


def two(make: type[Weights]) -> list[Weights]:
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        found.append(make())
    return found


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_and_inputs_over_the_same_memory(name: str) -> None:
    make, apart, sharing = WEIGHTS[name]
    ours, theirs = two(make)
    compiled = compile_anew(ours)
    for _ in range(2):
        args = [tuple(t.clone() for t in apart) for _ in range(2)]
        assert not called(compiled, theirs, *args).reason
    assert called(compiled, theirs, sharing(ours), sharing(theirs)).reason
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_a_weight_that_comes_to_lie_in_memory_that_is_written() -> None:
    """While all else stays where it is: another parameter, and the same one with other data."""
    ours, theirs = two(WritesABuffer)
    compiled = compile_anew(ours)
    assert not called(compiled, theirs, (X,), (X,)).reason
    kept = [m.linear.weight.data for m in (ours, theirs)]
    for model in (ours, theirs):
        model.linear.weight.data = model.rows.view(8, 8)
    assert called(compiled, theirs, (X,), (X,)).reason
    for model, data in zip((ours, theirs), kept, strict=True):
        model.linear.weight.data = data
    assert not called(compiled, theirs, (X,), (X,)).reason
    for model in (ours, theirs):
        model.linear.weight = nn.Parameter(model.rows.view(8, 8))
    assert called(compiled, theirs, (X,), (X,)).reason


def test_under_autocast() -> None:
    """What runs instead is the graph as it was traced: each linear casts what it reads then."""
    model = two(WritesAnInput)[0]
    compiled = compile_anew(model)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        compiled(X.clone(), X.clone())
        ours, theirs = ((whole[2:10], whole[:8]) for whole in (randn(16, 8), randn(16, 8)))
        assert called(compiled, model, ours, theirs).reason


def test_explain() -> None:
    compiled = compile_anew(function)
    whole = randn(16, 8)
    assert llmopt.explain(compiled, whole[:8], whole[8:].clone()).reasons == ()
    report = llmopt.explain(compiled, whole[:8], whole[4:12])
    assert report.steps == report.fallbacks == ()
    (reason,) = report.reasons
    assert "share memory that the graph writes into" in reason
    assert f"whole graph ran as in PyTorch: {reason}" in str(report)
