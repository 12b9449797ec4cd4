"""One GPU segment while it is built: FX nodes → steps that give launches once the sizes of a call are known.

Inputs, results, arena slots and caches are those of native/segment.py; a step is a function from a `Call` to launches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from llmopt.gpu.weights import Prepared
from llmopt.graph import fake
from llmopt.launch import Launch, Problem
from llmopt.native.segment import PackedSpec, SegmentBuilder, StepRecord
from llmopt.program import View
from llmopt.registry import Chooser, by_default
from llmopt.sizes import ADD, CONST, FLOOR_DIV, MAX, MIN, MOD, MUL, SYMBOL, Size
from llmopt.types import Target


@dataclass(frozen=True)
class Operand:
    """A strided window on a buffer; its sizes by their numbers in the segment's table."""

    buffer: int
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Number:
    """A size by its number in the segment's table."""

    id: int


@dataclass
class Call:
    """One call of a segment: the values of its sizes, its buffers and its weights. On meta tensors it plans."""

    target: Target
    values: Sequence[int]
    buffers: Sequence[Tensor]
    weights: Sequence[Prepared]
    choose: Chooser = by_default

    def launch(self, op: str, problem: Problem, *operands: Any, **more: Any) -> Launch:
        """The launch of the kernel and tile that are chosen for a problem, on these operands."""
        chosen = self.choose(op, problem, self.target)
        launch = chosen.kernel.launch(problem, chosen.config, self.target, *operands, **more)
        return replace(launch, config_source=chosen.source)

    def tensor(self, operand: Operand | None) -> Tensor | None:
        """The tensor an operand is in this call; arena buffers are bytes."""
        if operand is None:
            return None
        base = self.buffers[operand.buffer]
        if base.dtype == torch.uint8 != operand.dtype:
            base = base.view(operand.dtype)
        size = [self.values[i] for i in operand.size]
        stride = [self.values[i] for i in operand.stride]
        return base.as_strided(size, stride, base.storage_offset() + self.values[operand.offset])

    def scratch(self, size: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory between two launches of one step."""
        device = self.buffers[0].device if self.buffers else torch.device("cpu")
        return torch.empty(tuple(size), dtype=dtype, device=device)


Launches = Callable[[Call], list[Launch]]


@dataclass
class GpuSegmentBuilder(SegmentBuilder):
    """Collects the steps of one segment."""

    choose: Chooser = by_default
    steps: list[Launches] = field(default_factory=list)

    def operand(self, view: View | None) -> Operand | None:
        if view is None:
            return None
        ids = self.builder.sizes.id
        return Operand(
            view.buffer,
            view.dtype,
            ids(view.offset),
            tuple(map(ids, view.size)),
            tuple(map(ids, view.stride)),
        )

    def number(self, size: Size) -> Number:
        return Number(self.builder.sizes.id(size))

    def prepared(self, spec: PackedSpec) -> int:
        """The number of a weight among the segment's prepared ones; equal specs share one."""
        return self.packed.setdefault(spec, (len(self.packed), spec))[0]

    def specs(self) -> list[PackedSpec]:
        """Its weights in the order of their numbers."""
        return [spec for _, spec in sorted(self.packed.values(), key=lambda p: p[0])]

    def number_outside(self) -> None:
        """Numbers every size of what comes from outside and goes there, also those no operand has; once all is lowered."""
        values = (fake(n) for n in (*self.inputs, *self.results, *self.kv_results))
        for value in (v for v in values if isinstance(v, Tensor)):
            for size in (*value.shape, *value.stride()):
                self.builder.sizes.id(size)

    def launch(self, launches: Launches, record: StepRecord) -> None:
        self.steps.append(launches)
        self.records.append(record)


def memory(
    segment: GpuSegmentBuilder,
    sources: Mapping[str, Sequence[Tensor]],
    values: Sequence[int],
    device: torch.device,
) -> list[Tensor]:
    """Every buffer of a call. sources: its tensors by where externals come from; arena slots are made here."""
    program = segment.builder
    slots = [
        torch.empty(num_bytes, dtype=torch.uint8, device=device)
        for num_bytes in slot_bytes(segment, values)
    ]
    externals = [sources[source][number] for source, number in segment.externals]
    return [externals[n] if outside else slots[n] for outside, n in program.buffers]


def slot_bytes(segment: GpuSegmentBuilder, values: Sequence[int]) -> list[int]:
    """How large every arena slot is in a call, a multiple of 256."""
    largest = (max((values[i] for i in slot), default=0) for slot in segment.builder.slots)
    return [-(-size // 256) * 256 for size in largest]


_FOLDS: dict[int, Callable[[int, int], int]] = {
    ADD: lambda a, b: a + b,
    MUL: lambda a, b: a * b,
    FLOOR_DIV: lambda a, b: a // b,
    MOD: lambda a, b: a % b,
    MAX: max,
    MIN: min,
}


def evaluate(codes: Sequence[Sequence[int]], symbols: Sequence[int]) -> list[int]:
    """The values of a SizeTable's postfix codes for these symbol values."""
    return [_evaluate(code, symbols) for code in codes]


def _evaluate(code: Sequence[int], symbols: Sequence[int]) -> int:
    stack: list[int] = []
    at = 0
    while at < len(code):
        word = code[at]
        if word in (CONST, SYMBOL):
            stack.append(code[at + 1] if word == CONST else symbols[code[at + 1]])
            at += 2
            continue
        right = stack.pop()
        stack.append(_FOLDS[word](stack.pop(), right))
        at += 1
    return stack[0]
