"""linear and pack_linear: decode rows against the read probe, prefill against the FMA or the tile probe."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from llmopt import _C
from llmopt.program import DTYPE_CODES, OneOp, run_op
from llmopt.target import target

from bench.conftest import copies_beyond_cache
from bench.shapes import DECODE_LINEARS, PREFILL_LINEARS, Linear

SILU = 2  # Activation::silu in csrc/cpu/vec_math.h
PROBED = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def pack(weights: list[torch.Tensor], interleave: bool = False) -> tuple[_C.Memory, torch.Tensor]:
    """The packed form in huge pages, as the backend keeps it, and a tensor over it."""
    panel = target().panel_width
    n, k = sum(w.shape[0] for w in weights), weights[0].shape[1]
    num_bytes = -(-n // panel) * panel * (k + k % 2) * weights[0].element_size()
    memory = _C.Memory(num_bytes + 4096)
    packed = tensor_over(memory, num_bytes)
    run_op("pack_linear", [*weights, packed], ints=[int(interleave)])
    return memory, packed


def tensor_over(memory: _C.Memory, num_bytes: int) -> torch.Tensor:
    import ctypes

    array = (ctypes.c_uint8 * num_bytes).from_address(memory.address)
    return torch.frombuffer(array, dtype=torch.uint8)


def output(shape: Linear, dtype: torch.dtype) -> torch.Tensor:
    """One for all copies of a weight, as an arena and PyTorch's allocator give the same memory again and again."""
    return torch.empty(shape.m, shape.n // 2 if shape.gated else shape.n, dtype=dtype)


def ours(
    shape: Linear, w: torch.Tensor, x: torch.Tensor, y: torch.Tensor
) -> tuple[OneOp, _C.Memory]:
    halves = list(w.chunk(2)) if shape.gated else [w]
    memory, packed = pack(halves, interleave=shape.gated)
    activation = SILU if shape.gated else 0
    ints = [shape.n, shape.k, DTYPE_CODES[w.dtype], activation, int(shape.gated), 0]
    op = OneOp("linear", [x, packed, None, None, y, None, None], ints, [0.0, 1.0, 0.0])
    return op, memory


def theirs(shape: Linear, w: torch.Tensor, x: torch.Tensor):
    if not shape.gated:
        return lambda: F.linear(x, w)
    gate, up = w.chunk(2)
    return lambda: F.silu(F.linear(x, gate)) * F.linear(x, up)


@pytest.mark.parametrize("system", ["llmopt", "torch"])
@pytest.mark.parametrize("dtype", PROBED, ids=str)
@pytest.mark.parametrize("shape", [*DECODE_LINEARS, *PREFILL_LINEARS], ids=str)
def test_linear(timed, shape, dtype, system):
    num_bytes = shape.num_bytes(dtype.itemsize)
    x = torch.randn(shape.m, shape.k).to(dtype)
    first = (torch.randn(shape.n, shape.k) / shape.k**0.5).to(dtype)
    weights = [first.clone() for _ in range(copies_beyond_cache(num_bytes))]
    if system == "torch":
        calls = [theirs(shape, w, x) for w in weights]
    else:
        y = output(shape, dtype)
        built = [ours(shape, w, x, y) for w in weights]
        torch.testing.assert_close(  # never the time of a wrong result
            run(built[0][0]), theirs(shape, weights[0], x)().float(), atol=5e-2, rtol=5e-2
        )
        calls = [op for op, _ in built]
    multiplies = PROBED[dtype]
    timed(system, f"linear {shape}", dtype, calls, shape.flops, num_bytes, multiplies)


def run(op: OneOp) -> torch.Tensor:
    op()
    return op.tensors[4].float()


@pytest.mark.parametrize("shape", DECODE_LINEARS[3:4], ids=str)
def test_pack_linear(timed, shape):
    """Packing reads the weights and writes them once: its roof is half the read probe."""
    w = torch.randn(shape.n, shape.k)
    _, packed = pack([w])
    op = OneOp("pack_linear", [w, packed], [0])
    timed("llmopt", f"pack_linear {shape}", w.dtype, [op], 0.0, 2 * shape.num_bytes(4))
