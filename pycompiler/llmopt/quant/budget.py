"""The choice of "auto": for every layer the fastest plan, as long as the whole model stays inside an accuracy budget.

Pure: times and divergences are measured elsewhere and come in as numbers. The divergence of a choice is taken as the sum of what
its layers cost one at a time; a `check` that measures the choice as a whole has the last word. "exact" costs nothing and is
always possible.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

EXACT = "exact"
DEFAULT_BUDGET = 0.01  # to the unquantised model: KL divergence of logits in nats, half the squared relative error of others
MOST_CHECKS = 8  # of whole choices; after them everything stays exact

Layer = str
Choice = Mapping[Layer, str]  # layer → plan


@dataclass(frozen=True)
class Candidate:
    """One plan for one layer."""

    plan: str  # a scheme, or one per range of M
    seconds: float  # measured; a sum over ranges of M in the mix they are expected in
    divergence: float  # of the model's result when only this layer has the plan
    times: str = ""  # `seconds` in words, where it is a sum


@dataclass(frozen=True)
class Row:
    """What became of one candidate."""

    layer: Layer
    candidate: Candidate
    reason: str  # why it was refused; "" for the one that was chosen


@dataclass(frozen=True)
class Decision:
    """The chosen plans, and why not the others."""

    choice: Choice
    divergence: float  # of the whole choice: measured where there was a check, else the sum
    budget: float
    rows: tuple[Row, ...]
    note: str  # one sentence for the user when everything stays exact; else ""
    impossible: tuple[tuple[Layer, str, str], ...] = ()  # layer, scheme, why it cannot have it
    measure: str = "KL"  # what divergences are: "KL" of logits, "error²/2" of other results

    def summary(self) -> str:
        """One line: how many layers have which plan, and what that costs."""
        if self.note:
            return self.note
        counts = Counter(self.choice.values()).most_common()
        words = ", ".join(f"{plan} x{count}" for plan, count in counts)
        return f"{words}; {self.measure} {self.divergence:.5f} of at most {self.budget:g}"

    def __str__(self) -> str:
        """The table: every candidate of every layer, its times, its divergence, chosen or why not."""
        lines = [self.summary()]
        layers = max((len(row.layer) for row in self.rows), default=0)
        plans = max((len(row.candidate.plan) for row in self.rows), default=0)
        for row in self.rows:
            c = row.candidate
            times = c.times or f"{c.seconds * 1e6:.1f} µs"
            verdict = f"refused: {row.reason}" if row.reason else "chosen"
            what = f"{row.layer:<{layers}}  {c.plan:<{plans}}"
            lines.append(f"{what}  {times}  {self.measure} {c.divergence:.5f}  {verdict}")
        for layer, scheme, reason in self.impossible:
            lines.append(f"{layer:<{layers}}  {scheme:<{plans}}  refused: {reason}")
        return "\n".join(lines)


def check_budget(budget: object) -> float:
    """The budget as a number. Raises ValueError for what is none ≥ 0."""
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not budget >= 0:
        raise ValueError(f"llmopt: accuracy_budget={budget!r} is not a number ≥ 0")
    return float(budget)


def decide(
    measured: Mapping[Layer, Sequence[Candidate]],
    budget: float = DEFAULT_BUDGET,
    check: Callable[[Choice], float] | None = None,
) -> Decision:
    """The fastest choice whose divergence is at most the budget.

    measured: the candidates of each layer; "exact" among them. check: measures the divergence of a whole choice; as long as that
    is over the budget, the layers have to share less.

    Raises ValueError for a budget that is no number ≥ 0, a layer without "exact", and measurements that are NaN or negative.
    """
    budget = check_budget(budget)
    candidates = {name: _usable(name, own) for name, own in measured.items()}
    chosen, divergence, checked = _choose(candidates, budget, check)
    choice = {name: c.plan for name, c in chosen.items()}
    left = budget - sum(c.divergence for c in chosen.values())
    rows = tuple(
        Row(name, c, _reason(c, chosen[name], left, checked))
        for name, own in candidates.items()
        for c in own
    )
    return Decision(choice, divergence, budget, rows, _note(choice, rows, budget))


def all_exact(layers: Iterable[Layer], budget: float, reason: str) -> Decision:
    """The decision where nothing could be measured, and why."""
    choice = dict.fromkeys(layers, EXACT)
    return Decision(choice, 0.0, budget, (), f"every layer stays exact: {reason}")


def _usable(name: Layer, candidates: Sequence[Candidate]) -> list[Candidate]:
    for c in candidates:
        numbers_ok = math.isfinite(c.seconds) and c.seconds >= 0 and c.divergence >= 0
        if not numbers_ok:
            raise ValueError(f"llmopt: {name} as {c.plan} has no usable measurement: {c}")
    exact = [c for c in candidates if c.plan == EXACT]
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
    allowance = budget
    for attempt in range(MOST_CHECKS):
        chosen = _fastest(useful, allowance)
        predicted = sum(c.divergence for c in chosen.values())
        is_exact = all(c.plan == EXACT for c in chosen.values())
        if check is None or is_exact:
            return chosen, predicted, attempt > 0
        measured = check({name: c.plan for name, c in chosen.items()})
        if measured <= budget:
            return chosen, measured, attempt > 0
        # The sum of the parts was too hopeful: next time it may be smaller by as much.
        share = budget / measured if math.isfinite(measured) else 0.0
        allowance = predicted * max(0.0, min(0.9, share))
    exact = {name: next(c for c in own if c.plan == EXACT) for name, own in candidates.items()}
    return exact, 0.0, True


def _useful(candidates: Iterable[Candidate]) -> list[Candidate]:
    """From the most accurate to the fastest: those that no other beats in both."""
    ordered = sorted(candidates, key=lambda c: (c.divergence, c.seconds, c.plan != EXACT))
    useful: list[Candidate] = []
    for c in ordered:
        if not useful or c.seconds < useful[-1].seconds:
            useful.append(c)
    return useful


def _fastest(useful: Mapping[Layer, list[Candidate]], budget: float) -> dict[Layer, Candidate]:
    """The faster of what spending step by step finds and of one plan for every layer that has it, where that fits."""
    choices = [_spend(useful, budget)]
    for plan in sorted({c.plan for own in useful.values() for c in own}):
        same = {
            name: next((c for c in own if c.plan == plan), own[0]) for name, own in useful.items()
        }
        if sum(c.divergence for c in same.values()) <= budget:
            choices.append(same)
    return min(choices, key=lambda choice: sum(c.seconds for c in choice.values()))


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


def _reason(c: Candidate, chosen: Candidate, left: float, checked: bool) -> str:
    if c.plan == chosen.plan:
        return ""
    if c.seconds >= chosen.seconds:
        return f"{c.seconds * 1e6:.1f} µs is not faster than {chosen.plan} with {chosen.seconds * 1e6:.1f} µs"
    more = c.divergence - chosen.divergence
    if more > left:
        return f"it would add {more:.5f} to the divergence, and {max(left, 0.0):.5f} of the budget is left"
    if checked:
        return "with it the whole model, measured together, was over the budget"
    return "other layers gain more time for the same divergence"


def _note(choice: Choice, rows: Sequence[Row], budget: float) -> str:
    if any(plan != EXACT for plan in choice.values()):
        return ""
    exact = {row.layer: row.candidate.seconds for row in rows if row.candidate.plan == EXACT}
    if not any(row.candidate.seconds < exact[row.layer] for row in rows):
        return "every layer stays exact: no scheme is faster here"
    return (
        f"every layer stays exact: no faster scheme stays inside the accuracy budget of {budget:g}"
    )
