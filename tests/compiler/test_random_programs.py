"""Random programs give what they give in eager: values, dtypes, which results share memory, what is left in the arguments.

`--slow` runs many more; a failure shows the shortest program that still fails, and its number.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import pytest
import torch
from torch import Tensor

from tests.compiler.random_programs import Program, minimal

AT_ONCE, FEW, MANY = 15, 4, 150  # programs of one test; tests, and with --slow


@torch.no_grad()
def outcome(function: Callable, arguments: dict[str, Tensor]) -> list[Tensor]:
    """Results, then the arguments afterwards."""
    own = [t.clone() for t in arguments.values()]
    return [*function(*own), *own]


def difference(program: Program, dynamic: bool) -> str:
    """What differs between eager and compiled, "" where nothing does."""
    function = program.function()
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="llmopt", dynamic=dynamic or None)
    sets = [program.arguments, program.arguments]
    if dynamic and _runs(function, program.larger):
        sets.append(program.larger)
    for arguments in sets:
        want, got = outcome(function, arguments), outcome(compiled, arguments)
        for i, pair in enumerate(zip(want, got, strict=True)):
            if found := _unlike(*pair, 6e-2 if program.is_short else 2e-4):
                return f"value {i}: {found}"
    return ""


def _runs(function: Callable, arguments: dict[str, Tensor]) -> bool:
    try:
        outcome(function, arguments)
    except (RuntimeError, IndexError):  # a program of sizes that it wrote down
        return False
    return True


def _unlike(want: Tensor, got: Tensor, tolerance: float) -> str:
    if (want.dtype, want.shape) != (got.dtype, got.shape):
        return f"{got.dtype} {tuple(got.shape)} instead of {want.dtype} {tuple(want.shape)}"
    a, b = want.double(), got.double()
    if not torch.equal(a.isfinite(), b.isfinite()):
        return "other values are NaN or infinite"
    a, b = a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0)
    error = float((a - b).abs().max() / (a.abs().max() + 1e-2))
    if error > tolerance:
        return f"error {error:.2g}"
    return "" if _joins(want) <= _joins(got) else f"strides {got.stride()}, not {want.stride()}"


def _joins(t: Tensor) -> set[tuple[int, int]]:
    """Pairs of dimensions that a view can make one."""
    wide = [d for d in range(t.dim()) if t.shape[d] != 1]
    pairs = permutations(wide, 2)
    return {(i, j) for i, j in pairs if t.stride(i) == t.stride(j) * t.shape[j]}


def check(program: Program, dynamic: bool, name: str) -> None:
    found = difference(program, dynamic)
    if found:
        shortest = minimal(program, lambda p: _fails(p, dynamic))
        pytest.fail(f"{name} ({program.dtype}): {found}; shortest:\n{shortest.source}")


def _fails(program: Program, dynamic: bool) -> bool:
    try:
        return bool(difference(program, dynamic))
    except Exception:  # without one of its lines a program may read what is not there
        return False


@pytest.mark.parametrize("number", range(FEW))
def test_programs(number: int) -> None:
    check_many(number)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(FEW, MANY))
def test_many_programs(number: int) -> None:
    check_many(number)


def check_many(number: int) -> None:
    for seed in range(number * AT_ONCE, (number + 1) * AT_ONCE):
        check(Program(seed), bool(seed % 2), f"program {seed}")
