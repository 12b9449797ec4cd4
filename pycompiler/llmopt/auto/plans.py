"""What one layer can have under "auto", and what that takes.

Packed weights exist once per layer, so a plan has one form of codes; activations may be rounded at one range of M and stay as they
are at another. Ranges of M count as often as a text of PROMPT tokens and as many decoded ones needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
    """A linear as the clock sees it: x [m, k] times weights [n, k], all of one dtype."""

    m: int
    n: int
    k: int
    dtype: torch.dtype
    gated: bool = False


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
    def coarsest(self) -> Scheme | None:
        """The scheme that costs most accuracy: whose activations are rounded, where any are."""
        schemes = [s for _, s in self.schemes]
        return next((s for s in schemes if s is not None and s.activations == "int8"), schemes[0])


Seconds = Callable[[LayerShape, Scheme | None], float]


def schemes_tried() -> list[Scheme]:
    """Every scheme that a plan may hold."""
    return [scheme for form in FORMS for scheme in _readings(form)]


def candidates(
    shapes: Sequence[tuple[Bucket, LayerShape]],
    possible: Callable[[Scheme], bool],
    divergence: Callable[[Scheme], float],
    seconds: Seconds,
) -> Iterator[tuple[Plan, Candidate]]:
    """The plans of one layer with their times and divergences; "exact" first.

    shapes: the layer at each bucket. possible: whether the layer can have a scheme.
    """
    yield _timed(Plan(tuple((bucket, None) for bucket, _ in shapes)), shapes, 0.0, seconds)
    for form in FORMS:
        same, rounded = _readings(form)
        if not possible(same):
            continue
        as_they_are = Plan(tuple((bucket, same) for bucket, _ in shapes))
        yield _timed(as_they_are, shapes, divergence(same), seconds)
        fastest = Plan(
            tuple(
                (bucket, rounded if seconds(shape, rounded) <= seconds(shape, same) else same)
                for bucket, shape in shapes
            )
        )
        if fastest != as_they_are:
            yield _timed(fastest, shapes, divergence(rounded), seconds)


def _readings(form: CodeForm) -> tuple[Scheme, Scheme]:
    """The two schemes over one packed weight: activations as they are, and rounded."""
    same, rounded = (
        Scheme(form.bits, form.group, form.symmetric, activations=a) for a in ("same", "int8")
    )
    return same, rounded


def _timed(
    plan: Plan, shapes: Sequence[tuple[Bucket, LayerShape]], divergence: float, seconds: Seconds
) -> tuple[Plan, Candidate]:
    times = [(bucket, seconds(shape, plan.at(bucket))) for bucket, shape in shapes]
    words = ", ".join(f"{bucket.name} {time * 1e6:.1f} µs" for bucket, time in times)
    total = sum(bucket.calls * time for bucket, time in times)
    return plan, Candidate(plan.name, total, divergence, words)
