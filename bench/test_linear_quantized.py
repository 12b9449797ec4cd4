"""linear_quantized: decode rows against the read probe, prefill against the probe of byte products (vectors or tiles).

Rounding the inputs and the epilogue are in our times. Beside 8-bit products stands `torch._int_mm` alone, on codes that are there
already and without scales; beside the others PyTorch's linear in float32.
"""

from __future__ import annotations

import pytest
import torch
from llmopt import _C
from llmopt.native.linear_quantized import PLANES
from llmopt.packing import code_bytes, memory_bytes, pack_codes
from llmopt.program import DTYPE_CODES, OneOp
from llmopt.quant.rounding import by_reference, round_weight
from llmopt.quant.schemes import SCHEMES, CodeForm, Scheme, scheme_of
from llmopt.target import target

from bench.conftest import copies_beyond_cache
from bench.shapes import DECODE_LINEARS, PREFILL_LINEARS, SMALL_BATCH_LINEARS, Linear
from bench.test_linear import SILU, output, tensor_over, theirs

GEMM_ROWS = 16  # below, a product with 8-bit inputs is bound by reading

FORMS = [
    scheme_of("w8a8", group="channel"),
    scheme_of("w8a8", group=128),
    *SCHEMES.values(),
]


def ours(shape: Linear, w: torch.Tensor, x: torch.Tensor, scheme: Scheme, copies: int):
    """Steps over as many copies of the packed weight, and its bytes."""
    form = CodeForm(scheme.bits, scheme.group_of(shape.k), scheme.symmetric)
    halves = list(w.chunk(2)) if shape.gated else [w]
    codes = [round_weight(half, scheme) for half in halves]
    groups = shape.k // form.group
    size = memory_bytes(code_bytes(shape.n, groups, form, target().panel_width))
    memories = [_C.Memory(size) for _ in range(copies)]
    first = tensor_over(memories[0], size)
    pack_codes(codes, form, memories[0], shape.gated, target().tier)
    act = [SILU, 1] if shape.gated else [0, 0]
    ints = [shape.n, shape.k, DTYPE_CODES[torch.uint8], *act, 0]
    ints += [form.bits, form.group, int(not form.symmetric), PLANES[scheme.activations]]
    calls, y = [], output(shape, x.dtype)
    for memory in memories:
        packed = tensor_over(memory, size)
        if packed.data_ptr() != first.data_ptr():
            packed.copy_(first)
        operands = [x, packed, None, None, y, None, None]
        calls.append(OneOp("linear_quantized", operands, ints, [0.0, 1.0, 0.0]))
    return calls, memories, size


@pytest.mark.parametrize("scheme", FORMS, ids=lambda s: f"{s.name}-g{s.group}")
@pytest.mark.parametrize(
    "shape", [*DECODE_LINEARS, *SMALL_BATCH_LINEARS, *PREFILL_LINEARS], ids=str
)
def test_linear_quantized(timed, shape, scheme):
    if scheme.reject(shape.k):
        pytest.skip(scheme.reject(shape.k))
    x = torch.randn(shape.m, shape.k)
    w = torch.randn(shape.n, shape.k) / shape.k**0.5
    copies = copies_beyond_cache(shape.n * shape.k * scheme.bits // 8)
    calls, _memories, size = ours(shape, w, x, scheme, copies)
    calls[0]()
    got, want = calls[0].tensors[4], theirs(shape, w, x)()
    assert (got - want).norm() < 0.2 * want.norm()  # never the time of a wrong result
    products = PLANES[scheme.activations]
    multiplies = f"s{scheme.bits}"
    timed(
        "llmopt", name_of(shape, scheme), torch.int8, calls, shape.flops, size, multiplies, products
    )


@pytest.mark.parametrize("scheme", FORMS, ids=lambda s: f"{s.name}-g{s.group}")
@pytest.mark.parametrize(
    "shape", [*DECODE_LINEARS, *SMALL_BATCH_LINEARS, *PREFILL_LINEARS], ids=str
)
def test_torch_beside_it(timed, shape, scheme):
    if scheme.reject(shape.k):
        pytest.skip(scheme.reject(shape.k))
    what = name_of(shape, scheme)
    if scheme.activations == "int8" and scheme.bits == 8 and shape.m >= GEMM_ROWS:
        copies = copies_beyond_cache(shape.n * shape.k)
        calls = [int_mm(shape) for _ in range(copies)]
        timed("_int_mm", what, torch.int8, calls, shape.flops, shape.num_bytes(1), "s8")
        return
    x, w = torch.randn(shape.m, shape.k), torch.randn(shape.n, shape.k)
    copies = copies_beyond_cache(shape.num_bytes(4))
    calls = [theirs(shape, w.clone(), x) for _ in range(copies)]
    timed("torch fp32", what, torch.int8, calls, shape.flops, shape.num_bytes(4), "f32")


def name_of(shape: Linear, scheme: Scheme) -> str:
    return f"linear {shape} {scheme.name} g{scheme.group or shape.k}"


def int_mm(shape: Linear):
    x = torch.randint(-127, 128, (shape.m, shape.k), dtype=torch.int8)
    w = torch.randint(-127, 128, (shape.n, shape.k), dtype=torch.int8)
    return lambda: torch._int_mm(x, w.T)


@pytest.mark.parametrize("system", ["llmopt", "torch"])
@pytest.mark.parametrize("name", ["w8a8", "w4a16"])
def test_round_weight(timed, name, system):
    """Weights to codes, as quantize does; its roof is reading the weights and writing the codes."""
    shape, scheme = DECODE_LINEARS[5], SCHEMES[name]
    w = torch.randn(shape.n, shape.k) / shape.k**0.5
    rounding = round_weight if system == "llmopt" else by_reference
    num_bytes = shape.num_bytes(4) + shape.n * shape.k * scheme.bits // 8
    what = f"round_weight {shape.n}x{shape.k} {name} g{scheme.group}"
    timed(system, what, w.dtype, [lambda: rounding(w, scheme)], 0.0, num_bytes)
