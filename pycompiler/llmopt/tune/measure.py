"""Timing one linear under one config: a few calls in a row inside one C++ program, over weights that rotate through memory.

In a model no layer finds its weights in a cache, so each call reads another window of one large block. Its content does not
matter, as long as it holds ordinary numbers.
"""

from __future__ import annotations

import ctypes
import functools
import statistics

import torch

from llmopt import _C, packing
from llmopt.native.probe import READ_BYTES
from llmopt.native.segment import SHORT_DTYPES, CodeForm
from llmopt.ops import activation
from llmopt.ops.norm import KINDS as NORM_KINDS
from llmopt.program import ProgramBuilder, View, view_of
from llmopt.tune.candidates import Machine, op_ints
from llmopt.types import Choice, LinearConfig, LinearProblem

_DTYPES = {short: dtype for dtype, short in SHORT_DTYPES.items()}
_CALL_SECONDS = 300e-6  # of short calls as many are timed together as this takes ...
_MOST_STEPS = 8  # ... and no more
_FILL = 0x3C  # as f32 0x3C3C3C3C is 0.0115, as f16 and bf16 an ordinary number too, as a code 60


class WeightMemory:
    """Memory that stands for the packed weights of a model."""

    def __init__(self) -> None:
        self._memory: _C.Memory | None = None
        self._next = 0

    def reserve(self, num_bytes: int) -> None:
        """Makes sure that windows of num_bytes fit; the first time this fills all of the memory."""
        if self._memory is None or self._memory.bytes < num_bytes:
            self._memory = _C.Memory(max(READ_BYTES, num_bytes))
            ctypes.memset(self._memory.address, _FILL, self._memory.bytes)

    def window(self, num_bytes: int) -> int:
        """The address of the next num_bytes; they come again only when all the memory was used."""
        self.reserve(num_bytes)
        assert self._memory is not None
        if self._next + num_bytes > self._memory.bytes:
            self._next = 0
        address = self._memory.address + self._next
        self._next += -(-num_bytes // 4096) * 4096
        return address


@functools.lru_cache(maxsize=1)
def _common_memory() -> WeightMemory:
    return WeightMemory()


def memory_for(num_bytes: int) -> WeightMemory:
    """Memory that is filled already: one for the whole process, or one of its own for weights that are larger."""
    memory = _common_memory() if num_bytes <= READ_BYTES else WeightMemory()
    memory.reserve(num_bytes)
    return memory


class LinearBench:
    """Calls of one problem: `bench(config)` gives microseconds of one."""

    def __init__(self, problem: LinearProblem, machine: Machine, memory: WeightMemory) -> None:
        assert problem.m is not None
        self._problem, self._machine, self._memory = problem, machine, memory
        self._weight_bytes = weight_bytes(problem, machine.target.panel_width)
        memory.reserve(self._weight_bytes)
        m, n, k = problem.m, problem.n, problem.k
        outputs = n // 2 if problem.gated else n
        x, y = _DTYPES[problem.x], _DTYPES[problem.y]
        self._x = torch.full((m, k), 0.5, dtype=x)
        self._y = torch.zeros(m, outputs, dtype=y)
        self._residual = torch.zeros(m, outputs, dtype=y) if problem.residual else None
        self._bias = torch.zeros(n, dtype=y) if problem.bias else None
        self._norm = torch.ones(k, dtype=x) if problem.norm != "none" else None
        flops = 2.0 * m * n * k * max(1, problem.planes)
        call = flops / machine.probe.fma_flops + self._weight_bytes / machine.probe.read_bytes
        several = int(_CALL_SECONDS / call)
        self._steps = 1 if several < 2 else min(_MOST_STEPS, several) + 1
        self._programs: dict[LinearConfig, _C.Program] = {}

    def __call__(self, config: LinearConfig) -> float:
        if config not in self._programs:
            self._programs[config] = self._build(config)
        given = [t.data_ptr() for t in self._tensors() if t is not None]
        windows = [self._memory.window(self._weight_bytes) for _ in range(self._steps)]
        ns = self._programs[config].profile([*given, *windows], [], self._machine.threads)
        # The first wakes the threads, which only long calls do not notice.
        return statistics.median(ns[1:] or ns) / 1e3

    def _tensors(self) -> list[torch.Tensor | None]:
        return [self._x, self._bias, self._residual, self._y, self._norm]

    def _build(self, config: LinearConfig) -> _C.Program:
        p = self._problem
        builder = ProgramBuilder()
        views = [None if t is None else view_of(builder.external(), t) for t in self._tensors()]
        x, bias, residual, y, norm = views
        ints = op_ints(p)
        ints[3], ints[5] = activation.CODES[p.act], NORM_KINDS.index(p.norm)
        ints += Choice(((p.m or 0, config),)).ints()
        for _ in range(self._steps):
            w = View(builder.external(), torch.uint8, (self._weight_bytes,), (1,))
            builder.step(p.op, [x, w, bias, residual, y, norm, None], ints, [1e-5, 1.0, 0.0])
        return builder.build(self._machine.target.tier)


def weight_bytes(problem: LinearProblem, panel_width: int) -> int:
    if problem.op == "linear":
        each = packing.float_bytes(problem.n, problem.k, _DTYPES[problem.w], panel_width)
        return packing.memory_bytes(each)
    form = CodeForm(8 if problem.w == "q8" else 4, problem.group, not problem.offsets)
    groups = problem.k // problem.group
    return packing.memory_bytes(packing.code_bytes(problem.n, groups, form, panel_width))
