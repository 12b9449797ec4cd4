"""Noticing that the packed copies of a segment's weights are out of date."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from llmopt import _C
from llmopt.weights import STORE, PackedWeight, samples_of

_ADDRESS = Tensor.data_ptr

# Where PyTorch keeps what a call asks of a tensor, and how much of it: the Python object, the tensor, its storage.
_OBJECT_BYTES, _TENSOR_BYTES, _STORAGE_BYTES = 64, 256, 128


class Watch:
    """Notices when the packed copies of a segment's weights are out of date.

    Compares identity, address and version of every source tensor. An edit through `.data` changes neither, so each call also looks at
    content: at one cache line of every weight, another one than the call before, which shows at once what changed a whole weight; and
    at one window of 32 KiB of one weight, the next one than the call before, which comes to every element in time. `llmopt.refresh`
    does not wait for that. Of weights that were moved out of memory (`weights="packed"`) only lines are looked at.
    """

    def __init__(self, arguments: tuple, positions: Sequence[int]) -> None:
        """positions: which of a call's arguments are the weights. Before they are packed: an edit meanwhile is one that comes later."""
        self.epoch = STORE.epoch
        tensors = [arguments[p] for p in positions]
        counted = [not t.is_inference() for t in tensors]  # those have no edit count
        self._tensors = _C.Arguments(arguments, positions, _ADDRESS, Tensor._version, counted)
        self._samples = samples_of(tensors)
        self._sweep = _C.Sweep([])
        self._objects = _objects(tensors)

    def sweep(self, packed: Sequence[PackedWeight]) -> Watch:
        """The watch itself, which looks also at all that these were made from."""
        self._sweep = _C.Sweep([p.held.content for p in packed])
        return self

    def same_tensors(self, arguments: tuple) -> bool:
        """The same objects at the same addresses with the same edit counts."""
        self._samples.fetch()  # arrives while the tensors are asked
        return self.epoch == STORE.epoch and self._tensors.same(arguments)

    def same_content(self) -> bool:
        """What was looked at holds what it held; meaningful only while `same_tensors` is true."""
        return self._samples.unchanged() and self._sweep.unchanged()

    def fetch(self) -> None:
        """Asks for the tensors' own records, which the weights have pushed out of the caches: the guards of the next call and
        `same_tensors` ask each of some hundred tensors in turn."""
        self._objects.fetch()


def _objects(tensors: Sequence[Tensor]) -> _C.Prefetch:
    """Only prefetched, never read: whatever these addresses become, nothing goes wrong."""
    places = []
    for t in tensors:
        storage = t.untyped_storage()._cdata
        places += [(id(t), _OBJECT_BYTES), (t._cdata, _TENSOR_BYTES), (storage, _STORAGE_BYTES)]
    return _C.Prefetch([a for a, _ in places], [n for _, n in places])
