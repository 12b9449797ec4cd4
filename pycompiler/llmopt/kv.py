"""Caches that grow in place.

All caches of one graph with equal geometry lie in one slab [layers, capacity, B, H, D]; a cache is the view [B,H,S,D] of its part.
Its strides depend neither on S nor on the capacity, and it begins where its storage does, so neither strides nor offsets trip the
checks of compiled code or become arguments of it. Appending to a cache that ends where its slab is filled up to writes behind it;
any other cache (forked, reordered, cropped, foreign) is copied into a new slab first. Behind the floats of a slab lie, where they were
asked for, the mirrors of its layers: llmopt.mirrors.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.dlpack import from_dlpack

from llmopt import _C
from llmopt.exchange import EXCHANGE
from llmopt.mirrors import MirrorLayout, aligned
from llmopt.native.segment import KvSpec, picker

_MIN_SPARE = 64  # positions
_address_of = attrgetter("address")
_CPU = torch.device("cpu")


class _SlabMirrors:
    """Where the mirrors of a slab's layers lie, one after the other behind its floats; in bytes from its address."""

    def __init__(self, geometry: tuple, capacity: int, float_bytes: int) -> None:
        self._layers, batch, heads, width, *_ = geometry
        self._layout = MirrorLayout(batch, heads, capacity, width)
        self._begin = aligned(float_bytes)
        self.num_bytes = self._begin - float_bytes + self._layers * self._layout.num_bytes

    def empty(self, memory: Tensor) -> None:
        """The states of new mirrors."""
        rows = memory.view(torch.uint8)[self._begin :].view(self._layers, -1)
        rows[:, : self._layout.state_bytes].zero_()

    def addresses(
        self, slab_address: int, layers: Iterable[int], start: int
    ) -> list[tuple[int, int]]:
        """Of each layer its rows from position `start` on, and its state."""
        step, state_bytes = self._layout.num_bytes, self._layout.state_bytes
        to_rows = state_bytes + start * self._layout.position_bytes
        states = [slab_address + self._begin + layer * step for layer in layers]
        return [(state + to_rows, state) for state in states]


@dataclass
class _Slab:
    """A slab and how far it is filled. Holds no reference that keeps the memory alive."""

    address: int
    storage: StorageWeakRef
    parts: _C.Parts | None  # makes the tensors over it, where PyTorch has the functions for that
    geometry: tuple  # (layers, B, H, D, dtype, device, whether it has mirrors)
    capacity: int
    filled: int
    mirrors: _SlabMirrors | None


_slabs: list[_Slab] = []  # by address; replaced, never changed, so that it is read without the lock
_lock = (
    threading.Lock()
)  # threads that go on from one cache must not append to it at the same place


def _keep(slab: _Slab) -> None:
    global _slabs
    with _lock:
        living = [s for s in _slabs if not s.storage.expired()]
        _slabs = sorted([*living, slab], key=_address_of)


def _slab_around(address: int) -> _Slab | None:
    """The last that begins at the address or before it."""
    slabs = _slabs
    position = bisect_right(slabs, address, key=_address_of)
    return slabs[position - 1] if position else None


def _spare(length: int) -> int:
    return max(_MIN_SPARE, length // 4)


class KvGroup:
    """The caches of one segment that share a geometry and grow by the same length."""

    def __init__(self, specs: Sequence[tuple[int, KvSpec]]) -> None:
        self.numbers = [number for number, _ in specs]  # which of the segment's caches
        self.dtype = specs[0][1].dtype
        self.width = specs[0][1].width
        self.is_mirrored = specs[0][1].is_mirrored
        given = [spec.argument for _, spec in specs if spec.argument is not None]
        self._caches = picker(given)
        self._empty = not given  # `groups_of` never mixes empty and filled ones

    def grow(
        self,
        arguments: Sequence,
        batch: int,
        heads: int,
        new_length: int,
        *,
        device: torch.device = _CPU,
    ) -> Sequence[Tensor]:
        """Caches [B,H,S+n,D] whose first S positions hold the old content; the last n are for the caller to fill.

        arguments: the segment's arguments, among them the old caches [B,H,S,D], on the device.
        """
        kind = (batch, heads, self.width, self.dtype, device, self.is_mirrored)
        geometry = (len(self.numbers), *kind)
        caches = self._caches(arguments)
        if self._empty:
            return _fresh(geometry, 0, new_length)
        grown = _in_place(caches, geometry, new_length)
        if grown is not None:
            return grown
        length = caches[0].shape[2]
        if all(c.shape[2] == length for c in caches):
            return _copied(caches, geometry, new_length)
        # Layers with a window hold fewer positions than the others: each length has a slab of its own.
        result = list(caches)
        for some in {c.shape[2]: None for c in caches}:
            picked = [i for i, c in enumerate(caches) if c.shape[2] == some]
            same, part = [caches[i] for i in picked], (len(picked), *geometry[1:])
            grown = _in_place(same, part, new_length) or _copied(same, part, new_length)
            for i, cache in zip(picked, grown, strict=True):
                result[i] = cache
        return result

    def mirrors(self, caches: Sequence[Tensor]) -> list[tuple[int, int]]:
        """Addresses of the rows and of the state of each cache that `grow` gave; zeros where there is no memory."""
        if not all(c.numel() for c in caches):
            return [(0, 0)] * len(caches)
        first = _mirrors_of(caches[0], range(len(caches)))
        if len(first) == len(caches):
            return first
        return [_mirrors_of(cache, None)[0] for cache in caches]  # a slab for each length


def _laid_out(slab: _Slab, length: int) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Elements a position of one layer takes; sizes and strides of a cache of this length."""
    _, batch, heads, width, *_ = slab.geometry
    row = batch * heads * width
    return row, (batch, heads, length, width), (heads * width, width, row, 1)


def _in_place(
    caches: Sequence[Tensor], geometry: tuple, new_length: int
) -> Sequence[Tensor] | None:
    """The caches behind which there is room, grown; None where they have to be copied."""
    first = caches[0]
    itemsize, address = first.element_size(), first.data_ptr()
    slab = _slab_around(address)
    if slab is None or slab.geometry != geometry or slab.storage.expired():
        return None
    if geometry[-1] and not all(map(_is_unedited, caches)):
        return None  # mirrors hold what the caches held
    length = int(first.shape[2])
    row, _, _ = _laid_out(slab, length)
    start, rest = divmod(address - slab.address, row * itemsize) if row else (0, 1)
    end = start + length
    if rest or end + new_length > slab.capacity:
        return None
    if not _lie_in(slab, caches, start, length):
        return None
    with _lock:
        if slab.filled != end:
            return None
        slab.filled = end + new_length
    return _caches(slab, caches, start, length + new_length)


def _mirrors_of(cache: Tensor, layers: range | None) -> list[tuple[int, int]]:
    """Addresses in the slab of a cache: for all its layers where it has as many as these, else for the cache's own."""
    address = cache.data_ptr()
    slab = _slab_around(address)
    assert slab is not None
    assert slab.mirrors is not None
    row, _, _ = _laid_out(slab, 0)
    position_bytes = row * cache.element_size()
    layer, behind = divmod(address - slab.address, slab.capacity * position_bytes)
    if layers is None or len(layers) != slab.geometry[0]:
        layers = range(layer, layer + 1)
    return slab.mirrors.addresses(slab.address, layers, behind // position_bytes)


def _counting_edits(is_needed: bool) -> AbstractContextManager:
    """Within it new tensors count their edits, as those made under inference_mode do not."""
    if is_needed and torch.is_inference_mode_enabled():
        return torch.inference_mode(False)
    return nullcontext()


def _is_unedited(cache: Tensor) -> bool:
    return not cache.is_inference() and cache._version == 0


def _lie_in(slab: _Slab, caches: Sequence[Tensor], start: int, length: int) -> bool:
    """Whether these are what `_caches` makes of the same numbers."""
    row, size, stride = _laid_out(slab, length)
    if slab.parts is not None:
        return slab.parts.hold(tuple(caches), start * row, slab.capacity * row, size, stride)
    itemsize = caches[0].element_size()
    begin, step = slab.address + start * row * itemsize, slab.capacity * row * itemsize
    return all(
        (c.data_ptr(), c.size(), c.stride()) == (begin + i * step, size, stride)
        for i, c in enumerate(caches)
    )


def _copied(caches: Sequence[Tensor], geometry: tuple, new_length: int) -> Sequence[Tensor]:
    length = caches[0].shape[2]
    return _fresh(geometry, length, new_length, caches)


def _fresh(
    geometry: tuple, length: int, new_length: int, filled_with: Sequence[Tensor] = ()
) -> Sequence[Tensor]:
    """Caches in a slab of their own, the first `length` positions of which hold those of `filled_with`."""
    layers, batch, heads, width, dtype, device, is_mirrored = geometry
    total = length + new_length
    capacity = total + _spare(total)
    elements = layers * capacity * batch * heads * width
    mirrors = _SlabMirrors(geometry, capacity, elements * dtype.itemsize) if is_mirrored else None
    more = 0 if mirrors is None else mirrors.num_bytes // dtype.itemsize
    with _counting_edits(is_mirrored):
        memory = torch.empty(elements + more, dtype=dtype, device=device)
    if mirrors is not None:
        mirrors.empty(memory)
    parts = None if EXCHANGE is None else _C.Parts(EXCHANGE, memory)
    storage = StorageWeakRef(memory.untyped_storage())
    slab = _Slab(memory.data_ptr(), storage, parts, geometry, capacity, total, mirrors)
    # A part keeps the whole alive.
    whole = (
        [from_dlpack(part) for part in memory.view(layers, -1).unbind(0)] if parts is None else ()
    )
    caches = _caches(slab, whole, 0, total)
    for cache, target in zip(filled_with, caches, strict=False):
        target[:, :, :length].copy_(cache)
    if filled_with and mirrors is not None:
        caches = _caches(slab, whole, 0, total)  # tensors that nobody has edited
    if elements:
        _keep(slab)
    for cache in caches:
        _will_grow(cache)
    return caches


def _will_grow(cache: Tensor) -> None:
    """Tells Dynamo, as AOTAutograd does of results whose sizes change, that the length is to be a symbol when it first meets this
    cache: the next call's would be another one. Nothing is guarded by it, and a PyTorch that does not know it takes no notice."""
    cache._dynamo_propagated_dynamic_indices = {2}  # type: ignore[attr-defined]


def _caches(slab: _Slab, begun: Sequence[Tensor], start: int, length: int) -> Sequence[Tensor]:
    """[B,H,length,D] of every layer of a slab, from position `start` on; begun: without exchange functions, tensors that begin there, over
    storages as long as a layer's part."""
    row, size, stride = _laid_out(slab, length)
    if slab.parts is not None:
        with _counting_edits(slab.mirrors is not None):
            return slab.parts.over(slab.geometry[0], start * row, slab.capacity * row, size, stride)
    if begun[0].is_inference():
        return [t.as_strided(size, stride) for t in begun]
    # Detached: a window remembers the tensor that it is a view of, whose sizes Dynamo checks too; they must not be the capacity.
    return [t.detach().as_strided(size, stride) for t in begun]


def groups_of(specs: Sequence[KvSpec]) -> list[KvGroup]:
    """Caches grouped so that each group can share a slab; empty and filled caches never mix."""
    found: dict[tuple, list[tuple[int, KvSpec]]] = {}
    for number, spec in enumerate(specs):
        sizes = tuple(str(s) for s in (spec.batch, spec.heads, spec.new_length))
        key = (*sizes, spec.width, spec.dtype, spec.argument is None, spec.is_mirrored)
        found.setdefault(key, []).append((number, spec))
    return [KvGroup(group) for group in found.values()]
