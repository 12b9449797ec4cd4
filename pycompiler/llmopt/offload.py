"""The option weights="packed": a model's own weights leave memory once their packed copies exist.

They move to a memory-mapped file, which the operating system may drop from memory and brings back when something reads it: an
embedding lookup, `state_dict()`, eager code. So every use of the model stays right, and edits in place still work; only the packed
copy stays in memory. The file has no name any more as soon as it is mapped, and goes with its last tensor.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import tempfile
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from llmopt import settings

log = logging.getLogger("llmopt")

# The mapped storages, by address; a tensor whose storage is one of them has moved already.
_mapped: dict[int, StorageWeakRef] = {}
_failed = False


def offload(tensors: Iterable[Tensor]) -> bool:
    """Moves what the tensors hold to mapped memory; True when any moved. Where no file can be written they stay, with a warning."""
    global _failed
    moved = False
    for tensor in tensors:
        if _failed or _is_mapped(tensor) or tensor.numel() == 0:
            continue
        try:
            _move(tensor)
        except OSError as error:
            _failed = True
            log.warning("llmopt: weights stay in memory beside their packed copies: %s", error)
            continue
        moved = True
    return moved


def _is_mapped(tensor: Tensor) -> bool:
    known = _mapped.get(tensor.untyped_storage().data_ptr())
    return known is not None and not known.expired()


def _move(tensor: Tensor) -> None:
    storage = tensor.untyped_storage()
    folder = settings.cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=folder, prefix="weights-")
    try:
        # Written, not only sized: a full disk is an error here instead of a crash at the first touch of a page.
        with os.fdopen(handle, "wb") as file:
            file.write(_bytes_of(storage))
        copy = torch.UntypedStorage.from_file(name, True, storage.nbytes())
    finally:
        os.unlink(name)
    _mapped[copy.data_ptr()] = StorageWeakRef(copy)
    flat = torch.empty(0, dtype=tensor.dtype).set_(copy)  # type: ignore[arg-type]
    layout = (tensor.size(), tensor.stride(), tensor.storage_offset())
    with torch.no_grad():
        tensor.data = flat.as_strided(*layout)
    drop_pages(tensor)


def _bytes_of(storage: torch.UntypedStorage) -> memoryview:
    return memoryview((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr()))


def drop_pages(tensor: Tensor) -> None:
    """Tells the operating system that a mapped tensor's pages need not stay in this process."""
    storage = tensor.untyped_storage()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise(
        ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes()), mmap.MADV_DONTNEED
    )
