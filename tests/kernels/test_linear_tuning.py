"""Tuned linears: whatever way one is cut, it gives the same; what is impossible is refused before anything runs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmopt import _C
from llmopt.types import EVERY_M, LINEAR_FAMILIES, Choice, LinearConfig

from tests.kernels import test_linear as floats
from tests.kernels import test_linear_quantized as codes

TIERS = _C.tiers()


def check(case, op: str, tier: str, config: LinearConfig, threads: int = 2) -> str:
    """Runs the case under a config, or sees it refused; returns the reason."""
    case.tuning = tuple(Choice(((EVERY_M, config),)).ints())
    reason = _C.refuse_tuning(tier, op, [*case.ints(), *case.tuning])
    if not reason:
        case.check(tier, threads)
        return ""
    with pytest.raises(ValueError, match="linear") as error:
        case.run(tier, threads)
    assert reason in str(error.value)
    return reason


def multiples(step: int, most: int) -> st.SearchStrategy[int]:
    return st.integers(0, most).map(lambda i: step * i)


configs = st.builds(
    LinearConfig,
    family=st.sampled_from(LINEAR_FAMILIES),
    rows=st.integers(0, 15),
    k_block=multiples(4, 30) | st.sampled_from((600, 4096)),
    span=st.integers(0, 9) | st.just(1 << 20),
    tiles=st.integers(0, 9) | st.just(1 << 20),
    ahead=multiples(64, 40),
)
heights = st.integers(1, 60)
sizes = st.tuples(heights, st.integers(1, 200), st.integers(1, 90))


@pytest.mark.parametrize("tier", TIERS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(size=sizes, config=configs, dtype=st.sampled_from(floats.FLOATS), threads=st.integers(1, 3))
def test_any_config_gives_the_product_or_is_refused(tier, size, config, dtype, threads):
    check(floats.case(*size, dtype), "linear", tier, config, threads)


@pytest.mark.parametrize("tier", TIERS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    size=st.tuples(heights, st.integers(1, 200), st.sampled_from((32, 64, 96))),
    config=configs,
    bits=st.sampled_from((8, 4)),
    planes=st.sampled_from((1, 3)),
)
def test_any_config_of_codes_gives_the_product_or_is_refused(tier, size, config, bits, planes):
    case = codes.case(*size, bits=bits, group=32, planes=planes)
    check(case, "linear_quantized", tier, config)


@pytest.mark.parametrize("dtype", floats.FLOATS, ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_every_register_tile_and_family(tier, dtype):
    for rows in range(1, _C.tile_rows(tier, "linear") + 1):
        for family in LINEAR_FAMILIES:
            case = floats.case(29, 70, 68, dtype)
            reason = check(case, "linear", tier, LinearConfig(family, rows, 32, 2, 2, 1024))
            assert (family == "unpack" and dtype == torch.float32) == bool(reason)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tier", TIERS)
def test_every_register_tile_and_family_of_codes(tier, bits):
    impossible = "unpack" if bits == 8 else "blocked"
    for rows in range(1, _C.tile_rows(tier, "linear_quantized") + 1):
        for family in LINEAR_FAMILIES:
            case = codes.case(29, 70, 64, bits=bits, group=32, offsets=True)
            reason = check(
                case, "linear_quantized", tier, LinearConfig(family, rows, 0, 2, 2, 1024)
            )
            assert (family == impossible) == bool(reason)


@pytest.mark.parametrize("dtype", floats.FLOATS, ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_the_largest_configs_stay_in_their_scratch_memory(tier, dtype):
    """The most tiles, panels and K that are let through, for sums and widened panels alike."""
    m, k = 300, 2600
    case = floats.case(m, 8 * _C.panel_width(tier) + 1, k, dtype)
    for span in (1, 3, 8):
        for k_block in (256, 1024, 2048, 0):
            most = 0
            for tiles in (1 << n for n in range(9)):
                config = LinearConfig("auto", 0, k_block, span, tiles)
                case.tuning = tuple(Choice(((EVERY_M, config),)).ints())
                if not _C.refuse_tuning(tier, "linear", [*case.ints(), *case.tuning]):
                    most = tiles
            if most:
                check(case, "linear", tier, LinearConfig("auto", 0, k_block, span, most))


@pytest.mark.parametrize("tier", [t for t in TIERS if t in ("avx512", "avx512_vnni")])
def test_sums_between_k_blocks_of_own_rows_stay_in_their_memory(tier):
    """80 tiles a chunk, and four panels at once but for what the sums of all of them would take."""
    c = floats.case(16 * 80 * _C.tile_rows(tier, "linear"), 64 * _C.panel_width(tier), 64, norm=1)
    assert not check(c, "linear", tier, LinearConfig("auto", 0, 8, 0, 0))


def test_the_row_of_the_height_counts():
    """Rows are for heights up to their own; above the last the kernel's own rules hold."""
    tier = TIERS[0]
    rows = ((4, LinearConfig(rows=1)), (20, LinearConfig("blocked", rows=3, tiles=2)))
    for m in (1, 4, 5, 20, 21, 50):
        case = floats.case(m, 70, 37)
        case.tuning = tuple(Choice(rows).ints())
        case.check(tier)


LINEAR = [6, 8, 0, 0, 0, 0]
QUANTIZED = [6, 8, codes.U8, 0, 0, 0, 8, 8, 0, 3, 0]
BF16 = [6, 4096, 2, 0, 0, 0]

REFUSED = {  # name → op, its own ints, the tuning's ints, words of the error
    "a family that is not": ("linear", LINEAR, [1, 9, 4, 0, 0, 0, 0, 0], "no such kernel family"),
    "a negative family": ("linear", LINEAR, [1, 9, -1, 0, 0, 0, 0, 0], "no such kernel family"),
    "too many rows": ("linear", LINEAR, [1, 9, 0, 99, 0, 0, 0, 0], "more rows"),
    "negative rows": ("linear", LINEAR, [1, 9, 0, -1, 0, 0, 0, 0], "more rows"),
    "an odd K block": ("linear", LINEAR, [1, 9, 0, 0, 6, 0, 0, 0], "multiple of 4"),
    "a wide span": ("linear", LINEAR, [1, 9, 2, 0, 0, 9, 0, 0], "more panels"),
    "a negative span": ("linear", LINEAR, [1, 9, 1, 0, 0, -1, 0, 0], "a chunk has"),
    "negative tiles": ("linear", LINEAR, [1, 9, 1, 0, 0, 0, -1, 0], "a chunk has"),
    "a far prefetch": ("linear", LINEAR, [1, 9, 1, 0, 0, 0, 0, 1 << 20], "prefetch"),
    "half a line": ("linear", LINEAR, [1, 9, 1, 0, 0, 0, 0, 32], "prefetch"),
    "a row too short": ("linear", LINEAR, [1, 9, 0, 0, 0, 0, 0], "number of fields"),
    "a row missing": ("linear", LINEAR, [2, 9, 0, 0, 0, 0, 0, 0], "number of fields"),
    "fewer than no rows": ("linear", LINEAR, [-1], "number of fields"),
    "rows out of order": (
        "linear",
        LINEAR,
        [2, 9, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0],
        "do not ascend",
    ),
    "unpacking f32": ("linear", LINEAR, [1, 9, 3, 0, 0, 0, 0, 0], "16 or 4 bits"),
    "panels too wide to unpack": ("linear", BF16, [1, 9, 3, 0, 4096, 8, 0, 0], "unpacked panels"),
    "sums of too many tiles": ("linear", BF16, [1, 9, 2, 0, 256, 8, 1000, 0], "sums between"),
    "fewer rows than planes": ("linear_quantized", QUANTIZED, [1, 9, 0, 2, 0, 0, 0, 0], "planes"),
    "a K block of codes": ("linear_quantized", QUANTIZED, [1, 9, 0, 0, 4, 0, 0, 0], "not cut"),
    "unpacking bytes": ("linear_quantized", QUANTIZED, [1, 9, 3, 0, 0, 0, 0, 0], "16 or 4 bits"),
    "another op": ("norm", [1], [], "nothing to tune"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    op, own, tuning, words = REFUSED[name]
    assert words in _C.refuse_tuning(TIERS[0], op, own + tuning)


def test_panels_of_nibbles_too_long_to_unpack_are_refused():
    k = 1 << 16
    ints = [6, k, codes.U8, 0, 0, 0, 4, 32, 0, 1, 0, 1, 9, 3, 0, 0, 0, 0, 0]
    assert "unpacked panels" in _C.refuse_tuning(TIERS[0], "linear_quantized", ints)
