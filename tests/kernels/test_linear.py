"""linear and pack_linear: every tier this machine runs, against a float64 reference."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from llmopt import _C
from llmopt.ops.activation import CODES
from llmopt.program import DTYPE_CODES, run_op

from tests.kernels.activations import ACTIVATIONS
from tests.tolerance import assert_close

TIERS = _C.tiers()
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
EPS = 1e-5


@dataclass
class Case:
    """One call of the op: tensors, options, and what the answer is."""

    x: torch.Tensor  # [M,K]
    w: torch.Tensor  # [N,K]; gate rows then up rows when gated
    bias: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    norm: int = 0
    norm_weight: torch.Tensor | None = None
    norm_bias: torch.Tensor | None = None
    norm_offset: float = 0.0
    act: int = 0
    gated: bool = False
    alpha: float = 1.0
    out: torch.dtype = torch.float32
    y: torch.Tensor | None = field(default=None)
    tuning: tuple[int, ...] = ()  # ints behind the op's own, see csrc/cpu/linear/tuning.h

    def reference(self) -> torch.Tensor:
        x = self.x.double()
        if self.norm == 1:
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
        if self.norm == 2:
            x = F.layer_norm(x, x.shape[-1:], eps=EPS)
        if self.norm and self.norm_weight is not None:
            x = x * (self.norm_weight.double() + self.norm_offset)
        if self.norm and self.norm_bias is not None:
            x = x + self.norm_bias.double()
        y = self.alpha * (x @ self.w.double().T)
        if self.bias is not None:
            y = y + self.bias.double()
        if self.gated:
            gate, up = y.chunk(2, -1)
            y = ACTIVATIONS[self.act](gate) * up
        else:
            y = ACTIVATIONS[self.act](y)
        return y if self.residual is None else y + self.residual.double()

    def ints(self) -> list[int]:
        """The op's own."""
        n, k = self.w.shape
        return [n, k, DTYPE_CODES[self.w.dtype], self.act, int(self.gated), self.norm]

    def run(self, tier: str, threads: int) -> torch.Tensor:
        n = self.w.shape[0]
        weights = self.w.chunk(2, 0) if self.gated else [self.w]
        packed = pack(weights, tier, threads, interleave=self.gated)
        y = self.y
        if y is None:
            y = torch.full((self.x.shape[0], n // 2 if self.gated else n), 7.0, dtype=self.out)
        run_op(
            "linear",
            [
                self.x,
                packed,
                self.bias,
                self.residual,
                y,
                self.norm_weight,
                self.norm_bias,
            ],
            ints=[*self.ints(), *self.tuning],
            floats=[EPS, self.alpha, self.norm_offset],
            tier=tier,
            threads=threads,
        )
        return y

    def check(self, tier: str, threads: int = 2) -> None:
        want = self.reference()
        assert_close(self.run(tier, threads), want)


def pack(weights, tier: str, threads: int = 2, interleave: bool = False) -> torch.Tensor:
    """Packed weights, in memory that was full of ones: the pad must be written, or be harmless."""
    n, k = sum(w.shape[0] for w in weights), weights[0].shape[1]
    width = _C.panel_width(tier)
    num_bytes = -(-n // width) * width * (k + k % 2) * weights[0].element_size()
    packed = torch.full((num_bytes + 4096,), 255, dtype=torch.uint8)
    run_op("pack_linear", [*weights, packed], ints=[int(interleave)], tier=tier, threads=threads)
    return packed


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def case(m: int, n: int, k: int, dtype: torch.dtype = torch.float32, **options) -> Case:
    w = (randn(n, k, seed=2) / max(1, k) ** 0.5).to(dtype)
    return Case(randn(m, k, dtype=dtype, seed=1), w, **{"out": dtype, **options})


AWKWARD = [  # of all triples the third in which every pair of sizes still meets
    (m, n, k)
    for (i, m), (j, n), (h, k) in product(
        enumerate((1, 2, 3, 5, 12, 13, 17, 129)),
        enumerate((1, 3, 17, 31, 33, 48, 100)),
        enumerate((1, 2, 3, 17, 64, 129)),
    )
    if (i + j + h) % 3 == 0
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_awkward_sizes(tier, dtype):
    for m, n, k in AWKWARD:
        case(m, n, k, dtype).check(tier, threads=1 + n % 2)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_every_tile_height(tier, dtype):
    for m in range(1, 45):
        case(m, 70, 37, dtype).check(tier)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_k_blocks(tier, dtype):
    """K so long that it is cut, with row tiles and panels left over."""
    case(31, 70, 6149, dtype, bias=randn(70)).check(tier)


@pytest.mark.parametrize("k", [1280, 2560])
@pytest.mark.parametrize("tier", TIERS)
def test_k_that_fills_the_scratch_of_a_thread(tier, k):
    """Wide chunks of several K blocks: what one thread prepares must not reach the sums of the next."""
    case(128, 416, k).check(tier)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_many_rows(tier, dtype):
    """More rows than every kernel for few of them takes: tiles of rows, K and panels that end in the middle."""
    for m, n, k in ((97, 40, 31), (128, 96, 64), (145, 33, 33), (600, 290, 700), (100, 20, 5000)):
        c = case(m, n, k, dtype, bias=randn(n), residual=randn(m, n, dtype=dtype), act=2, norm=1)
        c.check(tier)


@pytest.mark.parametrize("tier", TIERS)
def test_large_and_small_numbers(tier):
    """Everything f32 can hold next to each other: no intermediate form may overflow or lose the small ones."""
    for m in (5, 100):
        c = case(m, 40, 96)
        c.x[:, ::2] *= 1e30
        c.w[:, ::2] *= 1e-30
        c.x[:, 1] = torch.finfo(torch.float32).max
        c.w[:, 1] = 1e-38
        c.w[:, 3] = torch.finfo(torch.float32).max
        c.x[:, 3] = 1e-37
        c.check(tier)


@pytest.mark.parametrize("x_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("w_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_mixed_dtypes(tier, x_dtype, w_dtype):
    for m, out in product((1, 4, 19, 97), FLOATS):
        c = case(m, 50, 67, w_dtype, out=out, bias=randn(50, dtype=x_dtype))
        c.x = c.x.to(x_dtype)
        c.residual = randn(m, 50, dtype=w_dtype)
        c.norm, c.norm_weight = 1, randn(67, dtype=out)
        c.check(tier)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("tier", TIERS)
def test_epilogues(tier, act, gated):
    for m, has_bias, has_residual in product((1, 3, 21), (False, True), (False, True)):
        outputs = 45
        n = 2 * outputs if gated else outputs
        case(
            m,
            n,
            40,
            act=act,
            gated=gated,
            alpha=0.7 if has_bias else 1.0,
            bias=randn(n) if has_bias else None,
            residual=randn(m, outputs, seed=5) if has_residual else None,
        ).check(tier)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("act", [CODES["silu"], CODES["gelu_erf"], CODES["gelu_tanh"]])
@pytest.mark.parametrize("tier", TIERS)
def test_activations_of_half_precision(tier, act, dtype):
    """No further from the function than the dtype rounds, half as much again, and 1e-5: tables of some tiers count."""
    tiny = torch.logspace(-7, -1, 500)
    x = torch.cat([torch.linspace(-40, 40, 20_001), tiny, -tiny, torch.tensor([0.0, 1e4, -1e30])])
    case = Case(x[:, None], torch.ones(48, 1), act=act, out=dtype)
    want, got = case.reference(), case.run(tier, 2).double()
    rounding = {torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    assert ((got - want).abs() <= 1.5 * rounding * want.abs() + 1e-5).all()
    case.x = torch.tensor([[float("nan")], [-float("inf")], [float("inf")]])
    no_number, below, above = case.run(tier, 2)
    assert no_number.isnan().all()
    assert below.isnan().all(), "as in PyTorch, which multiplies infinity with zero"
    assert (above == float("inf")).all()
    small = want.abs() < 0.05
    small &= x[:, None].abs() < 0.1  # not of the tails: these keep their digits
    assert ((got - want).abs() <= 1.5 * rounding * want.abs() + 6e-8)[small].all()


@pytest.mark.parametrize("tier", TIERS)
def test_gelu_keeps_its_digits_below_zero(tier):
    """One output alone is held to its own size: 1e-5 of what may be 1e-8."""
    for x in torch.linspace(-6, -1, 51):
        Case(x.reshape(1, 1), torch.ones(1, 1), act=CODES["gelu_erf"]).check(tier)


@pytest.mark.parametrize("tier", TIERS)
def test_gelu_far_below_zero_is_tiny_and_not_zero(tier):
    """Its float64 in torch is -0.0 here, for want of bits; the kernel that takes the sigmoid's form keeps all of its own."""
    c = Case(torch.tensor([[-9.0]]), torch.ones(1, 1), act=CODES["gelu_tanh"])
    assert -1e-27 < c.reference().item() < -1e-29
    c.check(tier)


@pytest.mark.parametrize("norm", [1, 2], ids=["rms", "layer"])
@pytest.mark.parametrize("tier", TIERS)
def test_norms(tier, norm):
    for m, k, has_weight, has_bias in product(
        (1, 2, 15), (1, 5, 64, 131), (False, True), (False, True)
    ):
        c = case(m, 33, k, norm=norm, norm_offset=1.0 if has_bias else 0.0)
        c.norm_weight = randn(k, seed=3) if has_weight else None
        c.norm_bias = randn(k, seed=4) if has_bias else None
        c.x = c.x * 3 + 1
        c.check(tier)


@pytest.mark.parametrize("tier", TIERS)
def test_layer_norm_of_a_large_mean(tier):
    """A mean a thousand times the deviation costs no digits."""
    for m in (1, 20):
        c = case(m, 40, 768, norm=2)
        c.x = c.x + 1000.0
        c.check(tier)


@pytest.mark.parametrize("tier", TIERS)
def test_strided_rows(tier):
    """Row strides beyond K, and a stride of 4096 bytes, where all rows fall in one cache set."""
    for m, stride in product((1, 12, 40), (70, 1024)):
        c = case(m, 36, 65)
        wide = torch.full((m, stride), float("nan"))
        wide[:, :65] = c.x
        c.x = wide[:, :65]
        c.y = torch.full((m, 100), 7.0)[:, 10:46]
        c.residual = randn(1, 36).expand(m, 36)
        c.check(tier)
        base = c.y._base
        assert (base[:, :10] == 7).all()
        assert (base[:, 46:] == 7).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_y_may_be_the_residual(tier, dtype):
    for m in (1, 7, 50):
        c = case(m, 75, 64, dtype)
        c.y = randn(m, 75, dtype=dtype)
        c.residual = c.y.clone()
        want = c.reference()
        c.residual = c.y
        assert_close(c.run(tier, 2), want)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_packing_of_strided_weights(tier, dtype):
    """A transposed view (GPT-2's Conv1D), columns of a wider matrix, and every second element."""
    for n, k in product((5, 64, 83), (3, 32, 71)):
        c = case(3, n, k, dtype)
        for w in (
            c.w.T.contiguous().T,
            F.pad(c.w, (3, 2))[:, 3 : k + 3],
            c.w.repeat_interleave(2, 1)[:, ::2],
        ):
            assert torch.equal(w, c.w)
            Case(c.x, w, out=dtype).check(tier)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_packing_is_the_same_for_every_way_to_get_there(tier, dtype):
    """Concatenation in one go or before packing, one thread or two: the same bytes."""
    parts = [randn(n, 77, dtype=dtype, seed=n) for n in (33, 1, 64, 20)]
    whole = pack([torch.cat(parts)], tier, threads=1)
    assert torch.equal(pack(parts, tier), whole)
    turned = [parts[0].T.contiguous().T, *parts[1:]]
    assert torch.equal(pack(turned, tier), whole)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("tier", TIERS)
def test_threads_give_the_same_bits(tier, threads):
    """Cutting the work otherwise must not change a single sum's order."""
    for m in (1, 6, 90, 300):
        c = case(m, 200, 300, norm=2, bias=randn(200))
        assert torch.equal(c.run(tier, threads), c.run(tier, 1))
        c = case(m, 200, 300, gated=True, act=5, residual=randn(m, 100))
        assert torch.equal(c.run(tier, threads), c.run(tier, 1))


@pytest.mark.parametrize("tier", TIERS)
def test_empty_problems(tier):
    assert case(0, 40, 64, norm=1).run(tier, 2).shape == (0, 40)
    for m in (1, 30):
        assert case(m, 0, 64).run(tier, 2).shape == (m, 0)
        assert (case(m, 40, 0).run(tier, 2) == 0).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("norm", [0, 1], ids=["plain", "rms"])
@pytest.mark.parametrize("tier", TIERS)
def test_nan_and_inf_propagate(tier, norm, dtype):
    """Odd K and N: what stands in the pad must neither hide them nor make new ones."""
    for m in (1, 5, 30, 101):
        c = case(m, 35, 67, dtype, norm=norm)
        c.x[0, 66] = float("nan")
        if m > 1:
            c.x[m - 1, 3] = float("inf")
        c.check(tier)
        c = case(m, 35, 67, dtype, norm=norm)
        c.w[34, 66] = float("inf")
        c.w[2, 0] = float("nan")
        c.check(tier)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_problem(data):
    """Whatever is asked for in whatever combination."""
    draw = data.draw
    dtype = st.sampled_from(FLOATS)
    m, outputs, k = draw(st.integers(1, 130)), draw(st.integers(1, 90)), draw(st.integers(1, 150))
    gated = draw(st.booleans())
    n = 2 * outputs if gated else outputs
    c = case(m, n, k, draw(dtype), gated=gated, act=draw(st.sampled_from(list(ACTIVATIONS))))
    c.out = draw(dtype)
    c.x = c.x.to(draw(dtype))
    c.alpha = draw(st.sampled_from([1.0, 0.25]))
    c.bias = draw(st.sampled_from([None, randn(n, dtype=draw(dtype))]))
    c.residual = draw(st.sampled_from([None, randn(m, outputs, dtype=draw(dtype))]))
    c.norm = draw(st.sampled_from([0, 1, 2]))
    c.norm_weight = draw(st.sampled_from([None, randn(k, dtype=draw(dtype))]))
    c.norm_bias = draw(st.sampled_from([None, randn(k, dtype=draw(dtype))]))
    if draw(st.booleans()):
        c.w = c.w.T.contiguous().T
    c.check(draw(st.sampled_from(TIERS)), threads=draw(st.integers(1, 3)))
