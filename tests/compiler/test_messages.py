"""What each LLMOPT_DEBUG level adds to what is printed."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

import pytest
import torch
from llmopt.compiled import alive
from llmopt.passes.pipeline import NAMES
from torch import nn

MODULE = nn.Sequential(nn.Linear(8, 8), nn.AvgPool1d(1)).requires_grad_(False)
FALLBACK = r"llmopt: runs as in PyTorch: avg_pool1d \(\w+\): no kernel for avg_pool1d  \[1 \(AvgPool1d\).*\]"


@pytest.fixture
def said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., list[str]]:
    """What compiling a module says at a level, message by message."""

    def say(level: int, module: Callable = MODULE, x: torch.Tensor | None = None) -> list[str]:
        monkeypatch.setenv("LLMOPT_DEBUG", str(level))
        torch._dynamo.reset()
        torch.compile(module, backend="llmopt")(torch.ones(2, 8) if x is None else x)
        return re.split(r"\n(?=llmopt: )", capsys.readouterr().out.rstrip("\n"))

    return say


def test_level_0_says_nothing(said: Callable, caplog: pytest.LogCaptureFixture) -> None:
    """All of it is in the log of the level DEBUG."""
    with caplog.at_level(logging.DEBUG, "llmopt"):
        assert said(0) == [""]
    assert "no kernel for avg_pool1d" in caplog.text
    assert str(alive()[-1].plan) in caplog.text


def test_level_1_says_what_falls_back(said: Callable) -> None:
    (message,) = said(1)
    assert re.fullmatch(FALLBACK, message)


def test_level_2_adds_the_plan(said: Callable) -> None:
    plan, fallback = said(2)
    assert plan == f"llmopt: {alive()[-1].plan}"
    assert "linear.cpu 8x8" in plan
    assert re.fullmatch(FALLBACK, fallback)


@pytest.mark.parametrize("level", [3, 4])
def test_level_3_adds_the_graph_after_each_pass(level: int, said: Callable) -> None:
    *graphs, plan, fallback = said(level)
    heads = [f"llmopt: graph after {name}:\ngraph():\n" for name in NAMES]
    assert len(graphs) == len(heads)
    assert all(g.startswith(head) for g, head in zip(graphs, heads, strict=True))
    before, after = (graphs[NAMES.index(name)] for name in ("activations", "linears"))
    assert "llmopt.ops.linear" in after
    assert "llmopt.ops.linear" not in before
    assert plan.startswith("llmopt: plan ")
    assert re.fullmatch(FALLBACK, fallback)


def test_level_1_says_why_a_whole_graph_runs_as_in_pytorch(said: Callable) -> None:
    (message,) = said(1, x=torch.ones(2, 8, requires_grad=True))
    assert re.match(r"llmopt: graph of \d+ nodes runs as in PyTorch: gradients are needed", message)
    assert said(1, torch.atan)[0] == "llmopt: nothing in this graph has a native kernel"
