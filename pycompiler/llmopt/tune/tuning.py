"""Measuring a linear that nobody has measured here: candidates, search between two probes, and the entry that is kept."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from llmopt.native import probe as machine_probe
from llmopt.native.probe import Probe
from llmopt.tune.candidates import Machine, candidates
from llmopt.tune.database import Entry
from llmopt.tune.environment import Environment
from llmopt.tune.measure import LinearBench, WeightMemory, memory_for, weight_bytes
from llmopt.tune.search import BUDGET_SECONDS, Result, search
from llmopt.types import LinearConfig, LinearProblem, Target

Bench = Callable[[LinearConfig], float]
_PROBE_SECONDS = 1.0  # as long as a probe is good for: on shared machines the limits move
_MOVED = 1.25  # times that a limit may differ between the probes around a measurement
_READS = 3  # by its probes


class Tuning:
    """Measures problems on this machine, one after the other.

    budget: seconds that a problem may take, with a glance at the machine's limits afterwards; a whole probe stands in front of the
    first one, and again when it is old, and memory is filled before that. bench_of: makes the function that times one config of a
    problem, in microseconds; probe, glance: measure the machine's limits; clock: seconds. Tests give their own.
    """

    def __init__(
        self,
        target: Target,
        environment: Environment,
        budget: float = BUDGET_SECONDS,
        bench_of: Callable[[LinearProblem, Machine, WeightMemory], Bench] = LinearBench,
        probe: Callable[[], Probe] | None = None,
        glance: Callable[[], Probe] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._target, self._budget, self._clock = target, budget, clock
        self._threads = int(dict(environment.facts)["threads"])
        self._bench_of = bench_of
        self._probe = probe or self._machine_probe
        self._glance = glance or probe or self._machine_glance
        self._probed: tuple[float, Probe] | None = None

    def measure(self, problem: LinearProblem) -> tuple[Entry, bool]:
        """The fastest config of a problem at its M; and whether the answer is worth keeping.

        It is not where there was no time to compare, or where the limits of the machine moved meanwhile: then the default stays.
        """
        # Filling takes longer than the budget of a shape: its clock starts afterwards.
        memory = memory_for(weight_bytes(problem, self._target.panel_width))
        before = self._fresh_probe()
        start = self._clock()
        machine = Machine(self._target, self._threads, before)
        bench = self._bench_of(problem, machine, memory)
        chosen = candidates(problem, machine)
        spent = self._clock() - start + _glance_seconds(before)
        result = search(chosen, bench, self._budget - spent, self._clock)
        if not result.conclusive:
            reason = (
                f"{result.reason} ({spent * 1e3:.0f} of {self._budget * 1e3:.0f} ms go to setting up "
                "and to a glance at the machine's limits)"
            )
            result = dataclasses.replace(result, reason=reason)
        moved = self._moved(before)
        if moved > _MOVED:
            reason = (
                f"the machine was busy: its limits moved {moved:.1f} times while it was measured"
            )
            result = dataclasses.replace(
                result, config=LinearConfig(), us=result.default_us, reason=reason, conclusive=False
            )
        entry = Entry(
            problem.facts(),
            result.config.given(),
            result.us,
            result.default_us,
            roof(problem, machine, result),
            result.reason,
            {str(config): us for config, us in result.timings.items()},
            result.samples[result.config],
            dataclasses.asdict(before),
        )
        return entry, result.conclusive

    def _moved(self, before: Probe) -> float:
        """How many times the machine's limits have moved since a probe; one run of a probe alone is no proof."""
        moved = _ratio(before, self._glance())
        return moved if moved <= _MOVED else _ratio(before, self._take_probe())

    def _fresh_probe(self) -> Probe:
        """The last probe, or a new one when that is old."""
        if self._probed is None or time.monotonic() - self._probed[0] > _PROBE_SECONDS:
            return self._take_probe()
        return self._probed[1]

    def _take_probe(self) -> Probe:
        taken = self._probe()
        self._probed = time.monotonic(), taken
        return taken

    def _machine_probe(self) -> Probe:
        # No more reads than make a glance comparable, which reads once.
        return machine_probe.measure(self._threads, self._target.tier, reads=_READS)

    def _machine_glance(self) -> Probe:
        return machine_probe.glance(self._threads, self._target.tier)


def _glance_seconds(probe: Probe) -> float:
    """What a glance will take: the read probe is most of it."""
    return 1.2 * machine_probe.READ_BYTES / probe.read_bytes


def _ratio(before: Probe, after: Probe) -> float:
    """How many times the limit differs that differs most."""
    pairs = [(before.fma_flops, after.fma_flops), (before.read_bytes, after.read_bytes)]
    return max(max(pair) / min(pair) for pair in pairs)


def roof(problem: LinearProblem, machine: Machine, result: Result[LinearConfig]) -> float:
    """The share of the limit that binds: multiplications at the probe's rate, or weights at the read probe's."""
    assert problem.m is not None
    probe = machine.probe
    multiplies = problem.w.replace("q", "s")  # codes of q8 and q4
    peak = probe.linear_peak(multiplies, max(1, problem.planes))
    compute = 2.0 * problem.m * problem.n * problem.k / peak
    memory = weight_bytes(problem, machine.target.panel_width) / probe.read_bytes
    return max(compute, memory) / (result.us * 1e-6)
