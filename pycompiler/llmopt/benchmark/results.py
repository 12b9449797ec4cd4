"""Measurements → one row per system and phase, as JSON lines or a Markdown table with a row per system."""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmopt.benchmark.accuracy import Accuracy
from llmopt.benchmark.phases import Phase
from llmopt.benchmark.rounds import Measurement, Run
from llmopt.models import ModelError
from llmopt.native.probe import Probe
from llmopt.target import target


@dataclass(frozen=True)
class Setting:
    """What the numbers were measured with."""

    model: str
    dtype: str
    threads: int
    command: str  # the command line that makes the numbers again
    quantised: bool = False  # some of the systems are

    @property
    def title(self) -> str:
        """What distinguishes its table from others."""
        return f"{self.model} {'quantised' if self.quantised else self.dtype}"

    def machine(self) -> str:
        here = target()
        return f"{here.name}, {self.threads} threads, {here}, torch {torch.__version__}"


@dataclass(frozen=True)
class Row:
    """One system in one phase: medians over the steady rounds (over all, when none was steady)."""

    system: str
    phase: str
    title: str
    value: float
    unit: str
    ratio: float | None = None  # to eager; above 1 is better than eager
    of_bound: float | None = (
        None  # 1.0 is the system's own roofline on the probes around the measurements
    )
    probe: Probe | None = None  # the median of each rate
    rounds: int = 0
    steady: int = 0
    accuracy: Accuracy | None = None  # of the system, the same in every phase


def rows_of(run: Run, phases: Sequence[Phase]) -> list[Row]:
    """Phase by phase, systems in the order asked for; compile time and memory last."""
    rows = []
    for phase in phases:
        eager = run.measurements.get(("eager", phase.name))
        for system in run.systems:
            found = run.measurements[system, phase.name]
            rows.append(_row(system, phase, found, eager, run))
    for system, seconds in run.compile_seconds.items():
        if system in run.systems:
            rows.append(Row(system, "compile", "compile, cold", seconds, "s"))
    for system, mib in run.peak_mib.items():
        rows.append(Row(system, "peak-memory", "peak memory", mib, "MiB"))
    return rows


def _row(
    system: str, phase: Phase, found: list[Measurement], eager: list[Measurement] | None, run: Run
) -> Row:
    seconds = _median_seconds(found)
    probe = _median_probe(found)
    work, form = run.work[phase.name], run.forms[system]
    least = None if work is None or form is None else work.least_seconds(form, probe)
    return Row(
        system,
        phase.name,
        phase.describe(),
        phase.value(seconds),
        phase.unit,
        ratio=_median_seconds(eager) / seconds if eager else None,
        of_bound=None if least is None else least / seconds,
        probe=probe,
        rounds=len(found),
        steady=sum(m.steady for m in found),
        accuracy=run.accuracy.get(system),
    )


def _median_probe(found: list[Measurement]) -> Probe:
    rates = (dataclasses.astuple(m.probe) for m in _used(found))
    return Probe(*(statistics.median(rate) for rate in zip(*rates, strict=True)))


def _used(found: list[Measurement]) -> list[Measurement]:
    return [m for m in found if m.steady] or found


def _median_seconds(found: list[Measurement]) -> float:
    return statistics.median(m.seconds for m in _used(found))


def number(value: float) -> str:
    """Three significant digits, never in exponent form."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def json_lines(rows: Sequence[Row], setting: Setting) -> str:
    """One JSON object a line."""
    lines = []
    for row in rows:
        line: dict[str, Any] = {
            "system": row.system,
            "model": setting.model,
            "dtype": setting.dtype,
            "phase": row.phase,
            "value": row.value,
            "unit": row.unit,
            "probe": row.probe and dataclasses.asdict(row.probe),
            "ratio_to_eager": row.ratio,
            "of_bound": row.of_bound,
            "rounds": row.rounds,
            "steady_rounds": row.steady,
            "accuracy": row.accuracy and dataclasses.asdict(row.accuracy),
            "machine": setting.machine(),
        }
        lines.append(json.dumps(line))
    return "\n".join(lines) + "\n"


def markdown(rows: Sequence[Row], setting: Setting) -> str:
    """A table with a row per system, headed by what was measured where."""
    systems = list(dict.fromkeys(row.system for row in rows))
    by_place = {(row.phase, row.system): row for row in rows}
    phases = list(dict.fromkeys((r.phase, r.title, r.unit) for r in rows))
    headings = [f"{title}, {unit}" for _, title, unit in phases]
    found = {row.system: row.accuracy for row in rows if row.accuracy is not None}
    columns = accuracy_columns(found.values())
    lines = [
        f"`{setting.command}` on {setting.machine()}:",
        "",
        f"| {' | '.join([setting.title, *headings, *(title for title, _ in columns)])} |",
        "| --- |" + " ---: |" * (len(headings) + len(columns)),
    ]
    for system in systems:
        cells = [_cell(by_place.get((phase, system))) for phase, _, _ in phases]
        cells += [text(found.get(system)) for _, text in columns]
        lines.append(f"| {' | '.join([system, *cells])} |")
    lines += ["", _legend(any(row.ratio is not None for row in rows)) + samples_of(found.values())]
    return "\n".join(lines) + "\n"


def _legend(has_eager: bool) -> str:
    ratio = "times eager's speed, " if has_eager else ""
    return (
        f"In brackets: {ratio}percent of the roofline measured around it, which counts the bytes and the products "
        "that the system's own form of the weights needs."
    )


def samples_of(found: Iterable[Accuracy]) -> str:
    """What the accuracy was measured on, as a sentence; "" when it was not."""
    for accuracy in found:
        what = "positions" if accuracy.top1 is not None else "texts"
        return f" Accuracy is beside eager in fp32, on {accuracy.samples:,} {what} of Python's documentation."
    return ""


def accuracy_columns(
    found: Iterable[Accuracy],
) -> list[tuple[str, Callable[[Accuracy | None], str]]]:
    """Headings and how an accuracy is written under them; none when none was measured."""
    first = next(iter(found), None)
    if first is None:
        return []
    if first.top1 is not None:
        return [
            ("KL", lambda a: "–" if a is None else f"{a.divergence:.4f}"),
            ("top-1", lambda a: "–" if a is None else f"{a.top1:.1%}"),
        ]
    return [
        ("cosine, mean", lambda a: "–" if a is None else f"{a.mean_cosine:.4f}"),
        ("lowest", lambda a: "–" if a is None else f"{a.lowest_cosine:.4f}"),
    ]


def _cell(row: Row | None) -> str:
    if row is None:
        return "–"
    details = [f"{row.ratio:.2f}×"] if row.ratio is not None and row.system != "eager" else []
    details += [f"{row.of_bound:.0%}"] if row.of_bound is not None else []
    return number(row.value) + (f" ({', '.join(details)})" if details else "")


def write_markdown(path: Path, table: str, setting: Setting) -> None:
    """Puts the table between this model's marks in a Markdown file; a new file gets both.

    The marks are `<!-- bench MODEL DTYPE -->` and `<!-- end bench MODEL DTYPE -->`, with "quantised" instead of the dtype where
    systems are.
    """
    name = f"bench {setting.title}"
    begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    block = f"{begin}\n{table}{end}"
    if not path.exists():
        path.write_text(block + "\n")
        return
    text = path.read_text()
    place = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not place.search(text):
        raise ModelError(f"{path} has no place for the table: add the lines {begin} and {end}")
    path.write_text(place.sub(lambda _: block, text, count=1))
