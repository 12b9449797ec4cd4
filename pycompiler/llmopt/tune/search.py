"""Finding the fastest of a few configs: successive halving, interleaved, and a proof that must succeed twice.

The clock of a shared machine is noisy, so nobody wins by luck: the winner has to beat the kernel's own rules by 3 % in two separate
comparisons, else the rules stay.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

C = TypeVar("C")

WIN = 1.03  # times faster, in each of two comparisons
BUDGET_SECONDS = 0.060
_MOST_PAIRS = 9  # of runs in one comparison
_LAST = 2  # candidates of the last round
_MOST_REPEATS = 8  # of a candidate in the first round


@dataclass(frozen=True)
class Result(Generic[C]):
    """The config to use, and what was seen on the way. Times are microseconds of one call."""

    config: C
    us: float
    default_us: float
    reason: str
    conclusive: bool  # False where there was no time to compare
    timings: dict[C, float]  # the best seen of every config that was tried
    samples: dict[C, list[float]]  # what us and default_us are the medians of


def search(
    candidates: Sequence[C],
    bench: Callable[[C], float],
    budget: float = BUDGET_SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> Result[C]:
    """The fastest of the candidates, likeliest first; candidates[0] is the default, which wins unless it is beaten twice.

    bench: runs a config once and returns its microseconds. budget: seconds that clock may advance: the longer a call takes, the fewer
    candidates are tried.
    """
    return _Search(bench, budget, clock).run(candidates)


class _Search(Generic[C]):
    def __init__(
        self, bench: Callable[[C], float], budget: float, clock: Callable[[], float]
    ) -> None:
        self._bench, self._budget, self._clock = bench, budget, clock
        self._start = clock()
        self._times: dict[C, list[float]] = {}
        self._proof = 0  # how many of the last times are the proof's; 0: there was none

    def run(self, candidates: Sequence[C]) -> Result[C]:
        default = candidates[0]
        call = min(self._seconds(default) for _ in range(2))  # the first also touches its memory
        self._times[default] = self._times[default][1:]
        left = self._left() / call  # calls
        pairs = max(1, min(_MOST_PAIRS, int(left / 8)))  # half of the time is for the proof
        trials = left - 4 * pairs
        count = _affordable(trials, len(candidates))
        if count < 2:
            return self._result(
                default, default, self._why_alone(candidates, call), conclusive=False
            )
        repeats = max(1, min(_MOST_REPEATS, int(trials / _calls(count))))
        best = self._halve(candidates[:count], repeats, call * 4 * pairs)
        if best == default:
            return self._result(default, default, "no candidate was faster")
        gains = [self._gain(default, best, pairs, turn) for turn in range(2)]
        self._proof = 2 * pairs
        words = " and ".join(f"{(gain - 1) * 100:+.1f} %" for gain in gains)
        if min(gains) < WIN:
            reason = f"the best candidate, {best}, gained {words}: 3 % twice are needed"
            return self._result(default, default, reason)
        return self._result(best, default, f"gained {words}")

    def _why_alone(self, candidates: Sequence[C], call: float) -> str:
        """Why nothing is compared with the default; call: seconds that it takes to time it."""
        if len(candidates) < 2:
            return "there is no other candidate"
        us = self._median(candidates[0])
        length = f"{us / 1e3:.1f} ms" if us >= 1e3 else f"{us:.1f} us"
        left = max(0.0, self._budget) * 1e3
        return (
            f"a call takes {length} and to time it {call * 1e3:.1f} ms of the {left:.1f} ms left: "
            "too few fit into the time for a comparison"
        )

    def _halve(self, candidates: Sequence[C], repeats: int, reserve: float) -> C:
        """The fastest after rounds in which half of the field leaves and the rest runs twice as often; the default runs in all."""
        default, field = candidates[0], list(candidates[1:])
        while True:
            for _ in range(repeats):
                for config in (default, *field):
                    if self._left() < reserve:
                        return min(self._times, key=self._median)
                    self._time(config)
            field.sort(key=self._median)
            if len(field) <= _LAST:
                return min((field[0], default), key=self._median)
            field, repeats = field[: len(field) // 2], repeats * 2

    def _gain(self, default: C, best: C, pairs: int, turn: int) -> float:
        """How many times faster `best` is in runs that alternate with the default's, who is first in turn."""
        theirs: list[float] = []
        ours: list[float] = []
        for i in range(pairs):
            for config in (default, best) if (i + turn) % 2 else (best, default):
                (ours if config == best else theirs).append(self._time(config))
        return statistics.median(theirs) / statistics.median(ours)

    def _seconds(self, config: C) -> float:
        """What one call advances the clock by, all that is around it included."""
        before = self._clock()
        self._time(config)
        return max(self._clock() - before, 1e-7)

    def _time(self, config: C) -> float:
        us = self._bench(config)
        self._times.setdefault(config, []).append(us)
        return us

    def _median(self, config: C) -> float:
        return statistics.median(self._times[config])

    def _left(self) -> float:
        return self._budget - (self._clock() - self._start)

    def _result(self, config: C, default: C, reason: str, conclusive: bool = True) -> Result[C]:
        timings = {c: min(times) for c, times in self._times.items()}
        samples = {c: self._times[c][-self._proof :] for c in (config, default)}
        us, default_us = (statistics.median(samples[c]) for c in (config, default))
        return Result(config, us, default_us, reason, conclusive, timings, samples)


def _calls(count: int) -> int:
    """Calls that halving takes when each of `count` configs, the default among them, runs once in the first round."""
    total, field, repeats = 0, count - 1, 1
    while field > _LAST:
        total, field, repeats = total + (field + 1) * repeats, field // 2, repeats * 2
    return total + (field + 1) * repeats


def _affordable(calls: float, most: int) -> int:
    """The largest field of at most `most` configs that can be halved in so many calls."""
    return next((count for count in range(most, 1, -1) if _calls(count) <= calls), 0)
