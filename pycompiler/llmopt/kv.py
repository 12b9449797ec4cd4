"""Caches that grow in place.

All caches of one graph with equal geometry lie in one slab [layers, capacity, B, H, D]; a cache is the view [B,H,S,D] of its part.
Its strides depend neither on S nor on the capacity, and each part is a storage of its own in which the cache begins at 0, so neither
strides nor offsets trip the checks of compiled code or become arguments of it. Appending to a cache that ends where its slab is filled
up to writes behind it; any other cache (forked, reordered, cropped, foreign) is copied into a new slab first.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.dlpack import from_dlpack

from llmopt.native.segment import KvSpec, picker

_MIN_SPARE = 64  # positions
_CPU = torch.device("cpu")
_ADDRESS = Tensor.data_ptr


@dataclass
class _Slab:
    """A slab and how far it is filled. Holds no reference that keeps the memory alive."""

    storage: StorageWeakRef
    geometry: tuple  # (layers, B, H, D, dtype, device)
    capacity: int
    filled: int


_slabs: dict[int, _Slab] = {}
_lock = (
    threading.Lock()
)  # threads that go on from one cache must not append to it at the same place


def _drop_dead_slabs() -> None:
    with _lock:
        for address in [a for a, s in _slabs.items() if s.storage.expired()]:
            del _slabs[address]


def _spare(length: int) -> int:
    return max(_MIN_SPARE, length // 4)


class KvGroup:
    """The caches of one segment that share a geometry and grow by the same length."""

    def __init__(self, specs: Sequence[tuple[int, KvSpec]]) -> None:
        self.numbers = [number for number, _ in specs]  # which of the segment's caches
        self.dtype = specs[0][1].dtype
        self.width = specs[0][1].width
        given = [spec.argument for _, spec in specs if spec.argument is not None]
        self._caches = picker(given)
        self._empty = not given  # `groups_of` never mixes empty and filled ones
        layouts = {spec.layout for _, spec in specs}
        # Sizes and strides of all are those of the first: the graph is called only where that is so.
        self._alike = len(layouts) == 1 and "" not in layouts

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
        geometry = (len(self.numbers), batch, heads, self.width, self.dtype, device)
        caches = self._caches(arguments)
        if self._empty:
            return _fresh(geometry, 0, new_length)
        grown = _in_place(caches, geometry, new_length, self._alike)
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


def _in_place(
    caches: Sequence[Tensor], geometry: tuple, new_length: int, alike: bool = False
) -> Sequence[Tensor] | None:
    """The caches behind which there is room, grown; None where they have to be copied. alike: all are laid out as the first."""
    first = caches[0]
    itemsize = first.element_size()
    address, offset = first.data_ptr(), int(first.storage_offset())
    slab = _slabs.get(address - offset * itemsize)
    if slab is None or slab.geometry != geometry or slab.storage.expired():
        return None
    _, batch, heads, width, _, _ = geometry
    row = batch * heads * width
    length = int(first.shape[2])
    start, rest = divmod(offset, row) if row else (0, 1)
    end = start + length
    if rest or end + new_length > slab.capacity:
        return None
    step = slab.capacity * row * itemsize
    if list(map(_ADDRESS, caches)) != list(range(address, address + len(caches) * step, step)):
        return None
    shape, strides = (batch, heads, length, width), (heads * width, width, row, 1)
    asked = (first,) if alike else caches
    if any(c.size() != shape or c.stride() != strides for c in asked):
        return None
    with _lock:
        if slab.filled != end:
            return None
        slab.filled = end + new_length
    return _views(caches, geometry, length + new_length)


def _copied(caches: Sequence[Tensor], geometry: tuple, new_length: int) -> Sequence[Tensor]:
    length = caches[0].shape[2]
    grown = _fresh(geometry, length, new_length)
    for cache, target in zip(caches, grown, strict=True):
        target[:, :, :length].copy_(cache)
    return grown


def _fresh(geometry: tuple, length: int, new_length: int) -> Sequence[Tensor]:
    layers, batch, heads, width, dtype, device = geometry
    total = length + new_length
    capacity = total + _spare(total)
    _drop_dead_slabs()
    memory = torch.empty(layers * capacity * batch * heads * width, dtype=dtype, device=device)
    if memory.numel():
        storage = StorageWeakRef(memory.untyped_storage())
        with _lock:
            _slabs[memory.data_ptr()] = _Slab(storage, geometry, capacity, total)
    # A part keeps the whole alive.
    parts = [from_dlpack(part) for part in memory.view(layers, -1).unbind(0)]
    caches = _views(parts, geometry, total)
    for cache in caches:
        _will_grow(cache)
    return caches


def _will_grow(cache: Tensor) -> None:
    """Tells Dynamo, as AOTAutograd does of results whose sizes change, that the length is to be a symbol when it first meets this
    cache: the next call's would be another one. Nothing is guarded by it, and a PyTorch that does not know it takes no notice."""
    cache._dynamo_propagated_dynamic_indices = {2}  # type: ignore[attr-defined]


def _views(parts: Sequence[Tensor], geometry: tuple, length: int) -> Sequence[Tensor]:
    """[B,H,length,D] of every layer; parts: tensors over the layers' storages, which begin where the result does."""
    _, batch, heads, width, _, _ = geometry
    size, stride = (batch, heads, length, width), (heads * width, width, batch * heads * width, 1)
    if parts[0].is_inference():
        return [p.as_strided(size, stride) for p in parts]
    # Detached: a window remembers the tensor that it is a view of, whose sizes Dynamo checks too; they must not be the capacity.
    return [p.detach().as_strided(size, stride) for p in parts]


def groups_of(specs: Sequence[KvSpec]) -> list[KvGroup]:
    """Caches grouped so that each group can share a slab; empty and filled caches never mix."""
    found: dict[tuple, list[tuple[int, KvSpec]]] = {}
    for number, spec in enumerate(specs):
        sizes = tuple(str(s) for s in (spec.batch, spec.heads, spec.new_length))
        key = (*sizes, spec.width, spec.dtype, spec.argument is None)
        found.setdefault(key, []).append((number, spec))
    return [KvGroup(group) for group in found.values()]
