"""What a session found: one JSON line a result as soon as it is there, then a markdown table and plots of all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Result:
    """One line: a check that held or not, or a time. seconds and peers are None where nothing was timed."""

    phase: str
    what: str
    system: str
    outcome: str  # "ok", "skipped" or what went wrong
    source: str  # "measured" or "rehearsed"
    seconds: float | None = None
    detail: str = ""  # a config, a reason
    tflops: float | None = None
    gbytes: float | None = None  # per second
    percent: float | None = None  # of the floor's speed, see ceilings.py


@dataclass
class Record:
    """The results of a session, written to a folder while they come."""

    folder: Path
    machine: dict[str, Any]
    source: str
    results: list[Result] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "machine.json").write_text(json.dumps(self.machine, indent=1))
        (self.folder / "results.jsonl").write_text("")

    def add(
        self, phase: str, what: str, system: str, outcome: str = "ok", seconds: float | None = None,
        detail: str = "", flops: float = 0.0, num_bytes: float = 0.0, floor: float = 0.0,
    ) -> None:  # fmt: skip
        """floor: seconds under which the GPU cannot be, or 0 where nobody knows."""
        rates = {}
        if seconds:
            rates = {
                "tflops": flops / seconds / 1e12 or None,
                "gbytes": num_bytes / seconds / 1e9 or None,
                "percent": 100 * floor / seconds or None,
            }
        result = Result(phase, what, system, outcome, self.source, seconds, detail, **rates)
        self.results.append(result)
        with (self.folder / "results.jsonl").open("a") as file:
            file.write(json.dumps(asdict(result)) + "\n")

    def reload(self) -> None:
        """What other processes added as well."""
        lines = (self.folder / "results.jsonl").read_text().splitlines()
        self.results[:] = [Result(**json.loads(line)) for line in lines]

    def failures(self) -> list[Result]:
        return [r for r in self.results if r.outcome not in ("ok", "skipped")]

    def write_table(self) -> Path:
        """table.md: the machine, times beside each other, what failed and what was left out."""
        machine = ", ".join(f"{k} {v}" for k, v in self.machine.items())
        lines = [f"{self.source.capitalize()} on {machine}.", "", *_table(self.results)]
        checks = [r for r in self.results if r.seconds is None and r.outcome == "ok"]
        lines += ["", f"{len(checks)} checks passed.", ""]
        rest = [r for r in self.results if r.outcome != "ok"]
        lines += [
            f"- {r.phase}: {r.what}, {r.system}: {r.outcome} {r.detail}".rstrip() for r in rest
        ]
        path = self.folder / "table.md"
        path.write_text("\n".join(lines) + "\n")
        return path

    def write_plots(self) -> list[Path]:
        """A PNG for each phase with times; raises ModuleNotFoundError where matplotlib is missing."""
        import matplotlib

        matplotlib.use("Agg")
        timed = [r for r in self.results if r.seconds]
        return [
            _plot(self.folder / f"{phase.replace(' ', '_')}.png", [r for r in timed if r.phase == phase])
            for phase in dict.fromkeys(r.phase for r in timed)
        ]  # fmt: skip


def _table(results: Sequence[Result]) -> list[str]:
    head = ("what", "system", "time", "TFLOP/s", "GB/s", "% of the floor's speed", "")
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(['---'] * len(head))} |"]
    for r in results:
        if r.seconds:
            rates = (f"{v:.1f}" if v else "" for v in (r.tflops, r.gbytes, r.percent))
            lines.append(
                f"| {r.phase}: {r.what} | {r.system} | {_time(r.seconds)} | {' | '.join(rates)} | {r.detail} |"
            )
    return lines


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _plot(path: Path, results: Sequence[Result]) -> Path:
    import matplotlib.pyplot as plt

    names = [f"{r.what}: {r.system}" for r in results]
    figure, axis = plt.subplots(figsize=(9, 1 + 0.24 * len(names)))
    colours = ["#1f6feb" if _is_ours(r.system) else "#9aa4b2" for r in results]
    bars = axis.barh(names, [1e6 * (r.seconds or 0.0) for r in results], color=colours)
    axis.bar_label(bars, labels=[_time(r.seconds or 0.0) for r in results], padding=3, fontsize=7)
    axis.set_xscale("log")
    axis.invert_yaxis()
    axis.tick_params(labelsize=7)
    axis.set_title(f"{results[0].phase}, {results[0].source}: µs, less is better", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _is_ours(system: str) -> bool:
    return system.startswith("llmopt") or system.endswith((".triton", ".cuda"))
