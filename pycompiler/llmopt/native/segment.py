"""Building one native segment: FX nodes → steps of a C++ program, with the facts needed to run and explain it.

A segment's inputs are the FX values it reads from outside; its results are the values read outside. Everything else lives in the arena.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, overload

import torch
from torch import Tensor, fx

from llmopt.graph import fake, kind, numel, view_base
from llmopt.ops.kv_codes import SCALE_BYTES
from llmopt.program import ProgramBuilder, View
from llmopt.quant.schemes import CodeForm
from llmopt.sizes import Size
from llmopt.types import Choice, LinearProblem

# Where externals come from, in the order in which a run gets their addresses.
SOURCES = ("packed", "bias", "argument", "result", "kv", "mirror")

# How float32 weights are packed that fewer bits hold as they are.
Storage = CodeForm | torch.dtype

# Which configs a linear runs with: what was measured, or nothing and why.
Tuner = Callable[[LinearProblem], Choice]


def picker(numbers: Sequence[int]) -> Callable[[Sequence], tuple]:
    """Takes some of a call's values, in this order."""
    if len(numbers) > 1:
        return itemgetter(*numbers)
    return lambda values: tuple(values[n] for n in numbers)


@dataclass(frozen=True)
class WeightView:
    """A static window on a module's tensor: which segment input, and how it is cut or transposed."""

    argument: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class PackedSpec:
    """A packed linear weight: its sources [N_i,K] side by side (or gate/up interleaved), and their biases as one vector, both in `dtype`.
    Sources [E,N_i,K] are a weight for each of E experts, packed one behind the other; their biases are a matrix.

    With a form it is quantised: sources are codes, with their scales and offsets, or float weights without, which are rounded when
    they are packed. What `stored` or an exact form cannot hold as it is, is not packed.
    """

    sources: tuple[WeightView, ...]
    biases: tuple[WeightView | None, ...]
    interleave: bool
    dtype: torch.dtype
    form: CodeForm | None = None
    scales: tuple[WeightView, ...] = ()
    offsets: tuple[WeightView, ...] = ()
    stored: torch.dtype | None = None  # of float weights, where it is another than that of biases
    is_exact: bool = False  # codes stand for every float weight as it is
    what: str = field(default="", compare=False)  # layer and scheme in words, for errors

    @property
    def experts(self) -> int | None:
        """How many weights there are, where there is one for each expert."""
        size = self.sources[0].size
        return size[0] if len(size) == 3 else None

    def views(self) -> list[WeightView]:
        """Everything the packed form is made from."""
        given = [b for b in self.biases if b is not None]
        return [*self.sources, *self.scales, *self.offsets, *given]


@dataclass(frozen=True)
class KvSpec:
    """One growing cache [B,H,S,D]: the segment input that holds it so far (None: empty), and what is appended."""

    argument: int | None
    batch: Size
    heads: Size
    new_length: Size
    width: int
    dtype: torch.dtype
    is_mirrored: bool = False  # codes are kept beside it


@dataclass(frozen=True)
class MirrorSpec:
    """Codes kept beside a cache of floats [B,H,S,D]: a growing one, by its number, or one that comes in as this argument."""

    kv: int | None = None
    argument: int | None = None


@dataclass(frozen=True)
class StepRecord:
    """What a step is, for plans and reports: kernel name, operands in words, costs as sizes, where it came from."""

    op: str
    kernel: str
    detail: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    flops: Size
    bytes: Size
    node: fx.Node
    config: str = ""  # in words; "" where all is left to the kernel
    config_source: str = (
        ""  # where it comes from, or why there is none; "" where nothing can be tuned
    )
    multiplies: str = ""  # of linears and attention: dtype of the multiplications, as `Probe.linear_peak` takes it
    products: int = 1  # of that dtype that one product is made of
    note: str = ""  # what a pass allowed and the kernel does not do, and why


@dataclass
class SegmentBuilder:
    """Emits steps for the nodes of one segment."""

    tuner: Tuner = field(default=lambda _: Choice())
    # What linears' float32 weights, side by side, are packed in; None: as they are.
    storage: Callable[[Sequence[fx.Node]], Storage | None] = field(default=lambda _: None)
    inputs: dict[fx.Node, int] = field(default_factory=dict)  # value from outside → argument number
    builder: ProgramBuilder = field(default_factory=ProgramBuilder)
    records: list[StepRecord] = field(default_factory=list)
    packed: dict[PackedSpec, tuple[int, PackedSpec]] = field(default_factory=dict)
    kv: list[KvSpec] = field(default_factory=list)
    mirrors: list[MirrorSpec] = field(default_factory=list)
    # Arguments that PyTorch made and may lay out in another order, and the strides that the steps know.
    laid_out: list[tuple[int, tuple[Size, ...]]] = field(default_factory=list)
    results: list[fx.Node] = field(default_factory=list)  # values handed out, in order
    kv_results: list[fx.Node] = field(
        default_factory=list
    )  # grown caches, handed out after the results
    # The address of each external buffer: ("argument", i), ("packed", j), ("bias", j), ("result", k), ("kv", l), and of
    # mirror m ("mirror", 2 m) and ("mirror", 2 m + 1), its codes and their state.
    externals: list[tuple[str, int]] = field(default_factory=list)
    _buffers: dict[Any, int] = field(default_factory=dict)

    def external(self, source: str, number: int) -> int:
        """The buffer behind an outside address, made once."""
        key = (source, number)
        if key not in self._buffers:
            self._buffers[key] = self.builder.external()
            self.externals.append(key)
        return self._buffers[key]

    def sort_externals(self) -> None:
        """Numbers externals by source and number, so that a run puts their addresses together from one list a source."""
        order = sorted(self.externals, key=lambda e: (SOURCES.index(e[0]), e[1]))
        place = {key: i for i, key in enumerate(order)}
        renumbered = [place[key] for key in self.externals]
        self.builder.buffers = [
            (outside, renumbered[n] if outside else n) for outside, n in self.builder.buffers
        ]
        self.externals = order

    def argument(self, node: fx.Node) -> int:
        """The argument number of a value from outside the segment."""
        return self.inputs.setdefault(node, len(self.inputs))

    def assign(self, node: fx.Node, slot: int) -> None:
        """Places the result of a node of this segment in an arena slot."""
        value = fake(node)
        size = numel(value) * value.element_size()
        self._buffers[node] = self.builder.arena(slot, size)

    def hand_out(self, node: fx.Node) -> None:
        """Makes the result of a node of this segment one of the segment's results."""
        self.results.append(node)
        self._buffers[node] = self.external("result", len(self.results) - 1)

    def grow(self, spec: KvSpec, node: fx.Node) -> int:
        """Makes `node` (the grown cache) a result whose memory the cache manager provides; returns its buffer."""
        self.kv.append(spec)
        self.kv_results.append(node)
        self._buffers[node] = self.external("kv", len(self.kv) - 1)
        return self._buffers[node]

    def mirror(self, spec: MirrorSpec, cache: Tensor) -> list[View]:
        """The operands of the codes beside a cache: as long as the cache, in the order of `slab_empty` or [B,H,S,D], and their state."""
        if spec not in self.mirrors:
            self.mirrors.append(spec)
        number = 2 * self.mirrors.index(spec)
        b, h, length, width = cache.shape
        size = (b, h, length, width + SCALE_BYTES)
        row = size[3]
        stride = (h * length * row, length * row, row, 1)
        if spec.kv is not None:
            stride = (h * row, row, b * h * row, 1)
        return [
            View(self.external("mirror", number), torch.int8, size, stride),
            View(self.external("mirror", number + 1), torch.int64, (b, h, 2), (2 * h, 2, 1)),
        ]

    def shared_buffer(self, key: tuple, size: Size) -> tuple[int, bool]:
        """An arena buffer several steps of the segment share, and whether this call made it."""
        if key in self._buffers:
            return self._buffers[key], False
        self._buffers[key] = self.builder.arena(self.builder.slot(), size)
        return self._buffers[key], True

    @staticmethod
    def part(node: fx.Node, index: int) -> fx.Node:
        """The node that reads part `index` of a node with several results."""
        return next(u for u in node.users if kind(u) == "getitem" and u.args[1] == index)

    @overload
    def view(self, node: None) -> None: ...

    @overload
    def view(self, node: fx.Node) -> View: ...

    def view(self, node: fx.Node | None) -> View | None:
        """The operand for a value; None stays None."""
        if node is None:
            return None
        base, value = view_base(node), fake(node)
        buffer = self._buffers.get(base)
        if buffer is None:
            buffer = self.external("argument", self.argument(base))
        offset = value.storage_offset() - fake(base).storage_offset()
        return View(buffer, value.dtype, tuple(value.shape), tuple(value.stride()), offset)

    def weight_view(self, node: fx.Node) -> WeightView:
        base, value = view_base(node), fake(node)
        offset = value.storage_offset() - fake(base).storage_offset()
        return WeightView(
            self.argument(base), tuple(value.shape), tuple(value.stride()), int(offset)
        )

    def packed_operands(self, spec: PackedSpec) -> tuple[View, View | None]:
        """Operands for the packed weights and for their biases as one vector (None when there is no bias); equal specs share one."""
        number, _ = self.packed.setdefault(spec, (len(self.packed), spec))
        n = sum(w.size[-2] for w in spec.sources)
        packed = View(self.external("packed", number), torch.uint8, (1,), (1,))
        if all(b is None for b in spec.biases):
            return packed, None
        size, stride = ((n,), (1,)) if spec.experts is None else ((spec.experts, n), (n, 1))
        return packed, View(self.external("bias", number), spec.dtype, size, stride)

    def step(
        self,
        op: str,
        operands: Sequence[View | None],
        ints: Sequence[Size],
        floats: Sequence[float],
        record: StepRecord,
    ) -> None:
        self.builder.step(op, operands, ints, floats)
        self.records.append(record)
        for cost in (record.flops, record.bytes):
            self.builder.sizes.id(cost)  # while the segment's sizes are collected


SHORT_DTYPES = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.bool: "b8",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "s8",
}


def describe(node: fx.Node | None) -> str:
    """A value in words: name[sizes]dtype."""
    if node is None:
        return "-"
    value = fake(node)
    sizes = ",".join(str(s) for s in value.shape)
    return f"{node.name}[{sizes}]{SHORT_DTYPES.get(value.dtype, str(value.dtype))}"
