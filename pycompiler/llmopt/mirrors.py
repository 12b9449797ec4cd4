"""Mirrors: int8 rows (ops/kv_codes.py) kept beside a cache of floats, so that decoding reads a fraction of its bytes.

The floats stay what everybody reads and writes. The kernel rounds what is new before it reads (csrc/cpu/attention/mirror.h), and notes in
a state, in front of the rows, which of them are up to date. Here: how a mirror lies in memory, and the mirrors of caches that come from the
caller (static ones). Those of growing caches lie behind their floats (kv.py).
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from llmopt import _C
from llmopt.messages import warn_once
from llmopt.ops.kv_codes import SCALE_BYTES

_LINE = 64


def aligned(num_bytes: int) -> int:
    """Rounded up to whole cache lines."""
    return -(-num_bytes // _LINE) * _LINE


@dataclass(frozen=True)
class MirrorLayout:
    """Of a cache [B,H,capacity,D] of one layer: the state [B,H,2] int64, then a row of D + 4 bytes for each position and head."""

    batch: int
    heads: int
    capacity: int
    width: int

    @property
    def state_bytes(self) -> int:
        return aligned(self.batch * self.heads * 2 * 8)

    @property
    def position_bytes(self) -> int:
        """What the rows of one position take."""
        return self.batch * self.heads * (self.width + SCALE_BYTES)

    @property
    def num_bytes(self) -> int:
        return self.state_bytes + aligned(self.capacity * self.position_bytes)


class _Mirror:
    """Of one cache of the caller's, and how often that had been edited when the mirror last held what it held."""

    def __init__(self, cache: Tensor) -> None:
        layout = MirrorLayout(*map(int, cache.shape))
        self.cache = weakref.ref(cache)
        self.shape = cache.shape
        self.place = cache.data_ptr()
        self.version = cache._version
        self._memory = _C.Memory(layout.num_bytes)
        self._state_bytes = layout.state_bytes
        state = self._memory.address
        self.addresses = (state + layout.state_bytes, state)  # of the rows, of the state

    def check(self, cache: Tensor) -> None:
        """Forgets what it holds when somebody else has edited the cache."""
        if cache._version != self.version or cache.data_ptr() != self.place:
            ctypes.memset(self._memory.address, 0, self._state_bytes)
            self.place = cache.data_ptr()


_mirrors: WeakIdKeyDictionary = WeakIdKeyDictionary()  # cache → _Mirror
_lock = threading.Lock()


_INFERENCE = (
    'kv_cache="int8": a cache that was made under inference_mode counts no edits, so it is read as it is; '
    "make it outside, or pass past_key_values=llmopt.KVCache(model)"
)


class CallerMirrors:
    """The mirrors of those arguments of a segment that are caches of the caller's, made when they are first seen."""

    def __init__(self, arguments: Sequence[int]) -> None:
        self._arguments = arguments
        self._last: list[weakref.ref[_Mirror]] = []  # of the call before

    def addresses(self, arguments: Sequence[Tensor]) -> list[tuple[int, int]]:
        """Of each mirror its rows and its state, which says nothing where the cache is not as the last call left it; zeros where edits
        are not counted, and the floats are read."""
        caches = [arguments[a] for a in self._arguments]
        if any(c.is_inference() for c in caches):
            warn_once(_INFERENCE)
            return [(0, 0)] * len(caches)
        last = [mirror() for mirror in self._last] or [None] * len(caches)
        mirrors = [
            m if m is not None and m.cache() is c and m.shape == c.shape else _mirror_of(c)
            for m, c in zip(last, caches, strict=True)
        ]
        if mirrors != last:
            self._last = [weakref.ref(m) for m in mirrors]
        for mirror, cache in zip(mirrors, caches, strict=True):
            mirror.check(cache)
        return [mirror.addresses for mirror in mirrors]

    def written(self, arguments: Sequence[Tensor]) -> None:
        """After a call: its own writes are no edits of somebody else's."""
        for argument in self._arguments:
            cache = arguments[argument]
            if not cache.is_inference():
                _mirror_of(cache).version = cache._version


def _mirror_of(cache: Tensor) -> _Mirror:
    with _lock:
        mirror = _mirrors.get(cache)
        if mirror is None or mirror.shape != cache.shape:
            mirror = _mirrors[cache] = _Mirror(cache)
        return mirror
