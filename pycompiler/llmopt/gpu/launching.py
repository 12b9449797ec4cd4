"""Making the launches of a segment's calls: planned and packed once for each kind of call, afterwards only launched.

A step is planned again only when a size it reads has changed: of decoding with a cache that grows, that is the attention. What cannot
be packed (see native.py) is launched through triton, step by step.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmopt import _C
from llmopt.counters import MOST_TILES, counters
from llmopt.gpu.native import NotNative, Packed, Place, pack
from llmopt.gpu.run import check_runnable, is_interpreting, run
from llmopt.gpu.segment import Call, GpuSegmentBuilder, Number, Operand, slot_bytes
from llmopt.gpu.weights import Prepared
from llmopt.launch import Launch
from llmopt.messages import say
from llmopt.types import Target

_MOST_PLANS = 32  # of a segment; the one used longest ago goes
_MOST_OF_A_STEP = 8
_ALIGNMENT = 16  # bytes, of what triton specialises kernels for
_META = torch.device("meta")
Sources = Mapping[str, Sequence[Any]]  # a call's tensors by where externals come from


class _Noted(Sequence):
    """The values of a call's sizes, and which of them were read."""

    def __init__(self, values: Sequence[int]) -> None:
        self._values = values
        self.read: dict[int, int] = {}

    def __getitem__(self, index: Any) -> Any:
        value = self.read[index] = self._values[index]
        return value

    def __len__(self) -> int:
        return len(self._values)


class _MetaBuffers(Sequence):
    """Buffers without memory, made when a step looks at them."""

    def __init__(self, count: int, like: Callable[[int], Tensor]) -> None:
        self._made: list[Tensor | None] = [None] * count
        self._like = like
        self.numbers: dict[int, int] = {}  # of their storages

    def __getitem__(self, index: Any) -> Any:
        made = self._made[index]
        if made is None:
            made = self._made[index] = self._like(index)
            self.numbers[made.untyped_storage()._cdata] = index
        return made

    def __len__(self) -> int:
        return len(self._made)


@dataclass
class _PlannedCall(Call):
    """A call on meta tensors that knows its scratch memory: storage → bytes behind the start of all of it."""

    buffers: _MetaBuffers
    scratch_at: dict[int, int] = field(default_factory=dict)
    scratch_bytes: int = 0
    kept: list[Tensor] = field(default_factory=list)  # so that storages stay distinct

    def scratch(self, size: Sequence[int], dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(tuple(size), dtype=dtype, device=_META)
        self.take(tensor)
        return tensor

    def take(self, tensor: Tensor) -> int:
        """Where this tensor, whose content nobody reads before the step writes it, is in the scratch memory."""
        storage = tensor.untyped_storage()
        at = self.scratch_at.setdefault(storage._cdata, self.scratch_bytes)
        if at == self.scratch_bytes:
            self.scratch_bytes += -(-max(storage.nbytes(), 1) // 256) * 256
            self.kept.append(tensor)
        return at


@dataclass(frozen=True)
class _Form:
    """What a step is, equal for the same step of two layers; and the buffers and sizes of this one, in the order of their first use."""

    shape: Hashable
    buffers: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()

    def size(self, number: int) -> int:
        """Which of the step's sizes a number of the segment's table is."""
        return self.sizes.index(number)


def _form(number: int, step: Any) -> _Form:
    """Two steps with one shape and equal sizes give the same launches over different buffers; a step that is no dataclass is alone."""
    buffers: list[int] = []
    sizes: list[int] = []

    def nth(known: list[int], value: int) -> int:
        if value not in known:
            known.append(value)
        return known.index(value)

    def plain(value: Any) -> Any:
        if isinstance(value, Number):
            return Number, nth(sizes, value.id)
        if isinstance(value, Operand):
            ids = (value.offset, *value.size, *value.stride)
            place = nth(buffers, value.buffer), *(nth(sizes, i) for i in ids)
            return Operand, value.dtype, len(value.size), place
        if dataclasses.is_dataclass(value):
            parts = (plain(getattr(value, f.name)) for f in dataclasses.fields(value))
            return type(value), *parts
        return value

    owner = getattr(step, "__self__", None)
    if not dataclasses.is_dataclass(owner):
        return _Form(number)
    return _Form(plain(owner), tuple(buffers), tuple(sizes))


@dataclass(frozen=True)
class _Step:
    """A step as it was planned while the sizes it read had these values; packed is None where triton launches it.

    read: pairs of (which of the form's sizes, value), or of the table's sizes where the form has none.
    """

    form: _Form
    read: tuple[tuple[int, int], ...]
    packed: Packed | None

    def fits(self, form: _Form, values: Sequence[int]) -> bool:
        """Whether a step of this form has the same launches over its own buffers."""
        own = form.sizes
        return all(values[own[i] if own else i] == value for i, value in self.read)

    def over(self, form: _Form) -> _Step:
        """The same step of another layer."""
        if form.buffers == self.form.buffers or self.packed is None:
            return self
        renamed = list(zip(self.form.buffers, form.buffers, strict=True))
        packed = dataclasses.replace(self.packed, launches=self.packed.launches.over(renamed))
        return _Step(form, self.read, packed)


@dataclass(frozen=True)
class _Plan:
    """The launches of one kind of call: native ones, and steps for triton, in order."""

    parts: tuple[_C.LaunchPlan | int, ...]  # an int: the number of a step that triton launches
    steps: tuple[_Step, ...]  # what the native ones point to
    slots: tuple[int, ...]  # bytes of each arena slot
    scratch_bytes: int


class _Plans:
    """What was planned for one set of weights."""

    def __init__(self, weights: Sequence[Prepared], gone: Callable[[object], None]) -> None:
        self.alive = [weakref.ref(w, gone) for w in weights]
        # Memory that is a weight's own, not something a step computed of it.
        self.storages = {t.untyped_storage()._cdata for w in weights for t in w.tensors()}
        self.plans: OrderedDict[tuple, _Plan] = OrderedDict()
        # By device, the shape of their form, and where its buffers begin.
        self.known: defaultdict[tuple, list[_Step]] = defaultdict(list)


class Launcher:
    """Makes the launches of one segment."""

    def __init__(self, builder: GpuSegmentBuilder, target: Target) -> None:
        self._builder, self._target = builder, target
        self._forms = [_form(number, step) for number, step in enumerate(builder.steps)]
        self._sets: dict[tuple[int, ...], _Plans] = {}  # by the ids of prepared weights
        self._lock = threading.Lock()
        self.through_triton: set[str] = set()  # why steps could not be packed

    def run(
        self,
        sources: Sources,
        symbols: Sequence[int],
        values: Sequence[int],
        weights: list[Prepared],
        device: torch.device,
    ) -> Any:
        """Launches every step on the current stream. values: of the sizes, which follow from the symbols.

        Returns what must live as long as these launches may be repeated, by a CUDA graph.
        """
        externals = [sources[source][number] for source, number in self._builder.externals]
        if not _can_pack(device):
            return self._run_all(externals, values, weights, device)
        addresses = [t.data_ptr() for t in externals]
        with self._lock:
            plan = self._plan_of(externals, addresses, symbols, values, weights, device)
        offsets = _offsets(plan.slots)
        arena = torch.empty(offsets[-1] + plan.scratch_bytes, dtype=torch.uint8, device=device)
        start = arena.data_ptr()
        places = [
            addresses[n] if outside else start + offsets[n]
            for outside, n in self._builder.builder.buffers
        ]
        places += [start + offsets[-1], counters(device, MOST_TILES).data_ptr()]
        stream = torch.cuda.current_stream(device).cuda_stream
        call: Call | None = None
        for part in plan.parts:
            if isinstance(part, _C.LaunchPlan):
                part.run(device.index or 0, stream, places)
                continue
            if call is None:
                slots = [arena[a : a + n] for a, n in zip(offsets, plan.slots, strict=False)]
                call = self._call(externals, slots, values, weights)
            for launch in self._builder.steps[part](call):
                run(launch)
        return plan

    def _run_all(
        self,
        externals: Sequence[Tensor],
        values: Sequence[int],
        weights: list[Prepared],
        device: torch.device,
    ) -> None:
        sizes = slot_bytes(self._builder, values)
        slots = [torch.empty(n, dtype=torch.uint8, device=device) for n in sizes]
        call = self._call(externals, slots, values, weights)
        for step in self._builder.steps:
            for launch in step(call):
                run(launch)

    def _call(
        self, externals: Sequence[Tensor], slots: Sequence[Tensor], values: Sequence[int], weights: list[Prepared]
    ) -> Call:  # fmt: skip
        buffers = [externals[n] if out else slots[n] for out, n in self._builder.builder.buffers]
        return Call(self._target, values, buffers, weights, self._builder.choose)

    def _forget(self, ids: tuple[int, ...], _: object) -> None:
        """A weight was prepared anew, or its module is gone."""
        self._sets.pop(ids, None)

    def _plan_of(
        self, externals: Sequence[Tensor], addresses: Sequence[int], symbols: Sequence[int], values: Sequence[int], weights: list[Prepared],
        device: torch.device,
    ) -> _Plan:  # fmt: skip
        ids = tuple(map(id, weights))
        of = self._sets.get(ids)
        if of is None:
            of = self._sets[ids] = _Plans(weights, functools.partial(self._forget, ids))
        starts = tuple(address % _ALIGNMENT for address in addresses)
        key = (device, starts, *symbols)
        plan = of.plans.get(key)
        if plan is None:
            plan = of.plans[key] = self._plan(of, externals, starts, values, weights, device)
            if len(of.plans) > _MOST_PLANS:
                of.plans.popitem(last=False)
        of.plans.move_to_end(key)
        return plan

    def _plan(
        self, of: _Plans, externals: Sequence[Tensor], starts: tuple[int, ...], values: Sequence[int], weights: list[Prepared],
        device: torch.device,
    ) -> _Plan:  # fmt: skip
        """starts: where the externals' memory begins behind a multiple of _ALIGNMENT, for which kernels are specialised."""
        slots = slot_bytes(self._builder, values)
        places = self._builder.builder.buffers

        def like(index: int) -> Tensor:
            outside, n = places[index]
            if not outside:
                return torch.empty(slots[n], dtype=torch.uint8, device=_META)
            t = externals[n]
            last = sum(
                (size - 1) * stride
                for size, stride in zip(t.size(), t.stride(), strict=True)
                if size
            )
            before = starts[n] // t.element_size()
            memory = torch.empty(before + last + 1, dtype=t.dtype, device=_META)
            return memory.as_strided(t.size(), t.stride(), before)

        call = _PlannedCall(
            self._target, values, _MetaBuffers(len(places), like), weights, functools.cache(self._builder.choose)
        )  # fmt: skip
        begins = [starts[n] if outside else 0 for outside, n in places]
        steps = [self._step(of, i, call, begins, device) for i in range(len(self._forms))]
        parts: list[_C.LaunchPlan | int] = []
        native: list[_C.Launches] = []
        for number, step in enumerate(steps):
            if step.packed is not None:
                native.append(step.packed.launches)
                continue
            if native:
                parts.append(_C.LaunchPlan(native))
                native = []
            parts.append(number)
        if native:
            parts.append(_C.LaunchPlan(native))
        scratch = max((s.packed.scratch_bytes for s in steps if s.packed), default=0)
        return _Plan(tuple(parts), tuple(steps), tuple(slots), scratch)

    def _step(
        self, of: _Plans, number: int, call: _PlannedCall, begins: Sequence[int], device: torch.device
    ) -> _Step:  # fmt: skip
        """begins: of every buffer, as `starts` of its external."""
        form = self._forms[number]
        own = tuple(begins[b] for b in form.buffers) if form.buffers else tuple(begins)
        known = of.known[device, form.shape, own]
        for step in known:
            if step.fits(form, call.values):
                return step.over(form)
        noted = _Noted(call.values)
        call = dataclasses.replace(call, values=noted, scratch_at={}, kept=[])
        launches = self._builder.steps[number](call)
        read = ((form.size(i) if form.sizes else i, value) for i, value in noted.read.items())
        made = _Step(form, tuple(read), self._pack(of, launches, call, begins, device))
        known.insert(0, made)
        del known[_MOST_OF_A_STEP:]
        return made

    def _pack(
        self, of: _Plans, launches: Sequence[Launch], call: _PlannedCall, begins: Sequence[int], device: torch.device
    ) -> Packed | None:  # fmt: skip
        buffers = call.buffers
        scratch, counter = len(buffers), len(buffers) + 1

        def find(name: str, tensor: Tensor) -> Place:
            storage = tensor.untyped_storage()._cdata
            offset = int(tensor.storage_offset()) * tensor.element_size()
            if storage in buffers.numbers:
                number = buffers.numbers[storage]
                return number, offset - begins[number]
            if storage in call.scratch_at or name == "partial_ptr":
                return scratch, call.take(tensor) + offset
            if name == "counter_ptr":
                return counter, offset
            raise NotNative(f"{name} is a tensor that the step makes")

        try:
            packed = pack(launches, self._target, device, find)
        except NotNative as error:
            self.through_triton.add(str(error))
            say(1, f"a step is launched through triton: {error}")
            return None
        packed.scratch_bytes = call.scratch_bytes
        tensors = (t for t in packed.kept if isinstance(t, Tensor))
        if any(t.untyped_storage()._cdata not in of.storages for t in tensors):
            # What the step computed of weights is there then, whatever stream launches it.
            torch.cuda.current_stream(device).synchronize()
        return packed


def _offsets(sizes: Sequence[int]) -> list[int]:
    """Where pieces of these sizes begin that lie behind each other, and where the last ends."""
    found = [0]
    for size in sizes:
        found.append(found[-1] + size)
    return found


def _can_pack(device: torch.device) -> bool:
    """Not in the interpreter, not on AMD's driver, and not while somebody listens to triton's launches."""
    check_runnable(device)
    if device.type != "cuda" or torch.version.hip is not None or is_interpreting():
        return False
    from triton import knobs

    hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    return not any(getattr(hook, "calls", hook) for hook in hooks)
