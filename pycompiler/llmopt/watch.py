"""Noticing that the packed copies of a segment's weights are out of date."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from llmopt import _C
from llmopt.weights import STORE, samples_of

_ADDRESS = Tensor.data_ptr

# Where PyTorch keeps what a call asks of a tensor, and how much of it: the Python object, the tensor, its storage.
_OBJECT_BYTES, _TENSOR_BYTES, _STORAGE_BYTES = 64, 256, 128


class Watch:
    """Notices when the packed copies of a segment's weights are out of date.

    Compares identity, address and version of every source tensor, and a digest of sampled content: an edit through `.data` changes
    neither version nor address. Each call samples one cache line of every weight, another one than the call before. An edit of a few
    elements through `.data` can escape for a while; `llmopt.refresh` is for that.
    """

    def __init__(self, arguments: tuple, positions: Sequence[int]) -> None:
        """positions: which of a call's arguments are the weights."""
        self.epoch = STORE.epoch
        tensors = [arguments[p] for p in positions]
        counted = [not t.is_inference() for t in tensors]  # those have no edit count
        self._tensors = _C.Arguments(arguments, positions, _ADDRESS, Tensor._version, counted)
        self._samples = samples_of(tensors)
        self._objects = _objects(tensors)

    def same_tensors(self, arguments: tuple) -> bool:
        """The same objects at the same addresses with the same edit counts."""
        self._samples.fetch()  # arrives while the tensors are asked
        return self.epoch == STORE.epoch and self._tensors.same(arguments)

    def same_content(self) -> bool:
        """The sampled lines hold what they held; meaningful only while `same_tensors` is true."""
        return self._samples.unchanged()

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
