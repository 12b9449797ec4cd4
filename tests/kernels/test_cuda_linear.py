"""The linears of csrc/cuda in the emulator: against exact integers and float64, ragged sizes, several orders of threads."""

from __future__ import annotations

import pytest
import torch
from cuda_emulator.operands import W4A16, W8A8
from llmopt.native.cuda import CudaError, LinearW4A16, LinearW8A8
from llmopt.ops import activation
from llmopt.program import DTYPE_CODES
from tolerance import assert_close

SEEDS = (0, 1, 2)


# Tokens up to 8 are GEMVs; more take 32x64x128 tiles on 4 multiprocessors, or larger ones where there are enough.
SIZES = [(1, 8, 16), (1, 33, 100), (2, 40, 512), (3, 17, 1), (4, 5, 2049), (7, 64, 48), (8, 9, 33)]
SIZES += [(9, 7, 15), (33, 65, 129), (40, 130, 300), (70, 130, 64), (100, 260, 129)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
def test_w8a8_sums_are_exact(emulator, size, seed):
    p = W8A8(*size, low=-1, high=2, around=False)
    p.x_scale.fill_(1.0)
    p.w_scale.fill_(1.0)
    assert p.sums().abs().max() <= 2048  # what half precision holds exactly
    emulator.seed(seed)
    assert torch.equal(p.run(emulator).double(), p.sums())


@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
def test_w8a8_with_everything_around_it(emulator, size, dtype):
    p = W8A8(*size, dtype)
    assert_close(p.run(emulator, "silu"), p.want("silu"))


@pytest.mark.parametrize("tile", ["128x128x64", "64x128x64", "32x64x128"])
def test_every_tile(emulator, tile):
    """More multiprocessors than blocks choose smaller tiles; each must give the same."""
    blocks, multiprocessors = {
        "128x128x64": (4, 4),
        "64x128x64": (6, 6),
        "32x64x128": (20, 1000),
    }[tile]
    p = W8A8(150, 200, 400, stride=204)
    emulator.device(multiprocessors=multiprocessors)
    with emulator.counting() as counters:
        assert_close(p.run(emulator, "gelu_tanh"), p.want("gelu_tanh"))
    assert counters.blocks == blocks


@pytest.mark.parametrize("act", activation.CODES)
def test_activations(emulator, act):
    p = W8A8(3, 50, 64)
    assert_close(p.run(emulator, act), p.want(act))


def test_extreme_codes_do_not_saturate(emulator):
    """-128 · -128 · 4096 = 2²⁶, on both paths."""
    for m in (1, 20):
        p = W8A8(m, 16, 4096, low=-128, high=-127, around=False)
        p.x_scale.fill_(2.0**-13)
        p.w_scale.fill_(2.0**-13)
        assert torch.equal(p.run(emulator), torch.ones(m, 16, dtype=torch.float16))


def test_nothing_to_do(emulator):
    with emulator.counting() as counters:
        for m, n in ((0, 8), (8, 0)):
            record = W8A8(2, 8, 16).record("none")
            record.m, record.n = m, n
            emulator.library.launch(record)
    assert counters.launches == 0
    for m in (2, 20):  # no inputs: the bias is all there is
        p = W8A8(m, 8, 0)
        p.x, p.w = torch.zeros(m, 16, dtype=torch.int8), torch.zeros(8, 16, dtype=torch.int8)
        record = p.record("none")
        record.k = 0
        emulator.buffers((p.x, p.w, p.x_scale, p.w_scale, p.bias, p.residual), (p.y,))
        emulator.library.launch(record)
        assert_close(p.y, p.bias.double() + p.residual.double())


def test_w8a8_reads_and_writes_densely(emulator):
    """No bank is asked twice in the tiles, and warps read and write whole sectors."""
    for multiprocessors in (4, 6, 1000):  # the three tiles
        p = W8A8(128, 384, 512)
        p.w = p.w.contiguous()  # its rows began at multiples of 16 bytes, not of a sector's 32
        emulator.device(multiprocessors=multiprocessors)
        with emulator.counting() as counters:
            p.run(emulator)
        assert counters.shared_accesses > 1000
        assert counters.shared_wavefronts == counters.shared_ideal
        assert counters.global_ideal / counters.global_sectors > 0.98


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("has_offset", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(
    ("m", "n", "groups"), [(1, 8, 1), (1, 37, 5), (2, 3, 8), (3, 17, 3), (5, 16, 9), (8, 9, 2)]
)
def test_w4a16(emulator, m, n, groups, group, has_offset):
    p = W4A16(m, n, groups * group, group, has_offset)
    emulator.seed(m)
    assert_close(p.run(emulator), p.want())


@pytest.mark.parametrize("has_offset", [False, True], ids=["symmetric", "asymmetric"])
def test_w4a16_in_bf16_with_an_activation(emulator, has_offset):
    p = W4A16(4, 21, 512, 64, has_offset, torch.bfloat16)
    assert_close(p.run(emulator, "gelu_erf"), p.want("gelu_erf"))


def test_w4a16_reads_densely(emulator):
    p = W4A16(1, 64, 4096, 128, True)
    with emulator.counting() as counters:
        p.run(emulator)
    assert counters.global_ideal / counters.global_sectors > 0.9


def w8a8_with(**changes) -> LinearW8A8:
    record = W8A8(2, 8, 32).record("none")
    for name, value in changes.items():
        setattr(record, name, value)
    return record


def w4a16_with(**changes) -> LinearW4A16:
    record = W4A16(2, 8, 64, 32, False).record("none")
    for name, value in changes.items():
        setattr(record, name, value)
    return record


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (w8a8_with(x=None), "x and y must be given"),
        (w8a8_with(w_scale=None), "w, x_scale and w_scale must be given"),
        (w8a8_with(dtype=DTYPE_CODES[torch.float32]), "f16 and bf16 are possible"),
        (w8a8_with(act=99), "activation 99"),
        (w8a8_with(m=-1), "negative"),
        (w8a8_with(x_stride=40), "multiples of 16 bytes"),
        (w8a8_with(w_stride=16), "K rounded up to 16"),
        (w8a8_with(y_stride=4), "must not overlap"),
        (w8a8_with(k=131072, x_stride=1 << 20, w_stride=1 << 20), "up to 131071"),
        (w4a16_with(group=16), "32, 64 and 128 are possible"),
        (w4a16_with(group=128), "groups of 128 do not divide 64"),
        (w4a16_with(m=9), "9 tokens: up to 8"),
        (w4a16_with(x_stride=65), "multiples of 16 bytes"),
        (w4a16_with(scale=None), "codes and scale must be given"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_impossible_problems_are_refused(emulator, problem, reason):
    with pytest.raises(CudaError, match=reason):
        emulator.library.launch(problem)
