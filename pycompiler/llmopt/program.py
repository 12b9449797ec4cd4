"""Builds programs for the C++ executor: buffers, arena slots, size expressions, steps.

In: steps described with torch dtypes and sizes (ints or symbolic sizes). Out: one `_C.Program`.
The encoding (dtype numbers, tuples) is the contract with csrc/bind.cpp and csrc/runtime/tensor.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from llmopt import _C
from llmopt.sizes import Size, SizeTable

# llmopt::DType in csrc/runtime/tensor.h
DTYPE_CODES = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.int64: 3,
    torch.int32: 4,
    torch.bool: 5,
    torch.uint8: 6,
    torch.int8: 7,
}
MAX_DIMS = 6


@dataclass(frozen=True)
class View:
    """A strided window on a buffer; offset and strides in elements."""

    buffer: int
    dtype: torch.dtype
    size: tuple[Size, ...]
    stride: tuple[Size, ...]
    offset: Size = 0


@dataclass
class ProgramBuilder:
    """Collects buffers and steps; `build` hands them to C++."""

    sizes: SizeTable = field(default_factory=SizeTable)
    externals: int = 0
    buffers: list[tuple[bool, int]] = field(default_factory=list)
    slots: list[list[int]] = field(default_factory=list)
    steps: list[tuple] = field(default_factory=list)

    def external(self) -> int:
        """A buffer whose address the caller passes at each run; returns the buffer's number."""
        self.buffers.append((True, self.externals))
        self.externals += 1
        return len(self.buffers) - 1

    def slot(self) -> int:
        """A new arena slot; returns the slot's number."""
        self.slots.append([])
        return len(self.slots) - 1

    def arena(self, slot: int, num_bytes: Size) -> int:
        """A buffer of num_bytes in an arena slot; returns the buffer's number."""
        self.slots[slot].append(self.sizes.id(num_bytes))
        self.buffers.append((False, slot))
        return len(self.buffers) - 1

    def step(
        self,
        op: str,
        operands: Sequence[View | None],
        ints: Sequence[Size] = (),
        floats: Sequence[float] = (),
    ) -> None:
        """Appends a step. Operands in the op's documented order; None for one that is not given."""
        self.steps.append(
            (
                op,
                [self._operand(v) for v in operands],
                [self.sizes.id(i) for i in ints],
                [float(f) for f in floats],
            )
        )

    def _operand(self, view: View | None) -> tuple:
        if view is None:
            return (-1, 0, self.sizes.id(0), [], [])
        if len(view.size) > MAX_DIMS:
            raise ValueError(f"a native operand has at most {MAX_DIMS} dimensions, got {view.size}")
        return (
            view.buffer,
            DTYPE_CODES[view.dtype],
            self.sizes.id(view.offset),
            [self.sizes.id(s) for s in view.size],
            [self.sizes.id(s) for s in view.stride],
        )

    def build(self, tier: str) -> _C.Program:
        """The runnable program for a CPU tier; raises ValueError when the tier lacks an op."""
        return _C.Program(
            tier,
            len(self.sizes.symbols),
            self.externals,
            self.sizes.codes,
            self.slots,
            self.buffers,
            self.steps,
        )


def view_of(buffer: int, tensor: torch.Tensor) -> View:
    """The view of a concrete tensor whose data pointer is the buffer's address."""
    return View(buffer, tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()))


@dataclass
class OneOp:
    """One op on concrete tensors, ready to run again and again: what kernel tests and microbenchmarks use.

    tensors: operands in the op's documented order (None where not given); they are read and written in place.
    """

    op: str
    tensors: Sequence[torch.Tensor | None]
    ints: Sequence[int] = ()
    floats: Sequence[float] = ()
    tier: str | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        builder = ProgramBuilder()
        views = [None if t is None else view_of(builder.external(), t) for t in self.tensors]
        builder.step(self.op, views, self.ints, self.floats)
        if self.tier is None:
            from llmopt.target import target

            self.tier = target().tier
        self._program = builder.build(self.tier)
        self._addresses = [t.data_ptr() for t in self.tensors if t is not None]

    def __call__(self) -> None:
        self._program.run(self._addresses, [], self.threads or torch.get_num_threads())


def run_op(
    op: str,
    tensors: Sequence[torch.Tensor | None],
    ints: Sequence[int] = (),
    floats: Sequence[float] = (),
    tier: str | None = None,
    threads: int | None = None,
) -> None:
    """Runs one native op once on concrete CPU tensors; see `OneOp` for the arguments."""
    OneOp(op, tensors, ints, floats, tier, threads)()
