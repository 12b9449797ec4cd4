"""Encoding of VM programs: registers, sharing, fusing, and what is refused."""

from __future__ import annotations

import math

import pytest
from llmopt import _C
from llmopt.native.vm import (
    Unsupported,
    VmProgram,
)

each_tier = pytest.mark.parametrize("tier", _C.tiers())


def test_registers_are_reused():
    program = VmProgram(1, 1)
    v = program.load(0)
    for name in ("exp", "tanh", "neg", "abs", "sqrt"):
        v = program.unary(name, v)
    program.store(0, v)
    ints, _ = program.encode()
    assert ints[:4] == [1, 1, 1, 0]


def test_equal_values_are_computed_once_and_unused_ones_never():
    program = VmProgram(2, 1)
    a = program.load(0)
    assert program.unary("exp", a) == program.unary("exp", program.load(0))
    assert program.const(0.0) != program.const(-0.0)
    assert program.const(math.nan) == program.const(math.nan)
    program.unary("log", program.load(1))
    program.store(0, program.unary("exp", a))
    ints, floats = program.encode()
    assert len(ints) == 4 + 3
    assert floats == []


def test_products_fuse_into_sums_only_when_nothing_else_reads_them():
    def length(keep: bool) -> int:
        program = VmProgram(2, 2 if keep else 1)
        a, b = program.load(0), program.load(1)
        product = program.binary("mul", a, b)
        program.store(0, program.binary("add", product, a))
        if keep:
            program.store(1, product)
        return len(program.encode()[0]) - 4

    assert length(keep=False) == 4  # load, load, mul_add, store
    assert length(keep=True) == 6


def test_what_the_vm_cannot_do_is_said():
    program = VmProgram(1, 1)
    a = program.load(0)
    with pytest.raises(Unsupported, match=r"'lgamma'.*tanh"):
        program.unary("lgamma", a)
    with pytest.raises(Unsupported, match="'atan2'"):
        program.binary("atan2", a, a)
    with pytest.raises(Unsupported, match=r"'prod'.*mean"):
        program.reduce("prod", a)
    with pytest.raises(Unsupported, match=r"2\.5"):
        program.pow(a, 2.5)
    with pytest.raises(Unsupported, match="at most 24"):
        VmProgram(20, 5)
    with pytest.raises(ValueError, match="never stored"):
        program.encode()
    with pytest.raises(ValueError, match="input 1 of 1"):
        program.load(1)
    program.store(0, a)
    with pytest.raises(ValueError, match="stored twice"):
        program.store(0, a)


def test_too_many_live_values_are_refused():
    program = VmProgram(1, 1)
    a = program.load(0)
    live = [program.unary("exp", program.binary("mul", a, program.const(i))) for i in range(300)]
    total = live[0]
    for v in live[1:]:
        total = program.binary("sub", total, v)
    program.store(0, total)
    with pytest.raises(Unsupported, match="registers"):
        program.encode()
