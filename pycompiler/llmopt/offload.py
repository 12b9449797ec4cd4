"""The option weights="packed": a model's own weights leave memory once their packed copies exist.

They move to a memory-mapped file, which the operating system may drop from memory and brings back when something reads it: an
embedding lookup, `state_dict()`, eager code. So every use of the model stays right, and edits in place still work: an edited page
becomes this process's own memory, and neither the file nor a forked process sees the edit. The file has no name any more as soon as
it is mapped, and goes with its last tensor.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import tempfile
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from llmopt import settings

log = logging.getLogger("llmopt")

# The mapped storages, by address; a tensor whose storage is one of them has moved already.
_mapped: dict[int, StorageWeakRef] = {}
_kept: set[str] = set()  # reasons to leave a weight where it is that were logged already


def offload(tensors: Iterable[Tensor]) -> bool:
    """Moves what the tensors hold to mapped memory; True when any moved.

    A weight stays where it is when moving it would cut it off from another tensor. Where no file can be written all that is left
    stays, with a warning.
    """
    for address in [a for a, storage in _mapped.items() if storage.expired()]:
        del _mapped[address]
    moved = False
    for group in _by_storage(tensors):
        if group[0].untyped_storage().data_ptr() in _mapped:
            continue
        reason = _why_not(group)
        if reason:
            if reason not in _kept:
                log.warning("llmopt: a weight stays in memory beside its packed copy: %s", reason)
            _kept.add(reason)
            continue
        try:
            _move(group)
        except (OSError, RuntimeError) as error:
            log.warning("llmopt: weights stay in memory beside their packed copies: %s", error)
            break
        moved = True
    return moved


def is_moved(tensor: Tensor) -> bool:
    """Whether what the tensor holds is in mapped memory."""
    storage = _mapped.get(tensor.untyped_storage().data_ptr())
    return storage is not None and not storage.expired()


def _by_storage(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """The tensors with elements, each once, those of one storage together."""
    groups: dict[int, dict[int, Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            storage = tensor.untyped_storage()
            groups.setdefault(storage.data_ptr(), {})[id(tensor)] = tensor
    return [list(group.values()) for group in groups.values()]


def _why_not(group: Sequence[Tensor]) -> str:
    """Why the storage that the tensors share must stay, or ""."""
    if any(t.is_inference() for t in group):
        return "it was made in inference mode, where tensors cannot be given other memory"
    if group[0].is_shared():
        return "it is shared with other processes"
    storage = group[0].untyped_storage()
    if any(t.numel() * t.element_size() != storage.nbytes() for t in group):
        return "it is a part of a larger piece of memory"
    holders = torch._C._storage_Use_Count(storage._cdata) - 1  # the Python object `storage` is one
    return "other tensors share its memory" if holders > len(group) else ""


def _move(group: Sequence[Tensor]) -> None:
    """Gives tensors of one storage a private mapping of a file that holds it. Raises OSError or RuntimeError when it cannot be made."""
    content = _mapped_copy(group[0].untyped_storage())
    with torch.inference_mode(False), torch.no_grad():
        flat = torch.frombuffer(content, dtype=torch.uint8)
        _mapped[flat.data_ptr()] = StorageWeakRef(flat.untyped_storage())
        for tensor in group:
            layout = (tensor.size(), tensor.stride(), tensor.storage_offset())
            tensor.data = flat.view(tensor.dtype).as_strided(*layout)


def _mapped_copy(storage: torch.UntypedStorage) -> mmap.mmap:
    folder = settings.cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=folder, prefix="weights-")
    with os.fdopen(handle, "r+b") as file:
        os.unlink(name)
        # Written, not only sized: a full disk is an error here instead of a crash at the first touch of a page.
        file.write((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr()))
        file.flush()
        return mmap.mmap(file.fileno(), storage.nbytes(), access=mmap.ACCESS_COPY)
