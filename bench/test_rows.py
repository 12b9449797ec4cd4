"""norm and embedding against PyTorch, and the read probe over the bytes that move."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from llmopt.program import OneOp

from bench.conftest import copies_beyond_cache
from bench.shapes import GATHERS, ROWS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RMS, LAYER = 1, 2  # kinds of csrc/cpu/rows/norm.h


@pytest.mark.parametrize("system", ["llmopt", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [RMS, LAYER], ids=["rms", "layer"])
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_norm(timed, shape, kind, dtype, system):
    num_bytes = shape.num_bytes(2, dtype.itemsize)
    weight, bias = torch.rand(shape.width).to(dtype), torch.rand(shape.width).to(dtype)
    bias = bias if kind == LAYER else None
    first = torch.randn(shape.rows, shape.width).to(dtype)
    sources = [first.clone() for _ in range(copies_beyond_cache(num_bytes))]

    def reference(x):
        if kind == RMS:
            return lambda: F.rms_norm(x, (shape.width,), weight, 1e-5)
        return lambda: F.layer_norm(x, (shape.width,), weight, bias, 1e-5)

    if system == "torch":
        calls = [reference(x) for x in sources]
    else:
        outs = [torch.empty_like(x) for x in sources]
        calls = [
            OneOp("norm", [x, None, weight, bias, y, None], [kind], [1e-5, 0.0])
            for x, y in zip(sources, outs, strict=True)
        ]
        calls[0]()  # never the time of a wrong result
        torch.testing.assert_close(outs[0], reference(sources[0])(), atol=3e-2, rtol=3e-2)
    name = "rms_norm" if kind == RMS else "layer_norm"
    timed(system, f"{name} {shape}", dtype, calls, 0.0, num_bytes)


@pytest.mark.parametrize("system", ["llmopt", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", GATHERS, ids=str)
def test_embedding(timed, shape, dtype, system):
    table = torch.randn(shape.vocab, shape.width).to(dtype)
    choices = [torch.randint(shape.vocab, (shape.tokens,)) for _ in range(16)]
    y = torch.empty(shape.tokens, shape.width, dtype=dtype)
    if system == "torch":
        calls = [lambda ids=ids: F.embedding(ids, table) for ids in choices]
    else:
        calls = [OneOp("embedding", [ids, table, y], (), [1.0]) for ids in choices]
        calls[0]()
        assert torch.equal(y, table[choices[0]])
    num_bytes = 2 * shape.tokens * shape.width * dtype.itemsize
    timed(system, f"embedding {shape}", dtype, calls, 0.0, num_bytes)
