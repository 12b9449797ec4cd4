"""Running a plan: the graph in which each native segment is one call into C++."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.autograd.graph import increment_version

from llmopt.gpu.executor import GpuSegment
from llmopt.gpu.segment import GpuSegmentBuilder
from llmopt.graph import fake, getitem, is_dense, is_in_place, kind, view_base
from llmopt.kv import groups_of
from llmopt.lossless import Lossless
from llmopt.mirrors import CallerMirrors
from llmopt.native.segment import PackedSpec, SegmentBuilder, picker
from llmopt.offload import offload
from llmopt.options import Options
from llmopt.plan import Plan
from llmopt.sizes import Size, SizeTable, expression
from llmopt.types import Target
from llmopt.watch import Watch
from llmopt.weights import STORE, NotHeld, PackedWeight
from llmopt.writes import written_by

_ADDRESS = Tensor.data_ptr
_MOST_FORMS = 64  # in which the weights of one segment are packed, each by a segment of its own
_MOST_SETS = 512  # of weights that one segment remembers: those of all layers, or experts, that share its graph


class _Ready(NamedTuple):
    """Where the packed weights and biases of a set of weights lie, and what notices that they are out of date."""

    addresses: list[int]
    watch: Watch | None

    def is_of(self, arguments: tuple) -> bool:
        return self.watch is not None and self.watch.same_tensors(arguments)


_NOTHING_READY = _Ready([], None)


class _Elsewhere(Exception):
    """Another segment of the family runs with the weights of a call."""

    def __init__(self, segment: Segment) -> None:
        super().__init__()
        self.segment = segment


class _Family:
    """The segments that stand for one native segment: each packs its weights in other forms, as `Lossless` has them."""

    def __init__(self, plan: Plan, level: int, name: str, options: Options) -> None:
        self._plan, self._level, self._name, self._options = plan, level, name, options
        # Nobody has called it: the forms are those of the weights that come first.
        self._is_new = True
        self._lock = threading.RLock()
        self._homes: dict[tuple[int, ...], Segment] = {}  # by weights
        self.last = self._segment(plan.segments[level])
        self._inputs = [*self.last.builder.inputs]
        self._seems = plan.lossless.of_inputs(self._inputs)
        self._made: dict[Lossless, Segment] = {self._seems: self.last}

    def all(self) -> list[Segment]:
        return list(self._made.values())

    def made_ready(self, asked: Segment, arguments: tuple, edited: bool) -> _Ready:
        """Packs the weights of a call in what holds them. Raises _Elsewhere where `asked` does not pack them so."""
        weights = asked.set_of(arguments)
        with self._lock:
            home = self._homes.get(weights, asked)
            if home is asked or edited:
                home, ready = self._packed(arguments, edited)
                self._homes[weights] = home
                if len(self._homes) > _MOST_SETS:
                    del self._homes[next(iter(self._homes))]
            for other in {asked, *self._made.values()} - {home}:
                other.drop(weights)  # packed before they were edited
            self.last, self._plan.segments[self._level] = home, home.builder
        if home is not asked:
            raise _Elsewhere(home)
        return ready

    def _packed(self, arguments: tuple, edited: bool) -> tuple[Segment, _Ready]:
        values = dict(zip(self._inputs, arguments, strict=True))
        forms = self._seems if self._is_new else self._seems.of(values)
        self._is_new = False
        while True:
            segment = self._of(forms)
            try:
                return segment, segment.pack(arguments, edited)
            except NotHeld:
                forms = forms.without({self._inputs[a] for a in segment.not_held(arguments)})

    def _of(self, forms: Lossless) -> Segment:
        """The segment that packs weights in these forms; the one that was not asked for longest makes room for another."""
        segment = self._made.pop(forms, None)
        if segment is None:
            segment = self._segment(self._plan.lowered_again(self._level, forms))
        self._made[forms] = segment
        if len(self._made) > _MOST_FORMS:
            gone = self._made.pop(next(iter(self._made)))
            self._homes = {w: home for w, home in self._homes.items() if home is not gone}
        return segment

    def _segment(self, builder: SegmentBuilder) -> Segment:
        symbols = _symbols_of(builder, self._plan.symbol_nodes[self._level])
        return Segment(builder, symbols, self._plan.target, self._name, self._options, self)


class Segment(torch.nn.Module):
    """A native segment as a callable: values from outside in, values read outside out."""

    def __init__(
        self,
        builder: SegmentBuilder,
        symbols: Sequence[tuple[int, int | None]],
        target: Target,
        name: str,
        options: Options,
        family: _Family,
    ) -> None:
        super().__init__()
        self.name = name
        self.builder = builder
        self._family = family
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
        self._mirrored_kv = {m.kv: n for n, m in enumerate(builder.mirrors) if m.kv is not None}
        given = {m.argument: n for n, m in enumerate(builder.mirrors) if m.argument is not None}
        self._given_mirrors = list(given.values())
        self._caller_mirrors = CallerMirrors(list(given))
        self._num_mirrors = len(builder.mirrors)
        self._check_dense = [a for n, a in builder.inputs.items() if _made_by_python(n)]
        self._check_strides = [
            (a, [self._want(sizes)(s) for s in stride]) for a, stride in builder.laid_out
        ]
        self._costs = [(sizes.id(r.flops), sizes.id(r.bytes)) for r in builder.records]
        builder.sort_externals()
        self.program = builder.builder.build(target.tier)
        self._symbols = symbols
        self._symbol_numbers = (  # where all come in as numbers
            picker([a for a, _ in symbols]) if all(d is None for _, d in symbols) else None
        )
        self._packed = [spec for _, spec in sorted(builder.packed.values(), key=lambda p: p[0])]
        views = [v for p in self._packed for v in p.views()]
        self._weights = list(dict.fromkeys(v.argument for v in views))
        self._matrices = sorted({v.argument for p in self._packed for v in p.sources})
        self._offload = options.weights == "packed"
        self._arguments = picker([n for source, n in builder.externals if source == "argument"])
        self._packed_externals = [e for e in builder.externals if e[0] in ("packed", "bias")]
        self._written = picker(_written_arguments(builder))
        self._weights_of = picker(self._weights)
        self._ready = _NOTHING_READY  # for the weights of the call before
        # By the tensors: layers may share a graph.
        self._ready_sets: dict[tuple[int, ...], _Ready] = {}
        self._told = 0  # how often others told it to look again
        # The store owns them, for as long as their tensors live.
        self._held: weakref.WeakSet[PackedWeight] = weakref.WeakSet()
        self.profile_ns: list[int] | None = None

    def forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        last = self._family.last
        return self._call(arguments, False) if last is self else last.forward(*arguments)

    def profiled(self, *arguments: Any) -> tuple[Tensor, ...]:
        """Like forward; leaves nanoseconds per step in `profile_ns`."""
        return self._call(arguments, True)

    def running(self) -> Segment:
        """Itself, or the one that ran last in its place."""
        return self._family.last

    def _call(self, arguments: tuple, profile: bool) -> tuple[Tensor, ...]:
        symbols = self.symbol_values(arguments)
        values = self.program.sizes(symbols, self._wanted) if self._wanted else ()
        if self._check_dense or self._check_strides:
            arguments = self._laid_out(arguments, values)
        other = None
        try:
            ready = self._weights_ready(arguments)
        except _Elsewhere as found:
            other = found.segment
        if other is not None:
            return other._call(arguments, profile)
        results = [spec.allocate(values) for spec in self._outputs]
        if self._num_kv:
            results += self._grown(arguments, values)
        given = map(_ADDRESS, self._arguments(arguments))
        addresses = [*ready.addresses, *given, *map(_ADDRESS, results)]  # in the order of SOURCES
        if self._num_mirrors:
            addresses += self._mirror_addresses(arguments, results[len(self._outputs) :])
        threads = torch.get_num_threads()
        if profile:
            self.profile_ns = self.program.profile(addresses, symbols, threads)
        else:
            self.program.run(addresses, symbols, threads)
        written = self._written(arguments)
        if written:  # whoever looks at versions takes note, as after PyTorch's own writes
            increment_version(t for t in written if not t.is_inference())
        if self._given_mirrors:
            self._caller_mirrors.written(arguments)
        if ready.watch is not None:
            ready.watch.fetch()
        return tuple(results)

    def _grown(self, arguments: tuple, values: Sequence[int]) -> list[Tensor]:
        caches: list[Any] = [None] * self._num_kv
        for group, ids in self._kv_groups:
            grown = group.grow(arguments, *(values[i] for i in ids))
            for number, cache in zip(group.numbers, grown, strict=True):
                caches[number] = cache
        return caches

    def _mirror_addresses(self, arguments: tuple, caches: Sequence[Tensor]) -> list[int]:
        """Rows and state of each mirror. caches: those that have grown."""
        addresses = [0] * (2 * self._num_mirrors)
        found = [*zip(self._given_mirrors, self._caller_mirrors.addresses(arguments), strict=True)]
        for group, _ in self._kv_groups:
            if group.is_mirrored:
                numbers = [self._mirrored_kv[n] for n in group.numbers]
                found += zip(
                    numbers, group.mirrors([caches[n] for n in group.numbers]), strict=True
                )
        for number, pair in found:
            addresses[2 * number : 2 * number + 2] = pair
        return addresses

    def costs(self, symbols: Sequence[int]) -> list[tuple[int, int]]:
        """(flops, bytes) of every step for these symbol values."""
        flops = self.program.sizes(list(symbols), [f for f, _ in self._costs])
        return list(
            zip(flops, self.program.sizes(list(symbols), [b for _, b in self._costs]), strict=True)
        )

    def symbol_values(self, arguments: Sequence[Any]) -> Sequence[int]:
        if self._symbol_numbers is not None:
            return self._symbol_numbers(arguments)
        return [arguments[a] if d is None else arguments[a].size(d) for a, d in self._symbols]

    def packed(self) -> list[PackedWeight]:
        """Of all of its family: what one has packed stays while the weights live."""
        return [weight for segment in self._family.all() for weight in segment._held]

    def _want(self, sizes: SizeTable) -> Callable[[Size], int]:
        """Gives a size the position its value will have in a call's `values`."""

        def position(size: Size) -> int:
            self._wanted.append(sizes.id(size))
            return len(self._wanted) - 1

        return position

    def _laid_out(self, arguments: tuple, values: Sequence[int]) -> tuple:
        """What Python made is passed on as its example value lies: contiguous most often."""
        fixed = {
            a: arguments[a].contiguous()
            for a in self._check_dense
            if not arguments[a].is_contiguous()
        }
        for a, wanted in self._check_strides:
            given, stride = arguments[a], tuple(values[n] for n in wanted)
            if given.stride() != stride:
                fixed[a] = torch.empty_strided(given.shape, stride, dtype=given.dtype).copy_(given)
        return tuple(fixed.get(n, a) for n, a in enumerate(arguments)) if fixed else arguments

    def _weights_ready(self, arguments: tuple) -> _Ready:
        """The packed weights and biases of a call, made again first where a source changed. Raises _Elsewhere where another segment of
        the family has them."""
        if not self._packed:
            return self._ready
        ready = self._ready  # another thread may forget it
        if not ready.is_of(arguments):
            ready = self._known(arguments)
            if not ready.is_of(arguments):
                return self._family.made_ready(self, arguments, edited=False)
        if ready.watch is None or not ready.watch.same_content():
            return self._family.made_ready(self, arguments, edited=True)
        return ready

    def _known(self, arguments: tuple) -> _Ready:
        """What is remembered of these weights, which the next call is likely to bring too."""
        with STORE.lock:  # nobody forgets it in between
            self._ready = self._ready_sets.get(self.set_of(arguments), _NOTHING_READY)
            return self._ready

    def set_of(self, arguments: tuple) -> tuple[int, ...]:
        """What tells a call's weights from others'."""
        return tuple(map(id, self._weights_of(arguments)))

    def pack(self, arguments: tuple, edited: bool) -> _Ready:
        """Packs the weights of a call, where that is not done. Raises NotHeld."""
        told, watch = self._told, Watch(arguments, self._weights)
        held = [STORE.get(p, arguments, self.target_, edited, self) for p in self._packed]
        if self._offload and offload(arguments[a] for a in self._matrices):
            STORE.follow(self._packed, arguments, self.target_)
            watch = Watch(arguments, self._weights)
        addresses = [_address(held[number], source) for source, number in self._packed_externals]
        self._held.update(held)
        ready = _Ready(addresses, watch.sweep(held))
        with STORE.lock:
            if told == self._told:
                self._ready = ready
                self._ready_sets.pop(self.set_of(arguments), None)
                self._ready_sets[self.set_of(arguments)] = ready
                if len(self._ready_sets) > _MOST_SETS:
                    del self._ready_sets[next(iter(self._ready_sets))]
        return ready

    def drop(self, weights: tuple[int, ...]) -> None:
        """Forgets what it knows of a set of weights, which another segment packs now."""
        with STORE.lock:
            self._ready = _NOTHING_READY
            self._ready_sets.pop(weights, None)

    def not_held(self, arguments: tuple) -> list[int]:
        """The arguments whose weights cannot be packed as they were to be; packs the others."""
        lost = [spec for spec in self._packed if not self._holds(spec, arguments)]
        return [v.argument for spec in lost for v in spec.sources]

    def _holds(self, spec: PackedSpec, arguments: tuple) -> bool:
        try:
            STORE.get(spec, arguments, self.target_, False, self)
        except NotHeld:
            return False
        return True

    def look_again(self) -> None:
        """The next call asks the store for every weight, also where a call that goes on now has just done so."""
        with STORE.lock:
            self._told += 1
            self._ready = _NOTHING_READY
            self._ready_sets = {}

    def forget_weights(self) -> None:
        """Makes the next calls pack every weight anew, of every layer that shares this graph."""
        for segment in self._family.all():
            STORE.forget(segment)
            segment.look_again()


def _address(weight: PackedWeight, source: str) -> int:
    """Of a packed weight ("packed") or of its bias vector ("bias")."""
    if source == "packed":
        return weight.address
    assert weight.bias is not None, "a program names a bias vector only where its linear has one"
    return weight.bias.data_ptr()


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


def _written_arguments(builder: SegmentBuilder) -> list[int]:
    """The arguments of a segment into whose memory its steps write."""
    bases = [view_base(n) for record in builder.records for n in written_by(record.node)]
    return sorted({builder.inputs[base] for base in bases if base in builder.inputs})


def _made_by_python(node: fx.Node) -> bool:
    """True for what Python computes and its example value says is contiguous. A result of another segment lies as its own says."""
    called = node.op in ("call_function", "call_method", "call_module")
    return called and isinstance(fake(node), Tensor) and is_dense(fake(node))


def build_executable(gm: fx.GraphModule, plan: Plan, options: Options) -> fx.GraphModule:
    """The graph that runs the plan: eager nodes as they were, each native segment one call."""
    source = gm.graph
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    native = {node for level in plan.segments for node in plan.levels[level]}
    modules: dict[str, torch.nn.Module] = {}

    def value(node: fx.Node) -> fx.Node:
        """The new graph's node for a value. Views are repeated where Python reads them; what a kernel wrote in place is what it got."""
        if node not in made:
            in_place = node in native and is_in_place(node)
            made[node] = value(node.args[0]) if in_place else graph.node_copy(node, value)
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
    direct = _direct_call(executable)
    if direct is not None:
        executable.forward = direct
    return executable


def _direct_call(executable: fx.GraphModule) -> Callable[..., tuple] | None:
    """What the graph computes, where it is one segment and nothing else; None for other graphs.

    The graph's own Python names each of some hundred inputs and results.
    """
    placeholders = [n for n in executable.graph.nodes if n.op == "placeholder"]
    calls = [n for n in executable.graph.nodes if n.op == "call_module"]
    output = next(n for n in executable.graph.nodes if n.op == "output").args[0]
    if len(calls) != 1 or not isinstance(output, (tuple, list)):
        return None
    results = {n: n.args[1] for n in calls[0].users if kind(n) == "getitem"}
    if len(placeholders) + 1 + len(results) + 1 != len(executable.graph.nodes):
        return None
    if any(n not in results for n in output):
        return None
    segment = executable.get_submodule(calls[0].target)
    inputs = picker([placeholders.index(n) for n in calls[0].args])
    outputs = picker([results[n] for n in output])

    def forward(*arguments: Any) -> tuple:
        return outputs(segment.forward(*inputs(arguments)))

    return forward


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
    if isinstance(builder, GpuSegmentBuilder):
        symbols = _symbols_of(builder, plan.symbol_nodes[level])
        modules[name] = GpuSegment(builder, symbols, plan.target, name, options.mode)
    else:
        modules[name] = _Family(plan, level, name, options).last
    call = graph.call_module(name, tuple(value(n) for n in builder.inputs))
    for i, result in enumerate((*builder.results, *builder.kv_results)):
        made[result] = graph.call_function(getitem, (call, i))


def _symbols_of(
    builder: SegmentBuilder | GpuSegmentBuilder, nodes: Sequence[tuple[fx.Node, int | None]]
) -> list[tuple[int, int | None]]:
    """Which argument of a segment, or which dimension of it, each of its symbols is."""
    return [(builder.argument(node), dimension) for node, dimension in nodes]


def segments_of(executable: fx.GraphModule) -> list[Segment]:
    """Those that run."""
    return [m.running() for m in executable.children() if isinstance(m, Segment)]
