"""Kernels in triton's interpreter: a process of its own, since triton decides at import whether it interprets (see the Makefile)."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton.language as tl
from cuda_emulator.emulator import Emulator, build
from llmopt import kernels
from llmopt.gpu import launching
from llmopt.gpu.plan import tensors
from llmopt.gpu.run import is_interpreting, run
from llmopt.native import cuda
from triton.runtime import interpreter

assert is_interpreting(), "run these tests with TRITON_INTERPRET=1, as `make test` does"

# The interpreter keeps bf16 as bit patterns in uint16 and multiplies those; a dot product needs their values.
# Elementwise arithmetic on bf16 stays wrong there, which is one more reason why kernels widen right after a load.
_create_dot = interpreter.InterpreterBuilder.create_dot


def _values(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = handle.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def _dot(self, a, b, d, precision, max_num_imprecise):
    return _create_dot(self, _values(a), _values(b), d, precision, max_num_imprecise)


def _to_bfloat16(self, source, dtype, _plain=interpreter.InterpreterBuilder.create_fp_trunc):
    """The interpreter cuts bits off; GPUs round to nearest, ties to even."""
    if dtype.scalar != tl.bfloat16 or source.dtype.scalar != tl.float32:
        return _plain(self, source, dtype)
    bits = source.data.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = np.where(np.isnan(source.data), 0x7FC0, rounded)
    return interpreter.TensorHandle(quiet.astype(np.uint16), dtype.scalar)


def _patch_lang(fn, _plain=interpreter._patch_lang):
    """Every call of a device function looks through triton.language for what its kernel's call has replaced: half the time of a run."""
    languages = [m for m in fn.__globals__.values() if m is tl or m is tl.core]
    if any(tl.core.is_builtin(language.load) for language in languages):
        return _plain(fn)
    return SimpleNamespace(restore=lambda: None)


interpreter._patch_lang = _patch_lang
interpreter.InterpreterBuilder.create_dot = _dot
interpreter.InterpreterBuilder.create_fp_trunc = _to_bfloat16
kernels.load()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def emulated_gpu() -> Emulator:
    return Emulator(build())


@pytest.fixture
def emulator(emulated_gpu, monkeypatch):
    """The library of this installation is the emulated one, whose launches see the tensors of their launch and no others."""
    emulated_gpu.device()
    emulated_gpu.seed(0)

    def launch(step):
        scratch = tensors(step, ("partial_ptr", "counter_ptr"))
        emulated_gpu.buffers(tensors(step, step.reads), [*tensors(step, step.writes), *scratch])
        run(step)

    monkeypatch.setattr(cuda, "library", lambda: emulated_gpu.library)
    monkeypatch.setattr(launching, "run", launch)
    torch._dynamo.reset()
    return emulated_gpu
