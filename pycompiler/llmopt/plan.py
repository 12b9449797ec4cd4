"""Graph → plan: which nodes run in C++, in which order, with which memory.

Nodes get levels: even levels run in Python as in PyTorch, odd levels are native segments, each as early as its inputs allow. So all
of a transformer's arithmetic ends in one segment unless something in the middle cannot be native. In-place operations keep their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from llmopt.effects import has_place
from llmopt.gpu import kernels as gpu_kernels
from llmopt.gpu import plan as gpu_plan
from llmopt.gpu.segment import GpuSegmentBuilder
from llmopt.graph import (
    fake,
    is_dense,
    is_in_place,
    is_tensor,
    is_view,
    kind,
    numel,
    readers,
    storage,
    tensors_in,
    unreadable,
    view_base,
)
from llmopt.launch import Launch
from llmopt.lossless import Lossless
from llmopt.memory import Life, assign_slots
from llmopt.native import kernels as native_kernels
from llmopt.native.operands import NativeKernel
from llmopt.native.segment import SegmentBuilder, StepRecord, Tuner
from llmopt.ops.attention import APPENDS
from llmopt.passes.simplify import PURE
from llmopt.registry import Chooser, by_default
from llmopt.sizes import Size, SizeTable, UnsupportedSize, expression
from llmopt.source_lines import source_line
from llmopt.types import Target
from llmopt.writes import mutated_storages, written_by


@dataclass(frozen=True)
class Fallback:
    """A node that runs as in PyTorch, and why."""

    node: fx.Node
    reason: str

    @property
    def source(self) -> str:
        return source_line(self.node)


@dataclass
class Plan:
    """What will run: levels of nodes, the segments' builders, and why the rest stays in PyTorch."""

    target: Target
    levels: dict[int, list[fx.Node]]
    segments: dict[int, SegmentBuilder]
    symbol_nodes: dict[
        int, list[tuple[fx.Node, int | None]]
    ]  # per segment: where each symbol's value comes from
    fallbacks: list[Fallback] = field(default_factory=list)
    notes: tuple[str, ...] = ()  # what was asked for and could not be done, and why
    lossless: Lossless = field(default_factory=Lossless)
    _lower: Callable[[SegmentBuilder, int], None] = field(default=lambda *_: None)

    def records(self) -> Iterator[StepRecord]:
        for level in sorted(self.segments):
            yield from self.segments[level].records

    def lowered_again(self, level: int, lossless: Lossless) -> SegmentBuilder:
        """A segment with its weights packed in these forms, called as before."""
        before = self.segments[level]
        again = SegmentBuilder(before.tuner, lossless.common, dict(before.inputs))
        self._lower(again, level)
        return again

    def tiles(self) -> dict[str, int]:
        """Where the tiles of launches on a GPU come from → of how many launches; empty for a CPU."""
        found: list[Launch] = []
        for level, segment in self.segments.items():
            if isinstance(segment, GpuSegmentBuilder):
                symbols = gpu_plan.hints(self.symbol_nodes[level])
                steps = gpu_plan.planned_steps(segment, self.target, symbols)
                found += [launch for step in steps for launch in step]
        return gpu_plan.sources(found)

    def __str__(self) -> str:
        lines = [f"plan  target={self.target}"]
        number = 0
        for level in sorted(self.levels):
            if level not in self.segments:
                counts: dict[str, int] = {}
                for node in self.levels[level]:
                    counts[kind(node)] = counts.get(kind(node), 0) + 1
                words = ", ".join(name if n == 1 else f"{name} x{n}" for name, n in counts.items())
                lines.append(f"   pytorch: {words}")
                continue
            segment = self.segments[level]
            lines.append(
                f"   native segment: {len(segment.records)} steps, {len(segment.builder.slots)} arena slots"
            )
            if isinstance(segment, GpuSegmentBuilder):
                symbols = gpu_plan.hints(self.symbol_nodes[level])
                lines += gpu_plan.lines(segment, self.target, symbols)
                continue
            for record in segment.records:
                arrow = f" -> {', '.join(record.outputs)}" if record.outputs else ""
                config = f" [{record.config}]" if record.config else ""
                name = f"{record.kernel} {record.detail}{config}"
                lines.append(f"{number:3d}  {name:44s} {', '.join(record.inputs)}{arrow}")
                number += 1
        return "\n".join(lines)


def make_plan(
    graph: fx.Graph,
    target: Target,
    tuner: Tuner,
    chooser: Chooser = by_default,
    lossless: Lossless | None = None,
) -> Plan:
    """Classifies, orders and lowers every node of a graph.

    tuner: says how each linear is cut on a CPU; chooser: which kernel and tile each launch on a GPU runs with; lossless: what weights
    are packed in on a CPU, where that is not as they are.
    """
    roles = _Roles(graph, target)
    levels = _levels(graph, roles)
    plan = Plan(target, {}, {}, {}, roles.fallbacks, lossless=lossless or Lossless())

    def lower(segment: SegmentBuilder, level: int) -> None:
        _lower(segment, plan.levels[level], level, levels, roles)
        symbols = segment.builder.sizes.symbols
        plan.symbol_nodes[level] = [roles.symbols[s] for s in symbols]

    plan._lower = lower
    for node in graph.nodes:
        if node in levels:
            plan.levels.setdefault(levels[node], []).append(node)
    for level in sorted(plan.levels):
        if level % 2:
            on_cpu = SegmentBuilder(tuner, plan.lossless.common)
            segment = on_cpu if target.gpu is None else GpuSegmentBuilder(choose=chooser)
            lower(segment, level)
            plan.segments[level] = segment
    return plan


class _Roles:
    """What each node is: native (with its kernel), a view, a part of a native result, or eager."""

    def __init__(self, graph: fx.Graph, target: Target) -> None:
        kernel_for = native_kernels.kernel_for if target.gpu is None else gpu_kernels.kernel_for
        self.symbols = _symbol_sources(graph)
        self._device = _device_of(graph)
        self.native: dict[fx.Node, NativeKernel] = {}
        self.fallbacks: list[Fallback] = []
        self._unread: set[fx.Node] = set()
        self._sizes = SizeTable()
        self._on_cpu = target.gpu is None
        self.written = mutated_storages(graph)
        weights = _packed_storages(graph)
        for node in graph.nodes:
            if (
                node.op not in ("call_function", "call_method", "call_module")
                or self.is_part(node)
                or is_view(node)
            ):
                continue
            kernel, reason = None, self._unreadable(node)
            if not reason:
                kernel, reason = kernel_for(node)
            reason = reason or self._unknown_sizes(node) or self._unknown_layout(node)
            if any(storage(n) in weights for n in written_by(node)):
                reason = reason or "writes a weight that a linear reads"
            if kernel is not None and not reason:
                self.native[node] = kernel
            else:
                self.fallbacks.append(Fallback(node, reason))
        self._leave_glue(graph)
        self._unread = self._unread_numbers(graph)
        self.fallbacks = [f for f in self.fallbacks if f.node not in self._unread]

    def _unread_numbers(self, graph: fx.Graph) -> set[fx.Node]:
        """Size arithmetic that only native nodes read: segments evaluate their sizes themselves."""
        unread: set[fx.Node] = set()
        for node in reversed(list(graph.nodes)):
            number = isinstance(fake(node), (int, torch.SymInt)) and kind(node) in PURE
            if number and all(u in self.native or u in unread for u in node.users):
                unread.add(node)
        return unread

    def _leave_glue(self, graph: fx.Graph) -> None:
        """Copies and small arithmetic that no native value feeds stay with PyTorch when PyTorch reads them next:
        taking them would only cut the graph into more segments. So do writes into memory that PyTorch writes next."""
        writers: dict[int | None, list[fx.Node]] = {}  # behind the node, by the memory they write
        for node in reversed(list(graph.nodes)):
            later = [w for n in written_by(node) for w in writers.get(storage(n), [])]
            for n in written_by(node):
                writers.setdefault(storage(n), []).append(node)
            if node not in self.native or not self.native[node].is_glue:
                continue
            fed = any(
                _producer(n, self) in self.native for n in node.all_input_nodes if is_tensor(n)
            )
            read_by = [u for value in _value_nodes(node) for u in readers(value) if not is_view(u)]
            in_python = any(self.is_eager(u) for u in read_by)
            alone = not fed and (in_python or not any(u in self.native for u in read_by))
            if alone or any(map(self.is_eager, later)):
                del self.native[node]
                self.fallbacks.append(
                    Fallback(node, "stands between operations that run in PyTorch")
                )

    def is_part(self, node: fx.Node) -> bool:
        """getitem of a native node with several results."""
        return (
            kind(node) == "getitem" and node.args[0] in self.native and not is_tensor(node.args[0])
        )

    def is_eager(self, node: fx.Node) -> bool:
        called = node.op in ("call_function", "call_method", "call_module")
        if node in self._unread:
            return False
        return called and node not in self.native and not self.is_part(node) and not is_view(node)

    @staticmethod
    def _unreadable(node: fx.Node) -> str:
        """A value, read or made, that is more than its memory."""
        for value in (node, *node.all_input_nodes):
            if reason := unreadable(value):
                return f"{value.name} is {reason}"
        return ""

    def _unknown_sizes(self, node: fx.Node) -> str:
        """A size the executor could not know when the segment runs."""
        return self._unknown_among([fake(n) for n in (node, *node.all_input_nodes)])

    def _unknown_among(self, values: list[Any]) -> str:
        sizes: list[Size] = [v for v in values if isinstance(v, torch.SymInt)]
        for value in tensors_in(values):
            sizes += [*value.shape, *value.stride(), value.storage_offset()]
        for size in sizes:
            expr = expression(size)
            if isinstance(expr, int):
                continue
            if any(s not in self.symbols for s in expr.free_symbols):
                return f"size {expr} is known only while the graph runs"
            try:
                self._sizes.id(size)
            except UnsupportedSize as error:
                return str(error)
        return ""

    def _can_lay_out(self, base: fx.Node) -> bool:
        """Whether a segment may copy what PyTorch made into the order that it knows, where it lies in another."""
        return (
            self._on_cpu
            and storage(base) not in self.written
            and not self._unknown_among([fake(base)])
        )

    def _unknown_layout(self, node: fx.Node) -> str:
        """An eager input whose memory order PyTorch does not promise, where a segment could not bring it into the one it knows."""
        for value in node.all_input_nodes:
            base = view_base(value)
            uncertain = is_tensor(base) and self.is_eager(base) and not is_dense(fake(base))
            if uncertain and not self._can_lay_out(base):
                return f"memory order of {base.name} is not certain"
            if is_tensor(base) and fake(base).device != self._device:
                return f"{base.name} is on {fake(base).device}"
        return ""


_LINEARS = ("llmopt.linear", "llmopt.linear_quantized", "llmopt.grouped_linear")


def _packed_storages(graph: fx.Graph) -> set[int | None]:
    """Memory that linears take for weights and biases: a segment packs those before its first step."""
    linears = [n for n in graph.nodes if kind(n) in _LINEARS]
    found: list[fx.Node] = []
    for linear in linears:
        given = {name: v for name, v in linear.kwargs.items() if name != "residual"}
        fx.node.map_arg((linear.args[1:], given), found.append)
    return {storage(n) for n in found} - {None}


def _device_of(graph: fx.Graph) -> torch.device:
    """Where the graph's inputs are, numbers apart: they may stay on the CPU."""
    values = [fake(n) for n in graph.nodes if n.op == "placeholder" and is_tensor(n)]
    return next((v.device for v in values if v.dim()), torch.device("cpu"))


def _symbol_sources(graph: fx.Graph) -> dict:
    """symbol → (placeholder, None) for a number passed in, or (placeholder, dimension) for a tensor's size."""
    found: dict = {}
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        value = fake(node)
        if isinstance(value, torch.SymInt):
            expr = expression(value)
            if not isinstance(expr, int) and expr.is_Symbol:
                found[expr] = (node, None)
        elif isinstance(value, torch.Tensor):
            for d, size in enumerate(value.shape):
                expr = expression(size)
                if not isinstance(expr, int) and expr.is_Symbol:
                    found.setdefault(expr, (node, d))
    return found


def _levels(graph: fx.Graph, roles: _Roles) -> dict[fx.Node, int]:
    """The level of every native and eager node."""
    levels = _Levels(graph, roles)
    for node in graph.nodes:
        levels.place(node)
    return levels.level


def _after(level: int, for_native: bool) -> int:
    """The earliest level of the given sort (odd: native) that may come after work at `level`."""
    return level if level % 2 == for_native else level + 1


class _Levels:
    """Gives nodes levels, in graph order: as early as what they read, what is written in place, and the order of what draws random
    numbers allow."""

    def __init__(self, graph: fx.Graph, roles: _Roles) -> None:
        self.level: dict[fx.Node, int] = {}
        self._roles = roles
        self._ready: dict[fx.Node, int] = {}  # first even level at which Python can read a value
        self._writer: dict[int, fx.Node] = {}  # the last one that wrote a storage
        self._readers: dict[int, list[fx.Node]] = {}  # who read it since
        self._in_order = 0  # the level of the last node that has to stay behind those before it

    def place(self, node: fx.Node) -> None:
        if node.op in ("placeholder", "get_attr"):
            self._ready[node] = 0
        elif self._roles.is_part(node):
            self._ready[node] = self.level[node.args[0]] + 1
        elif is_view(node):
            self._ready[node] = self._inputs_ready(node)
        elif node in self._roles.native:
            self._place_work(node, self._native_inputs_ready(node), native=True)
        elif self._roles.is_eager(node):
            at = self._inputs_ready(node)
            if has_place(node):
                at = max(at, self._in_order)
            self._place_work(node, at, native=False)
            if has_place(node):
                self._in_order = self.level[node]
        # What remains is the output.

    def _inputs_ready(self, node: fx.Node) -> int:
        return max((self._ready[n] for n in node.all_input_nodes), default=0)

    def _native_inputs_ready(self, node: fx.Node) -> int:
        producers = [_producer(n, self._roles) for n in node.all_input_nodes if is_tensor(n)]
        return max((_after(self.level[p], True) for p in producers if p in self.level), default=1)

    def _place_work(self, node: fx.Node, at: int, native: bool) -> None:
        touched = [
            s for n in (node, *node.all_input_nodes) if (s := storage(n)) in self._roles.written
        ]
        for s in dict.fromkeys(touched):
            before = [self._writer[s]] if s in self._writer else []
            if is_in_place(node):
                before += self._readers.pop(s, [])
                self._writer[s] = node
            else:
                self._readers.setdefault(s, []).append(node)
            at = max(at, *(_after(self.level[other], native) for other in before), 0)
        self.level[node] = at
        self._ready[node] = _after(at, for_native=False)


def _producer(node: fx.Node, roles: _Roles) -> fx.Node:
    """The node that computes the memory a value lives in."""
    base = view_base(node)
    return base.args[0] if roles.is_part(base) else base


def _value_nodes(node: fx.Node) -> list[fx.Node]:
    """The tensors a native node makes: itself, or its parts."""
    if is_tensor(node):
        return [] if is_in_place(node) else [node]
    return sorted(u for u in node.users if kind(u) == "getitem")


def _lower(
    segment: SegmentBuilder,
    nodes: list[fx.Node],
    level: int,
    levels: dict[fx.Node, int],
    roles: _Roles,
) -> None:
    """Gives values their memory and writes the nodes' steps."""
    position = {node: i for i, node in enumerate(nodes)}
    lives: list[Life] = []
    for node in nodes:
        for value in _value_nodes(node):
            users = [u for u in readers(value) if not is_view(u)]
            escapes = any(levels.get(u, -1) != level for u in users)
            if kind(node) in APPENDS and value.args[1] > 0:
                continue  # grown caches come from the cache manager
            if escapes:
                segment.hand_out(value)
                continue
            last = max((position[u] for u in users), default=position[node])
            size = numel(fake(value)) * fake(value).element_size()
            lives.append(Life(value, size, position[node], last))
    slots, count = assign_slots(lives)
    for _ in range(count):
        segment.builder.slot()
    for life in lives:
        segment.assign(life.value, slots[life.value])
    for node in nodes:
        roles.native[node].lower(segment, node)
    if isinstance(segment, GpuSegmentBuilder):
        segment.number_outside()
        return
    for node, number in segment.inputs.items():
        if roles.is_eager(node) and is_tensor(node) and not is_dense(fake(node)):
            segment.laid_out.append((number, fake(node).stride()))
            for step in fake(node).stride():
                segment.builder.sizes.id(step)  # a size that the segment has to know
