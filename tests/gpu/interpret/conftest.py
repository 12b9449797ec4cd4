"""Kernels in triton's interpreter: a process of its own, since triton decides at import whether it interprets (see the Makefile)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton.language as tl
from llmopt import kernels
from llmopt.gpu.run import is_interpreting
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


interpreter.InterpreterBuilder.create_dot = _dot
kernels.load()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
