"""Elementwise operations of PyTorch that run in chains: each on numbers of all kinds, in every dtype, beside eager."""

from __future__ import annotations

import operator
from collections.abc import Callable
from math import inf, nan
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from llmopt.compiled import alive
from llmopt.graph import kind
from torch import Tensor

from tests.tolerance import assert_close

WIDTH = 24
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NUMBERS = torch.tensor([0.0, -0.0, 1e-4, -1e-4, 0.1, 0.5, -0.5, 1.0, -1.0, 3.0, -3.0, 6.5, 20.5, -30.0, 90.0, -90.0])  # fmt: skip
SPECIAL = torch.tensor([inf, -inf, nan])
XIELU = torch.tensor(-1e-6)

EVERYWHERE: dict[str, Callable[[Tensor], Any]] = {
    "elu": F.elu,
    "elu, alpha": lambda x: F.elu(x, 0.3, True),
    "selu": F.selu,
    "celu": lambda x: F.celu(x, 0.7),
    "logsigmoid": F.logsigmoid,
    "hardshrink": F.hardshrink,
    "softshrink": lambda x: F.softshrink(x, 0.4),
    "tanhshrink": F.tanhshrink,
    "softsign": F.softsign,
    "softplus": F.softplus,
    "softplus, sharp": lambda x: F.softplus(x, beta=3.0, threshold=10.0),
    "hardtanh": lambda x: F.hardtanh(x, -0.7, 2.0),
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "mish": F.mish,
    "leaky_relu": F.leaky_relu,
    "threshold": lambda x: F.threshold(x, 0.5, -7.0),
    "prelu": lambda x: F.prelu(x, torch.full((1,), 0.25, dtype=x.dtype)),
    "expm1": torch.expm1,
    "exp2": torch.exp2,
    "log1p": torch.log1p,
    "floor": torch.floor,
    "round": torch.round,
    "cube": lambda x: x**3,
    "fourth power": lambda x: x.pow(4),
    "root": lambda x: x**0.5,
    "inverse root": lambda x: x**-0.5,
    "inverse square": lambda x: x**-2,
    "where": lambda x: torch.where(x > 0.1, x * 2, x - 1),
    "where, numbers": lambda x: torch.where(x <= -0.5, -inf, 2.0 * x),
    "masked_fill": lambda x: x.masked_fill(x < 0, -1.5),
    "masked_fill, a tensor": lambda x: x.masked_fill(x.abs() >= 1, torch.zeros((), dtype=x.dtype)),
    "gate": lambda x: x * (x != 0.5),
    "step": lambda x: (x >= 0.1).to(x.dtype),
    "and": lambda x: ((x > 0) & (x < 1)).to(x.dtype) - x,
    "or, xor, not": lambda x: torch.where((x < -1) | ~(x < 1) ^ (x == 3), x, -x),
    "logical": lambda x: x.masked_fill(torch.logical_or(torch.logical_not(x > 0), x > 6), 0.0),
    "comparison": lambda x: x < x * 0 + 0.1,
    "truth of numbers": lambda x: x.eq(x),
    "where of bools": lambda x: x * (x > 0).where(x > -1, x < -2),
    "where of a tensor": lambda x: (x * 2).where(x > 0.5, x - 1),
    "softplus, flat": lambda x: F.softplus(x, 0.0) * x,
    "larger": lambda x: torch.max(x, -x * 0.5),
    "smaller": lambda x: torch.minimum(x, x * x),
    "clamp by tensors": lambda x: torch.clamp(x, min=-x.abs(), max=x * x),
    "addcmul": lambda x: torch.addcmul(x, x, x, value=0.5),
    "addcdiv": lambda x: torch.addcdiv(x, x, x.abs() + 1, value=2),
    "xielu": lambda x: torch.where(x > 0, 0.8 * x * x + 0.5 * x, (torch.expm1(torch.min(x, XIELU.to(x.dtype))) - x) * 0.3),
}  # fmt: skip
OF_ROWS: dict[str, Callable[[Tensor], Any]] = {
    "amax": lambda x: x - x.amax(-1, keepdim=True),
    "amin": lambda x: x - x.amin(dim=-1, keepdim=True),
    "norm": lambda x: x / x.norm(dim=-1, keepdim=True),
    "norm, p": lambda x: x / x.norm(p=2, dim=-1, keepdim=True),
    "vector_norm": lambda x: x / torch.linalg.vector_norm(x, dim=-1, keepdim=True),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "normalize, eps": lambda x: F.normalize(x, p=2.0, dim=2, eps=30.0),
    "var": lambda x: x * x.var(-1, keepdim=True),
    "var, biased": lambda x: x * torch.var(x, dim=-1, unbiased=False, keepdim=True),
    "std": lambda x: (x - x.mean(-1, keepdim=True)) / (x.std(dim=-1, keepdim=True) + 1e-3),
    "std, correction": lambda x: x / torch.std(x, -1, correction=0, keepdim=True),
    "logsumexp": lambda x: x - torch.logsumexp(x, -1, keepdim=True),
    "log_softmax": lambda x: F.log_softmax(x, dim=-1),
    "log_softmax, method": lambda x: x.log_softmax(-1) * 0.5,
}


def table(dtype: torch.dtype, special: bool) -> Tensor:
    """[rows, WIDTH]; special ones are a row's last."""
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(7, WIDTH, generator=gen) * 2
    x[0, : len(NUMBERS)] = NUMBERS
    if special:
        x[1, -3:] = SPECIAL
        x[2, -1], x[3, -1], x[4] = inf, -inf, -inf
    return x.to(dtype)


def check(
    functions: dict[str, Callable[[Tensor], Any]], dtype: torch.dtype, special: bool
) -> tuple[set[str], Any]:
    """Each on the rows of an embedding, which are a kernel's; all in one graph. Returns the kinds of what has no kernel, and the plan."""
    torch._dynamo.reset()
    before = {id(g) for g in alive()}
    rows, ids = table(dtype, special), torch.arange(7)[None]

    def call(ids: Tensor, rows: Tensor) -> list[Tensor]:
        return [function(F.embedding(ids, rows)) for function in functions.values()]

    with torch.no_grad():
        results = torch.compile(call, backend="llmopt")(ids, rows)
    (plan,) = [g.plan for g in alive() if id(g) not in before]
    for name, got, want, exact in zip(
        functions, results, call(ids, rows), call(ids, rows.float()), strict=True
    ):
        assert got.dtype == want.dtype, name
        assert got.stride() == want.stride(), name
        try:
            if dtype == torch.float32 or not want.dtype.is_floating_point:
                assert_close(got, want)
            else:
                assert_near(got, want, exact)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}\n{plan}") from None
    return {kind(f.node) for f in plan.fallbacks}, plan


def assert_near(got: Tensor, want: Tensor, exact: Tensor) -> None:
    """As far from what float32 gives as PyTorch's, which rounds in between; special where it or PyTorch's is."""
    for special in (torch.isnan, torch.isposinf, torch.isneginf):
        ours = special(got)
        assert ((ours == special(want)) | (ours == special(exact.to(got.dtype)))).all(), special
    finite = torch.isfinite(got) & torch.isfinite(want) & torch.isfinite(exact)
    ours, theirs = ((t - exact)[finite].double().abs() for t in (got, want))
    unit = exact[finite].double().abs().clamp_min(1e-3) * torch.finfo(got.dtype).eps
    assert (ours <= theirs + 1.01 * unit).all()


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chains(dtype: torch.dtype, special: bool) -> None:
    left, plan = check(EVERYWHERE | OF_ROWS, dtype, special)
    assert left <= {"full", "tensor", "zeros", "to"}, plan
    assert len(plan.segments) == 1, plan


LEFT: dict[str, Callable[[Tensor], Any]] = {
    "elu of ATen": lambda x: torch.ops.aten.elu(x, 1.0, 2.0, 0.5),
    "powers that need logarithms": lambda x: x.abs() ** 1.3,
    "slopes of channels": lambda x: F.prelu(x, torch.linspace(0, 1, 7).to(x.dtype)),
    "a number of another dtype": lambda x: x > torch.tensor(0.1),
    "a norm of first order": lambda x: x / x.norm(p=1, dim=-1, keepdim=True),
    "rows that are not last": lambda x: x - x.amax(1, keepdim=True),
    "rows that lose a dimension": lambda x: x.std(-1),
    "integers": lambda x: (x > 0).sum(-1, keepdim=True) * 2,
    "bools that are added": lambda x: torch.where((x > 0) + (x < 1), x, 0.0),
    "log_softmax of one": lambda x: x + F.log_softmax(x.mean(-1, keepdim=True), -1),
    "normalize of one": lambda x: x + F.normalize(x.mean(-1, keepdim=True), dim=-1),
    "norm of one": lambda x: x + x.mean(-1, keepdim=True).norm(dim=-1, keepdim=True),
    "numbers among bools": lambda x: (x > 0).masked_fill(x > 1, 2) * x,
    "another dtype": lambda x: torch.log_softmax(x, -1, torch.float64).to(x.dtype),
    "a mask of integers": lambda x: x * (torch.arange(WIDTH) > 3),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_left_to_pytorch(dtype: torch.dtype) -> None:
    left, plan = check(LEFT, dtype, special=False)
    assert left >= {"elu", "pow", "prelu", "norm", "amax", "std", "sum", "log_softmax"}, plan


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_are_rounded_as_in_pytorch(dtype: torch.dtype) -> None:
    """0.1 is no float16, but is equal to the float16 next to it; 1e9 is beyond all of them."""

    def choice(compare: Callable[..., Any], number: float) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.where(compare(x, number), x, -x)

    compared = (operator.lt, operator.le, operator.eq, operator.ne, operator.ge)
    functions = {f"{c.__name__} {n}": choice(c, n) for c in compared for n in (0.1, -0.5, 1e9, inf)}
    check(functions, dtype, special=True)


def test_what_is_compared_is_rounded_first() -> None:
    """A chain keeps float32 between its operations; PyTorch's product of these float16 numbers is 0."""
    functions = {
        "a product": lambda x: torch.where((x * 1e-4) * 1e-4 == 0, 1.0, 2.0),
        "a product that is widened": lambda x: torch.where(
            (x * 1e-4 * 1e-4).float() == 0, 1.0, 2.0
        ),
        "a sum": lambda x: torch.floor(x * 3.0 + 1.0),
    }
    check(functions, torch.float16, special=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_that_jump(dtype: torch.dtype) -> None:
    """What they judge is rounded first, and so are their numbers where PyTorch rounds them."""
    functions = {
        "hardshrink": lambda x: F.hardshrink(x, 0.3) * 1.5,
        "hardshrink of a sum": lambda x: F.hardshrink(x * 3.0 + 0.1, 0.5) * 1.5,
        "threshold": lambda x: F.threshold(x, 0.3, 20.0) * 1.5,
        "threshold of a sum": lambda x: F.threshold(x * 3.0 + 0.1, 0.5, 20.0) * 1.5,
        "softplus": lambda x: F.softplus(x * 3.0, 1.0, 0.25) * 1.5,
    }
    torch._dynamo.reset()
    x = torch.cat((torch.arange(-400, 400) / 100, torch.tensor([0.3, -0.3]))).view(2, -1).to(dtype)
    for name, function in functions.items():
        with torch.no_grad():
            got, want = torch.compile(function, backend="llmopt")(x), function(x)
        torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-6, msg=name)


def test_a_row_of_zeros_is_normalized_as_in_pytorch() -> None:
    """Whose smallest norm is 0 in float16."""
    for dtype in DTYPES:
        x = torch.zeros(2, 8, dtype=dtype)
        call = lambda x: F.normalize(x, dim=-1) * 1.5  # noqa: E731
        got = torch.compile(call, backend="llmopt")(x)
        assert torch.equal(got.isnan(), call(x).isnan())


def test_sizes_that_change() -> None:
    torch._dynamo.reset()
    call = lambda ids, rows: F.log_softmax(F.elu(F.embedding(ids, rows)), -1)  # noqa: E731
    compiled, rows = torch.compile(call, backend="llmopt"), table(torch.float32, False)
    for length in (1, 5, 2, 7):
        ids = torch.arange(length)[None]
        with torch.no_grad():
            assert_close(compiled(ids, rows), call(ids, rows))
