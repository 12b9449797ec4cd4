"""The emulated device from Python: the shipped kernels and launchers, compiled for the host over emulator.h.

One library holds kernels, launchers and driver, so that variants of a kernel live beside each other in one process.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from build_tools import ROOT, only_one, run
from llmopt.native.cuda import CudaError, Library

HERE = Path(__file__).parent
CUDA = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "cuda_emulator"
KERNELS = sorted(CUDA.glob("*.cu"))
HOST = [HERE / f"{name}.cpp" for name in ("machine", "memory", "driver", "cubins")]
HOST += [CUDA / "driver.cpp", CUDA / "launch.cpp"]
HEADERS = [*CUDA.glob("*.h"), *HERE.rglob("*.h"), ROOT / "csrc/runtime/tensor.h"]
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-fno-gnu-unique"]
FLAGS += ["-Wno-unknown-pragmas", "-Wno-unused-parameter", "-Wno-unused-variable"]
FLAGS += [f"-I{HERE / 'include'}", f"-I{HERE}", f"-I{ROOT / 'csrc'}"]


class Counters(ctypes.Structure):
    """How the accesses of warps fell together since `count`; see emulator.h."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("shared_accesses", "shared_wavefronts", "shared_ideal"),
            *("global_accesses", "global_sectors", "global_ideal"),
            *("launches", "blocks"),
        )
    ]


def _compile(source: Path, text: str) -> Path:
    """The object of a source with this text, kept by the hash of all it is made from."""
    seen = hashlib.sha256(" ".join(FLAGS).encode())
    for header in sorted(HEADERS):
        seen.update(header.read_bytes())
    seen.update(text.encode())
    out = BUILD / f"{source.stem}-{source.parent.name}-{seen.hexdigest()[:16]}.o"
    if out.exists():
        return out
    copy = out.with_suffix(source.suffix)
    copy.write_text(f'#line 1 "{source.name}"\n{text}')
    front = ["-include", "builtins.h"] if source.suffix == ".cu" else []
    _compiler(*FLAGS, *front, "-x", "c++", "-c", copy, out=out)
    copy.unlink()
    return out


def _compiler(*arguments: str | Path, out: Path) -> None:
    """Runs the compiler; what stands at `out` is always complete."""
    fresh = out.with_suffix(".part")
    run([os.environ.get("CXX", "c++"), *arguments, "-o", fresh])
    fresh.replace(out)


def build(kernels: Iterable[Path] = KERNELS, changed: dict[Path, str] | None = None) -> Path:
    """A shared library of these kernel files in build/cuda_emulator; `changed` replaces the text of some."""
    changed = changed or {}
    with only_one(BUILD):
        objects = [_compile(f, changed.get(f) or f.read_text()) for f in (*kernels, *HOST)]
        name = hashlib.sha256(" ".join(map(str, objects)).encode()).hexdigest()[:16]
        out = BUILD / f"lib{name}.so"
        if not out.exists():
            _compiler("-shared", "-Wl,-Bsymbolic", *objects, "-ldl", out=out)
    return out


def guarded(t: torch.Tensor) -> torch.Tensor:
    """The same values with the same strides, a page away from every other tensor: no access out of bounds hits one by chance."""
    extent = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    margin = 4096 // t.element_size()
    storage = torch.zeros(max(extent, 0) + 2 * margin, dtype=t.dtype)
    return storage.as_strided(t.shape, t.stride(), margin).copy_(t)


class Emulator:
    """The launchers of csrc/cuda over an emulated GPU; launches see only the tensors they were given."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.raw = ctypes.CDLL(str(path))
        self.library = Library(path, str(path))

    def device(
        self,
        capability: int = 80,
        multiprocessors: int = 4,
        shared: int = 166912,
        *,
        context: bool = True,
    ) -> None:
        self.raw.emulator_device(capability, multiprocessors, shared, context)

    def buffers(
        self, read: Iterable[torch.Tensor | None], written: Iterable[torch.Tensor | None]
    ) -> None:
        """The memory that kernels may touch: the storage behind these tensors, from their first to their last element."""
        self.raw.emulator_forget_buffers()
        for tensors, writable in ((read, False), (written, True)):
            for t in tensors:
                if t is not None and t.numel():
                    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
                    num_bytes = (last + 1) * t.element_size()
                    self.raw.emulator_add_buffer(
                        ctypes.c_size_t(t.data_ptr()), ctypes.c_size_t(num_bytes), writable
                    )

    def seed(self, seed: int) -> None:
        self.raw.emulator_seed(seed)

    @contextlib.contextmanager
    def counting(self) -> Iterator[Counters]:
        """Counts the accesses of the launches inside; the counters are read afterwards too."""
        self.raw.emulator_counters.restype = ctypes.POINTER(Counters)
        self.raw.emulator_count(True)
        try:
            yield self.raw.emulator_counters().contents
        finally:
            self.raw.emulator_count(False)

    def run(
        self, kernel: str, params: ctypes.Structure, threads: int, shared: int, grid: int = 1
    ) -> None:
        """Launches any kernel by its name, with no launcher's checks."""
        function = ctypes.cast(getattr(self.raw, kernel), ctypes.c_void_p)
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        self.raw.cuFuncSetAttribute(None, 8, shared)
        sizes = (ctypes.c_uint(v) for v in (grid, 1, 1, threads, 1, 1, shared))
        if self.raw.cuLaunchKernel(function, *sizes, None, arguments, None):
            self.raw.emulator_message.restype = ctypes.c_char_p
            raise CudaError(self.raw.emulator_message().decode())
