"""The emulator finds what it is there to find: every planted bug, and every barrier or wait taken out of a shipped kernel."""

from __future__ import annotations

import ctypes
import re

import pytest
import torch
from cuda_emulator.emulator import CUDA, HERE, KERNELS, Emulator, build, guarded
from cuda_emulator.operands import W4A16, W8A8, Decode
from llmopt.native.cuda import CudaError
from tolerance import assert_close

PLANTED = HERE / "planted_bugs.cu"
SHARED = 1024


class Operands(ctypes.Structure):
    _fields_ = [("x", ctypes.c_void_p), ("y", ctypes.c_void_p)]


@pytest.fixture(scope="module")
def planted() -> Emulator:
    return Emulator(build([PLANTED]))


def run(emulator: Emulator, kernel: str, shared: int = SHARED) -> torch.Tensor:
    x = guarded(torch.arange(64, dtype=torch.int32))
    y = guarded(torch.full((64,), -1, dtype=torch.int32))
    emulator.buffers((x,), (y,))
    emulator.run(kernel, Operands(x.data_ptr(), y.data_ptr()), 64, shared)
    return y


THREADS = torch.arange(64, dtype=torch.int32)
RIGHT = {
    "right_exchange": 63 - THREADS,
    "right_warp_exchange": THREADS ^ 1,
    "right_copy": THREADS,
    "right_shuffle_of_half_a_warp": torch.where(THREADS < 16, THREADS ^ 1, -1),
    "right_publication": torch.where(THREADS == 0, 2, 1),
}
BUGS = {
    "missing_barrier": "missing barrier: byte .* was written by thread|before anything wrote it",
    "missing_barrier_before_overwriting": "missing barrier: byte .* was (read|written) by",
    "missing_syncwarp": "missing barrier|before anything wrote it",
    "syncwarp_across_warps": "missing barrier|before anything wrote it",
    "missing_wait": "missing cp.async wait",
    "wait_for_too_few": "missing cp.async wait",
    "missing_barrier_after_wait": "missing barrier|missing cp.async wait|before anything wrote it",
    "copy_over_what_is_read": "missing barrier: byte|is read while thread",
    "never_committed": "never committed",
    "never_waited_for": "never waited for",
    "misaligned_copy_to": "misaligned cp.async of 16 bytes: byte",
    "misaligned_copy_from": "misaligned cp.async of 16 bytes from global memory",
    "misaligned_load": "misaligned read of 16 bytes in global memory",
    "misaligned_matrices": "misaligned read of 16 bytes: byte",
    "barrier_of_half_the_block": "divergent barrier: 32 of 64 threads wait .*, 32 have left",
    "two_barriers": "divergent barrier: some threads wait at planted_bugs.cu:.*others at",
    "barrier_against_collective": "divergent barrier: 16 of 64.*partial collective: __syncwarp",
    "shuffle_without_half_the_lanes": "partial collective: __shfl_xor_sync .* misses lanes ffff0000",
    "shuffle_from_outside_the_mask": "asks for lane .*, not in mask 0000ffff",
    "shuffle_outside_its_own_mask": "is not in its own mask 0000ffff",
    "product_without_a_lane": "partial collective: mma .* misses lanes 00000080",
    "read_out_of_bounds": "read of 4 bytes out of bounds: byte 256 of a buffer of 256",
    "wide_read_out_of_bounds": "read of 16 bytes out of bounds: byte 256",
    "copy_out_of_bounds": "read of 16 bytes out of bounds: byte",
    "write_out_of_bounds": "write of 4 bytes out of bounds: byte -4",
    "write_to_an_input": "write of 4 bytes to an operand that is only read",
    "stale_read_of_an_output": "read-only path from memory that this kernel writes",
    "shared_out_of_bounds": "write of 16 bytes out of bounds: byte 1024 of 1024",
    "shared_never_written": "before anything wrote it",
    "missing_fence": "missing __threadfence",
    "missing_barrier_before_atomic": "missing (barrier|__threadfence): an atomic",
}


def test_every_planted_kernel_is_run_here():
    names = set(re.findall(r"KERNEL\((\w+)\) \{", PLANTED.read_text()))
    assert names == {*RIGHT, *BUGS, "one_bank", "two_rows_a_bank", "strided"}


@pytest.mark.parametrize("kernel", RIGHT)
def test_right_forms_pass_in_every_order(planted, kernel):
    for seed in range(20):
        planted.seed(seed)
        assert torch.equal(run(planted, kernel), RIGHT[kernel])


@pytest.mark.parametrize("kernel", BUGS)
def test_bugs_are_found_in_every_order(planted, kernel):
    for seed in range(20):
        planted.seed(seed)
        with pytest.raises(CudaError, match=BUGS[kernel]):
            run(planted, kernel)


def test_the_device_is_usable_after_a_bug(planted):
    with pytest.raises(CudaError):
        run(planted, "two_barriers")
    assert torch.equal(run(planted, "right_exchange"), RIGHT["right_exchange"])


def test_bank_conflicts_are_counted(planted):
    with planted.counting() as counters:
        run(planted, "one_bank", 4096)
    assert (counters.shared_accesses, counters.shared_wavefronts, counters.shared_ideal) == (
        1,
        32,
        1,
    )
    with planted.counting() as counters:
        run(planted, "two_rows_a_bank")
    assert (counters.shared_accesses, counters.shared_wavefronts, counters.shared_ideal) == (
        1,
        4,
        1,
    )
    with planted.counting() as counters:
        run(planted, "right_exchange")
    assert counters.shared_wavefronts == counters.shared_ideal == 4


def test_uncoalesced_accesses_are_counted(planted):
    with planted.counting() as counters:
        run(planted, "strided")
    assert (counters.global_accesses, counters.global_sectors, counters.global_ideal) == (1, 8, 1)


def gemm(emulator: Emulator) -> None:
    p = W8A8(70, 130, 700)
    assert_close(p.run(emulator), p.want())


def gemv(emulator: Emulator) -> None:
    p = W8A8(3, 13, 300)
    assert_close(p.run(emulator), p.want())


def gemv_4bit(emulator: Emulator) -> None:
    p = W4A16(3, 13, 320, 32, True)
    assert_close(p.run(emulator), p.want())


def decode(emulator: Emulator) -> None:
    p = Decode(4, 2, 64, (40, 13), 3)
    for _ in range(2):  # the counters must be ready for a second launch
        assert_close(p.run(emulator), p.want())


GEMM, DECODE = "linear_w8a8_gemm", "attention_decode"
UNORDERED = "missing (barrier|__threadfence)|missing cp.async wait|before anything wrote it"
# (file, statement, which of them, instead, problem, what is found)
MUTANTS = [
    *((GEMM, "__syncthreads();", i, "", gemm, UNORDERED) for i in range(3)),
    (GEMM, "ptx::cp_async_wait<kStages - 2>();", 0, "", gemm, "missing cp.async wait"),
    (GEMM, "cp_async_wait<kStages - 2>", 0, "cp_async_wait<kStages - 1>", gemm, "missing cp.async"),
    (
        GEMM,
        "fetch_stage(i + kStages - 1)",
        0,
        "fetch_stage(i + kStages)",
        gemm,
        "missing|written while",
    ),
    (GEMM, "row0 + r >= rows || ", 0, "", gemm, "out of bounds"),
    (GEMM, "<< 4)", 0, "<< 3)", gemm, "misaligned"),
    (
        GEMM,
        "swizzled<kBlockK>(warp_m",
        0,
        "swizzled<kBlockK>(1 + warp_m",
        gemm,
        "relative error|out of",
    ),
    (GEMM, "if (m >= p.m || n >= p.n) continue;", 0, "", gemm, "out of bounds"),
    (GEMM, "left < 16 ? left", 0, "left < 16 ? 16", gemm, "relative error"),
    *((DECODE, "__syncthreads();", i, "", decode, UNORDERED) for i in range(3)),
    (DECODE, "__threadfence();", 0, "", decode, "missing __threadfence"),
    (DECODE, "if (last) store(counter, 0);", 0, "", decode, "relative error|NaN"),
    (DECODE, "wanted < end ? wanted : end - 1", 0, "wanted", decode, "out of bounds|(?i:nan)"),
    (DECODE, "p.splits - 1", 0, "p.splits", decode, "relative error|NaN"),
    ("linear_w8a8_gemv", "if (left < 16)", 0, "if (false)", gemv, "relative error"),
    ("linear_w8a8_gemv", "n0 + c < p.n ? n0 + c : n0", 0, "n0 + c", gemv, "out of bounds"),
    ("linear_w8a8_gemv", "t < p.m ? t : 0", 0, "t", gemv, "out of bounds"),
    ("linear_w4a16_gemv", "0x000f000fu", 0, "0x001f000fu", gemv_4bit, "relative error"),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m[0]}: {m[1]} {m[2]} -> {m[3]}")
def test_a_shipped_kernel_with_a_mistake_is_found(mutant):
    name, statement, which, instead, problem, found = mutant
    (file,) = (f for f in KERNELS if f.stem == name)
    parts = file.read_text().split(statement)
    assert len(parts) > which + 1, f"{file.name} has no {statement} number {which}"
    text = statement.join(parts[: which + 1]) + instead + statement.join(parts[which + 1 :])
    mutated = Emulator(build([file], {file: text}))
    with pytest.raises((CudaError, AssertionError), match=found):
        problem(mutated)


def test_a_tile_without_swizzle_is_right_and_conflicts():
    (file,) = (f for f in KERNELS if f.stem == GEMM)
    text, count = re.subn(r"c \^ \([^)]*\)", "c", file.read_text())
    assert count == 1
    plain = Emulator(build([file], {file: text}))
    p = W8A8(64, 128, 256)
    plain.device(multiprocessors=1)
    with plain.counting() as counters:
        assert_close(p.run(plain), p.want())
    assert counters.shared_wavefronts > 1.5 * counters.shared_ideal


def test_kernels_touch_memory_only_where_it_is_checked():
    """Nothing but ptx.h and memory.h follows a pointer, so that no access escapes the emulator."""
    escapes = re.compile(
        r"__shared__|\basm\b|\.address\b|\breinterpret_cast\b|\*static_cast|->|\bp\.\w+\["
    )
    files = [f for f in CUDA.iterdir() if f.suffix == ".cu" or f.name in ("epilogue.h", "gemv.h")]
    assert len(files) >= 6
    for file in files:
        code = re.sub(r"//.*", "", file.read_text())
        found = [m[0] for m in escapes.finditer(code)]
        assert found in ([], [".address"]), (
            f"{file.name}: {found}"
        )  # the counter of attention_decode
