"""The program executor: several steps, symbolic sizes, wrong programs, threads, memory."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from llmopt import _C
from llmopt.native.vm import VmProgram
from llmopt.program import OneOp, ProgramBuilder, View
from llmopt.sizes import Size
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from tests.threads import threads_that_run

TIER = _C.tiers()[0]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def symbol() -> Callable[[str, int], torch.SymInt]:
    """Makes symbolic sizes as Dynamo hands them over: (name, size at the first call)."""
    env = ShapeEnv()

    def make(name: str, hint: int) -> torch.SymInt:
        number = env.create_symbol(hint, ConstantSource(name), dynamic_dim=DimDynamic.DYNAMIC)
        return env.create_symintnode(number, hint=hint)

    return make


def vm(step: Callable[[VmProgram], int], inputs: int) -> tuple[list[int], list[float]]:
    program = VmProgram(inputs, 1)
    program.store(0, step(program))
    return program.encode()


def mlp(rows: Size, width: Size) -> tuple[ProgramBuilder, int]:
    """x → RMS norm → exp(-|.|) → + x, through two arena slots of symbolic size."""
    builder = ProgramBuilder()
    x, y = builder.external(), builder.external()
    view = {"dtype": torch.float32, "size": (rows, width), "stride": (width, 1)}
    num_bytes = rows * width * 4
    normed, decayed = (builder.arena(builder.slot(), num_bytes) for _ in range(2))
    builder.step(
        "norm", [View(x, **view), None, None, None, View(normed, **view), None], [1], [1e-6, 0.0]
    )
    decay = vm(lambda p: p.unary("exp", p.unary("neg", p.unary("abs", p.load(0)))), 1)
    builder.step("vm", [View(normed, **view), View(decayed, **view)], *decay)
    add = vm(lambda p: p.binary("add", p.load(0), p.load(1)), 2)
    builder.step("vm", [View(decayed, **view), View(x, **view), View(y, **view)], *add)
    return builder, 3


def mlp_reference(x: torch.Tensor) -> torch.Tensor:
    x = x.double()
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (torch.exp(-normed.abs()) + x).float()


def test_a_program_of_symbolic_sizes_runs_at_every_size(symbol):
    rows, width = symbol("rows", 5), symbol("width", 7)
    builder, steps = mlp(rows, width)
    program = builder.build(TIER)
    assert program.num_steps == steps
    order = [str(s) for s in builder.sizes.symbols]
    for r, w in [(5, 7), (1, 1), (64, 576), (3, 10_000), (2, 3), (0, 9)]:
        x = torch.randn(r, w)
        y = torch.empty_like(x)
        values = {str(rows.node.expr): r, str(width.node.expr): w}
        program.run([x.data_ptr(), y.data_ptr()], [values[s] for s in order], 2)
        torch.testing.assert_close(y, mlp_reference(x), rtol=1e-5, atol=1e-6)
    assert program.arena_bytes >= 2 * 3 * 10_000 * 4


def test_size_expressions(symbol):
    """Sums, products, floor division, remainder, maximum and minimum of sizes."""
    n = symbol("n", 10)
    builder = ProgramBuilder()
    x, y = builder.external(), builder.external()
    kept = torch.sym_min(n // 3 + n % 3 * 2, torch.sym_max(n - 4, 2))
    view = View(x, torch.float32, (kept,), (2,), offset=n - 1)
    builder.step("copy", [view, View(y, torch.float32, (kept,), (1,))])
    program = builder.build(TIER)
    source = torch.arange(200.0)
    for size in (4, 5, 10, 11, 50):
        count = min(size // 3 + size % 3 * 2, max(size - 4, 2))
        out = torch.full((100,), -1.0)
        program.run([source.data_ptr(), out.data_ptr()], [size], 1)
        assert torch.equal(out[:count], source[size - 1 :: 2][:count])
        assert (out[count:] == -1).all()


def test_profile_gives_one_time_a_step():
    builder, steps = mlp(64, 576)
    x, y = torch.randn(64, 576), torch.empty(64, 576)
    times = builder.build(TIER).profile([x.data_ptr(), y.data_ptr()], [], 2)
    assert len(times) == steps
    assert all(0 < t < 1e9 for t in times)


GOOD = {
    "tier": TIER,
    "num_symbols": 1,
    "num_externals": 2,
    "exprs": [[0, 0], [0, 4], [0, 1], [1, 0]],
    "slots": [[1]],
    "buffers": [(True, 0), (True, 1), (False, 0)],
    "steps": [("copy", [(0, 0, 0, [1], [2]), (1, 0, 0, [1], [2])], [], [])],
}
WRONG = {
    "unknown tier": ({"tier": "sse9"}, "tier 'sse9'.*scalar"),
    "unknown op": ({"steps": [("no_such_op", [], [], [])]}, "no kernel for op 'no_such_op'"),
    "symbol": ({"exprs": [[1, 1]]}, "symbol that does not exist"),
    "symbol without number": ({"exprs": [[0, 4], [1]]}, "symbol that does not exist"),
    "slot": ({"slots": [[9]]}, "arena slot"),
    "buffer external": ({"buffers": [(True, 2)]}, "buffer names memory"),
    "buffer slot": ({"buffers": [(False, 1)]}, "buffer names memory"),
    "operand buffer": ({"steps": [("copy", [(3, 0, 0, [1], [2])], [], [])]}, "names a buffer"),
    "operand size": ({"steps": [("copy", [(0, 0, 0, [4], [2])], [], [])]}, "names an expression"),
    "operand offset": (
        {"steps": [("copy", [(0, 0, -1, [1], [2])], [], [])]},
        "names an expression",
    ),
    "strides": ({"steps": [("copy", [(0, 0, 0, [1, 1], [2])], [], [])]}, "as many strides"),
    "dimensions": ({"steps": [("copy", [(0, 0, 0, [1] * 7, [2] * 7)], [], [])]}, "at most 6"),
    "attribute": ({"steps": [("copy", [], [4], [])]}, "attribute names"),
}


def test_the_program_that_the_wrong_ones_derive_from_is_right():
    x, y = torch.randn(4), torch.zeros(4)
    _C.Program(**GOOD).run([x.data_ptr(), y.data_ptr()], [5], 1)
    assert torch.equal(x, y)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_programs_are_refused(name):
    change, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        _C.Program(**{**GOOD, **change})


def test_wrong_run_arguments_are_refused():
    program = _C.Program(**GOOD)
    for externals, symbols in (([0], [1]), ([0, 0], []), ([0, 0, 0], [1]), ([0, 0], [1, 2])):
        with pytest.raises(ValueError, match="it needs 2 and 1"):
            program.run(externals, symbols, 1)


def test_division_by_a_zero_size_is_an_error_and_the_program_lives_on(symbol):
    builder = ProgramBuilder()
    n = symbol("n", 4)
    x = builder.external()
    view = View(x, torch.float32, (12 // n,), (1,))
    builder.step("copy", [view, view])
    program = builder.build(TIER)
    a = torch.randn(12)
    with pytest.raises(ValueError, match="divides by zero"):
        program.run([a.data_ptr()], [0], 1)
    program.run([a.data_ptr()], [3], 1)


def test_runs_follow_each_other_with_other_sizes_addresses_operands_and_threads(symbol):
    """What stays between runs is resolved once: nothing of it may be another run's."""
    builder = ProgramBuilder()
    n = symbol("n", 4)
    w, r, y, x, z = (builder.external() for _ in range(5))
    grows = builder.arena(builder.slot(), n * 4)
    behind = builder.arena(builder.slot(), 2 * 16 * 4)  # moves with n
    rows = {b: View(b, torch.float32, (2, 16), (16, 1)) for b in (w, r, y, behind)}
    line = {b: View(b, torch.float32, (n,), (1,)) for b in (x, z, grows)}
    norm = [rows[w], rows[r], None, None, rows[behind], None]
    builder.step("norm", norm, [1], [1e-6, 0.0])
    builder.step("copy", [rows[behind], rows[y]])
    builder.step("copy", [line[x], line[grows]])
    builder.step("copy", [line[grows], line[z]])
    program = builder.build(TIER)
    torch.manual_seed(0)
    for size, has_residual, threads in [
        (4, True, 1),
        (4, True, 1),
        (5000, True, 1),
        (4, False, 1),
        (4, False, 2),
        (300, True, 2),
        (300, False, 2),
        (0, False, 2),
        (300, True, 2),
    ]:
        given_w, given_r, given_x = torch.randn(2, 16), torch.randn(2, 16), torch.randn(size)
        got_y, got_z = torch.zeros(2, 16), torch.zeros(size)
        kept = (given_w, given_r, got_y, given_x, got_z)
        addresses = [t.data_ptr() for t in kept]
        if not has_residual:
            addresses[1] = 0
        program.run(addresses, [size], threads)
        total = given_w + given_r if has_residual else given_w
        want = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6)
        torch.testing.assert_close(got_y, want, rtol=1e-5, atol=1e-5)
        assert torch.equal(got_z, given_x)
        if size == 0:  # a refused run leaves nothing behind: not even the second time
            for _ in range(2):
                with pytest.raises(ValueError, match=r"copy: .*differ"):
                    program.run([*addresses[:2], 0, *addresses[3:]], [size], threads)


def test_content_is_checked_at_every_run():
    """Indices change where neither sizes nor addresses do."""
    builder = ProgramBuilder()
    ids, table, y = (builder.external() for _ in range(3))
    row = View(ids, torch.int64, (3,), (1,))
    tables = View(table, torch.float32, (5, 4), (4, 1)), View(y, torch.float32, (3, 4), (4, 1))
    builder.step("embedding", [row, *tables], [], [1.0])
    program = builder.build(TIER)
    given, rows, got = torch.tensor([0, 4, 2]), torch.randn(5, 4), torch.zeros(3, 4)
    addresses = [t.data_ptr() for t in (given, rows, got)]
    for bad in (None, 5, -1, None):
        given[1] = 4 if bad is None else bad
        if bad is None:
            program.run(addresses, [], 1)
            assert torch.equal(got, rows[given])
            continue
        with pytest.raises(IndexError, match=f"index {bad} is out of range"):
            program.run(addresses, [], 1)


def test_two_python_threads_share_one_program():
    builder, _ = mlp(37, 600)
    program = builder.build(TIER)
    failures: list[str] = []

    def work(seed: int) -> None:
        x = torch.randn(37, 600, generator=torch.Generator().manual_seed(seed))
        want = mlp_reference(x)
        for i in range(150):
            y = torch.zeros_like(x)
            program.run([x.data_ptr(), y.data_ptr()], [], 1 + i % 2)
            if not torch.allclose(y, want, rtol=1e-5, atol=1e-6):
                failures.append(f"thread {seed}, run {i}")

    threads = [threading.Thread(target=work, args=(s,)) for s in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert failures == []


@pytest.mark.parametrize("call", ["run", "profile"])
def test_other_python_threads_go_on_while_a_program_runs(call):
    """Nobody has to give up the interpreter here within ten seconds: only a call that lets it go lets another thread in."""
    builder = ProgramBuilder()
    x, y = (View(builder.external(), torch.float32, (1 << 20,), (1,)) for _ in range(2))
    builder.step("copy", [x, y])
    program = builder.build(TIER)
    source, copied = torch.ones(1 << 20), torch.zeros(1 << 20)
    addresses = [source.data_ptr(), copied.data_ptr()]
    may_start, went_on = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: may_start.wait() and went_on.set())
    thread.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(10)
    try:
        may_start.set()
        for _ in range(5000):  # a second, for a thread that waits for a core
            getattr(program, call)(addresses, [], 1)
            if went_on.is_set():
                break
        has_gone_on = went_on.is_set()
    finally:
        sys.setswitchinterval(interval)
        thread.join()
    assert has_gone_on
    assert torch.equal(copied, source)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_a_thousand_runs_do_not_grow_memory():
    builder, _ = mlp(64, 576)
    program = builder.build(TIER)
    x = torch.randn(64, 576)
    y = torch.empty_like(x)
    addresses = [x.data_ptr(), y.data_ptr()]

    def run_many(n: int) -> None:
        for _ in range(n):
            program.run(addresses, [], 2)

    run_many(50)
    before = resident_bytes()
    run_many(1000)
    # One leaked workspace, arena or scratch a run would be over 100 MB here.
    assert resident_bytes() - before < 4 << 20


@pytest.mark.parametrize("tier", _C.tiers())
def test_one_and_two_threads_agree_bit_for_bit(tier):
    builder, _ = mlp(201, 333)
    program = builder.build(tier)
    x = torch.randn(201, 333)
    results = []
    for threads in (1, 2, 3, 8):
        y = torch.empty_like(x)
        program.run([x.data_ptr(), y.data_ptr()], [], threads)
        results.append(y)
    assert all(torch.equal(r, results[0]) for r in results)


def test_runs_inside_and_between_torch_s_parallel_regions():
    """torch's own ops use the same OpenMP pool; neither may disturb the other."""
    big = torch.randn(1 << 20)
    x = torch.randn(64, 576)
    y = torch.empty_like(x)
    builder, _ = mlp(64, 576)
    program = builder.build(TIER)
    want_sum, want = big.exp().sum(), mlp_reference(x)

    class FromBackward(torch.autograd.Function):
        """Runs the program on autograd's worker thread."""

        @staticmethod
        def forward(ctx, a):
            return a.clone()

        @staticmethod
        def backward(ctx, grad):
            program.run([x.data_ptr(), y.data_ptr()], [], 2)
            return grad

    for _ in range(20):
        program.run([x.data_ptr(), y.data_ptr()], [], torch.get_num_threads())
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(big.exp().sum(), want_sum)
    y.zero_()
    leaf = torch.ones(3, requires_grad=True)
    FromBackward.apply(leaf).sum().backward()
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-6)


def test_thread_count_follows_torch():
    x, y = torch.randn(100, 100), torch.empty(100, 100)
    op = OneOp("copy", [x, y])
    before = torch.get_num_threads()
    try:
        for n in (1, 2, 4):
            torch.set_num_threads(n)
            y.zero_()
            assert threads_that_run(op) == n
            assert torch.equal(x, y)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("limit", ["1", "3"])
def test_fewer_threads_than_asked_for(limit):
    command = [sys.executable, "-m", "tests.kernels.few_threads_run"]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_THREAD_LIMIT": limit})
