"""explain: what llmopt did with a model — every step's kernel, time and share of the machine's limit, what stayed in PyTorch and why."""

from __future__ import annotations

import html
import json
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llmopt.auto.module import DECISION
from llmopt.compiled import CompiledGraph, Run, alive, profiling
from llmopt.native.probe import READ_BYTES, Probe, give_back, measure
from llmopt.native.segment import StepRecord
from llmopt.quant.budget import Decision
from llmopt.target import target

_WIDTH = 120
_MACHINERY = frozenset({"getitem", "size", "sym_sum", "numel", "dim"})


@dataclass(frozen=True)
class StepTime:
    """One native step of a profiled call."""

    kernel: str
    detail: str
    isa: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    microseconds: float
    flops: int
    bytes: int
    roof: float  # share of the limit that binds: 1.0 is what the probe reaches
    bound: str  # "compute" or "memory"
    source: str
    config: str  # in words; "" where all is left to the kernel
    config_source: (
        str  # "tuned: ...", "borrowed ...", "default: <reason>"; "" where nothing can be tuned
    )


@dataclass(frozen=True)
class Unaccelerated:
    """A node that ran as in PyTorch."""

    operation: str
    reason: str
    source: str


@dataclass(frozen=True)
class Report:
    """What happened in one call. Print it, or write it with to_json and to_html."""

    target: str
    cpu: str
    threads: int
    probe: Probe
    call_seconds: float
    compile_seconds: dict[str, float]
    packed_bytes: int
    graphs: int
    steps: tuple[StepTime, ...]
    fallbacks: tuple[Unaccelerated, ...]
    reasons: tuple[str, ...]  # why whole graphs ran as in PyTorch
    notes: tuple[str, ...]  # what was asked for and could not be done, and why
    decisions: tuple[Decision, ...] = ()  # of precision="auto"
    tiles: tuple[str, ...] = ()  # of launches on a GPU: how many come from where
    steady: bool = True  # the probes before and after agree

    def summary(self) -> str:
        """The short form: where the time went, by kind of step."""
        native = sum(s.microseconds for s in self.steps) / 1e6
        lines = [
            f"{self.target} ({self.cpu}), {self.threads} threads; probe: {self.probe.fma_flops / 1e9:.0f} GFLOP/s, "
            f"{self.probe.read_bytes / 1e9:.1f} GB/s",
            f"call {self.call_seconds * 1e3:.2f} ms, of which {native * 1e3:.2f} ms in {len(self.steps)} native steps "
            f"of {self.graphs} graph(s); packed weights {self.packed_bytes / 2**20:.0f} MiB",
            f"compiled in {sum(self.compile_seconds.values()):.2f} s beyond Dynamo",
        ]
        if not self.steady:
            lines.append(
                "probes before and after differ: other work may run here, and shares of a limit be off"
            )
        lines += [f"precision='auto': {d.summary()}" for d in self.decisions]
        lines += [f"whole graph ran as in PyTorch: {r}" for r in self.reasons]
        for note in self.notes:
            lines += textwrap.wrap(note, _WIDTH, subsequent_indent="  ")
        lines += [_row(*group) for group in self._groups()]
        lines += self._config_sources()
        for tiles in self.tiles:
            lines += textwrap.wrap(f"tiles: {tiles}", _WIDTH, subsequent_indent="  ")
        if self.fallbacks:
            names: dict[str, int] = {}
            for f in self.fallbacks:
                names[f.operation] = names.get(f.operation, 0) + 1
            words = ", ".join(n if c == 1 else f"{n} x{c}" for n, c in names.items())
            lines.append(f"in PyTorch: {words}")
        return "\n".join(lines)

    def __str__(self) -> str:
        lines = [self.summary(), "", "steps:"]
        for i, step in enumerate(self.steps):
            lines += _step_lines(i, step)
        if self.fallbacks:
            lines += ["", "ran as in PyTorch:"]
            for f in self.fallbacks:
                lines += [f"  {f.operation}: {f.reason}", *_indented(f.source)]
        for decision in self.decisions:
            lines += ["", "precision='auto':", *str(decision).splitlines()]
        lines += ["", "compile seconds beyond Dynamo:"]
        lines += [f"  {phase}: {seconds:.3f}" for phase, seconds in self.compile_seconds.items()]
        return "\n".join(lines)

    def _config_sources(self) -> list[str]:
        """How many configs are tuned, borrowed or default, the reasons of the default ones apart."""
        found: dict[str, int] = {}
        for step in self.steps:
            word = step.config_source.split(":")[0].split(" ")[0]
            name = step.config_source if word == "default" else word
            if name:
                found[name] = found.get(name, 0) + 1
        return [f"configs: {count} {name}" for name, count in sorted(found.items())]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), indent=1))

    def to_html(self, path: str | Path) -> None:
        """One self-contained file with a plot of where the time went."""
        Path(path).write_text(_html(self))

    def _groups(self) -> list[tuple[str, float, int, float, str]]:
        """(name, microseconds, steps, share of the binding limit, which limit), longest first."""
        found: dict[str, list[StepTime]] = {}
        for s in self.steps:
            found.setdefault(f"{s.kernel} {s.detail}", []).append(s)
        rows = []
        for name, steps in found.items():
            time = sum(s.microseconds for s in steps)
            roof = sum(s.roof * s.microseconds for s in steps) / time if time else 0.0
            rows.append((name, time, len(steps), roof, steps[0].bound))
        return sorted(rows, key=lambda r: -r[1])


def _step_lines(number: int, s: StepTime) -> list[str]:
    """Times and costs, then operands, then the source: each on a line of its own where they are many."""
    numbers = f"{number:4d} {s.microseconds:9.1f} us {_share(s.roof):>5s} of {s.bound:7s} {_amount(s.flops)}FLOP {_amount(s.bytes)}B"
    operands = ", ".join(s.inputs) + (f" -> {', '.join(s.outputs)}" if s.outputs else "")
    head = f"{numbers}  {s.kernel}:{s.isa} {s.detail}"
    config = (
        f"config: {s.config or 'the kernel’s own'}; {s.config_source}" if s.config_source else ""
    )
    return [head, *_indented(operands), *_indented(config), *_indented(s.source)]


def _amount(count: float) -> str:
    """With a prefix: 12.3 M."""
    for prefix in ("", "k", "M", "G"):
        if count < 999.95:
            return f"{count:.1f} {prefix}"
        count /= 1000
    return f"{count:.1f} T"


def _indented(text: str) -> list[str]:
    """The text as lines of at most _WIDTH characters under a step, without lines when it is empty."""
    return textwrap.wrap(
        text, _WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 10, break_long_words=False
    )


def _row(name: str, microseconds: float, count: int, roof: float, bound: str) -> str:
    return f"{microseconds / 1e3:9.3f} ms {count:4d} x {name:44s} {_share(roof):>4s} of {bound}"


def _share(roof: float) -> str:
    """Of a limit; nothing above what can be true when the probe is."""
    return f"{roof:.0%}" if roof <= 1.25 else "–"


def explain(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """Calls a model compiled with backend="llmopt" once to warm up and once with every step timed.

    model: a compiled function or module, or a module whose `compile` was called. Tensors the call changes in place (a cache) are
    changed by both calls. Raises ValueError when no graph of llmopt ran.
    """
    threads = torch.get_num_threads()
    before = measure(threads, read_bytes=0)  # what is in caches now, the next calls find there
    with torch.no_grad():
        model(*args, **kwargs)
        with profiling() as runs:
            model(*args, **kwargs)
    if not runs:
        raise ValueError(
            'explain: no graph compiled by llmopt ran in this call; compile the model with backend="llmopt" first. If it is, Dynamo '
            "left the forward to Python: without a word where its graph breaks inside a loop (TORCH_LOGS=graph_breaks says where), and "
            "with a warning after torch._dynamo.config.recompile_limit kinds of calls"
        )
    after = measure(threads, read_bytes=_read_bytes(runs) or READ_BYTES)
    give_back()
    probe = after.best(before)
    graphs = list(dict.fromkeys(r.graph for r in runs))
    reasons = dict.fromkeys((r.graph, r.reason) for r in runs)
    here = target()
    return Report(
        target=str(here),
        cpu=here.name,
        threads=threads,
        probe=probe,
        steady=after.is_near(replace(before, read_bytes=after.read_bytes)),
        call_seconds=sum(r.seconds for r in runs),
        compile_seconds=_sum_phases(graphs),
        packed_bytes=_packed_bytes(graphs),
        graphs=len(graphs),
        steps=tuple(s for r in runs for s in _steps(r, probe)),
        fallbacks=tuple(f for graph, reason in reasons if not reason for f in _fallbacks(graph)),
        reasons=tuple(reason for _, reason in reasons if reason),
        notes=tuple(
            dict.fromkeys(n for g in graphs if g.plan for n in (*g.plan.notes, *g.cuda_graphs()))
        ),
        tiles=tuple(f"{n} {s}" for g in graphs if g.plan for s, n in g.plan.tiles().items()),
        decisions=_decisions(model, graphs),
    )


def _read_bytes(runs: Sequence[Run]) -> int:
    costs = (cost for run in runs for ran in run.segments.values() for cost in ran.costs)
    return sum(num_bytes for _, num_bytes in costs)


def _decisions(model: Callable[..., Any], graphs: list[CompiledGraph]) -> tuple[Decision, ...]:
    """Of precision="auto", and of quantize(…, "auto") that made the model."""
    made = getattr(getattr(model, "_orig_mod", model), DECISION, None)
    found = [*([made] if made else []), *(g.decision for g in graphs if g.decision)]
    return tuple({id(d): d for d in found}.values())


def refresh() -> None:
    """Makes every compiled graph compare and pack its weights anew at its next call.

    For edits that PyTorch does not count, through `.data` or NumPy: on a CPU they are noticed in time (`llmopt.watch.Watch`), on a GPU
    they are not. Every other change is noticed at once.
    """
    for graph in alive():
        graph.forget_weights()


def _sum_phases(graphs: list[CompiledGraph]) -> dict[str, float]:
    total: dict[str, float] = {}
    for graph in graphs:
        for phase, seconds in graph.compile_seconds.items():
            total[phase] = total.get(phase, 0.0) + seconds
    return total


def _packed_bytes(graphs: list[CompiledGraph]) -> int:
    """Of all packed weights, each counted once however many segments read it."""
    every = {id(weight): weight.bytes for graph in graphs for weight in graph.packed()}
    return sum(every.values())


def _steps(run: Run, probe: Probe) -> list[StepTime]:
    steps = []
    for segment, times, costs in run.segments.values():
        for record, ns, (flops, num_bytes) in zip(segment.records, times, costs, strict=True):
            isa = segment.target_.tier  # of the program that ran, whatever is set now
            steps.append(_step(record, isa, ns, flops, num_bytes, probe))
    return steps


def _step(
    record: StepRecord, isa: str, ns: int, flops: int, num_bytes: int, probe: Probe
) -> StepTime:
    from llmopt.source_lines import source_line

    peak = probe.fma_flops
    if record.multiplies:
        peak = probe.linear_peak(record.multiplies, record.products)
    compute, memory = flops / peak, num_bytes / probe.read_bytes
    seconds = max(ns, 1) * 1e-9
    return StepTime(
        kernel=record.kernel,
        detail=record.detail,
        isa=isa,
        inputs=record.inputs,
        outputs=record.outputs,
        microseconds=ns / 1e3,
        flops=flops,
        bytes=num_bytes,
        roof=max(compute, memory) / seconds,
        bound="compute" if compute > memory else "memory",
        source=source_line(record.node),
        config=record.config,
        config_source=record.config_source,
    )


def _fallbacks(graph: CompiledGraph) -> list[Unaccelerated]:
    from llmopt.graph import kind

    if graph.plan is None:
        return []
    nodes = [f for f in graph.plan.fallbacks if kind(f.node) not in _MACHINERY]
    return [Unaccelerated(kind(f.node), f.reason, f.source) for f in nodes]


def _html(report: Report) -> str:
    groups = report._groups()
    longest = max((g[1] for g in groups), default=1.0)
    bars = []
    for i, (name, time, count, roof, bound) in enumerate(groups):
        y, width = 24 * i, 420 * time / longest
        label = html.escape(f"{time / 1e3:.3f} ms  {count} x {name}  {_share(roof)} of {bound}")
        bars.append(
            f'<rect x="0" y="{y}" width="{width:.1f}" height="18" fill="#c9d7e8"/>'
            f'<rect x="0" y="{y}" width="{width * min(roof, 1):.1f}" height="18" fill="#3b6ea5"/>'
            f'<text x="{width + 8:.1f}" y="{y + 13}">{label}</text>'
        )
    plot = f'<svg width="1100" height="{24 * len(groups)}">{"".join(bars)}</svg>'
    return (
        '<!doctype html><meta charset="utf-8"><title>llmopt</title>'
        "<style>body{font:14px sans-serif;margin:2em}text{font:12px monospace}pre{font-size:12px}</style>"
        f"<h1>llmopt on {html.escape(report.target)}</h1>"
        "<p>Length is time; the dark part is the share of the limit that binds the step.</p>"
        f"{plot}<pre>{html.escape(str(report))}</pre>"
    )
