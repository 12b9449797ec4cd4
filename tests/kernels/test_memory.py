"""_C.Memory: what is asked for is what lies in memory."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
from llmopt import _C

MIB = 1 << 20
# Without them nothing marks where one mapping ends and the next begins.
pytestmark = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a kernel without huge pages"
)


def resident(memory: _C.Memory) -> int:
    """Bytes of its mappings that are in memory. They are nobody else's: what lies around them has other flags."""
    total, counted = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = (int(b, 16) for b in bounds.groups())
            counted = start < memory.address + memory.bytes and end > memory.address
        elif counted and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total


@pytest.mark.parametrize("size", [2 * MIB, 2 * MIB + 1, 3 * MIB + 4096, 4 * MIB - 64, 9 * MIB // 2])
def test_the_last_huge_page_is_no_waste(size: int) -> None:
    memory = _C.Memory(size)
    assert memory.bytes >= size
    assert bytes((ctypes.c_char * size).from_address(memory.address)) == bytes(size)
    ctypes.memset(memory.address, 1, memory.bytes)
    kept = resident(memory)
    assert size <= kept < size + 4096, f"{size} bytes take {kept}"
