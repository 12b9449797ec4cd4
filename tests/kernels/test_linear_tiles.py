"""linear over bf16 rows, which products on AMX tiles read where they lie: the same in every tier this machine runs."""

from __future__ import annotations

import ctypes
import mmap
from itertools import product

import pytest
import torch

from tests.kernels import test_linear_quantized as quantized
from tests.kernels.test_linear import case, randn
from tests.tolerance import assert_close

HEIGHTS = (32, 33, 47, 48, 49, 64, 65, 129)  # the last tile has few rows, just a half, all
DEPTHS = (64, 672, 1344)  # of one K block and of several, of equal length and not
PAGE = mmap.PAGESIZE


def a_page_apart(x: torch.Tensor) -> torch.Tensor:
    """The same rows, which would share lines of a cache."""
    memory = torch.zeros(x.shape[0], PAGE // x.itemsize, dtype=x.dtype)
    return memory[:, : x.shape[1]].copy_(x)


@pytest.mark.parametrize("height", HEIGHTS)
def test_rows_give_the_same_bits_wherever_they_lie(tier, height):
    for k in DEPTHS:
        problem = case(height, 100, k, torch.bfloat16)
        want = problem.run(tier, 2)
        assert_close(want, problem.reference())
        wide = torch.cat([problem.x, randn(height, 24, dtype=torch.bfloat16)], 1)
        for x in (a_page_apart(problem.x), wide[:, :k]):
            problem.x = x
            assert torch.equal(problem.run(tier, 2), want)


@pytest.mark.parametrize("height", HEIGHTS)
def test_rows_that_two_tiles_multiply_get_one_residual(tier, height):
    """y is the residual, so adding it twice would show."""
    for k, gated in product(DEPTHS, (False, True)):
        problem = case(height, 128, k, torch.bfloat16, gated=gated, act=2 if gated else 0)
        problem.y = randn(height, 64 if gated else 128, dtype=torch.bfloat16, seed=3)
        problem.residual = problem.y.clone()
        want = problem.reference()
        problem.residual = problem.y
        assert_close(problem.run(tier, 2), want)


def test_a_row_that_is_not_finite_stays_alone(tier):
    problem = case(49, 96, 672, torch.bfloat16)
    want = problem.run(tier, 2)
    others = torch.arange(49) != 40
    for value in (float("inf"), float("nan")):
        problem.x[40, 5] = value
        got = problem.run(tier, 2)
        assert torch.equal(got[others], want[others])
        assert not got[40].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_cuts_of_rows_give_the_same_bits(tier, dtype):
    """A block of rows for all, one a thread, and several a thread; K in parts, because no more of it stays in a cache."""
    for m, n, k in ((300, 200, 672), (700, 64, 1344), (400, 450, 4096)):
        problem = case(m, n, k, dtype)
        want = problem.run(tier, 1)
        assert_close(want, problem.reference())
        for threads in (2, 3, 5):
            assert torch.equal(problem.run(tier, threads), want)


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("group", [64, 128, None])
def test_cuts_of_rows_over_codes_give_the_same_bits(tier, group, planes):
    problem = quantized.case(400, 450, 4096, 8, group, planes=planes)
    want = problem.run(tier, 1)
    for threads in (2, 3, 5):
        assert torch.equal(problem.run(tier, threads), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("k", [0, 1000, 2079])
def test_what_is_not_finite_in_one_part_of_k_counts_in_all(tier, dtype, k):
    problem = case(400, 450, 2080, dtype)
    want = problem.run(tier, 2)
    problem.x[70, k] = float("inf")
    got = problem.run(tier, 2)
    others = torch.arange(400) != 70
    assert torch.equal(got[others], want[others])
    assert got[70].isinf().all()
    problem.x[70, k] = 1.0
    problem.w[300, k] = float("-inf")
    got = problem.run(tier, 2)
    others = torch.arange(450) != 300
    assert got[:, 300].isinf().all()
    assert_close(got[:, others], problem.reference()[:, others])


@pytest.mark.parametrize("at_end", [False, True])
def test_only_the_rows_are_read(tier, at_end):
    """Nobody may read what lies in front of them or behind."""
    libc = ctypes.CDLL(None, use_errno=True)
    for height in HEIGHTS:
        problem = case(height, 64, 96, torch.bfloat16)
        want = problem.run(tier, 2)
        size = problem.x.numel() * problem.x.itemsize
        pages = -(-size // PAGE)
        memory = mmap.mmap(-1, (pages + 2) * PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for guard in (start, start + (pages + 1) * PAGE):
            assert libc.mprotect(ctypes.c_void_p(guard), PAGE, 0) == 0  # PROT_NONE
        at = start + PAGE + (pages * PAGE - size if at_end else 0)
        rows = torch.frombuffer((ctypes.c_uint8 * size).from_address(at), dtype=torch.bfloat16)
        problem.x = rows.view_as(problem.x).copy_(problem.x)
        assert torch.equal(problem.run(tier, 2), want)
        for guard in (start, start + (pages + 1) * PAGE):
            assert (
                libc.mprotect(ctypes.c_void_p(guard), PAGE, mmap.PROT_READ | mmap.PROT_WRITE) == 0
            )
