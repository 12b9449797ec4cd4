"""Timing of one op between two probes of the machine, and the table printed at the end.

pytest-benchmark does the timing; `extra_info` gets the shape, the rates and the share of the roof,
so that `--benchmark-json` keeps them. Ops rotate over copies of their operands, CACHE_BYTES of them
or MAX_COPIES: in a model no layer finds its weights in a cache. A last-level cache of some hundred
MiB that nobody else uses may hold them all the same; then the share of the roof is above 100%.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from llmopt.native.probe import Probe, measure

CACHE_BYTES = 256 << 20
MAX_COPIES = 512

_rows: list[tuple[str, str, str, float, float]] = []  # op and shape, dtype, system, seconds, roof


def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_columns = ["median"]  # the table below says the rest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(min_rounds=5, max_time=0.2, warmup=True))


def copies_beyond_cache(num_bytes: int) -> int:
    """How many copies of operands of this size to rotate over."""
    return max(1, min(MAX_COPIES, -(-CACHE_BYTES // max(1, num_bytes))))


@pytest.fixture
def timed(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """timed(system, what, dtype, calls, flops, num_bytes): times the calls in turn.

    system: "llmopt", or who stands beside it in the table. multiplies: the dtype of a linear's products, as
    `Probe.linear_peak` takes it, and how many of those one product is; None: the roof of the arithmetic is the FMA probe.
    """

    def run(
        system: str,
        what: str,
        dtype: torch.dtype,
        calls: Sequence[Callable[[], Any]],
        flops: float,
        num_bytes: float,
        multiplies: str | None = None,
        products: int = 1,
    ) -> None:
        endless = itertools.cycle(calls)
        threads = torch.get_num_threads()
        name = str(dtype).removeprefix("torch.")
        benchmark.group = f"{what} {name}"
        with torch.inference_mode():
            for call in calls:  # outputs have their pages
                call()
            before = measure(threads)
            benchmark(lambda: next(endless)())
            after = measure(threads)
        if benchmark.stats is None:  # --benchmark-disable
            return
        peak = statistics.mean(_peak(probe, multiplies, products) for probe in (before, after))
        read = statistics.mean((before.read_bytes, after.read_bytes))
        seconds = benchmark.stats.stats.median
        roof = max(flops / peak, num_bytes / read) / seconds
        benchmark.extra_info.update(
            op=what,
            dtype=name,
            system=system,
            threads=threads,
            gflops=flops / seconds / 1e9,
            gbytes=num_bytes / seconds / 1e9,
            probe_gflops=peak / 1e9,
            probe_gbytes=read / 1e9,
            of_bound=roof,
        )
        _rows.append((what, name, system, seconds, roof))

    return run


def _peak(probe: Probe, multiplies: str | None, products: int) -> float:
    return probe.fma_flops if multiplies is None else probe.linear_peak(multiplies, products)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _rows:
        return
    by_case: dict[tuple[str, str], dict[str, tuple[float, float]]] = {}
    for what, dtype, system, seconds, roof in _rows:
        by_case.setdefault((what, dtype), {})[system] = (seconds, roof)
    terminalreporter.section("beside others, and percent of the roof measured around each")
    heading = f"{'op and shape':<52}{'dtype':<10}{'llmopt us':>11}{'% of roof':>11}"
    terminalreporter.write_line(f"{heading}{'beside us':>11}{'ratio':>8}  beside it")
    for (what, dtype), systems in by_case.items():
        ours = systems.pop("llmopt", None)
        line = f"{what:<52}{dtype:<10}{_micros(ours):>11}"
        line += f"{ours[1]:>11.0%}" if ours else f"{'–':>11}"
        for name, theirs in (systems or {"": None}).items():
            ratio = f"{theirs[0] / ours[0]:>7.2f}x" if ours and theirs else f"{'–':>8}"
            terminalreporter.write_line(f"{line}{_micros(theirs):>11}{ratio}  {name}")


def _micros(found: tuple[float, float] | None) -> str:
    return f"{found[0] * 1e6:,.1f}" if found else "–"
