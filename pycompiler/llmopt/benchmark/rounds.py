"""Interleaved rounds: each system measures each phase once a round, between two probes.

A measurement whose probes before and after differ by more than 10 % met a disturbance and is
repeated, up to three times; if it never gets calm it is kept and marked. Probes read as much memory as a call of the system does:
caches hold a part of it. Interleaving spreads slow
drifts over all systems. Before the rounds every system's outputs are compared with those of the model in fp32.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from llmopt.benchmark.accuracy import Accuracy, compare
from llmopt.benchmark.phases import Phase
from llmopt.benchmark.systems import System
from llmopt.benchmark.work import Form, Work
from llmopt.benchmark.worker import Job, Worker, WorkerError
from llmopt.native.probe import READ_BYTES, Probe, measure

TRIES = 4


@dataclass(frozen=True)
class Measurement:
    """One measurement of one system in one phase."""

    seconds: float
    probe: Probe  # the mean of those around it
    steady: bool


@dataclass
class Run:
    """All that one benchmark run found out."""

    systems: list[str] = field(default_factory=list)  # those that ran, in the order asked for
    work: dict[str, Work | None] = field(default_factory=dict)  # by phase name
    forms: dict[str, Form | None] = field(default_factory=dict)  # by system
    compile_seconds: dict[str, float] = field(default_factory=dict)  # by system
    peak_mib: dict[str, float] = field(default_factory=dict)  # by system
    difference: dict[str, float] = field(default_factory=dict)  # from eager, by system
    accuracy: dict[str, Accuracy] = field(default_factory=dict)  # beside fp32, by system
    failures: dict[str, str] = field(default_factory=dict)  # by system, why it has no numbers
    measurements: dict[tuple[str, str], list[Measurement]] = field(default_factory=dict)


def run(
    systems: Sequence[System],
    phases: Sequence[Phase],
    job: Callable[[str], Job],
    rounds: int,
    say: Callable[[str], None],
) -> Run:
    """Starts one worker per system, then compares and measures. say: told what happens next."""
    result = Run()
    workers: dict[str, Worker] = {}
    try:
        for system in systems:
            _start(system, phases, job(system.name), result, workers, say)
        _compare(workers, phases, result)
        _compare_with_fp32(workers, phases, job("eager"), result, say)
        for number in range(rounds):
            for phase in phases:
                for name in list(workers):
                    say(f"round {number + 1} of {rounds}: {phase.describe()}, {name}")
                    _measure(name, phase, workers, result)
        for name, worker in workers.items():
            result.peak_mib[name] = worker.ask("peak_mib")
    finally:
        for worker in workers.values():
            worker.stop()
    result.systems = list(workers)
    return result


def _start(
    system: System,
    phases: Sequence[Phase],
    job: Job,
    result: Run,
    workers: dict[str, Worker],
    say: Callable[[str], None],
) -> None:
    say(f"{system.name}: loading{', compiling' * system.compiles} and warming up")
    worker = Worker(job, phases)
    try:
        if not result.work:
            result.work = {phase.name: worker.ask("work", phase) for phase in phases}
        seconds = worker.ask("start")
        result.forms[system.name] = worker.ask("form")
    except WorkerError as error:
        result.failures[system.name] = str(error)
        worker.stop()
        return
    workers[system.name] = worker
    if system.compiles:
        result.compile_seconds[system.name] = seconds


def _compare(workers: dict[str, Worker], phases: Sequence[Phase], result: Run) -> None:
    """Each system's largest difference from eager's output, relative to its largest value."""
    if "eager" not in workers:
        return
    want: torch.Tensor = workers["eager"].ask("sample", phases[0])
    for name, worker in workers.items():
        got = worker.ask("sample", phases[0])
        result.difference[name] = float((got - want).abs().max() / want.abs().max())


def _compare_with_fp32(
    workers: dict[str, Worker],
    phases: Sequence[Phase],
    eager: Job,
    result: Run,
    say: Callable[[str], None],
) -> None:
    """Each system beside the model in fp32: the worker of eager where that is it, else one for this alone."""
    job = dataclasses.replace(eager, dtype="fp32")
    if not workers or (eager == job and "eager" in result.failures):
        return  # nothing to compare, or nothing to compare with: it would fail again
    ours = workers.get("eager") if eager == job else None
    worker = ours or Worker(job, phases)
    try:
        say("eager in fp32: what the others are compared with")
        worker.ask("build")
        kind, wanted = worker.ask("outputs")
    except WorkerError as error:
        result.failures["eager in fp32"] = str(error)
        return
    finally:
        if worker is not ours:
            worker.stop()
    if wanted is None:
        return
    for name in list(workers):
        say(f"{name}: comparing with fp32")
        try:
            got = wanted if workers[name] is ours else workers[name].ask("outputs")[1]
        except WorkerError as error:
            result.failures[name] = f"comparing with fp32: {error}"
            workers.pop(name).stop()
            continue
        result.accuracy[name] = compare(kind, wanted, got)


def _measure(name: str, phase: Phase, workers: dict[str, Worker], result: Run) -> None:
    worker = workers[name]
    read_bytes = _read_bytes(name, phase, result)
    for _ in range(TRIES):
        before = measure(worker.job.threads, read_bytes=read_bytes)
        try:
            seconds = worker.ask("measure", phase)
        except WorkerError as error:
            result.failures[name] = f"{phase.describe()}: {error}"
            workers.pop(name).stop()
            return
        after = measure(worker.job.threads, read_bytes=read_bytes)
        if before.is_near(after):
            break
    result.measurements.setdefault((name, phase.name), []).append(
        Measurement(
            seconds,
            _mean([before, after]),
            before.is_near(after),
        )
    )


def _read_bytes(name: str, phase: Phase, result: Run) -> float:
    """What a call of a system reads, where that is known."""
    work, form = result.work.get(phase.name), result.forms[name]
    return READ_BYTES if work is None or form is None else work.read_bytes(form, phase)


def _mean(probes: Sequence[Probe]) -> Probe:
    rates = [dataclasses.astuple(probe) for probe in probes]
    return Probe(*(statistics.mean(rate) for rate in zip(*rates, strict=True)))
