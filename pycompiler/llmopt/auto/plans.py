"""What one layer can have under "auto", and what that takes.

Packed weights exist once per layer, so a plan has one form of codes; activations may be rounded at one range of M and stay as they
are at another. Ranges of M count as often as a text of PROMPT tokens and as many decoded ones needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from llmopt.quant.budget import EXACT, Candidate
from llmopt.quant.schemes import W4A8, W8A8, CodeForm, Scheme

PROMPT = 256
# The forms that are tried: each one's groups are those of the scheme that rounds activations.
FORMS: tuple[CodeForm, ...] = (W8A8, W4A8)


@dataclass(frozen=True)
class Bucket:
    """A range of M: the M that stands for it, and how often it runs."""

    name: str
    m: int
    calls: int


DECODE = Bucket("decode", 1, PROMPT)
PREFILL = Bucket("prefill", PROMPT, 1)
DECODE_ROWS = 8  # the largest M that counts as decode


def bucket_of(m: int) -> Bucket:
    return DECODE if m <= DECODE_ROWS else PREFILL


@dataclass(frozen=True)
class LayerShape:
    """A linear as the clock sees it: x [m, k] times weights [n, k], all of one dtype; `experts` of them, where it is that of experts.
    stored: what its weights are packed in while they are exact, where that is not their dtype."""

    m: int
    n: int
    k: int
    dtype: torch.dtype
    gated: bool = False
    experts: int = 1
    stored: CodeForm | torch.dtype | None = None


@dataclass(frozen=True)
class Plan:
    """The scheme of a layer at each bucket; None everywhere is "exact"."""

    schemes: tuple[tuple[Bucket, Scheme | None], ...]

    @property
    def name(self) -> str:
        names = {b.name: EXACT if s is None else s.name for b, s in self.schemes}
        if len(set(names.values())) == 1:
            return next(iter(names.values()))
        return ", ".join(f"{name} at {bucket}" for bucket, name in names.items())

    def at(self, bucket: Bucket) -> Scheme | None:
        """The scheme at a bucket; at one that was not asked about, that of the first."""
        return dict(self.schemes).get(bucket, self.schemes[0][1])

    @property
    def bits(self) -> int:
        """Of its codes; 0 for "exact"."""
        return next((s.bits for _, s in self.schemes if s is not None), 0)

    @property
    def forms(self) -> frozenset[tuple[int, int, bool]]:
        """Of its codes: one, or none for "exact"."""
        schemes = (s for _, s in self.schemes if s is not None)
        return frozenset((s.bits, s.group, s.symmetric) for s in schemes)

    @property
    def rounds(self) -> bool:
        """Whether activations are rounded anywhere."""
        return self.coarsest is not None and self.coarsest.activations == "int8"

    @property
    def coarsest(self) -> Scheme | None:
        """The scheme that costs most accuracy: whose activations are rounded, where any are."""
        schemes = [s for _, s in self.schemes]
        return next((s for s in schemes if s is not None and s.activations == "int8"), schemes[0])


Seconds = Callable[[LayerShape, Scheme | None], float]


@dataclass(frozen=True)
class TimedPlan:
    """A plan of one layer and what it takes."""

    plan: Plan
    seconds: float  # in the mix of calls that buckets are expected in
    words: str  # the times of the buckets

    def costing(self, divergence: float) -> Candidate:
        return Candidate(self.plan.name, self.seconds, divergence, self.words)


def schemes_tried() -> list[Scheme]:
    """Every scheme that a plan may hold."""
    return [scheme for form in FORMS for scheme in _readings(form)]


def timed_plans(
    shapes: Sequence[tuple[Bucket, LayerShape]],
    forms: Sequence[CodeForm],
    seconds: Seconds,
    mixed: bool = True,
) -> list[TimedPlan]:
    """The plans of one layer with their times; "exact" first.

    shapes: the layer at each bucket. forms: those of FORMS that the layer can have. mixed: whether activations may be rounded at
    one bucket and stay as they are at another.
    """
    plans = [Plan(tuple((bucket, None) for bucket, _ in shapes))]
    for form in forms:
        same, rounded = _readings(form)
        rows = [[same] * len(shapes), [rounded] * len(shapes)]
        if mixed:
            times = [(seconds(x, rounded), seconds(x, same)) for _, x in shapes]
            rows.insert(1, [rounded if fast <= slow else same for fast, slow in times])
        for schemes in rows:
            chosen = ((bucket, s) for (bucket, _), s in zip(shapes, schemes, strict=True))
            plans.append(Plan(tuple(chosen)))
    return [_timed(plan, shapes, seconds) for plan in dict.fromkeys(plans)]


def worth_trying(plans: Sequence[TimedPlan]) -> tuple[list[TimedPlan], list[tuple[TimedPlan, str]]]:
    """The plans whose accuracy matters, "exact" first, and the others with the reason of their time.

    Four bits that are nowhere faster than eight are not rounded to: only weights on a 4-bit grid could gain by them. Nor are
    activations where rounding them takes longer.
    """
    exact, *others = plans
    kept, refused = [exact], []
    for timed in others:
        same = [p for p in others if p.plan.bits == 8 and p.plan.rounds == timed.plan.rounds]
        alike = [p for p in others if p.plan.forms == timed.plan.forms]
        faster = [p for p in alike if p.seconds < timed.seconds]
        if timed.seconds >= exact.seconds:
            refused.append((timed, _slower(timed, exact)))
        elif timed.plan.bits == 4 and same and timed.seconds >= min(p.seconds for p in same):
            refused.append((timed, _slower(timed, min(same, key=lambda p: p.seconds))))
        elif timed.plan.rounds and faster:
            refused.append((timed, _slower(timed, min(faster, key=lambda p: p.seconds))))
        else:
            kept.append(timed)
    return kept, refused


def readings_of(form: CodeForm, schemes: Collection[Scheme]) -> list[Scheme]:
    """Those of the schemes that read codes of this form."""
    return [s for s in _readings(form) if s in schemes]


def _slower(timed: TimedPlan, than: TimedPlan) -> str:
    return f"{timed.words} is not faster than {than.plan.name} with {than.words}; it was not tried"


def _readings(form: CodeForm) -> tuple[Scheme, Scheme]:
    """The two schemes over one packed weight: activations as they are, and rounded."""
    same, rounded = (
        Scheme(form.bits, form.group, form.symmetric, activations=a) for a in ("same", "int8")
    )
    return same, rounded


def _timed(plan: Plan, shapes: Sequence[tuple[Bucket, LayerShape]], seconds: Seconds) -> TimedPlan:
    times = [(bucket, seconds(shape, plan.at(bucket))) for bucket, shape in shapes]
    words = ", ".join(f"{bucket.name} {time * 1e6:.1f} µs" for bucket, time in times)
    return TimedPlan(plan, sum(bucket.calls * time for bucket, time in times), words)
