"""What "auto" times: each scheme's linear with the config that a plan would run it with."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from llmopt.auto import timing
from llmopt.auto.plans import LayerShape
from llmopt.quant.schemes import W8A8
from llmopt.target import target
from llmopt.tune import lookup, tuning
from llmopt.types import LinearConfig, LinearProblem

from tests.tune.problems import entry

SHAPE = LayerShape(3, 256, 128, torch.float32)
PROBLEM = timing.problem_of(SHAPE, W8A8)
FASTER = LinearConfig(span=2)
US = {FASTER: 1.0}  # of a call; of all other configs 3


@pytest.fixture
def clock_of() -> Callable[[str], tuple[timing.LayerClock, list]]:
    """A clock of a mode, and what it times; all know what one of them has timed."""

    def make(mode: str = "default") -> tuple[timing.LayerClock, list]:
        timed: list[tuple[LinearProblem, LinearConfig]] = []

        def bench_of(problem: LinearProblem, config: LinearConfig) -> timing.Bench:
            timed.append((problem, config))
            return lambda: US.get(config, 3.0)

        return timing.LayerClock(mode, bench_of, known), timed

    known: dict = {}
    return make


def tuned() -> lookup.Database:
    """This machine's own database, with one better config."""
    known = lookup.database(target(), torch.get_num_threads())
    known.put(entry(lookup.at(PROBLEM, lookup.bucket(SHAPE.m)), FASTER))
    return known


def test_a_tuned_config_is_timed(clock_of):
    clock, timed = clock_of()
    assert clock(SHAPE, W8A8) == 3e-6
    assert (PROBLEM, LinearConfig()) in timed
    tuned()
    clock, timed = clock_of()
    assert clock(SHAPE, W8A8) == 1e-6  # what was timed before says nothing of this config
    assert clock(SHAPE, None) == 3e-6
    assert timed.count((PROBLEM, FASTER)) == 1


def test_untuned_it_is_the_kernels_own_rules(clock_of, monkeypatch):
    tuned()
    monkeypatch.setenv("LLMOPT_TUNE", "0")
    clock, timed = clock_of()
    assert clock(SHAPE, W8A8) == 3e-6
    assert {config for _, config in timed} == {LinearConfig()}


def test_only_max_autotune_measures(clock_of, monkeypatch):
    asked = []

    def measure(_, problem: LinearProblem):
        asked.append(problem)
        return entry(problem, FASTER), True

    monkeypatch.setattr(tuning.Tuning, "measure", measure)
    clock, _ = clock_of()
    assert clock(SHAPE, W8A8) == 3e-6
    assert not asked
    clock, timed = clock_of("max-autotune")
    assert clock(SHAPE, W8A8) == 1e-6
    assert lookup.at(PROBLEM, lookup.bucket(SHAPE.m)) in asked
    assert {config for _, config in timed} == {FASTER}
    assert clock(SHAPE, W8A8) == 1e-6
    assert len(asked) == len(set(asked))


def test_the_mode_of_compile_reaches_the_clock(monkeypatch):
    modes = []

    def clock_of(mode: str):
        modes.append(mode)
        return lambda shape, scheme: 1e-6 if scheme is None else 2e-6

    monkeypatch.setattr("llmopt.auto.choose.LayerClock", clock_of)
    torch._dynamo.reset()
    options = {"precision": "auto", "mode": "max-autotune"}
    monkeypatch.setattr(tuning.Tuning, "measure", lambda _, p: (entry(p, LinearConfig()), True))
    model = torch.nn.Linear(128, 256)
    with torch.no_grad():
        torch.compile(model, backend="llmopt", options=options)(torch.randn(3, 128))
    assert modes == ["max-autotune"]
