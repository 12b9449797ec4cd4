"""Measurements → one row per system and phase, as a table, JSON lines or Markdown."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmopt.benchmark.phases import Phase
from llmopt.benchmark.rounds import Measurement, Run
from llmopt.models import ModelError
from llmopt.target import target


@dataclass(frozen=True)
class Setting:
    """What the numbers were measured with."""

    model: str
    dtype: str
    threads: int
    command: str  # the command line that makes the numbers again

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
    of_bound: float | None = None  # 1.0 is the roofline of the probes around the measurements
    fma_flops: float | None = None  # per second
    read_bytes: float | None = None
    rounds: int = 0
    steady: int = 0


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
        rows.append(Row(system, "peak-memory", "peak memory of the process", mib, "MiB"))
    return rows


def _row(
    system: str, phase: Phase, found: list[Measurement], eager: list[Measurement] | None, run: Run
) -> Row:
    seconds = _median_seconds(found)
    used = _used(found)
    fma_flops = statistics.median(m.fma_flops for m in used)
    read_bytes = statistics.median(m.read_bytes for m in used)
    work = run.work[phase.name]
    return Row(
        system,
        phase.name,
        phase.describe(),
        phase.value(seconds),
        phase.unit,
        ratio=_median_seconds(eager) / seconds if eager else None,
        of_bound=work.seconds(fma_flops, read_bytes) / seconds if work else None,
        fma_flops=fma_flops,
        read_bytes=read_bytes,
        rounds=len(found),
        steady=sum(m.steady for m in found),
    )


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
            "probe": {"fma_flops": row.fma_flops, "read_bytes": row.read_bytes},
            "ratio_to_eager": row.ratio,
            "of_bound": row.of_bound,
            "rounds": row.rounds,
            "steady_rounds": row.steady,
            "machine": setting.machine(),
        }
        lines.append(json.dumps(line))
    return "\n".join(lines) + "\n"


def markdown(rows: Sequence[Row], setting: Setting) -> str:
    """A table with a row per phase and a column per system, headed by what was measured where."""
    systems = list(dict.fromkeys(row.system for row in rows))
    by_place = {(row.phase, row.system): row for row in rows}
    lines = [
        f"`{setting.command}` on {setting.machine()}:",
        "",
        "| " + " | ".join([f"{setting.model} {setting.dtype}", *systems]) + " |",
        "| --- |" + " ---: |" * len(systems),
    ]
    for phase, title, unit in dict.fromkeys((r.phase, r.title, r.unit) for r in rows):
        cells = [_cell(by_place.get((phase, system))) for system in systems]
        lines.append(f"| {title}, {unit} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "In brackets: times eager's speed, percent of the roofline measured around it.",
    ]
    return "\n".join(lines) + "\n"


def _cell(row: Row | None) -> str:
    if row is None:
        return "–"
    details = [f"{row.ratio:.2f}×"] if row.ratio is not None and row.system != "eager" else []
    details += [f"{row.of_bound:.0%}"] if row.of_bound is not None else []
    return number(row.value) + (f" ({', '.join(details)})" if details else "")


def write_markdown(path: Path, table: str, setting: Setting) -> None:
    """Puts the table between this model's marks in a Markdown file; a new file gets both.

    The marks are `<!-- bench MODEL DTYPE -->` and `<!-- end bench MODEL DTYPE -->`.
    """
    name = f"bench {setting.model} {setting.dtype}"
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
