"""Running a plan: the graph in which each native segment is one call into C++."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from llmopt import _C
from llmopt.gpu.executor import GpuSegment
from llmopt.gpu.segment import GpuSegmentBuilder
from llmopt.graph import fake, getitem, is_dense
from llmopt.kv import groups_of
from llmopt.native.segment import SegmentBuilder
from llmopt.offload import offload
from llmopt.options import Options
from llmopt.plan import Plan
from llmopt.sizes import Size, SizeTable, expression
from llmopt.types import Target
from llmopt.weights import STORE, PackedWeight, version_of

_ADDRESS = Tensor.data_ptr


class _Watch:
    """Notices when the packed copies of a segment's weights are out of date.

    Compares identity, address and version of every source tensor, and a digest of sampled content: an edit through `.data` changes
    neither version nor address. Each call samples one cache line of every weight, another one than the call before. An edit of a few
    elements through `.data` can escape for a while; `llmopt.refresh` is for that.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.epoch = STORE.epoch
        self._ids = list(map(id, tensors))
        self._addresses = list(map(_ADDRESS, tensors))
        self._version = version_of(tensors)
        self._versions = list(map(self._version, tensors))
        self._samples = _C.Samples(
            self._addresses, [t.untyped_storage().nbytes() - _start(t) for t in tensors]
        )

    def same_tensors(self, tensors: Sequence[Tensor]) -> bool:
        """The same objects at the same addresses with the same edit counts."""
        self._samples.fetch()  # arrives while the tensors are asked
        return (
            self.epoch == STORE.epoch
            and self._ids == list(map(id, tensors))
            and self._addresses == list(map(_ADDRESS, tensors))
            and self._versions == list(map(self._version, tensors))
        )

    def same_content(self) -> bool:
        """The sampled lines hold what they held; meaningful only while `same_tensors` is true."""
        return self._samples.unchanged()


def _start(tensor: Tensor) -> int:
    return int(tensor.storage_offset()) * tensor.element_size()


class Segment(torch.nn.Module):
    """A native segment as a callable: values from outside in, values read outside out."""

    def __init__(
        self,
        builder: SegmentBuilder,
        symbols: Sequence[tuple[int, int | None]],
        target: Target,
        name: str,
        options: Options,
    ) -> None:
        super().__init__()
        self.name = name
        self.records = builder.records
        self.target_ = target
        sizes = builder.builder.sizes
        self._wanted: list[int] = []  # size expressions Python needs at each call
        self._outputs = [_OutputSpec(fake(n), self._want(sizes)) for n in builder.results]
        self._kv_groups = [
            (group, [self._want(sizes)(s) for s in (spec.batch, spec.heads, spec.new_length)])
            for group in groups_of(builder.kv)
            for spec in [builder.kv[group.numbers[0]]]
        ]
        self._num_kv = len(builder.kv)
        self._costs = [(sizes.id(r.flops), sizes.id(r.bytes)) for r in builder.records]
        self.program = builder.builder.build(target.tier)
        self._symbols = symbols
        self._packed = [spec for _, spec in sorted(builder.packed.values(), key=lambda p: p[0])]
        views = [v for p in self._packed for v in p.views()]
        self._weight_arguments = list(dict.fromkeys(v.argument for v in views))
        self._matrices = sorted({v.argument for p in self._packed for v in p.sources})
        self._offload = options.weights == "packed"
        self._positions = {
            kind: [
                (slot, number)
                for slot, (source, number) in enumerate(builder.externals)
                if source == kind
            ]
            for kind in ("argument", "packed", "bias", "result", "kv")
        }
        self._check_dense = [builder.inputs[n] for n in builder.inputs if _made_by_python(n)]
        self._template: list[int] = [0] * len(builder.externals)
        self._watch: _Watch | None = None
        self._held: list[weakref.ref] = []  # the store owns them, for as long as their tensors live
        self._lock = threading.Lock()
        self.profile_ns: list[int] | None = None

    def forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        return self._call(arguments, profile=False)

    def profiled(self, *arguments: Any) -> tuple[Tensor, ...]:
        """Like forward; leaves nanoseconds per step in `profile_ns`."""
        return self._call(arguments, profile=True)

    def _call(self, arguments: tuple, profile: bool) -> tuple[Tensor, ...]:
        if self._check_dense:
            arguments = self._with_dense(arguments)
        addresses = self._weights_ready(arguments).copy()
        for slot, number in self._positions["argument"]:
            addresses[slot] = _ADDRESS(arguments[number])
        symbols = self.symbol_values(arguments)
        values = self.program.sizes(symbols, self._wanted) if self._wanted else ()
        results = [spec.allocate(values) for spec in self._outputs]
        for slot, number in self._positions["result"]:
            addresses[slot] = results[number].data_ptr()
        if self._num_kv:
            caches: list[Any] = [None] * self._num_kv
            for group, ids in self._kv_groups:
                grown = group.grow(arguments, *(values[i] for i in ids))
                for number, cache in zip(group.numbers, grown, strict=True):
                    caches[number] = cache
            for slot, number in self._positions["kv"]:
                addresses[slot] = caches[number].data_ptr()
            results += caches
        threads = torch.get_num_threads()
        if profile:
            self.profile_ns = self.program.profile(addresses, symbols, threads)
        else:
            self.program.run(addresses, symbols, threads)
        return tuple(results)

    def costs(self, symbols: Sequence[int]) -> list[tuple[int, int]]:
        """(flops, bytes) of every step for these symbol values."""
        flops = self.program.sizes(list(symbols), [f for f, _ in self._costs])
        return list(
            zip(flops, self.program.sizes(list(symbols), [b for _, b in self._costs]), strict=True)
        )

    def symbol_values(self, arguments: Sequence[Any]) -> list[int]:
        return [arguments[a] if d is None else arguments[a].size(d) for a, d in self._symbols]

    def packed(self) -> list[PackedWeight]:
        return [entry for ref in self._held if (entry := ref()) is not None]

    def _want(self, sizes: SizeTable) -> Callable[[Size], int]:
        """Gives a size the position its value will have in a call's `values`."""

        def position(size: Size) -> int:
            self._wanted.append(sizes.id(size))
            return len(self._wanted) - 1

        return position

    def _with_dense(self, arguments: tuple) -> tuple:
        """What Python made is passed on contiguous, as its example value promised."""
        if all(arguments[a].is_contiguous() for a in self._check_dense):
            return arguments
        fixed = list(arguments)
        for a in self._check_dense:
            fixed[a] = fixed[a].contiguous()
        return tuple(fixed)

    def _weights_ready(self, arguments: tuple) -> list[int]:
        """The addresses of packed weights and biases, made again first where a source changed."""
        if not self._packed:
            return self._template
        tensors = [arguments[a] for a in self._weight_arguments]
        watch = self._watch
        same = False
        if watch is not None and watch.same_tensors(tensors):
            if watch.same_content():
                return self._template
            same = True
        with self._lock:
            held = [STORE.get(spec, arguments, self.target_, changed=same) for spec in self._packed]
            if self._offload and offload(arguments[a] for a in self._matrices):
                STORE.follow(self._packed, arguments, self.target_)
            template = list(self._template)
            for slot, number in self._positions["packed"]:
                template[slot] = held[number].address
            for slot, number in self._positions["bias"]:
                bias = held[number].bias
                assert bias is not None, (
                    "a program names a bias vector only where its linear has one"
                )
                template[slot] = bias.data_ptr()
            self._held = [weakref.ref(entry) for entry in held]
            self._template, self._watch = template, _Watch(tensors)
            return template

    def forget_weights(self) -> None:
        """Makes the next call compare and pack every weight anew."""
        self._watch = None


class _OutputSpec:
    """How to allocate one result."""

    def __init__(self, value: Tensor, want: Callable[[Size], int]) -> None:
        self.dtype = value.dtype
        fixed = all(isinstance(expression(s), int) for s in (*value.shape, *value.stride()))
        self._fixed = (
            (tuple(map(int, value.shape)), tuple(map(int, value.stride()))) if fixed else None
        )
        self._size = [] if fixed else [want(s) for s in value.shape]
        self._stride = [] if fixed else [want(s) for s in value.stride()]

    def allocate(self, values: Sequence[int]) -> Tensor:
        if self._fixed is not None:
            return torch.empty_strided(*self._fixed, dtype=self.dtype, device="cpu")
        size, stride = [values[i] for i in self._size], [values[i] for i in self._stride]
        return torch.empty_strided(size, stride, dtype=self.dtype, device="cpu")


def _made_by_python(node: fx.Node) -> bool:
    """True for what Python computes: contiguous, or the planner would not have taken its readers. A result of another
    segment lies as its example value says."""
    if node.op not in ("call_function", "call_method", "call_module"):
        return False
    return isinstance(fake(node), Tensor) and is_dense(fake(node))


def build_executable(gm: fx.GraphModule, plan: Plan, options: Options) -> fx.GraphModule:
    """The graph that runs the plan: eager nodes as they were, each native segment one call."""
    source = gm.graph
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    modules: dict[str, torch.nn.Module] = {}

    def value(node: fx.Node) -> fx.Node:
        """The new graph's node for a value; views are repeated where Python reads them."""
        if node not in made:
            made[node] = graph.node_copy(node, value)
        return made[node]

    for node in source.nodes:
        if node.op == "placeholder":
            made[node] = graph.node_copy(node)
    for level in sorted(plan.levels):
        if level not in plan.segments:
            for node in plan.levels[level]:
                value(node)
            continue
        name = f"segment_{level // 2}"
        _call_segment(graph, plan, level, name, options, made, value, modules)
    output = next(n for n in source.nodes if n.op == "output")
    graph.node_copy(output, value)
    for name, module in modules.items():
        gm.add_submodule(name, module)
    graph.lint()
    executable = fx.GraphModule(gm, graph)
    executable.recompile()
    return executable


def _call_segment(
    graph: fx.Graph,
    plan: Plan,
    level: int,
    name: str,
    options: Options,
    made: dict,
    value: Any,
    modules: dict,
) -> None:
    builder = plan.segments[level]
    symbols = []
    for node, dimension in plan.symbol_nodes[level]:
        symbols.append((builder.argument(node), dimension))
    if isinstance(builder, GpuSegmentBuilder):
        modules[name] = GpuSegment(builder, symbols, plan.target, name)
    else:
        modules[name] = Segment(builder, symbols, plan.target, name, options)
    call = graph.call_module(name, tuple(value(n) for n in builder.inputs))
    for i, result in enumerate((*builder.results, *builder.kv_results)):
        made[result] = graph.call_function(getitem, (call, i))


def segments_of(executable: fx.GraphModule) -> list[Segment]:
    return [m for m in executable.children() if isinstance(m, Segment)]
