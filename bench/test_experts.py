"""grouped_linear and grouped_linear_quantized: the experts of a mixture, beside a loop over the chosen ones in PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from llmopt import _C, ops, packing
from llmopt.native.experts import TABLE_INTS
from llmopt.native.linear_quantized import PLANES
from llmopt.program import DTYPE_CODES, OneOp
from llmopt.quant.rounding import round_weight
from llmopt.quant.schemes import SCHEMES, CodeForm
from llmopt.target import target

from bench.conftest import copies_beyond_cache
from bench.shapes import EXPERTS, Experts
from bench.test_linear import SILU, tensor_over


def routed(shape: Experts) -> torch.Tensor:
    """Where the rows of each expert end, for tokens that choose at random."""
    scores = torch.rand(shape.tokens, shape.experts, generator=torch.Generator().manual_seed(0))
    ids = scores.topk(shape.top).indices.flatten()
    return ops.sort_by_expert(ids, shape.experts)[1]


def chosen(ends: torch.Tensor) -> int:
    return int((ends.diff(prepend=ends.new_zeros(1)) > 0).sum())


def halves(w: torch.Tensor, shape: Experts) -> list[torch.Tensor]:
    return list(w.chunk(2)) if shape.gated else [w]


def step(shape: Experts, op: str, x, packed, ends, form: list[int], weight: torch.dtype) -> OneOp:
    y = torch.empty(x.shape[0], shape.n // 2 if shape.gated else shape.n, dtype=x.dtype)
    table = torch.zeros(shape.experts + 2, TABLE_INTS, dtype=torch.int64)
    act = [SILU, 1] if shape.gated else [0, 0]
    ints = [shape.n, shape.k, DTYPE_CODES[weight], *act, 0, *form]
    operands = [x, packed, None, None, y, None, None, ends, table]
    return OneOp(op, operands, ints, [0.0, 1.0, 0.0])


def theirs(shape: Experts, x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor):
    """One F.linear for each expert that has rows."""

    def run() -> torch.Tensor:
        parts, begin = [], 0
        for expert, end in enumerate(ends.tolist()):
            if end > begin:
                y = F.linear(x[begin:end], w[expert])
                if shape.gated:
                    gate, up = y.chunk(2, -1)
                    y = F.silu(gate) * up
                parts.append(y)
            begin = end
        return torch.cat(parts)

    return run


@pytest.mark.parametrize("system", ["llmopt", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", EXPERTS, ids=str)
def test_experts(timed, shape, dtype, system):
    ends = routed(shape)
    x = torch.randn(shape.tokens * shape.top, shape.k).to(dtype)
    w = (torch.randn(shape.experts, shape.n, shape.k) / shape.k**0.5).to(dtype)
    each = packing.float_bytes(shape.n, shape.k, dtype, target().panel_width)
    size = packing.memory_bytes(each, shape.experts)
    copies = copies_beyond_cache(size)
    if system == "torch":
        calls = [theirs(shape, x, w.clone(), ends) for _ in range(copies)]
    else:
        memories = [_C.Memory(size) for _ in range(copies)]
        for memory in memories:
            for expert, own in enumerate(w):
                packing.pack(halves(own, shape), memory, shape.gated, target().tier, expert * each)
        packed = [tensor_over(memory, size) for memory in memories]
        calls = [step(shape, "grouped_linear", x, p, ends, [], dtype) for p in packed]
        check(calls[0], theirs(shape, x, w, ends)(), 0.02)
    num_bytes = shape.num_bytes(dtype.itemsize, chosen(ends))
    multiplies = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    timed(system, f"experts {shape}", dtype, calls, shape.flops, num_bytes, multiplies)


def check(op: OneOp, want: torch.Tensor, bound: float) -> None:
    """Never the time of a wrong result."""
    op()
    got = op.tensors[4]
    assert (got.float() - want.float()).norm() < bound * want.float().norm()


@pytest.mark.parametrize("name", ["w8a8", "w4a16"])
@pytest.mark.parametrize("shape", EXPERTS, ids=str)
def test_experts_quantized(timed, shape, name):
    scheme = SCHEMES[name]
    form = CodeForm(scheme.bits, scheme.group_of(shape.k), scheme.symmetric)
    ends = routed(shape)
    x = torch.randn(shape.tokens * shape.top, shape.k)
    w = torch.randn(shape.experts, shape.n, shape.k) / shape.k**0.5
    each = packing.code_bytes(shape.n, shape.k // form.group, form, target().panel_width)
    size = packing.memory_bytes(each, shape.experts)
    memories = [_C.Memory(size) for _ in range(copies_beyond_cache(size))]
    for expert, own in enumerate(w):
        codes = [round_weight(half, form) for half in halves(own, shape)]
        for memory in memories:
            at = expert * each
            packing.pack_codes(codes, form, memory, shape.gated, target().tier, at)
    products = PLANES[scheme.activations]
    ints = [form.bits, form.group, int(not form.symmetric), products]
    op = "grouped_linear_quantized"
    packed = [tensor_over(memory, size) for memory in memories]
    calls = [step(shape, op, x, p, ends, ints, torch.uint8) for p in packed]
    check(calls[0], theirs(shape, x, w, ends)(), 0.2)
    what = f"experts {shape} {name} g{form.group}"
    timed(
        "llmopt",
        what,
        torch.int8,
        calls,
        shape.flops,
        chosen(ends) * each,
        f"s{scheme.bits}",
        products,
    )
