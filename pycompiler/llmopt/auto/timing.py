"""How long a linear takes on this machine under a scheme: our own kernel alone, timed as the tuner does."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from llmopt.auto.plans import LayerShape, schemes_tried
from llmopt.native import probe
from llmopt.native.linear_quantized import PLANES
from llmopt.native.segment import SHORT_DTYPES
from llmopt.quant.schemes import CodeForm, Scheme
from llmopt.target import target
from llmopt.tune.candidates import Machine, predict
from llmopt.tune.lookup import tuner_for
from llmopt.tune.measure import LinearBench, WeightMemory
from llmopt.types import LinearConfig, LinearProblem

ROUNDS = 6  # in which all schemes of a shape run in turn
SECONDS = 0.05  # after which the rounds of a shape end, when two were made ...
PATIENCE = 0.5  # ... and no call seems to have been interrupted every time; after this they end in any case
INTERRUPTED = 10.0  # times longer than the tuner's model expects

Bench = Callable[[], float]  # → microseconds of one call

# A linear with the config that it runs with, on a tier, by so many threads.
_Timed = tuple[LinearProblem, LinearConfig, str, int]
_known: dict[_Timed, float] = {}  # seconds; all are timed once per process


class LayerClock:
    """Seconds of one linear of a shape under a scheme (None: exact), or of those of several experts, one after the other.

    Each runs with the config that a plan of `mode` would give it: what was tuned here, and under max-autotune nothing untuned. The
    schemes of a shape are timed in turns and the fastest call of each counts, so that a busy moment of the machine favours none.
    bench_of: makes the function that times a problem with a config; tests give their own, together with what is known already.
    """

    def __init__(
        self,
        mode: str = "default",
        bench_of: Callable[[LinearProblem, LinearConfig], Bench] | None = None,
        known: dict[_Timed, float] | None = None,
    ) -> None:
        tuner = tuner_for(target(), mode)
        self._config = functools.cache(lambda problem: tuner(problem).at(problem.m))
        self._here = target().tier, torch.get_num_threads()
        self._memory = WeightMemory()
        self._bench_of = bench_of or self._linear_bench
        self._known = _known if known is None else known

    def __call__(self, shape: LayerShape, scheme: Scheme | None) -> float:
        others = [None, *(s for s in schemes_tried() if not s.reject(shape.k))]
        wanted, *rest = (self._timed(shape, s) for s in (scheme, *others))
        if wanted not in self._known:
            missing = [t for t in dict.fromkeys((wanted, *rest)) if t not in self._known]
            machine = _machine(*self._here)
            expected = [predict(problem, config, machine) for problem, config, *_ in missing]
            benches = [self._bench_of(problem, config) for problem, config, *_ in missing]
            times = fastest_in_turns(benches, expected)
            self._known.update(zip(missing, times, strict=True))
        return shape.experts * self._known[wanted]

    def _timed(self, shape: LayerShape, scheme: Scheme | None) -> _Timed:
        problem = problem_of(shape, scheme)
        return problem, self._config(problem), *self._here

    def _linear_bench(self, problem: LinearProblem, config: LinearConfig) -> Bench:
        bench = LinearBench(problem, _machine(*self._here), self._memory)
        return lambda: bench(config)


def fastest_in_turns(
    benches: Sequence[Bench], expected: Sequence[float], seconds: float = SECONDS
) -> list[float]:
    """The seconds of each one's fastest call, of up to ROUNDS in which all run in turn; at least of two.

    expected: the seconds a call should take. Threads that wait for one that lost its core make a call a hundred times as long: where all
    calls of one were like that there are more rounds.
    """
    best = [float("inf")] * len(benches)
    spent, turn = 0.0, 0
    while True:
        enough = turn >= ROUNDS or (turn >= 2 and spent > seconds)
        undisturbed = all(b <= INTERRUPTED * e for b, e in zip(best, expected, strict=True))
        if enough and (undisturbed or spent > PATIENCE):
            return best
        for i, bench in enumerate(benches):
            best[i] = min(best[i], took := bench() * 1e-6)
            spent += took
        turn += 1


@functools.lru_cache(maxsize=8)
def _machine(tier: str, threads: int) -> Machine:
    return Machine(target(), threads, probe.measure(threads, tier))


def problem_of(shape: LayerShape, scheme: Scheme | None) -> LinearProblem:
    """The linear of a shape as the tuner knows it."""
    dtype, act = SHORT_DTYPES[shape.dtype], "silu" if shape.gated else "none"
    m, n, k = shape.m, shape.n, shape.k
    if scheme is None and not isinstance(shape.stored, CodeForm):
        weight = SHORT_DTYPES[shape.stored or shape.dtype]
        return LinearProblem("linear", m, n, k, dtype, weight, dtype, shape.gated, act=act)
    form = scheme or shape.stored
    assert isinstance(form, CodeForm)
    return LinearProblem(
        "linear_quantized",
        m,
        n,
        k,
        dtype,
        f"q{form.bits}",
        dtype,
        shape.gated,
        act=act,
        group=form.group_of(k),
        offsets=not form.symmetric,
        planes=PLANES["same" if scheme is None else scheme.activations],
        exact=scheme is None,
    )
