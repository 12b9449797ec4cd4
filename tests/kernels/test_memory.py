"""_C.Memory: what is asked for is what lies in memory."""

from __future__ import annotations

import ctypes

import pytest
from llmopt import _C

MIB, PAGE, HUGE = 1 << 20, 4096, 2 << 20
LIBC = ctypes.CDLL(None, use_errno=True)


def resident(start: int, end: int) -> set[int]:
    """Pages between two addresses that are in memory; what is not mapped is not."""
    state = ctypes.c_ubyte()
    return {
        page
        for page in range(start, end, PAGE)
        if LIBC.mincore(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), ctypes.byref(state)) == 0
        and state.value & 1
    }


@pytest.mark.parametrize("size", [2 * MIB, 2 * MIB + 1, 3 * MIB + 4096, 4 * MIB - 64, 9 * MIB // 2])
def test_the_last_huge_page_is_no_waste(size: int) -> None:
    memory = _C.Memory(size)
    assert memory.bytes >= size
    ends = memory.address, memory.address + -(-size // HUGE) * HUGE  # of the last huge page
    before = resident(*ends)  # nothing yet, but for what lies behind
    assert bytes((ctypes.c_char * size).from_address(memory.address)) == bytes(size)
    ctypes.memset(memory.address, 1, memory.bytes)
    kept = len(resident(*ends) - before) * PAGE
    assert size <= kept < size + PAGE, f"{size} bytes take {kept}"
