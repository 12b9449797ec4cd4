"""The choice of "auto": for every layer and range of M the fastest scheme, as long as the whole stays inside an accuracy budget.

Pure: times and divergences are measured elsewhere and come in as numbers. The divergence of a choice is taken as the sum of what
its layers cost one at a time; a `check` that measures the choice as a whole has the last word. "exact" costs nothing and is
always possible.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

EXACT = "exact"
DEFAULT_BUDGET = 0.01  # KL divergence of the logits to the unquantised model, in nats

Layer = str
Bucket = str  # a range of M, such as "decode" or "M>=128"
Choice = Mapping[Layer, str]  # layer → scheme


@dataclass(frozen=True)
class Candidate:
    """One scheme for one layer at one range of M."""

    scheme: str
    seconds: float  # measured
    divergence: float  # of the logits when only this layer has the scheme


@dataclass(frozen=True)
class Row:
    """What became of one candidate."""

    layer: Layer
    bucket: Bucket
    candidate: Candidate
    reason: str  # why it was refused; "" for the one that was chosen


@dataclass(frozen=True)
class Decision:
    """The chosen schemes, and why not the others."""

    schemes: Mapping[Bucket, Choice]
    divergence: Mapping[
        Bucket, float
    ]  # of the whole choice: checked where there was a check, else the sum
    budget: float
    rows: tuple[Row, ...]
    note: str  # one sentence for the user when everything stays exact; else ""

    def __str__(self) -> str:
        lines = [self.note] if self.note else []
        width = max((len(row.layer) for row in self.rows), default=0)
        for row in self.rows:
            what = f"{row.layer:<{width}}  {row.bucket:<8} {row.candidate.scheme:<6}"
            time = f"{row.candidate.seconds * 1e6:8.1f} µs"
            verdict = "chosen" if not row.reason else f"refused: {row.reason}"
            lines.append(f"{what} {time}  KL {row.candidate.divergence:.5f}  {verdict}")
        return "\n".join(lines)


def decide(
    measured: Mapping[Layer, Mapping[Bucket, Sequence[Candidate]]],
    budget: float = DEFAULT_BUDGET,
    check: Callable[[Choice], float] | None = None,
) -> Decision:
    """The fastest choice per range of M whose divergence is at most the budget.

    measured: the candidates of each layer and range; "exact" among them. check: measures the divergence of a whole choice; as
    long as it is over the budget, the layer that gives back most divergence per second of time goes back to a milder scheme.

    Raises ValueError for a budget that is no number ≥ 0, a layer without "exact", and measurements that are NaN or negative.
    """
    if not budget >= 0:
        raise ValueError(f"llmopt: accuracy_budget={budget} is not a number ≥ 0")
    buckets = list(dict.fromkeys(b for layer in measured.values() for b in layer))
    schemes: dict[Bucket, Choice] = {}
    divergences: dict[Bucket, float] = {}
    rows: list[Row] = []
    for bucket in buckets:
        candidates = {name: _usable(name, c[bucket]) for name, c in measured.items() if bucket in c}
        chosen, divergence, checked = _choose(candidates, budget, check)
        schemes[bucket] = {name: c.scheme for name, c in chosen.items()}
        divergences[bucket] = divergence
        left = budget - sum(c.divergence for c in chosen.values())
        rows += [
            Row(name, bucket, c, _reason(c, chosen[name], left, checked))
            for name, own in candidates.items()
            for c in own
        ]
    return Decision(schemes, divergences, budget, tuple(rows), _note(schemes, rows, budget))


def _usable(name: Layer, candidates: Sequence[Candidate]) -> list[Candidate]:
    for c in candidates:
        numbers_ok = math.isfinite(c.seconds) and c.seconds >= 0 and c.divergence >= 0
        if not numbers_ok:
            raise ValueError(f"llmopt: {name} as {c.scheme} has no usable measurement: {c}")
    exact = [c for c in candidates if c.scheme == EXACT]
    if len(exact) != 1 or exact[0].divergence != 0:
        raise ValueError(f"llmopt: {name} needs one candidate {EXACT!r} with divergence 0")
    return list(candidates)


def _choose(
    candidates: Mapping[Layer, list[Candidate]],
    budget: float,
    check: Callable[[Choice], float] | None,
) -> tuple[dict[Layer, Candidate], float, bool]:
    """The choice, its divergence, and whether the check made it milder."""
    useful = {name: _useful(own) for name, own in candidates.items()}
    chosen = _spend(useful, budget)
    predicted = sum(c.divergence for c in chosen.values())
    if check is None or predicted == 0:
        return chosen, predicted, False
    milder = False
    while any(c.divergence > 0 for c in chosen.values()):
        divergence = check({name: c.scheme for name, c in chosen.items()})
        if divergence <= budget:
            return chosen, divergence, milder
        chosen, milder = _one_step_back(useful, chosen), True
    exact = {name: next(c for c in own if c.scheme == EXACT) for name, own in candidates.items()}
    return exact, 0.0, milder


def _useful(candidates: Iterable[Candidate]) -> list[Candidate]:
    """From the most accurate to the fastest: those that no other beats in both."""
    ordered = sorted(candidates, key=lambda c: (c.divergence, c.seconds, c.scheme != EXACT))
    useful: list[Candidate] = []
    for c in ordered:
        if not useful or c.seconds < useful[-1].seconds:
            useful.append(c)
    return useful


def _gain(a: Candidate, b: Candidate) -> float:
    """Seconds saved per unit of divergence when b replaces a."""
    return (a.seconds - b.seconds) / (b.divergence - a.divergence)


def _spend(useful: Mapping[Layer, list[Candidate]], budget: float) -> dict[Layer, Candidate]:
    """From the most accurate choice, again and again the change that saves most time per divergence and still fits."""
    chosen = {name: own[0] for name, own in useful.items()}
    while True:
        left = budget - sum(c.divergence for c in chosen.values())
        moves = [
            (_gain(now, c), name, c)
            for name, now in chosen.items()
            for c in useful[name]
            if c.seconds < now.seconds and c.divergence - now.divergence <= left
        ]
        if not moves:
            return chosen
        _, name, c = max(moves, key=lambda move: move[0])
        chosen[name] = c


def _one_step_back(
    useful: Mapping[Layer, list[Candidate]], chosen: Mapping[Layer, Candidate]
) -> dict[Layer, Candidate]:
    """One layer goes back to its milder neighbour: the one that gives back most divergence for its time."""
    moves = [
        (_gain(milder, c), name, milder)
        for name, c in chosen.items()
        for milder in useful[name][: useful[name].index(c)][-1:]
    ]
    _, name, milder = min(moves, key=lambda move: move[0])
    return {**chosen, name: milder}


def _reason(c: Candidate, chosen: Candidate, left: float, checked: bool) -> str:
    if c.scheme == chosen.scheme:
        return ""
    if c.seconds >= chosen.seconds:
        return f"{c.seconds * 1e6:.1f} µs is not faster than {chosen.scheme} with {chosen.seconds * 1e6:.1f} µs"
    more = c.divergence - chosen.divergence
    if more > left:
        return f"it would add {more:.5f} to the divergence, and {max(left, 0.0):.5f} of the budget is left"
    if checked:
        return "with it the whole model, measured together, was over the budget"
    return "other layers gain more time for the same divergence"


def _note(schemes: Mapping[Bucket, Choice], rows: Sequence[Row], budget: float) -> str:
    if any(scheme != EXACT for choice in schemes.values() for scheme in choice.values()):
        return ""
    exact = {(r.layer, r.bucket): r.candidate.seconds for r in rows if r.candidate.scheme == EXACT}
    faster = [r for r in rows if r.candidate.seconds < exact[r.layer, r.bucket]]
    if not faster:
        return "every layer stays exact: no scheme is faster here"
    return (
        f"every layer stays exact: no faster scheme stays inside the accuracy budget of {budget:g}"
    )
