"""Measuring a kernel's tiles on the GPU that is here: likely tiles, compiled and tried, then the search of llmopt.tune.

Each call finds a cold L2 cache, as a layer's weights do in a model. The default is always a candidate, and must be beaten by 3 % twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import torch

from llmopt.gpu import device as gpu_device
from llmopt.gpu.run import run
from llmopt.gpu.tune.candidates import Candidate, inspect, likely
from llmopt.gpu.tune.cost import roof
from llmopt.gpu.tune.problems import example, facts, operands, source_of, words
from llmopt.gpus import stand_in
from llmopt.launch import Tile
from llmopt.registry import Kernel
from llmopt.tune.database import Entry
from llmopt.tune.search import search
from llmopt.types import Target

BUDGET_SECONDS = 6.0  # of timing a problem, beside compiling, which a machine does once
_WARMUP_MS, _REPEAT_MS = 2, 10
_REPEATS = 3  # of medians, of a kernel without tiles
_APART = 1e-2  # relative to the result: further from the default's result a tile is wrong


class Bench(Protocol):
    """Times the tiles of one problem."""

    def reject(self, tile: Tile) -> str:
        """Runs a tile once: why it cannot be used, or ""."""

    def __call__(self, tile: Tile) -> float:
        """Microseconds of a call."""


class LaunchBench:
    """Launches on operands in the memory of a GPU."""

    def __init__(
        self,
        kernel: Kernel,
        problem: Any,
        target: Target,
        device: torch.device,
        timer: Callable[[Callable[[], None]], float] | None = None,
    ) -> None:
        """timer(call): milliseconds of a call; triton.testing.do_bench, which flushes the L2 cache before each."""
        self._of = (kernel, problem)
        self._target = target
        self._device = device
        self._given = operands(kernel.op, problem, device)
        self._timer = timer or _do_bench
        self._want: torch.Tensor | None = None  # the default's result

    def reject(self, tile: Tile) -> str:
        try:
            with gpu_device.on(self._device):
                launch = example(*self._of, tile, self._target, self._given)
                run(launch)
            got = launch.arguments[launch.writes[0]].float()
        except (
            Exception
        ) as error:  # compilers and drivers raise what they like; the default's would be the user's
            if self._want is None:
                raise
            return f"it does not run: {type(error).__name__}: {error}".splitlines()[0]
        if self._want is None:
            self._want = got.clone()
        off = ((got - self._want).norm() / self._want.norm().clamp(min=1e-20)).item()
        return "" if off <= _APART else f"its result is {off:.1e} from the default's"

    def __call__(self, tile: Tile) -> float:
        with gpu_device.on(self._device):  # where events and the flush of the L2 cache are, too
            launch = example(*self._of, tile, self._target, self._given)
            return self._timer(lambda: run(launch)) * 1e3


def _do_bench(call: Callable[[], None]) -> float:
    from triton.testing import do_bench

    return do_bench(call, warmup=_WARMUP_MS, rep=_REPEAT_MS, return_mode="median")


class Tuning:
    """Measures problems on one GPU, one after the other.

    bench_of, look: time a problem's tiles, and compile one tile; tests give their own.
    """

    def __init__(
        self,
        target: Target,
        device: torch.device,
        budget: float = BUDGET_SECONDS,
        bench_of: Callable[[Kernel, Any], Bench] | None = None,
        look: Callable[..., tuple[Candidate | None, str]] = inspect,
    ) -> None:
        self._target, self._device, self._budget = target, device, budget
        self._bench_of = bench_of or self._launch_bench
        self._look = look
        self._part = stand_in(target)

    def measure(self, kernel: Kernel, problem: Any) -> tuple[Entry, bool]:
        """The fastest tile of a problem; and whether the answer is worth keeping."""
        bench = self._bench_of(kernel, problem)
        tiles, left_out = self._usable(kernel, problem, bench)
        if kernel.function is None:
            return self._as_it_is(kernel, problem, bench, tiles[0])
        result = search(tiles, bench, self._budget)
        default = tiles[0]
        config = {} if result.config == default else dataclasses.asdict(result.config)
        seconds = result.us * 1e-6
        reason = result.reason + (f"; {left_out} tiles do not fit" if left_out else "")
        entry = Entry(
            facts(kernel, problem, source_of(kernel)),
            config,
            result.us,
            result.default_us,
            roof(problem, self._part, seconds),
            reason,
            {words(tile): us for tile, us in result.timings.items()},
        )
        return entry, result.conclusive

    def _as_it_is(
        self, kernel: Kernel, problem: Any, bench: Bench, tile: Tile
    ) -> tuple[Entry, bool]:
        """A kernel that chooses its tile itself: what it takes, to compare with other kernels."""
        us = min(bench(tile) for _ in range(_REPEATS))
        share = roof(problem, self._part, us * 1e-6)
        of = facts(kernel, problem, source_of(kernel))
        return Entry(of, {}, us, us, share, "it chooses its tile itself", {}), True

    def _usable(self, kernel: Kernel, problem: Any, bench: Bench) -> tuple[list[Tile], int]:
        """The default, then what compiles and runs, likeliest first by what it takes; and how many do not."""
        default, *others = likely(kernel, problem, self._part)
        if reason := bench.reject(default):
            raise ValueError(f"llmopt: the default of {kernel.name} cannot be measured: {reason}")
        found = [self._look(kernel, problem, tile, self._part, self._target)[0] for tile in others]
        fitting = sorted((c for c in found if c is not None), key=lambda c: c.prediction.seconds)
        tiles = [c.tile for c in fitting if not bench.reject(c.tile)]
        return [default, *tiles], len(others) - len(tiles)

    def _launch_bench(self, kernel: Kernel, problem: Any) -> Bench:
        return LaunchBench(kernel, problem, self._target, self._device)
