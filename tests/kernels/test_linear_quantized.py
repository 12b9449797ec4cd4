"""linear_quantized and its packing: every tier this machine runs, against float64."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmopt import _C
from llmopt.ops.linear_quantized import dequantized, quantized_activations
from llmopt.program import run_op

from tests.kernels.activations import ACTIVATIONS
from tests.kernels.test_linear import EPS, FLOATS, Case, randn
from tests.tolerance import WORDS, assert_close

TIERS = _C.tiers()
U8 = 6  # DType::u8 in csrc/runtime/tensor.h
TERM_GROUP = 32  # kTileK of csrc/cpu/linear/terms.h
HEIGHTS = {"amx": 14, "avx512_vnni": 14, "avx512": 12, "avx2": 4, "scalar": 4}  # kLoneRows
# Tiers that multiply several rows of activations as they are in f32, whatever the group.
FLOAT_TIERS = [t for t in TIERS if t in ("scalar", "avx2", "avx512")]


@dataclass
class Weights:
    """Quantised weights as the op takes them."""

    codes: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None
    bits: int

    @property
    def group(self) -> int:
        k = self.codes.shape[1] * (1 if self.bits == 8 else 2)
        return k // self.scale.shape[1]

    def dense(self) -> torch.Tensor:
        offset = None if self.offset is None else self.offset.double()
        return dequantized(self.codes, self.scale.double(), offset, self.bits)

    def rows(self, start: int, end: int) -> Weights:
        offset = None if self.offset is None else self.offset[start:end]
        return Weights(self.codes[start:end], self.scale[start:end], offset, self.bits)


def weights(n: int, k: int, bits: int, group: int, offsets: bool, seed: int = 0) -> Weights:
    """Random codes over their whole range, and scales that 4-bit packing keeps exactly (f16)."""
    generator = torch.Generator().manual_seed(seed + n + k)
    low, high = (-127, 128) if bits == 8 else (0, 256)
    width = k if bits == 8 else k // 2
    codes = torch.randint(low, high, (n, width), generator=generator)
    codes = codes.to(torch.int8 if bits == 8 else torch.uint8)
    scale = (torch.rand(n, k // group, generator=generator) + 0.5).half().float() / k**0.5 / 8
    scale = scale.half().float()
    offset = torch.randn(n, k // group, generator=generator).half().float() if offsets else None
    return Weights(codes, scale, offset, bits)


def packed_bytes(n: int, w: Weights, tier: str) -> int:
    panel = _C.panel_width(tier)
    k = w.group * w.scale.shape[1]
    steps = -(-w.group // 8)
    codes = steps * panel * w.bits
    scales = panel * (4 if w.bits == 8 else 2) * (1 if w.offset is None else 2)
    each = k // w.group * (codes + scales) + (0 if w.bits == 8 else 4 * panel)
    return -(-n // panel) * each


def pack(parts: list[Weights], tier: str, threads: int = 2, interleave: bool = False):
    """The packed form, in memory that was full of ones."""
    n = sum(w.codes.shape[0] for w in parts)
    packed = torch.full((packed_bytes(n, parts[0], tier) + 4096,), 255, dtype=torch.uint8)
    tensors = [t for w in parts for t in (w.codes, w.scale, w.offset)]
    ints = [parts[0].bits, parts[0].group, int(interleave)]
    run_op("pack_linear_quantized", [*tensors, packed], ints, tier=tier, threads=threads)
    return packed


@dataclass
class QuantizedCase(Case):
    """One call of the op; `w` of the base class is the dense weight."""

    weights: Weights | None = None
    planes: int = 1  # 1: activations rounded to 8 bits; else as they are
    exact: bool = False

    def on_terms(self, tier: str) -> bool:
        """Whether bf16 tiles multiply it: activations keep the bits of their terms then, no scheme rounds them."""
        (m, k), group = self.x.shape, self.weights.group
        least = 24 if self.planes > 1 else 40 if self.weights.bits == 4 else 64  # least_term_rows
        return (
            tier == "amx"
            and group < k
            and group % TERM_GROUP == 0
            and m >= least
            and not self.exact
        )

    def on_words(self, tier: str) -> bool:
        """Whether it is multiplied as 16-bit fixed point."""
        (m, k), group = self.x.shape, self.weights.group
        may_widen = not self.tuning and (k <= 128 or group % 8 == 0 or group == k)
        return (
            tier == "avx512_vnni" and self.planes > 1 and m >= 24 and may_widen and not self.exact
        )

    def reference(self, as_they_are: bool = False) -> torch.Tensor:
        if self.planes > 1 or as_they_are:
            return super().reference()
        x = self.x
        if self.norm:  # the op rounds what a float32 norm gives
            x = self.normalized().float()
        q, scale = quantized_activations(x, self.weights.scale.shape[1])
        rounded = (q.double() * scale.double()[..., None]).flatten(-2)
        plain = Case(rounded, self.w, self.bias, self.residual, act=self.act, gated=self.gated)
        plain.alpha = self.alpha
        return plain.reference()

    def normalized(self) -> torch.Tensor:
        k = self.x.shape[1]
        eye = Case(self.x, torch.eye(k, dtype=torch.float64), norm=self.norm)
        eye.norm_weight, eye.norm_bias = self.norm_weight, self.norm_bias
        eye.norm_offset = self.norm_offset
        return eye.reference()

    def run(self, tier: str, threads: int) -> torch.Tensor:
        n = self.w.shape[0]
        w = self.weights
        parts = [w.rows(0, n // 2), w.rows(n // 2, n)] if self.gated else [w]
        packed = pack(parts, tier, threads, self.gated)
        y = self.y
        if y is None:
            y = torch.full((self.x.shape[0], n // 2 if self.gated else n), 7.0, dtype=self.out)
        operands = [self.x, packed, self.bias, self.residual, y, self.norm_weight, self.norm_bias]
        ints, floats = [*self.ints(), *self.tuning], [EPS, self.alpha, self.norm_offset]
        run_op("linear_quantized", operands, ints, floats, tier, threads)
        return y

    def ints(self) -> list[int]:
        n, k = self.w.shape
        w = self.weights
        form = [w.bits, w.group, int(w.offset is not None), self.planes, int(self.exact)]
        return [n, k, U8, self.act, int(self.gated), self.norm, *form]


def case(m, n, k, bits=8, group=None, offsets=False, planes=1, dtype=torch.float32, **options):
    w = weights(n, k, bits, group or k, offsets)
    x = randn(m, k, dtype=dtype, seed=1)
    options = {"out": dtype, **options}
    return QuantizedCase(x, w.dense(), weights=w, planes=planes, **options)


FORMS = [  # bits, group as a share of K, offsets
    (bits, group, offsets)
    for bits, group, offsets in product((8, 4), (32, 64, 128, None), (False, True))
]


@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize(("bits", "group", "offsets"), FORMS, ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_every_form(tier, bits, group, offsets, planes):
    for m, n in product((1, 5, 33), (1, 40)):
        c = case(m, n, 256, bits, group, offsets, planes)
        check(c, tier)


# K, and groups: short ones, some that are no multiple of a step, and some longer than a K block.
LONG_GROUPS = (
    (4352, 64),
    (4350, 150),
    (4800, 1600),
    (4100, 4100),
    (8200, 4100),
    (4108, 2054),
    (6192, 2064),
)


@pytest.mark.parametrize("planes", [2, 3])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tier", TIERS)
def test_activations_as_they_are_in_k_blocks(tier, bits, planes):
    """Where such rows are multiplied in f32: blocks that begin with a group, and inside one that is longer than a block."""
    for (k, group), m in product(LONG_GROUPS, (2, 15)):
        check(case(m, 35, k, bits, group, m == 2, planes), tier)


@pytest.mark.parametrize("tier", TIERS)
def test_a_cut_without_a_family_stays_in_its_scratch(tier):
    """The largest spans and blocks, of activations as they are: results and neighbours' memory stay what they were."""
    for (span, tiles), m in product(((8, 0), (8, 200), (1, 1400)), (2, 400)):
        c = case(m, 8 * _C.panel_width(tier) + 1, 2600, 8, 104, planes=3)
        want, bound = c.run(tier, 2), WORDS if c.on_words(tier) else None
        c.tuning = [1, 1 << 40, 0, 0, 0, span, tiles, 0]
        assert_close(c.run(tier, 2), want, bound)


def check(c: QuantizedCase, tier: str, threads: int = 2) -> None:
    """Two planes keep 15 bits of the largest activation in a group, two terms 16: what f16 is held to. One term is bf16, words have a
    bound of their own; the others are exact or as f32."""
    terms = c.on_terms(tier)
    want, got = c.reference(as_they_are=terms), c.run(tier, threads)
    bound = None
    if terms and (c.planes == 1 or c.x.dtype == torch.bfloat16):
        bound = torch.bfloat16
    elif c.on_words(tier) and got.dtype == torch.float32:
        bound = WORDS
    elif (c.planes == 2 or terms) and got.dtype == torch.float32:
        bound = torch.float16
    assert_close(got, want, bound)


@pytest.mark.parametrize("planes", [1, 3])
@pytest.mark.parametrize(("bits", "group", "offsets"), FORMS, ids=str)
def test_many_rows(bits, group, offsets, planes):
    """What tiles are for: whole and ragged row tiles, several panels, K in blocks and parts (a cache holds less than K = 8192)."""
    for (m, n, k), dtype in product(((64, 70, 256), (97, 40, 384), (129, 33, 8192)), FLOATS):
        c = case(m, n, k, bits, group, offsets, planes, dtype)
        c.bias, c.residual = randn(n, dtype=dtype), randn(m, n, dtype=dtype)
        check(c, TIERS[0])


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_epilogues_of_many_rows(act, gated):
    """Bytes with one scale a column, and terms, of activations as they are: a steep activation magnifies bf16's rounding."""
    for group, planes in ((64, 1), (64, 3), (32, 3)):
        n = 90 if gated else 45
        c = case(90, n, 64, 8, group, act=act, gated=gated, planes=planes, alpha=0.7)
        c.bias, c.residual = randn(n), randn(90, 45, seed=5)
        check(c, TIERS[0])


def test_a_scaled_sum_beyond_float32_is_not_read():
    """Without offsets the sums of activations mean nothing, so that they may overflow."""
    c = case(64, 40, 512, 8)
    c.x[:] = 1e36
    assert c.run(TIERS[0], 2).isfinite().all()


@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tier", TIERS)
def test_sums_within_float32_are_finite(tier, bits, offsets):
    """Packed scales of 4-bit codes lie at the top of f16's range: sums over them must not."""
    for m, planes in product((1, 4, 20, 90), (1, 3)):
        c = case(m, 35, 64, bits, 32, offsets, planes=planes)
        c.x *= 3e34
        check(c, tier)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tier", TIERS)
def test_awkward_sizes(tier, bits):
    """K that is no multiple of a step, a vector or a quad; groups that are not either; N around a panel."""
    for (k, group), n, m in product(
        ((2, 2), (6, 2), (30, 30), (60, 20), (54, 18), (132, 44)), (1, 15, 33), (1, 3, 17)
    ):
        check(case(m, n, k, bits, group, offsets=m == 3), tier, threads=1 + n % 2)
    if bits == 8:
        for k, m in product((1, 3, 17, 129), (1, 3, 17)):
            check(case(m, 33, k, 8, planes=1 + 2 * (m == 3)), tier)


@pytest.mark.parametrize("tier", TIERS)
def test_every_tile_height(tier):
    top = HEIGHTS[tier]
    for m, bits in product(range(1, 2 * top + 3), (8, 4)):
        check(case(m, 70, 64, bits, 32), tier)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize("tier", TIERS)
def test_dtypes(tier, planes, dtype):
    for m, out, bits in product((1, 19, 90) if tier == "amx" else (1, 19), FLOATS, (8, 4)):
        c = case(m, 50, 128, bits, 64, bits == 4, planes, dtype, out=out)
        c.bias, c.residual = randn(50, dtype=dtype), randn(m, 50, dtype=out)
        check(c, tier)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("tier", TIERS)
def test_epilogues(tier, act, gated):
    for m, extra in product((1, 21), (False, True)):
        n = 90 if gated else 45
        c = case(m, n, 64, 8, 32, act=act, gated=gated, alpha=0.7 if extra else 1.0)
        c.bias = randn(n) if extra else None
        c.residual = randn(m, 45, seed=5) if extra else None
        check(c, tier)


@pytest.mark.parametrize("norm", [1, 2], ids=["rms", "layer"])
@pytest.mark.parametrize("tier", TIERS)
def test_norms(tier, norm):
    """With activations as they are: rounded ones would differ by a code where the norm differs in its last bit."""
    for m, group, has_weight in product((1, 15, 90), (32, 128), (False, True)):
        c = case(m, 33, 128, 8, group, planes=3, norm=norm, norm_offset=1.0)
        c.norm_weight = randn(128, seed=3) if has_weight else None
        c.norm_bias = randn(128, seed=4) if has_weight else None
        c.x = c.x * 3 + 1
        check(c, tier)


@pytest.mark.parametrize("norm", [1, 2], ids=["rms", "layer"])
@pytest.mark.parametrize("tier", TIERS)
def test_norm_then_rounding(tier, norm):
    for m in (1, 15):
        c = case(m, 33, 128, 8, 32, norm=norm)
        c.norm_weight = randn(128, seed=3)
        assert_close(c.run(tier, 2), c.reference(), torch.float16)


@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize("tier", TIERS)
def test_nan_and_inf_never_become_numbers(tier, planes):
    for m, bad, bits in product((1, 20, 90), (float("nan"), float("inf"), -float("inf")), (8, 4)):
        c = case(m, 35, 64, bits, 32, planes=planes)
        c.x[m - 1, 33] = bad
        y = c.run(tier, 2)
        # Where codes become floats and activations stay as they are, infinity is what it is in PyTorch.
        as_floats = tier in FLOAT_TIERS and planes > 1 and m > 1
        as_floats |= c.on_words(tier)
        assert not y[m - 1].isfinite().any() if as_floats else y[m - 1].isnan().all()
        assert y[: m - 1].isfinite().all()
        c = case(m, 35, 64, bits, 32, planes=planes)
        c.weights.scale[34, 1] = bad
        y = c.run(tier, 2)
        assert not y[:, 34].isfinite().any()
        assert y[:, :34].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tier", TIERS)
def test_nan_and_inf_in_rows_with_one_scale(tier, dtype):
    """Rows that are rounded as they lie, 64 values at a time, and those next to them."""
    for k, bad in product(
        (64, 192, 200), (float("nan"), -float("nan"), float("inf"), -float("inf"))
    ):
        c = case(80, 35, k, 8)
        c.x = c.x.to(dtype)
        c.x[3, k - 1] = c.x[70, 1] = bad
        y = c.run(tier, 2)
        lost = torch.zeros(80, dtype=torch.bool)
        lost[[3, 70]] = True
        assert y[lost].isnan().all()
        assert y[~lost].isfinite().all()


@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize("tier", TIERS)
def test_zero_and_tiny_groups(tier, planes):
    """A group of zeros, or of numbers whose reciprocal overflows, adds nothing; small ones still count."""
    for m in (1, 20, 90):
        c = case(m, 35, 128, 8, 32, planes=planes)
        c.x[:, :32], c.x[:, 32:64] = 0, 1e-39
        check(c, tier)
        c.x[:] = 1e-30 * randn(m, 128)
        c.weights.scale[:] = 1e20
        c.w = c.weights.dense()
        check(c, tier)
        c.x[:] = 0
        assert (c.run(tier, 2) == 0).all()


@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize("group", [257, 504, 512, 513, 1024])
@pytest.mark.parametrize("tier", TIERS)
def test_the_largest_sums(tier, group, planes):
    """Every product at its largest, of either sign: no sum of integers wraps. Planes of 16 bits fit up to groups of 512."""
    halves = 1 - 0.49 / 127, 1 - 0.49 / 32767  # leave most of a code to the next plane
    for code, sign, x in product((127, -127, -128), (1.0, -1.0), (1.0, *halves)):
        c = case(1, 35, 2 * group, 8, group, planes=planes)
        c.weights.codes[:] = code
        c.x[:] = x * sign
        c.x[:, ::group] = sign
        c.w = c.weights.dense()
        check(c, tier)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize("group", [64, 512])
@pytest.mark.parametrize("tier", TIERS)
def test_every_code_of_an_activation_is_in_its_sum(tier, group, planes, dtype):
    """Weights of 0 are stored as 128, which the sums of the activations' codes take off again: exactly, or some were cut off."""
    for seed in range(30):
        c = case(1, 16, 4 * group, 8, group, planes=planes, dtype=dtype)
        c.x[:] = randn(1, 4 * group, dtype=dtype, seed=seed)
        c.weights.codes[:] = 0
        c.w = c.weights.dense()
        assert (c.run(tier, 1) == 0).all()


@pytest.mark.parametrize("tier", TIERS)
def test_strided_rows(tier):
    for m, planes in product((1, 40, 90), (1, 3)):
        c = case(m, 36, 64, 8, 32, planes=planes)
        wide = torch.full((m, 1024), float("nan"))
        wide[:, :64] = c.x
        c.x = wide[:, :64]
        c.y = torch.full((m, 100), 7.0)[:, 10:46]
        c.residual = randn(1, 36).expand(m, 36)
        check(c, tier)
        base = c.y._base
        assert (base[:, :10] == 7).all()
        assert (base[:, 46:] == 7).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tier", TIERS)
def test_packing_is_the_same_for_every_way_to_get_there(tier, bits):
    parts = [weights(n, 96, bits, 32, True, seed=n) for n in (33, 1, 64, 20)]
    whole = Weights(
        torch.cat([w.codes for w in parts]),
        torch.cat([w.scale for w in parts]),
        torch.cat([w.offset for w in parts]),
        bits,
    )
    assert torch.equal(pack(parts, tier), pack([whole], tier, threads=1))
    turned = Weights(whole.codes.T.contiguous().T, whole.scale, whole.offset, bits)
    assert torch.equal(pack([turned], tier), pack([whole], tier))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("tier", TIERS)
def test_threads_give_the_same_bits(tier, threads):
    for m, bits in product((1, 6, 90), (8, 4)):
        c = case(m, 200, 256, bits, 32, norm=2, bias=randn(200))
        assert torch.equal(c.run(tier, threads), c.run(tier, 1))


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("tier", FLOAT_TIERS)
def test_threads_give_the_same_bits_in_f32(tier, threads):
    """Rows that are cut among chunks, and K blocks."""
    for m, k in ((6, 256), (200, 4352)):
        c = case(m, 40, k, 8, 64, planes=3, bias=randn(40))
        assert torch.equal(c.run(tier, threads), c.run(tier, 1))


@pytest.mark.parametrize(("bits", "k"), [(8, 65536), (4, 131072)])
@pytest.mark.parametrize("tier", TIERS)
def test_panels_without_room_to_unpack_are_streamed(tier, bits, k):
    """Several tiles of one stream, whatever a tuning asks for."""
    c = case(9, 20, k, bits, 64)
    check(c, tier)
    for family in (1, 2) if bits == 8 else (1,):
        c.tuning = [1, 1 << 40, family, 0, 0, 0, 0, 0]
        check(c, tier)


@pytest.mark.parametrize("tier", TIERS)
def test_no_rows(tier):
    for planes in (1, 3):
        assert case(0, 40, 64, 8, 32, planes=planes).run(tier, 2).shape == (0, 40)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_problem(data):
    """Whatever is asked for in whatever combination."""
    draw = data.draw
    group = 2 * draw(st.integers(1, 40))
    m, outputs, k = (
        draw(st.integers(1, 40)),
        draw(st.integers(1, 90)),
        group * draw(st.integers(1, 4)),
    )
    gated, offsets = draw(st.booleans()), draw(st.booleans())
    n = 2 * outputs if gated else outputs
    c = case(m, n, k, draw(st.sampled_from([8, 4])), group, offsets, draw(st.integers(1, 3)))
    c.gated, c.act = gated, draw(st.sampled_from(list(ACTIVATIONS)))
    c.alpha = draw(st.sampled_from([1.0, 0.25]))
    c.bias = draw(st.sampled_from([None, randn(n)]))
    c.residual = draw(st.sampled_from([None, randn(m, outputs)]))
    check(c, draw(st.sampled_from(TIERS)), threads=draw(st.integers(1, 3)))
