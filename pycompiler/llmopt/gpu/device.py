"""The GPU that tensors are on, and the target that plans for it: all that is asked of torch's driver beside launches and graphs."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llmopt.target import GPUS, gpu_target, target
from llmopt.types import Target


@dataclass(frozen=True)
class Gpu:
    """One GPU as its driver describes it."""

    device: str  # "cuda" or "hip"
    arch: str  # "90" for compute capability 9.0, "gfx942"
    name: str
    sms: int
    smem_block: int  # bytes of shared memory one block may ask for

    def __str__(self) -> str:
        generation = f"sm_{self.arch}" if self.device == "cuda" else self.arch
        return f"{self.name} ({generation})"


@functools.cache
def gpu_of(device: torch.device) -> Gpu | None:
    """What is known about a torch device; None where it is no GPU. On AMD's GPUs torch says "cuda", too."""
    if device.type != "cuda":
        return None
    found: Any = torch.cuda.get_device_properties(device)
    smem = getattr(found, "shared_memory_per_block_optin", 0) or found.shared_memory_per_block
    if torch.version.hip is not None:
        arch = found.gcnArchName.split(":")[0]
        return Gpu("hip", arch, found.name, found.multi_processor_count, smem)
    arch = f"{found.major}{found.minor}"
    return Gpu("cuda", arch, found.name, found.multi_processor_count, smem)


def gpu_among(values: Sequence[Any]) -> torch.device | None:
    """The first GPU that one of these values is on; None where none is."""
    tensors = (value for value in values if isinstance(value, Tensor))
    return next((t.device for t in tensors if t.device.type == "cuda"), None)


def on(device: torch.device) -> Any:
    """A context in which triton launches on this device's current stream."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def target_of(gpu: Gpu) -> tuple[Target | None, str]:
    """The target that plans for a GPU, with its own multiprocessors and shared memory; or None and the reason.

    A GPU without a row of its own takes the newest one that its generation runs: sm_86 that of sm_80.
    """
    known = ", ".join(row.tier for row in GPUS if row.device == gpu.device)
    rows = [r for r in GPUS if r.gpu and r.device == gpu.device and _runs(gpu.arch, r.gpu.arch)]
    if not rows:
        old = gpu.device == "cuda" and int(gpu.arch) < 80
        why = "too old" if old else "of a generation without kernels"
        return None, f"{gpu} is {why}; possible: {known}"
    row = rows[-1]
    assert row.gpu is not None
    smem = min(gpu.smem_block, row.gpu.smem_block)
    return replace(row, name=gpu.name, gpu=replace(row.gpu, sms=gpu.sms, smem_block=smem)), ""


def _runs(arch: str, row: str) -> bool:
    """True when a GPU runs what is compiled for a row: the same major version, no newer minor one."""
    if not arch.isdigit() or not row.isdigit():
        return arch == row
    return arch[:-1] == row[:-1] and int(row) <= int(arch)


def choose_target(asked: str | None, tensors: Sequence[Tensor]) -> tuple[Target, str]:
    """The target to plan for, and why a graph over these tensors is left to PyTorch all the same, or "".

    asked: the option `target`; None: wherever the tensors are. Numbers in tensors on the CPU may go with tensors on a GPU.
    Raises ValueError when a target was asked for that does not exist or is not the GPU the tensors are on.
    """
    wanted = target() if asked in (None, "cpu") else gpu_target(str(asked))
    devices = list(dict.fromkeys(t.device for t in tensors if t.dim() or t.device.type != "cpu"))
    if len(devices) > 1:
        return wanted, f"tensors on {', '.join(map(str, devices))}: one device is possible"
    gpu = gpu_of(devices[0]) if devices else None
    if gpu is None:
        odd = devices and devices[0].type != "cpu"
        return wanted, f"tensors on {devices[0]}: cpu and cuda are possible" if odd else ""
    if asked == "cpu":
        return wanted, f"tensors on {devices[0]}, and target='cpu' was asked for"
    here, reason = target_of(gpu)
    if asked is None and not reason and importlib.util.find_spec("triton") is None:
        reason = f"{gpu} needs triton: pip install 'llmopt[triton]'"
    if asked is None:
        return (wanted if here is None else here), reason
    if here is None or here.tier != wanted.tier:
        this = reason if here is None else f"{gpu} is planned for as {here.tier}"
        raise ValueError(
            f"llmopt: target={asked!r} is not the GPU the tensors are on: {this}; leave target out to plan for it"
        )
    return here, ""
