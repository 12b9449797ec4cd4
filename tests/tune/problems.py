"""Problems, entries and databases that tests of the tuner share."""

from __future__ import annotations

import functools
import os
import signal
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
from llmopt.native.probe import Probe
from llmopt.target import target
from llmopt.tune import tuning
from llmopt.tune.database import Database, Entry
from llmopt.tune.environment import Environment, cpu_environment
from llmopt.types import LinearConfig, LinearProblem

FACTS = {"schema": 1, "device": "cpu", "name": "some CPU", "tier": "avx2", "threads": 2}
HERE = Environment.of(FACTS)


def problem(m: int | None = 16, n: int = 96, k: int = 64, **more) -> LinearProblem:
    return LinearProblem("linear", m, n, k, "f32", "f32", "f32", **more)


def entry(
    of: LinearProblem | None = None, config: LinearConfig | None = None, us: float = 10.0
) -> Entry:
    config = LinearConfig(span=2) if config is None else config
    facts = (of or problem()).facts()
    return Entry(facts, config.given(), us, 12.5, 0.8, "gained a lot", {"default": 12.5})


def database(root: Path, environment: Environment = HERE) -> Database:
    """A new one, as another process sees it."""
    return Database(root, environment)


def tune_patiently(monkeypatch: pytest.MonkeyPatch) -> None:
    """mode="max-autotune" with time for every candidate, however slow and busy the machine is."""
    steady = Probe(300e9, 1200e9, 20e9)
    patient = functools.partial(tuning.Tuning, budget=600.0, probe=lambda: steady)
    monkeypatch.setattr(tuning, "Tuning", patient)


def local(threads: int = 2) -> Environment:
    return cpu_environment(target(), threads)


def write_again_and_again(root: Path, count: int, ready: Event) -> None:
    """Five problems in turns, each result later than the one before."""
    known = database(root)
    ready.set()
    for i in range(count):
        known.put(entry(problem(m=i % 5 + 1), us=float(i)))


def die_while_writing(root: Path, step: str) -> None:
    """Killed at its first call of `os.<step>`."""
    setattr(os, step, lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL))
    database(root).put(entry(us=99.0))
