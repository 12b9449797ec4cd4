"""Arena slots by liveness: values whose lives do not overlap share memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmopt.sizes import Size, expression, size_hint


@dataclass(frozen=True)
class Life:
    """A value's size in bytes and the first and last step that touch it."""

    value: Any
    size: Size
    first: int
    last: int


def assign_slots(lives: Sequence[Life]) -> tuple[dict[Any, int], int]:
    """value → slot number, and how many slots there are. A slot is free again after its value's last step.

    A free slot of the same size is taken first, else the one nearest in size, so that slots stay tight.
    """
    slots: dict[Any, int] = {}
    sizes: list[Size] = []  # of the first value in each slot
    busy: list[tuple[int, int]] = []  # (last step, slot)
    free: list[int] = []
    for life in sorted(lives, key=lambda x: x.first):
        free += [slot for last, slot in busy if last < life.first]
        busy = [(last, slot) for last, slot in busy if last >= life.first]
        wanted = expression(life.size)
        slot = next((f for f in free if expression(sizes[f]) == wanted), None)
        if slot is None and free:
            slot = min(free, key=lambda f: abs(size_hint(sizes[f]) - size_hint(life.size)))
        if slot is None:
            slot = len(sizes)
            sizes.append(life.size)
        else:
            free.remove(slot)
        slots[life.value] = slot
        busy.append((life.last, slot))
    return slots, len(sizes)
