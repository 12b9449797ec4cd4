"""Packed weights: made once from a module's tensors, shared by every plan that reads the same tensors, never stale.

A packed weight is found by the tensors it was made from. It is made again when one of them is another tensor, has moved, has a new
version, or when its content changed (an edit through `.data` changes no version): see `Watch`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from llmopt import _C, packing
from llmopt.lossless import is_held
from llmopt.native.segment import PackedSpec, WeightView
from llmopt.offload import is_moved
from llmopt.ops.reference import outside_autocast
from llmopt.quant.rounding import Codes, exact_codes, round_weight
from llmopt.quant.schemes import CodeForm
from llmopt.types import Target

_LINE = 64  # bytes
_LINES = 16  # of a moved tensor that are compared


class NotHeld(Exception):
    """A weight is not, or no longer, what the storage that was chosen for it can hold as it is."""


class Reader(Protocol):
    """Who runs with packed weights."""

    def look_again(self) -> None:
        """Another packed one of them again. Content that looks as when this reader last looked may be that of an edit which was undone:
        what is packed is then the edit."""


class Held:
    """What source tensors were and held at one time; to be asked while they stay where they are."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.state = state_of(tensors)
        self.content = _content_of(tensors)
        self._samples = samples_of(tensors)
        self._sweep = _C.Sweep([self.content])

    def seems_unchanged(self) -> bool:
        """By a line of every tensor, which shows what changed all of it, and a window of one: others each time."""
        return self._samples.unchanged() and self._sweep.unchanged()


@dataclass(eq=False)
class PackedWeight:
    """A weight in the kernels' layout, its biases as one vector, and what its sources held when it was made."""

    memory: _C.Memory
    bias: Tensor | None
    held: Held
    sources: tuple[weakref.ref, ...]
    # Who has compared all of the content.
    readers: weakref.WeakSet[Reader] = field(default_factory=weakref.WeakSet)
    is_forgotten: bool = False  # to be made again, whatever its sources look like

    @property
    def address(self) -> int:
        return self.memory.address

    @property
    def bytes(self) -> int:
        return self.memory.bytes


def _cut(tensor: Tensor, view: WeightView) -> Tensor:
    return tensor.detach().as_strided(view.size, view.stride, tensor.storage_offset() + view.offset)


def version(tensor: Tensor) -> int:
    """The tensor's edit count; 0 for inference tensors, which have none."""
    return 0 if tensor.is_inference() else tensor._version


def state_of(tensors: Sequence[Tensor]) -> tuple:
    """Identity, address and version of each tensor: differs when any was replaced, moved or edited in place."""
    return tuple((id(t), t.data_ptr(), version(t)) for t in tensors)


def samples_of(tensors: Sequence[Tensor]) -> _C.Samples:
    """Some lines of each tensor's memory, as they are now; readable while the tensors stay where they are."""
    return _C.Samples([t.data_ptr() for t in tensors], [bytes_of(t) for t in tensors])


def _content_of(tensors: Sequence[Tensor]) -> _C.Content:
    """The tensors' memory as it is now; readable while they stay where they are.

    All of it; but some lines of what was moved out of memory, where looking at all would bring all back.
    """
    ranges: dict[tuple[int, int], None] = {}
    for tensor in tensors:
        address, length = tensor.data_ptr(), bytes_of(tensor)
        if is_moved(tensor):
            line = min(_LINE, length)
            starts = [address + (length - line) * i // (_LINES - 1) for i in range(_LINES)]
            ranges |= dict.fromkeys((start, line) for start in starts)
        else:
            ranges[address, length] = None
    return _C.Content([address for address, _ in ranges], [length for _, length in ranges])


def bytes_of(tensor: Tensor) -> int:
    """From a tensor's first element to the end of its last."""
    if tensor.numel() == 0:
        return 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


class PackedStore:
    """All packed weights of the process. Entries go when one of their source tensors does."""

    def __init__(self) -> None:
        self._entries: dict[tuple, PackedWeight] = {}
        self.lock = threading.RLock()
        self.epoch = 0  # grows when a source tensor dies: its id may then belong to another tensor
        self.packings = 0

    def get(
        self,
        spec: PackedSpec,
        arguments: Sequence[Tensor],
        target: Target,
        changed: bool,
        reader: Reader,
    ) -> PackedWeight:
        """The packed form of `spec` over a segment's arguments; `changed` forces it to be made again.

        reader: who asks. All content is compared the first time: who is new knows nothing of an edit through `.data` since another
        packed. Later what `Held` looks at: a reader that is called with another layer's weights each time remembers none.
        """
        bases, key = _identity(spec, arguments, target)
        with self.lock:
            entry = self._entries.get(key)
            if (
                changed
                or entry is None
                or entry.is_forgotten
                or entry.held.state != state_of(bases)
                or not self._is_unchanged(entry, reader)
            ):
                readers = [] if entry is None else list(entry.readers)
                try:
                    entry = self._make(spec, arguments, target, bases, key, entry)
                except NotHeld:
                    if entry is not None:  # some experts may have been packed
                        entry.is_forgotten = True
                    for other in readers:
                        other.look_again()
                    raise
                self._entries[key] = entry
                for other in readers:
                    if other is not reader:
                        other.look_again()
            entry.readers.add(reader)
            return entry

    def forget(self, reader: Reader) -> None:
        """Makes all that a reader runs with be packed again when it is asked for."""
        with self.lock:
            for entry in self._entries.values():
                if reader in entry.readers:
                    entry.is_forgotten = True

    @staticmethod
    def _is_unchanged(entry: PackedWeight, reader: Reader) -> bool:
        known = reader in entry.readers
        return entry.held.seems_unchanged() if known else entry.held.content.all_unchanged()

    def follow(
        self, specs: Sequence[PackedSpec], arguments: Sequence[Tensor], target: Target
    ) -> None:
        """Takes note that the sources moved in memory and kept their content."""
        with self.lock:
            for spec in specs:
                bases, key = _identity(spec, arguments, target)
                if key in self._entries:
                    self._entries[key].held = Held(bases)

    @outside_autocast
    def _make(
        self,
        spec: PackedSpec,
        arguments: Sequence[Tensor],
        target: Target,
        bases: Sequence[Tensor],
        key: tuple,
        old: PackedWeight | None,
    ) -> PackedWeight:
        held = Held(bases)  # before they are read: an edit meanwhile is one that comes later
        memory = None if old is None else old.memory
        memory = (
            _packed_floats(spec, arguments, target, memory)
            if spec.form is None
            else _packed_codes(spec, spec.form, arguments, target, memory)
        )
        self.packings += 1

        def forget(_: weakref.ref) -> None:
            with self.lock:
                self._entries.pop(key, None)
                self.epoch += 1

        sources = old.sources if old is not None else tuple(weakref.ref(b, forget) for b in bases)
        bias = _bias_vector(spec, arguments)
        if (
            old is not None
            and old.bias is not None
            and bias is not None
            and old.bias.dtype == bias.dtype
        ):
            with torch.inference_mode():  # where it may have been made
                bias = old.bias.copy_(bias)  # other graphs have its address, as that of the memory
        return PackedWeight(memory, bias, held, sources)


def _identity(
    spec: PackedSpec, arguments: Sequence[Tensor], target: Target
) -> tuple[list[Tensor], tuple]:
    """The tensors a packed weight is made from, and its key in the store."""
    bases = [arguments[v.argument] for v in spec.views()]
    key = (
        tuple(id(b) for b in bases),
        tuple((v.size, v.stride, v.offset) for v in spec.views()),
        tuple(b is None for b in spec.biases),
        spec.interleave,
        spec.dtype,
        spec.stored,
        spec.form,
        spec.is_exact,
        str(target),
    )
    return bases, key


def _packed_floats(
    spec: PackedSpec, arguments: Sequence[Tensor], target: Target, memory: _C.Memory | None
) -> _C.Memory:
    n, k = sum(v.size[-2] for v in spec.sources), spec.sources[0].size[-1]
    dtype = spec.stored or spec.dtype
    each = packing.float_bytes(n, k, dtype, target.panel_width)
    needed = packing.memory_bytes(each, spec.experts or 1)
    if memory is None or memory.bytes < needed:  # of another dtype
        memory = _C.Memory(needed)
    for expert, sources in enumerate(_matrices(spec.sources, arguments)):
        weights = [w.to(dtype) for w in sources]
        if spec.stored is not None and not all(map(is_held, sources, weights)):
            raise NotHeld
        packing.pack(weights, memory, spec.interleave, target.tier, expert * each)
    return memory


def _matrices(views: Sequence[WeightView], arguments: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """What is packed together, of one expert after the other where there are some."""
    tensors = [_cut(arguments[v.argument], v) for v in views]
    if tensors and tensors[0].dim() == 2:
        yield tensors
    else:
        yield from map(list, zip(*tensors, strict=True))


def _packed_codes(
    spec: PackedSpec,
    form: CodeForm,
    arguments: Sequence[Tensor],
    target: Target,
    memory: _C.Memory | None,
) -> _C.Memory:
    """The quantised form; float sources are rounded first. Raises ValueError when they hold NaN or Inf."""
    scales, offsets = (list(_matrices(views, arguments)) for views in (spec.scales, spec.offsets))
    for expert, weights in enumerate(_matrices(spec.sources, arguments)):
        if scales:
            starts = offsets[expert] if offsets else [None] * len(weights)
            codes = [Codes(*parts) for parts in zip(weights, scales[expert], starts, strict=True)]
        elif spec.is_exact:
            codes = _exact_codes(weights, form)
        else:
            try:
                codes = [round_weight(w, form) for w in weights]
            except ValueError as error:
                raise ValueError(f"llmopt: cannot round {spec.what}: {error}") from error
        codes = [c for c in codes if c.codes.shape[0]] or codes[
            :1
        ]  # of no rows there is nothing to pack
        n, groups = sum(c.codes.shape[0] for c in codes), codes[0].scales.shape[1]
        each = packing.code_bytes(n, groups, form, target.panel_width)
        if memory is None:
            memory = _C.Memory(packing.memory_bytes(each, spec.experts or 1))
        packing.pack_codes(codes, form, memory, spec.interleave, target.tier, expert * each)
    assert memory is not None
    return memory


def _exact_codes(weights: Sequence[Tensor], form: CodeForm) -> list[Codes]:
    found = [exact_codes(w, form) for w in weights]
    if any(c is None for c in found):
        raise NotHeld
    return [c for c in found if c is not None]


def _bias_vector(spec: PackedSpec, arguments: Sequence[Tensor]) -> Tensor | None:
    if all(b is None for b in spec.biases):
        return None
    pieces = [
        torch.zeros(w.size[:-1], device="cpu") if b is None else _cut(arguments[b.argument], b)
        for w, b in zip(spec.sources, spec.biases, strict=True)
    ]
    return torch.cat(pieces, -1).to(spec.dtype)


STORE = PackedStore()
