"""What a plan asks the tuner: the config of a linear, and where it comes from.

tuned: measured for this shape here. borrowed: measured for a shape near to it. default: left to the kernel's own rules, with the
reason. Only mode="max-autotune" measures what was not measured yet.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from llmopt import settings
from llmopt.native.segment import Tuner
from llmopt.tune.candidates import refuse
from llmopt.tune.database import Database, Entry, key_of
from llmopt.tune.environment import Environment, cpu_environment
from llmopt.tune.recording import Recorder
from llmopt.types import EVERY_M, Choice, LinearConfig, LinearProblem, Target

# One measurement serves all heights up to its own and above the one before; the last also all above.
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 1536, 2048, 3072, 4096)
_NEAR = 1.0  # factors of two, over M, N and K together, within which a shape may borrow
_SIZES = ("m", "n", "k")
_AROUND = ("norm", "act", "bias", "residual", "y")  # hardly change how the product is best cut

Measure = Callable[[LinearProblem], tuple[Entry, bool]]  # the bool: worth keeping


def bucket(m: int) -> int:
    """The height that is measured for M rows."""
    return next((edge for edge in BUCKETS if m <= edge), BUCKETS[-1])


def at(problem: LinearProblem, m: int) -> LinearProblem:
    """The problem at a height."""
    return dataclasses.replace(problem, m=m)


def database(target: Target, threads: int) -> Database:
    """The measurements of this machine with so many threads."""
    return _database(settings.cache_dir() / "tune", cpu_environment(target, threads))


@functools.lru_cache(maxsize=16)
def _database(root: Path, environment: Environment) -> Database:
    return Database(root, environment)


_asked = Recorder[LinearProblem]()
recording = _asked.recording  # the problems of all plans that are made within it


def tuner_for(target: Target, mode: str) -> Tuner:
    """What plans of a mode ask. Measuring is loaded only when a mode asks for it."""
    if not settings.tuning():
        return lambda problem: Choice(source="default: LLMOPT_TUNE=0")
    known = database(target, torch.get_num_threads())
    if not mode.startswith("max-autotune"):
        return Lookup(target, known)
    from llmopt.tune.tuning import Tuning

    return Lookup(target, known, Tuning(target, known.environment).measure)


class Lookup:
    """Answers from a database; with `measure`, what is not in it is measured and put there."""

    def __init__(self, target: Target, known: Database, measure: Measure | None = None) -> None:
        self._target, self._known, self._measure = target, known, measure

    def __call__(self, problem: LinearProblem) -> Choice:
        _asked.note(problem)
        if problem.n == 0 or problem.k == 0 or problem.m == 0:
            return Choice(source="default: nothing to compute")
        if problem.m is None:
            return self._for_every_height(problem)
        config, source = self._for_height(at(problem, bucket(problem.m)))
        return Choice(((EVERY_M, config),), source)

    def entry(self, problem: LinearProblem) -> tuple[Entry | None, str]:
        """What was measured for a problem, if it can be used here, or the reason why not."""
        entry, reason = self._known.get(key_of(problem.facts()))
        if entry is not None:
            reason = self._refuse(problem, entry)
        return (None, reason) if reason else (entry, "")

    def keep(self, entry: Entry, conclusive: bool) -> Entry:
        """Puts a measurement into the database; one that had no time to compare only for this process."""
        if conclusive:
            self._known.put(entry)
        else:
            self._known.remember(entry)
        return entry

    def _for_height(self, problem: LinearProblem) -> tuple[LinearConfig, str]:
        entry, reason = self.entry(problem)
        if entry is None and self._measure is not None:
            entry = self.keep(*self._measure(problem))
        if entry is not None and not entry.config:
            return LinearConfig(), f"default: measured, and {entry.reason}"
        if entry is not None:
            config = LinearConfig.of(entry.config)
            return (
                config,
                f"tuned: {entry.us:.1f} us, by its own rules {entry.default_us:.1f} us ({entry.reason})",
            )
        near = self._nearest(problem)
        if near is None:
            return LinearConfig(), f"default: {reason}"
        lent = near.problem
        return LinearConfig.of(
            near.config
        ), f"borrowed from {lent['m']}x{lent['n']}x{lent['k']}: {reason}"

    def _for_every_height(self, problem: LinearProblem) -> Choice:
        """A row for each height that was measured; M is known only when the step runs."""
        if self._measure is not None and problem.hint > 0:
            self._for_height(at(problem, bucket(problem.hint)))
        rows: list[tuple[int, LinearConfig]] = []
        reasons = {}  # of the heights that are left to the kernel
        for m in BUCKETS:
            entry, reason = self.entry(at(problem, m))
            config = LinearConfig() if entry is None else LinearConfig.of(entry.config)
            if entry is None or not entry.config:
                reasons[m] = reason if entry is None else f"measured, and {entry.reason}"
            if rows and rows[-1][1] == config:
                rows.pop()
            rows.append((m if m < BUCKETS[-1] else EVERY_M, config))
        tuned = ", ".join(str(m) for m in BUCKETS if m not in reasons)
        if not tuned:
            return Choice(source=f"default: {reasons[bucket(problem.hint or 1)]}")
        if rows[-1][1] == LinearConfig():
            rows.pop()
        rest = f"; else default: {_in_words(reasons)}" if reasons else ""
        return Choice(tuple(rows), f"tuned for M={tuned}, which changes from call to call{rest}")

    def _refuse(self, problem: LinearProblem, entry: Entry) -> str:
        """Why a measured config cannot be used for a problem, or ""."""
        try:
            reason = refuse(self._target, problem, LinearConfig.of(entry.config))
        except (ValueError, TypeError) as error:
            reason = str(error)
        return reason and f"its config is impossible: {reason}"

    def _nearest(self, problem: LinearProblem) -> Entry | None:
        """The entry nearest in size, of the same op and weights, whose config is possible here."""
        wanted = problem.facts()
        near = [(distance(wanted, entry.problem), entry) for entry in self._known.entries()]
        for far, entry in sorted(near, key=lambda pair: (pair[0], pair[1].key)):
            if far > _NEAR:
                return None
            if not self._refuse(problem, entry):
                return entry
        return None


def _in_words(reasons: dict[int, str]) -> str:
    """The reasons of heights: the one that most have, then the others with theirs."""
    ((most, _),) = Counter(reasons.values()).most_common(1)
    return "; ".join([most, *(f"M={m}: {r}" for m, r in reasons.items() if r != most)])


def distance(
    a: dict[str, str | int],
    b: object,
    sizes: Sequence[str] = _SIZES,
    around: Sequence[str] = _AROUND,
) -> float:
    """How far apart two problems are: factors of two between their sizes; infinite where they differ otherwise.

    sizes: the names of sizes; around: of what may differ and counts for nothing.
    """
    if not isinstance(b, dict) or set(a) - set(around) != set(b) - set(around):
        return math.inf
    if any(a[name] != b[name] for name in a if name not in (*sizes, *around)):
        return math.inf
    total = 0.0
    for name in (n for n in sizes if n in a):
        one, other = a[name], b[name]
        if not isinstance(one, int) or not isinstance(other, int) or one < 1 or other < 1:
            return math.inf
        total += abs(math.log2(one / other))
    return total
