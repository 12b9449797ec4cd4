"""Generated kernels for chains of pointwise operations and row reductions: every operation, drawn chains, layouts, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from llmopt.gpu.run import run
from llmopt.kernels import pointwise
from llmopt.kernels.operands import dtype_name
from llmopt.launch import ChainProblem, RowTile
from llmopt.ops.pointwise import BINARY, REDUCE, UNARY
from llmopt.target import gpu_target

from tests.tolerance import assert_close

HOPPER = gpu_target("cuda:90")
# The interpreter's arithmetic on infinities and NaNs is numpy's, which warns.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
SPECIAL = [0.0, -0.0, 1.0, -2.5, 0.003, 30.0, -100.0, math.inf, -math.inf, math.nan]


def problem(program, inputs, y, results=None):
    k = y.shape[-1] if y.dim() else 1
    results = results or (len(inputs) + len(program) - 1,)
    return ChainProblem(y.numel() // k, k, dtype_name(y.dtype), len(inputs), program, results)


def result(program, inputs, y, tile=None):
    """y, written by the generated kernel over inputs that broadcast to its shape."""
    p = problem(program, inputs, y)
    tile = tile or pointwise.tiles(p, HOPPER)[0]
    run(pointwise.launch(p, tile, HOPPER, y.shape, [t.expand(y.shape) for t in inputs], [y]))
    return y


def exact(program, inputs):
    """The chain in float64, as ops/pointwise.py reads it."""
    values = [t.double() for t in inputs]
    for op, *args in program:
        if op == "const":
            values.append(torch.tensor(args[0], dtype=torch.float64))
            continue
        if op == "where":
            condition, a, b = (values[number] for number in args)
            values.append(torch.where(condition != 0, a, b))
            continue
        table = {"unary": UNARY, "binary": BINARY, "reduce": REDUCE}[op]
        values.append(table[args[0]](*(values[a] for a in args[1:])))
    return values[-1]


@pytest.mark.parametrize("name", UNARY)
def test_unary(name):
    x = torch.cat((torch.randn(300) * 3, torch.tensor(SPECIAL)))
    program = (("unary", name, 0),)
    assert_close(result(program, [x], torch.empty_like(x)), exact(program, [x]))


@pytest.mark.parametrize("name", BINARY)
def test_binary(name):
    x = torch.tensor(SPECIAL)[:, None].expand(-1, len(SPECIAL))
    program = (("binary", name, 0, 1),)
    assert_close(result(program, [x, x.T], torch.empty(x.shape)), exact(program, [x, x.T]))


def test_a_choice_by_bools_and_by_numbers():
    x = torch.tensor(SPECIAL)[:, None].expand(-1, len(SPECIAL))
    program = (("where", 0, 1, 2), ("binary", "gt", 1, 2), ("where", 4, 3, 0))
    for condition in (torch.rand(x.shape) < 0.5, torch.randn(x.shape).round()):
        inputs = [condition, x, x.T]
        assert_close(result(program, inputs, torch.empty(x.shape)), exact(program, inputs))


def test_truths_are_stored_as_bools():
    x = torch.tensor(SPECIAL)[:, None].expand(-1, len(SPECIAL))
    for name in ("lt", "ge", "ne", "logical_or"):
        program = (("binary", name, 0, 1),)
        got = result(program, [x, x.T], torch.empty(x.shape, dtype=torch.bool))
        assert torch.equal(got, exact(program, [x, x.T]).bool())


@pytest.mark.parametrize("name", REDUCE)
@pytest.mark.parametrize("columns", [1, 3, 300])
def test_a_reduction_and_what_reads_it(name, columns):
    x = torch.randn(2, 3, columns).half()
    x[0, 1, -1] = math.nan
    program = (("reduce", name, 0), ("binary", "sub", 0, 1))
    assert_close(result(program, [x], torch.empty_like(x)), exact(program, [x]))


def test_a_float16_sum_is_added_in_float32():
    x = torch.full((1, 4096), 60.0).half()
    program = (("reduce", "mean", 0),)
    assert result(program, [x], torch.empty_like(x)).eq(60).all()


def test_constants_keep_every_digit_and_infinities():
    x = torch.ones(40)
    for value in (0.1, -1e-30, math.inf, 3e38):
        program = (("const", value), ("binary", "mul", 0, 1))
        want = torch.full((40,), value)
        assert torch.equal(result(program, [x], torch.empty(40)), want)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_layouts(dtype):
    """Transposed, sliced and broadcast inputs, and a result with gaps."""
    whole = torch.randn(4, 6, 2, 33)
    inputs = [
        whole.permute(1, 2, 0, 3)[..., ::2],
        torch.randn(17),
        torch.randn(6, 1, 4, 1),
        torch.randn(1),
    ]
    inputs = [t.to(dtype) for t in inputs]
    program = (("binary", "mul", 0, 1), ("binary", "add", 4, 2), ("binary", "sub", 5, 3))
    for chain in (program, (*program, ("reduce", "mean", 6), ("binary", "div", 6, 7))):
        gaps = torch.full((6, 2, 4, 20), 7.0, dtype=dtype)
        assert_close(result(chain, inputs, gaps[..., :17], None), exact(chain, inputs))
        assert (gaps[..., 17:] == 7).all()


def test_a_result_may_be_its_input():
    x = torch.randn(3, 100)
    want = x.double().exp()
    assert_close(result((("unary", "exp", 0),), [x], x, RowTile(128)), want)


def test_several_results():
    x = torch.randn(5, 30)
    program = (("unary", "exp", 0), ("unary", "neg", 1), ("unary", "sin", 0))
    p = problem(program, [x], x, (3, 1))
    y = torch.empty_like(x), torch.empty_like(x).half()
    run(pointwise.launch(p, RowTile(64), HOPPER, x.shape, [x], y))
    assert_close(y[0], x.double().sin())
    assert_close(y[1], x.double().exp())


@st.composite
def chains(draw):
    """(program, number of inputs): values stay near one, so that errors say something about the kernel."""
    inputs = draw(st.integers(1, 3))
    program: list[tuple] = []
    for number in range(inputs, inputs + draw(st.integers(1, 6))):
        value = st.integers(0, number - 1)
        kind = draw(st.sampled_from(("unary", "unary", "binary", "binary", "const", "reduce")))
        if kind == "const":
            program.append(("const", draw(st.floats(-2, 2, width=32))))
        elif kind == "reduce":
            program.append(("reduce", draw(st.sampled_from(("mean", "max"))), draw(value)))
        elif kind == "unary":
            names = ("neg", "abs", "tanh", "sigmoid", "silu", "gelu_tanh", "sin", "erf")
            program.append(("unary", draw(st.sampled_from(names)), draw(value)))
        else:
            names = ("add", "sub", "mul", "maximum", "minimum")
            program.append(("binary", draw(st.sampled_from(names)), draw(value), draw(value)))
    return tuple(program), inputs


@settings(max_examples=25, deadline=None)
@example(((("reduce", "mean", 0), ("reduce", "max", 1)), 1), torch.float16, [3])
@given(chains(), st.sampled_from(FLOATS), st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_drawn_chains(chain, dtype, shape):
    program, count = chain
    inputs = [(torch.rand(shape) + 0.5).to(dtype) for _ in range(count)]
    want = exact(program, inputs).expand(shape)
    got = result(program, inputs, torch.empty(shape))
    # What cancels has errors of the size of its operands.
    assert torch.allclose(got.double(), want, rtol=1e-4, atol=1e-4)


def test_equal_chains_share_a_function_and_layouts_do_not():
    program = (("unary", "exp", 0),)

    def function(x):
        y = torch.empty(x.shape)
        p = problem(program, [x], y)
        return pointwise.launch(p, RowTile(64), HOPPER, x.shape, [x], [y]).function

    assert function(torch.randn(3, 8)) is function(torch.randn(4, 16))
    assert function(torch.randn(3, 8)) is not function(torch.randn(8, 3).T)


def test_what_it_cannot_do_is_named():
    p = problem((("unary", "lgamma", 0),), [torch.ones(4)], torch.ones(4))
    assert pointwise.reject(p, HOPPER).startswith("operation 'lgamma': neg, abs")
    p = problem((("matmul", 0, 0, 0),), [torch.ones(4)], torch.ones(4))
    assert pointwise.reject(p, HOPPER).startswith("instruction 'matmul'")
    wide = torch.ones(1, pointwise.WIDEST + 1)
    p = problem((("reduce", "max", 0),), [wide], wide)
    assert "up to 16384" in pointwise.reject(p, HOPPER)


def test_debug_level_4_shows_the_source(monkeypatch, capsys):
    monkeypatch.setenv("LLMOPT_DEBUG", "4")
    pointwise._function.cache_clear()
    x = torch.ones(7)
    result((("unary", "log", 0),), [x], torch.empty(7))
    text = capsys.readouterr().out
    assert "def pointwise_log(" in text
    assert "v1 = tl.log(v0)" in text
