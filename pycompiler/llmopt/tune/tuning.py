"""Measuring a linear that nobody has measured here: candidates, search, and the entry that is kept."""

from __future__ import annotations

import time
from collections.abc import Callable

from llmopt.native.probe import Probe
from llmopt.native.probe import measure as measure_probe
from llmopt.tune.candidates import Machine, candidates
from llmopt.tune.database import Entry
from llmopt.tune.environment import Environment
from llmopt.tune.measure import LinearBench, WeightMemory, weight_bytes
from llmopt.tune.search import BUDGET_SECONDS, Result, search
from llmopt.types import LinearConfig, LinearProblem, Target

Bench = Callable[[LinearConfig], float]
_PROBE_SECONDS = 2.0


class Tuning:
    """Measures problems on this machine, one after the other.

    bench_of: makes the function that times one config of a problem, in microseconds; tests give their own.
    """

    def __init__(
        self,
        target: Target,
        environment: Environment,
        budget: float = BUDGET_SECONDS,
        bench_of: Callable[[LinearProblem, Machine], Bench] | None = None,
    ) -> None:
        self._target, self._budget = target, budget
        self._threads = int(dict(environment.facts)["threads"])
        self._memory = WeightMemory()
        self._probed: tuple[float, Probe] | None = None
        self._bench_of = bench_of or self._linear_bench

    def measure(self, problem: LinearProblem) -> tuple[Entry, bool]:
        """The fastest config of a problem at its M, beside a probe of the machine; and whether there was time to find it."""
        machine = Machine(self._target, self._threads, self._probe())
        bench = self._bench_of(problem, machine)
        start = time.perf_counter()
        chosen = candidates(problem, machine)
        result = search(chosen, bench, self._budget - (time.perf_counter() - start))
        entry = Entry(
            problem.facts(),
            result.config.given(),
            result.us,
            result.default_us,
            roof(problem, machine, result),
            result.reason,
            {str(config): us for config, us in result.timings.items()},
        )
        return entry, result.conclusive

    def _probe(self) -> Probe:
        """The limits of the machine, no older than a moment: on shared machines they move."""
        now = time.monotonic()
        if self._probed is None or now - self._probed[0] > _PROBE_SECONDS:
            self._probed = now, measure_probe(self._threads, self._target.tier)
        return self._probed[1]

    def _linear_bench(self, problem: LinearProblem, machine: Machine) -> Bench:
        return LinearBench(problem, machine, self._memory)


def roof(problem: LinearProblem, machine: Machine, result: Result[LinearConfig]) -> float:
    """The share of the limit that binds: multiplications at the probe's rate, or weights at the read probe's."""
    assert problem.m is not None
    probe = machine.probe
    is_integer = problem.op == "linear_quantized" and probe.vnni_ops > 0
    peak = probe.vnni_ops if is_integer else probe.fma_flops
    compute = 2.0 * problem.m * problem.n * problem.k / peak
    memory = weight_bytes(problem, machine.target.panel_width) / probe.read_bytes
    return max(compute, memory) / (result.us * 1e-6)
