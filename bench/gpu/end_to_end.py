"""Whole models: eager, llmopt exact, with CUDA graphs and with codes for weights, Inductor; every run in a process of its own.

Results are compared with eager's before they are timed. Times are those of a call on the host's clock, what a user sees, and beside them
for how long the GPU runs kernels in it.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.gpu import model as own
from bench.gpu.clock import WARM_CALLS
from bench.gpu.forms.work import FULL, SMALL
from bench.gpu.session import Session
from bench.gpu.subject import Subject

PHASE = "models"
SECONDS = 120.0  # of one run, at most
CALLS = 20  # timed ones
STEPS = 4  # of decoding, compared; then lengths are symbols, and graphs are captured
_REDUCE = {"mode": "reduce-overhead"}


SYSTEMS: dict[str, dict[str, Any]] = {
    "eager": {},
    "llmopt": {"backend": "llmopt"},
    "llmopt reduce-overhead": {"backend": "llmopt", **_REDUCE},
    "llmopt w8a8": {"backend": "llmopt", "options": {"precision": "w8a8"}},
    "llmopt w4a16": {"backend": "llmopt", "options": {"precision": "w4a16"}},
    "llmopt w8a8 reduce-overhead": {
        "backend": "llmopt",
        "options": {"precision": "w8a8", **_REDUCE},
    },
    "llmopt w4a16 reduce-overhead": {
        "backend": "llmopt",
        "options": {"precision": "w4a16", **_REDUCE},
    },
    "Inductor": {"backend": "inductor"},
    "Inductor reduce-overhead": {"backend": "inductor", **_REDUCE},
}
_EXACT, _GRAPHS = ("eager", "llmopt", "Inductor"), ("llmopt reduce-overhead",)
_CODES, _GRAPHS_OF_CODES = (
    ("llmopt w8a8", "llmopt w4a16"),
    ("llmopt w8a8 reduce-overhead", "llmopt w4a16 reduce-overhead"),
)
# In the order of what their numbers are worth: time may run out.
TIERS = (
    ("eager", "llmopt", *_GRAPHS),
    (*_CODES, *_GRAPHS_OF_CODES),
    ("Inductor", "Inductor reduce-overhead"),
)
# How far results may be from eager's, by a word of the system: RMS of the difference over RMS. Roundings on the way add up to less, and
# another model's results are farther away (1.4); random weights lose more to codes than trained ones: the CPU's kernels, over a Llama's
# 16 random layers, 0.60 in w4a16 and 0.05 in w8a8, whose rows they round more finely.
BOUNDS = {"w8a8": 0.15, "w4a16": 0.8, "": 2e-2}

Make = Callable[[torch.device, bool], Subject]


@dataclass(frozen=True)
class Model:
    """systems: of a session; rehearsed: of a rehearsal."""

    name: str
    make: Make
    systems: tuple[str, ...]
    rehearsed: tuple[str, ...] = ()


def _models() -> Iterator[Model]:
    """A cache that grows has no CUDA graph; with a static one, graphs show what codes are worth."""
    yield Model("own Llama, 4 layers", _own, (*_EXACT, *_GRAPHS), ("eager", *_GRAPHS))
    if importlib.util.find_spec("transformers") is None:
        return
    from bench.gpu import hugging_face as hf

    static = (*_EXACT, *_GRAPHS, *_GRAPHS_OF_CODES, "Inductor reduce-overhead")
    for name, make in (("Llama 1.2B", hf.llama), ("Qwen3 0.5B", hf.qwen3)):
        is_llama = make is hf.llama
        yield Model(
            f"{name}, static cache", functools.partial(make, cache="static"), static if is_llama else (*_EXACT, *_GRAPHS),
            _GRAPHS_OF_CODES[1:] if is_llama else (),
        )  # fmt: skip
        yield Model(
            f"{name}, dynamic cache", functools.partial(make, cache="dynamic"), (*_EXACT, *_CODES) if is_llama else _EXACT,
            ("llmopt",),
        )  # fmt: skip
    yield Model("BERT base 8x128", hf.bert, (*_EXACT, *_GRAPHS, "llmopt w8a8"), ("llmopt w8a8",))


def _own(device: torch.device, full: bool) -> Subject:
    return own.subject(*((FULL, 4) if full else (SMALL, 1)), device)


def end_to_end(session: Session) -> None:
    """All runs, or those that `session.models` names."""
    if importlib.util.find_spec("transformers") is None:
        session.record.add(PHASE, "models of transformers", "all", "skipped", detail="transformers is not installed")  # fmt: skip
    models = list(_models())
    for model, system in ((m, s) for tier in TIERS for m in models for s in tier):
        name = f"{model.name}: {system}"
        if system not in (model.systems if session.full else model.rehearsed):
            continue
        if session.models and not any(re.search(wanted, name) for wanted in session.models):
            continue
        session.apart(PHASE, model.name, system, lambda m=model, s=system: _measure(session, m, s), SECONDS)  # type: ignore[misc]  # fmt: skip


@torch.no_grad()
def _measure(session: Session, model: Model, system: str) -> None:
    torch._dynamo.reset()
    subject, how = model.make(session.device, session.full), SYSTEMS[system]
    steps = STEPS if session.full else 1
    wanted = list(_results(subject, subject.model, steps))
    run = torch.compile(subject.model, **how) if how else subject.model
    start = time.perf_counter()
    error = max(map(_error, _results(subject, run, steps), wanted))
    first = f"compiled in {time.perf_counter() - start:.1f} s, " if how else ""
    bound = next(b for word, b in BOUNDS.items() if word in system)
    if not error < bound:
        raise AssertionError(f"results differ from eager's by {error:.3g} of their RMS")
    detail = f"{first}differs from eager by {error:.2g}"
    _timed(session, f"{model.name}, prefill", system, lambda: subject.start(run), detail)
    if subject.step is None:
        return
    kept: list[Any] = [None]

    def step() -> None:
        assert subject.step is not None
        _, kept[0] = subject.step(run, kept[0])

    # The second time all lengths are known to what prepares itself for each, as cuDNN does.
    for what in ("decode, lengths not seen before", "decode"):
        kept[0] = subject.start(run)[1]
        _timed(session, f"{model.name}, {what}", system, step, detail)


def _timed(session: Session, what: str, system: str, call: Callable[[], Any], detail: str) -> None:
    clock, calls = session.clock, CALLS if session.full else 1
    for _ in range(WARM_CALLS if session.full else 0):
        call()
    session.record.add(PHASE, what, system, "ok", clock.wall(call, calls), detail)
    if busy := clock.busy(call, min(calls, 5)):
        session.record.add(
            PHASE, f"{what}, the GPU alone", system, "ok", busy, "kernels and copies, by CUPTI"
        )


def _results(subject: Subject, run: Any, steps: int) -> Iterator[Tensor]:
    """Of a prompt and a few steps after it; copies, since a CUDA graph's results do not stay."""
    result, cache = subject.start(run)
    yield result.clone()
    for _ in range(steps if subject.step else 0):
        assert subject.step is not None
        result, cache = subject.step(run, cache)
        yield result.clone()


def _error(got: Tensor, want: Tensor) -> float:
    """NaN where one is in a result, which is within no bound."""
    difference = (got.double() - want.double()).square().mean().sqrt()
    return (difference / want.double().square().mean().sqrt()).item()
