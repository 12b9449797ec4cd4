"""The elementwise VM against float64: ops, access patterns, dtypes, reductions, aliasing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmopt import _C
from llmopt.native.vm import (
    REDUCTIONS,
    SUPPORTED_BINARY,
    SUPPORTED_UNARY,
    VmProgram,
)
from llmopt.program import run_op

from tests.kernels.activations import EXACT
from tests.tolerance import assert_close

each_tier = pytest.mark.parametrize("tier", _C.tiers())
SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, 2.5, -3.5, 7.0, math.inf, -math.inf, math.nan, 1e-40, 3e38]

UNARY = {
    "copy": lambda a: a,
    "neg": torch.neg,
    "abs": torch.abs,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "log": torch.log,
    "log1p": torch.log1p,
    "erf": torch.erf,
    "square": torch.square,
    "sin": torch.sin,
    "cos": torch.cos,
    "round": torch.round,
    "floor": torch.floor,
    "logical_not": lambda a: torch.logical_not(a).to(a.dtype),
    "round_f16": lambda a: a.half().to(a.dtype),
    "round_bf16": lambda a: a.bfloat16().to(a.dtype),
    **{name: exact for name, exact in EXACT.items() if name != "none"},
}
BINARY = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "lt": lambda a, b: torch.lt(a, b).to(a.dtype),
    "le": lambda a, b: torch.le(a, b).to(a.dtype),
    "gt": lambda a, b: torch.gt(a, b).to(a.dtype),
    "ge": lambda a, b: torch.ge(a, b).to(a.dtype),
    "eq": lambda a, b: torch.eq(a, b).to(a.dtype),
    "ne": lambda a, b: torch.ne(a, b).to(a.dtype),
    "logical_and": lambda a, b: torch.logical_and(a, b).to(a.dtype),
    "logical_or": lambda a, b: torch.logical_or(a, b).to(a.dtype),
}
REDUCE = {"sum": torch.sum, "mean": torch.mean, "max": torch.amax, "min": torch.amin}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(program: VmProgram, inputs, outputs, tier: str, threads: int | None = None) -> None:
    shape = torch.broadcast_shapes(*(t.shape for t in (*inputs, *outputs)))
    operands = [t.expand(shape) for t in (*inputs, *outputs)]
    run_op("vm", operands, *program.encode(), tier=tier, threads=threads)


def test_reference_tables_are_complete():
    assert UNARY.keys() == SUPPORTED_UNARY.keys()
    assert BINARY.keys() == SUPPORTED_BINARY.keys()
    assert REDUCE.keys() == REDUCTIONS.keys()


@each_tier
@pytest.mark.parametrize("name", UNARY)
def test_unary(tier, name):
    x = torch.cat([torch.tensor(SPECIAL), randn(700) * 4])
    program = VmProgram(1, 1)
    program.store(0, program.unary(name, program.load(0)))
    for n in (1, 3, 16, 129, x.numel()):
        y = torch.empty(n)
        run(program, [x[:n]], [y], tier)
        want = UNARY[name](x[:n].double()).float().double()
        huge = want.abs() > 1e30  # a scale for assert_close that is not the one huge value
        assert torch.equal(torch.where(huge, y.double(), 0.0).isinf(), want.isinf())
        assert_close(torch.where(huge, 0.0, y), torch.where(huge, 0.0, want))


@each_tier
@pytest.mark.parametrize("name", BINARY)
def test_binary_with_every_pair_of_special_values(tier, name):
    values = torch.tensor(SPECIAL)
    a, b = values.repeat_interleave(len(SPECIAL)), values.repeat(len(SPECIAL))
    y = torch.empty_like(a)
    program = VmProgram(2, 1)
    program.store(0, program.binary(name, program.load(0), program.load(1)))
    run(program, [a, b], [y], tier)
    torch.testing.assert_close(y, BINARY[name](a, b), rtol=1e-6, atol=0, equal_nan=True)


@each_tier
def test_constants_on_either_side(tier):
    x, y = randn(1000), torch.empty(3, 1000)
    program = VmProgram(1, 3)
    a = program.load(0)
    program.store(0, program.binary("sub", a, program.const(1.5)))
    program.store(1, program.binary("sub", program.const(1.5), a))
    program.store(2, program.binary("div", program.const(3.0), program.const(-0.0)))
    run_op("vm", [x, *y], *program.encode(), tier=tier)
    assert torch.equal(y[0], x - 1.5)
    assert torch.equal(y[1], 1.5 - x)
    assert torch.equal(y[2], torch.full((1000,), -math.inf))


@each_tier
def test_where_and_clamp_treat_nan_like_torch(tier):
    x = torch.tensor(SPECIAL * 3)
    y = [torch.empty_like(x) for _ in range(3)]
    program = VmProgram(1, 3)
    a = program.load(0)
    program.store(0, program.where(a, program.const(2.0), program.unary("neg", a)))
    program.store(1, program.clamp(a, -1.0, 2.0))
    program.store(2, program.clamp(a, high=0.25))
    run(program, [x], y, tier)
    torch.testing.assert_close(y[0], torch.where(x.bool(), 2.0, -x), equal_nan=True)
    torch.testing.assert_close(y[1], x.clamp(-1, 2), equal_nan=True)
    torch.testing.assert_close(y[2], x.clamp(max=0.25), equal_nan=True)


@each_tier
@pytest.mark.parametrize("exponent", [-3, -1, -0.5, 0, 0.5, 1, 2, 3, 5, 16])
def test_pow(tier, exponent):
    x, y = randn(100).abs() + 0.5, torch.empty(100)
    program = VmProgram(1, 1)
    program.store(0, program.pow(program.load(0), exponent))
    run(program, [x], [y], tier)
    torch.testing.assert_close(y, x.double().pow(exponent).float(), rtol=2e-6, atol=0)


@each_tier
@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool, torch.uint8, torch.int8],
    ids=str,
)
def test_dtypes_in_and_out(tier, dtype):
    for shape in [(700,), (5, 33), (3, 600)]:
        x = (randn(*shape) * 40).to(dtype)
        out = dtype if dtype.is_floating_point or dtype is torch.bool else torch.float32
        program = VmProgram(2, 1)
        program.store(0, program.binary("sub", program.load(0), program.load(1)))
        y = torch.empty(shape, dtype=out)
        run(program, [x, x[..., :1]], [y], tier)
        assert torch.equal(y, (x.float() - x[..., :1].float()).to(out))
        strided = torch.zeros(*shape, 3, dtype=out)[..., 1]
        run(program, [x.repeat_interleave(2, -1)[..., ::2], x[..., :1]], [strided], tier)
        assert torch.equal(strided, y)


VIEWS = {
    "plain": lambda x: x,
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "heads": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "last strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "one column": lambda x: x[..., :1],
    "one row": lambda x: x[..., :1, :],
    "one value": lambda x: x[:1, :1, :1, :1],
    "batch": lambda x: x[:, :1],
}


@each_tier
@pytest.mark.parametrize("a_view", VIEWS)
def test_access_patterns(tier, a_view):
    for b_view in VIEWS:
        check_access(tier, a_view, b_view)


def check_access(tier, a_view, b_view):
    for shape in [(2, 3, 4, 5), (1, 2, 3, 576), (2, 1, 2, 1100), (3, 2, 40, 64)]:
        a, b = VIEWS[a_view](randn(*shape)), VIEWS[b_view](randn(*shape, seed=1))
        program = VmProgram(2, 1)
        program.store(0, program.mul_add(program.load(0), program.const(2.0), program.load(1)))
        y = torch.empty(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2)
        run(program, [a, b], [y], tier)
        assert_close(y, (2 * a.double() + b.double()).expand(shape))


@each_tier
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions(tier, name):
    for width in (1, 2, 15, 16, 17, 100, 576, 5000):
        check_reduction(tier, name, width)


def check_reduction(tier, name, width):
    x = randn(2, 7, width).transpose(0, 1)
    program = VmProgram(1, 2)
    total = program.reduce(name, program.load(0))
    program.store(0, program.binary("sub", program.load(0), total))
    program.store(1, total)
    y, one = torch.empty(7, 2, width), torch.empty(7, 2, 1)
    run(program, [x], [y, one], tier)
    want = REDUCE[name](x.double(), -1, keepdim=True)
    assert_close(one, want)
    assert_close(y, x.double() - want)


@each_tier
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_of_special_values(tier, name):
    x = randn(5, 50)
    x[0, 49] = math.nan
    x[1, 0] = math.nan
    x[2, 30] = math.inf
    x[3, 30] = -math.inf
    program = VmProgram(1, 1)
    program.store(0, program.reduce(name, program.load(0)))
    y = torch.empty(5, 1)
    run(program, [x], [y], tier)
    torch.testing.assert_close(y, REDUCE[name](x, -1, keepdim=True), equal_nan=True)


@each_tier
def test_reduction_of_one_value_a_row(tier):
    x, y = randn(4, 1), torch.empty(4, 1)
    program = VmProgram(1, 1)
    program.store(0, program.reduce("sum", program.load(0)))
    run_op("vm", [x.expand(4, 30), y.expand(4, 30)], *program.encode(), tier=tier)
    assert_close(y, x.double() * 30)


def softmax(program: VmProgram, a: int) -> int:
    e = program.unary("exp", program.binary("sub", a, program.reduce("max", a)))
    return program.binary("div", e, program.reduce("sum", e))


@each_tier
@pytest.mark.parametrize("width", [5, 577, 400_000])
def test_softmax_in_one_program(tier, width):
    """The longest rows do not fit the private scratch and use the step's workspace."""
    x, y = randn(3, width), torch.empty(3, width)
    program = VmProgram(1, 1)
    program.store(0, softmax(program, program.load(0)))
    for threads in (1, 2):
        run(program, [x], [y], tier, threads)
        assert_close(y, torch.softmax(x.double(), -1))


@each_tier
def test_layer_norm_with_half_weights(tier):
    x, weight, bias = randn(6, 100), randn(100).half(), randn(100).bfloat16()
    y = torch.empty(6, 100, dtype=torch.bfloat16)
    program = VmProgram(3, 1)
    a = program.load(0)
    d = program.binary("sub", a, program.reduce("mean", a))
    variance = program.reduce("mean", program.unary("square", d))
    scale = program.unary("rsqrt", program.binary("add", variance, program.const(1e-5)))
    n = program.binary("mul", program.binary("mul", d, scale), program.load(1))
    program.store(0, program.binary("add", n, program.load(2)))
    run(program, [x, weight, bias], [y], tier)
    want = torch.nn.functional.layer_norm(x.double(), (100,), weight.double(), bias.double())
    assert_close(y, want)


# Aliasing ---------------------------------------------------------------------------------


@each_tier
@pytest.mark.parametrize("shape", [(1000,), (7, 33), (3, 576), (4096,)], ids=str)
def test_outputs_may_be_inputs(tier, shape):
    """Both outputs see the old values, whichever is written first and whatever is read later."""
    a, b = randn(*shape), randn(*shape, seed=1)
    program = VmProgram(2, 2)
    x, y = program.load(0), program.load(1)
    program.store(0, program.binary("add", x, y))
    late = program.binary("mul", program.unary("exp", program.binary("sub", x, y)), x)
    program.store(1, late)
    want = a.double() + b.double(), (a.double() - b.double()).exp() * a.double()
    run(program, [a, b], [a, b], tier)
    assert_close(a, want[0])
    assert_close(b, want[1])


@each_tier
def test_in_place_chain(tier):
    a = randn(2048)
    want = torch.nn.functional.silu(a.double() * 2 + 1) + a.double()
    program = VmProgram(1, 1)
    x = program.load(0)
    inner = program.binary("add", program.binary("mul", x, program.const(2.0)), program.const(1.0))
    program.store(0, program.binary("add", program.unary("silu", inner), x))
    run(program, [a], [a], tier)
    assert_close(a, want)


@each_tier
def test_in_place_row_statistics(tier):
    a, b = randn(5, 96), randn(5, 96, seed=1)
    want = torch.softmax(a.double(), -1)
    program = VmProgram(2, 2)
    p = softmax(program, program.load(0))
    program.store(0, p)
    program.store(1, program.binary("add", program.load(1), program.reduce("sum", program.load(0))))
    want_b = b.double() + a.double().sum(-1, keepdim=True)
    run(program, [a, b], [a, b], tier)
    assert_close(a, want)
    assert_close(b, want_b)


@each_tier
def test_one_value_stored_to_two_dtypes(tier):
    x = randn(600)
    y = [torch.empty(600, dtype=d) for d in (torch.float32, torch.float16, torch.float32)]
    program = VmProgram(1, 3)
    v = program.unary("tanh", program.load(0))
    for i in range(3):
        program.store(i, v)
    run(program, [x], y, tier)
    for out in y:
        assert_close(out, x.double().tanh())


@each_tier
@pytest.mark.parametrize("n", [1, 31, 513, 577, 1025])
def test_nothing_outside_the_views_is_touched(tier, n):
    wall = 64
    room = torch.full((2, n + 2 * wall), 7.0)
    x, y = (r[wall : wall + n] for r in room)
    x.copy_(randn(n))
    program = VmProgram(1, 1)
    program.store(0, program.unary("square", program.load(0)))
    run(program, [x], [y], tier)
    assert_close(y, x.double().square())
    assert (room[:, :wall] == 7.0).all()
    assert (room[:, wall + n :] == 7.0).all()


@each_tier
def test_empty_and_scalar_tensors(tier):
    program = VmProgram(1, 1)
    program.store(0, program.unary("neg", program.load(0)))
    run(program, [torch.empty(0, 5)], [torch.empty(0, 5)], tier)
    run(program, [torch.empty(5, 0)], [torch.empty(5, 0)], tier)
    y = torch.empty(())
    run(program, [torch.tensor(3.0)], [y], tier)
    assert y == -3.0


@each_tier
def test_threads_agree_bit_for_bit(tier):
    x = randn(77, 1234)
    program = VmProgram(1, 1)
    program.store(0, softmax(program, program.unary("gelu_erf", program.load(0))))
    y = [torch.empty_like(x) for _ in range(3)]
    for threads, out in zip((1, 2, 7), y, strict=True):
        run(program, [x], [out], tier, threads)
    assert torch.equal(y[0], y[1])
    assert torch.equal(y[0], y[2])


# Random programs --------------------------------------------------------------------------

SAFE_UNARY = [
    "neg",
    "abs",
    "tanh",
    "sigmoid",
    "silu",
    "gelu_erf",
    "gelu_tanh",
    "relu",
    "sin",
    "erf",
]
SAFE_BINARY = ["add", "sub", "mul", "maximum", "minimum"]


@each_tier
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_random_programs(tier, data):
    """Bounded operations, and tanh after each: float64 and fp32 stay comparable."""
    draw = data.draw
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 17, 64, 300]), min_size=1, max_size=4))
    while math.prod(shape) > 20_000:
        shape.remove(max(shape))
    num_inputs, num_outputs = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    program = VmProgram(num_inputs, num_outputs)
    inputs, values = [], []
    for i in range(num_inputs):
        kept = [n if draw(st.booleans()) else 1 for n in shape]
        x = randn(*kept, seed=i).tanh()
        inputs.append(x)
        values.append((program.load(i), x.double().expand(shape)))
    for _ in range(draw(st.integers(1, 12))):
        a, want_a = draw(st.sampled_from(values))
        b, want_b = draw(st.sampled_from(values))
        kind = draw(st.sampled_from(["unary", "binary", "reduce", "where", "const"]))
        if kind == "unary":
            name = draw(st.sampled_from(SAFE_UNARY))
            v, want = program.unary(name, a), UNARY[name](want_a)
        elif kind == "binary":
            name = draw(st.sampled_from(SAFE_BINARY))
            v, want = program.binary(name, a, b), BINARY[name](want_a, want_b)
        elif kind == "reduce":
            name = draw(st.sampled_from(["mean", "max", "min"]))
            v = program.reduce(name, a)
            want = REDUCE[name](want_a, -1, keepdim=True).expand(shape)
        elif kind == "where":
            # Compared with a constant that no value meets, so that rounding cannot flip the choice.
            v = program.where(program.binary("lt", a, program.const(5.0)), a, b)
            want = torch.where(want_a < 5.0, want_a, want_b)
        else:
            v, want = program.const(0.37), torch.full(shape, 0.37, dtype=torch.float64)
        v, want = program.unary("tanh", v), want.tanh()
        values.append((v, want))
    outputs, wants = [], []
    for o in range(num_outputs):
        v, want = draw(st.sampled_from(values))
        program.store(o, v)
        outputs.append(torch.empty(shape))
        wants.append(want)
    run(program, inputs, outputs, tier)
    for got, want in zip(outputs, wants, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


# The builder ------------------------------------------------------------------------------
