"""What a plan is told: tuned, borrowed or default, always with where it comes from."""

from __future__ import annotations

import dataclasses
import itertools
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmopt.native.probe import READ_BYTES, Probe
from llmopt.target import target
from llmopt.tune import lookup, measure
from llmopt.tune.candidates import COUNT, Machine, candidates, predict, refuse
from llmopt.tune.database import Database
from llmopt.tune.lookup import BUCKETS, Lookup, at, bucket, recording, tuner_for
from llmopt.tune.search import BUDGET_SECONDS
from llmopt.tune.tuning import Tuning
from llmopt.types import EVERY_M, Choice, LinearConfig, LinearProblem

from tests.tune.problems import database, entry, local, problem, tune_patiently

CONFIG = LinearConfig(span=2)
MACHINE = Machine(target(), 2, Probe(300e9, 1200e9, 20e9))


@pytest.fixture
def known(tmp_path: Path) -> Database:
    return database(tmp_path / "tune", local())


def ask(known: Database, of: LinearProblem, measure=None) -> Choice:
    return Lookup(target(), known, measure)(of)


def test_buckets_at_their_edges():
    assert bucket(1) == 1
    for low, high in itertools.pairwise(BUCKETS):
        assert (bucket(low), bucket(low + 1), bucket(high)) == (low, high, high)
    assert bucket(4097) == bucket(10**9) == 4096


@pytest.mark.parametrize("m", [9, 12, 16])
def test_a_measured_height_serves_its_bucket(known, m):
    known.put(entry(problem(m=16), CONFIG))
    choice = ask(known, problem(m=m))
    assert str(choice) == "span=2"
    assert choice.source.startswith("tuned: 10.0 us, by its own rules 12.5 us")


@pytest.mark.parametrize("m", [1, 4, 40])
def test_far_heights_are_not_served(known, m):
    known.put(entry(problem(m=16), CONFIG))
    choice = ask(known, problem(m=m))
    assert choice.ints() == []
    assert choice.source == "default: not measured on this machine"


def test_a_measured_default_says_why(known):
    known.put(dataclasses.replace(entry(config=LinearConfig()), reason="no candidate was faster"))
    choice = ask(known, problem())
    assert choice.ints() == []
    assert choice.source == "default: measured, and no candidate was faster"


@pytest.mark.parametrize(
    "change", [{"m": 8}, {"m": 32}, {"n": 160}, {"k": 128}, {"bias": True, "norm": "rms"}], ids=str
)
def test_a_near_shape_is_borrowed(known, change):
    known.put(entry(problem(), CONFIG))
    choice = ask(known, dataclasses.replace(problem(), **change))
    assert str(choice) == "span=2"
    assert choice.source == "borrowed from 16x96x64: not measured on this machine"


@pytest.mark.parametrize(
    "change",
    [{"m": 64}, {"n": 300}, {"m": 32, "n": 192}, {"w": "bf16"}, {"x": "f16"}, {"gated": True}],
    ids=str,
)
def test_a_far_or_different_shape_is_not_borrowed(known, change):
    known.put(entry(problem(), CONFIG))
    assert ask(known, dataclasses.replace(problem(), **change)).source.startswith("default: ")


def test_the_nearest_is_borrowed(known):
    known.put(entry(problem(n=192), LinearConfig(span=1)))
    known.put(entry(problem(n=112), LinearConfig(span=3)))
    assert ask(known, problem()).rows[0][1] == LinearConfig(span=3)


def test_an_impossible_config_is_a_miss(known):
    known.put(entry(problem(), LinearConfig(rows=1000)))
    choice = ask(known, problem())
    assert choice.ints() == []
    assert "its config is impossible: the tuning asks for more rows" in choice.source
    assert ask(known, problem(n=112)).ints() == []  # nor is it lent


def test_unknown_fields_of_a_config_are_a_miss(known):
    known.put(dataclasses.replace(entry(), config={"speed": 11}))
    assert "its config is impossible: a config has no field 'speed'" in ask(known, problem()).source


def test_a_height_that_changes_gets_a_row_for_each_measured_one(known):
    for m in (8, 16, 64):
        known.put(entry(problem(m=m), CONFIG))
    choice = ask(known, problem(m=None))
    assert choice.rows == ((4, LinearConfig()), (16, CONFIG), (48, LinearConfig()), (64, CONFIG))
    assert choice.source.startswith("tuned for M=8, 16, 64, which changes from call to call")
    assert refuse_rows(choice) == ""


def test_heights_without_a_config_say_why(known):
    known.put(entry(problem(m=8), CONFIG))
    words = "tuned for M=8, which changes from call to call; else default: "
    assert ask(known, problem(m=None)).source == f"{words}not measured on this machine"
    lost = entry(problem(m=16), LinearConfig())
    known.put(dataclasses.replace(lost, reason="no candidate was faster"))
    assert ask(known, problem(m=None)).source == (
        f"{words}not measured on this machine; M=16: measured, and no candidate was faster"
    )


def test_a_height_that_changes_and_was_measured_in_vain_is_not_tuned(known):
    """Neither where no candidate won nor where there was no time to compare."""
    tuning = Tuning(
        target(), known.environment, 0.0, lambda *_: lambda config: 1e5, lambda: MACHINE.probe
    )
    choice = ask(known, problem(m=None, hint=13), tuning.measure)
    assert choice.rows == ()
    assert choice.source.startswith("default: measured, and a call takes 100.0 ms")
    assert "too few fit" in choice.source


def test_heights_that_are_all_measured_have_no_else(known):
    for m in BUCKETS:
        known.put(entry(problem(m=m), CONFIG))
    choice = ask(known, problem(m=None))
    assert choice.rows == ((EVERY_M, CONFIG),)
    assert choice.source.endswith("3072, 4096, which changes from call to call")


def test_the_largest_measured_height_serves_all_above_it(known):
    known.put(entry(problem(m=BUCKETS[-1]), CONFIG))
    assert ask(known, problem(m=10**6)).rows == ((EVERY_M, CONFIG),)
    choice = ask(known, problem(m=None))
    assert choice.rows == ((3072, LinearConfig()), (EVERY_M, CONFIG))
    assert str(choice) == "M<=3072: default; any other M: span=2"


def refuse_rows(choice: Choice) -> str:
    from llmopt import _C
    from llmopt.tune.candidates import op_ints

    return _C.refuse_tuning(target().tier, "linear", op_ints(problem()) + choice.ints())


def test_a_height_that_changes_and_was_never_measured(known):
    choice = ask(known, problem(m=None, hint=5))
    assert choice.ints() == []
    assert "default: nothing was measured on this machine" in choice.source


@pytest.mark.parametrize("empty", [{"m": 0}, {"n": 0}, {"k": 0}], ids=str)
def test_empty_problems_are_left_alone(known, empty):
    def measure(_):
        raise AssertionError("there is nothing to measure")

    choice = ask(known, dataclasses.replace(problem(), **empty), measure)
    assert choice.source == "default: nothing to compute"


def fake_tuning(known: Database, us_of) -> Tuning:
    return Tuning(
        target(),
        known.environment,
        60.0,
        lambda *_: lambda config: us_of(config),
        lambda: MACHINE.probe,
    )


def test_a_miss_is_measured_once_and_kept(known):
    asked = []

    def us_of(config: LinearConfig) -> float:
        asked.append(config)
        return 10.0 if config == LinearConfig() else 5.0

    measure = fake_tuning(known, us_of).measure
    first = ask(known, problem(), measure)
    assert first.source.startswith("tuned: 5.0 us, by its own rules 10.0 us (gained +100.0 %")
    assert first.ints()
    count = len(asked)
    assert ask(known, problem(), measure) == first
    again = database(known.root, known.environment)
    assert ask(again, problem()) == first  # another process
    (kept,) = again.entries()
    assert kept.samples == [5.0] * 18  # both comparisons
    assert kept.probe == dataclasses.asdict(MACHINE.probe)
    assert len(asked) == count


def test_a_measurement_without_time_lasts_for_the_process_only(known):
    tuning = Tuning(
        target(), known.environment, 0.0, lambda *_: lambda config: 1e5, lambda: MACHINE.probe
    )
    choice = ask(known, problem(), tuning.measure)
    assert choice.ints() == []
    assert "too few fit into the time" in choice.source
    assert known.entries() != []
    assert database(known.root, known.environment).entries() == []


@pytest.mark.parametrize("limit", ["fma_flops", "read_bytes"])
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_winner_on_a_machine_that_is_busy_does_not_count(known, limit, factor):
    """The probes behind the measurement differ from the one in front of it."""
    moved = dataclasses.replace(MACHINE.probe, **{limit: getattr(MACHINE.probe, limit) * factor})
    probes = itertools.chain([MACHINE.probe], itertools.repeat(moved))

    def us_of(config: LinearConfig) -> float:
        return 10.0 if config == LinearConfig() else 5.0

    tuning = Tuning(target(), known.environment, 60.0, lambda *_: us_of, lambda: next(probes))
    choice = ask(known, problem(), tuning.measure)
    assert choice.ints() == []
    assert "the machine was busy: its limits moved 2.0 times" in choice.source
    assert database(known.root, known.environment).entries() == []


def test_one_slow_glance_is_no_proof(known):
    slow = dataclasses.replace(MACHINE.probe, read_bytes=MACHINE.probe.read_bytes / 3)
    tuning = Tuning(
        target(),
        known.environment,
        60.0,
        lambda *_: lambda config: 10.0 if config == LinearConfig() else 5.0,
        lambda: MACHINE.probe,
        lambda: slow,
    )
    assert ask(known, problem(), tuning.measure).source.startswith("tuned: 5.0 us")


class Clock:
    """A clock that only what takes time on it advances."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def take(self, seconds: float, value):
        self.now += seconds
        return value


def test_the_budget_of_a_shape_holds_with_all_that_is_around_it(known):
    """Setting up, the search and the glance behind it, on a clock that only these advance."""
    clock = Clock()
    take = clock.take
    read_seconds = READ_BYTES / MACHINE.probe.read_bytes
    tuning = Tuning(
        target(),
        known.environment,
        BUDGET_SECONDS,
        lambda *_: take(0.002, lambda config: take(1e-3, 1e3)),
        lambda: MACHINE.probe,
        lambda: take(1.1 * read_seconds, MACHINE.probe),
        clock=clock,
    )
    tuning.measure(problem())
    assert 0.5 * BUDGET_SECONDS < clock.now < BUDGET_SECONDS + 2e-3


@pytest.mark.parametrize("n", [96, 2 * READ_BYTES // 1024], ids=["common memory", "its own"])
def test_filling_memory_is_nobodys_time(known, monkeypatch, n):
    """The first shape of a process is tuned like the second, though memory is filled for it: longer than a shape may take."""
    now, asked, filled = [0.0], [], []

    def fill(address: int, value: int, num_bytes: int) -> None:
        filled.append(num_bytes)
        now[0] += 3 * BUDGET_SECONDS

    def call(bench, config: LinearConfig) -> float:
        asked.append(config)
        now[0] += 1e-4
        return 100.0 if config == LinearConfig() else 120.0

    monkeypatch.setattr(measure.ctypes, "memset", fill)
    monkeypatch.setattr(measure.LinearBench, "__call__", call)
    measure._common_memory.cache_clear()
    tuning = Tuning(target(), known.environment, probe=lambda: MACHINE.probe, clock=lambda: now[0])
    counts = []
    for m in (16, 8):
        found, keep = tuning.measure(problem(m=m, n=n, k=256))
        assert (found.reason, keep) == ("no candidate was faster", True)
        counts.append(len(asked))
    measure._common_memory.cache_clear()  # nobody filled it
    assert filled
    assert abs(counts[1] - 2 * counts[0]) <= 0.1 * counts[0]


def test_the_memory_is_one_for_the_process_except_for_larger_weights(monkeypatch):
    filled = []
    monkeypatch.setattr(measure.ctypes, "memset", lambda *given: filled.append(given[2]))
    measure._common_memory.cache_clear()
    one, other = measure.memory_for(1), measure.memory_for(READ_BYTES)
    assert one is other
    assert filled == [READ_BYTES]
    large = measure.memory_for(READ_BYTES + 1)
    assert large is not one
    assert len(filled) == 2
    assert filled[1] > READ_BYTES
    assert measure.memory_for(1) is one
    measure._common_memory.cache_clear()  # nobody filled it


def test_setting_up_that_takes_all_the_time_says_so(known):
    """A call of 0.1 ms would fit: the reason is not its length alone."""
    clock = Clock()
    tuning = Tuning(
        target(),
        known.environment,
        BUDGET_SECONDS,
        lambda *_: clock.take(0.050, lambda config: clock.take(1e-3, 100.0)),
        lambda: MACHINE.probe,
        clock=clock,
    )
    found, keep = tuning.measure(problem())
    assert not keep
    assert "a call takes 100.0 us and to time it 1.0 ms of the 1.9 ms left" in found.reason
    assert "too few fit into the time for a comparison" in found.reason
    assert "58 of 60 ms go to setting up and to a glance at the machine's limits" in found.reason


def test_limits_that_move_a_little_do_not_matter(known):
    moved = dataclasses.replace(MACHINE.probe, read_bytes=MACHINE.probe.read_bytes * 1.2)
    probes = itertools.chain([MACHINE.probe], itertools.repeat(moved))

    def us_of(config: LinearConfig) -> float:
        return 10.0 if config == LinearConfig() else 5.0

    tuning = Tuning(target(), known.environment, 60.0, lambda *_: us_of, lambda: next(probes))
    assert ask(known, problem(), tuning.measure).source.startswith("tuned: 5.0 us")


def test_max_autotune_measures_the_height_of_the_call_where_it_changes(known):
    measure = fake_tuning(known, lambda c: 10.0 if c == LinearConfig() else 5.0).measure
    choice = ask(known, problem(m=None, hint=13), measure)
    assert choice.source.startswith("tuned for M=16,")


def test_only_max_autotune_measures(monkeypatch):
    tune_patiently(monkeypatch)
    assert tuner_for(target(), "default")(problem()).source.startswith(
        "default: nothing was measured"
    )
    known = lookup.database(target(), torch.get_num_threads())
    assert known.entries() == []
    choice = tuner_for(target(), "max-autotune")(problem())
    (measured,) = database(known.root, known.environment).entries()
    assert len(measured.timings) == COUNT
    won = "tuned: " if measured.config else f"default: measured, and {measured.reason}"
    assert choice.source.startswith(won)


def test_tuning_can_be_switched_off(monkeypatch):
    known = lookup.database(target(), torch.get_num_threads())
    known.put(entry(problem(), CONFIG))
    assert str(tuner_for(target(), "default")(problem())) == "span=2"
    monkeypatch.setenv("LLMOPT_TUNE", "0")
    for mode in ("default", "max-autotune"):
        assert tuner_for(target(), mode)(problem()) == Choice(source="default: LLMOPT_TUNE=0")


def test_the_database_is_that_of_the_threads(cache_dir):
    one, two = lookup.database(target(), 1), lookup.database(target(), 2)
    assert one.folder != two.folder
    assert one.folder.parent == cache_dir / "tune"
    assert lookup.database(target(), 1) is one


def test_problems_of_plans_are_recorded_once(known):
    asked = Lookup(target(), known)
    with recording() as found:
        for m in (3, 3, 4):
            asked(problem(m=m))
    asked(problem(m=5))
    assert [p.m for p in found] == [3, 4]


SHAPES = st.builds(
    problem,
    m=st.sampled_from(BUCKETS),
    n=st.integers(1, 5000),
    k=st.integers(1, 5000),
)
QUANTIZED = st.builds(
    lambda m, n, groups, w, planes: LinearProblem(
        "linear_quantized", m, n, groups * 32, "f32", w, "f32", group=32, planes=planes
    ),
    m=st.sampled_from(BUCKETS),
    n=st.integers(1, 5000),
    groups=st.integers(1, 200),
    w=st.sampled_from(("q8", "q4")),
    planes=st.sampled_from((1, 3)),
)


@settings(deadline=None)
@given(of=SHAPES | SHAPES.map(lambda p: dataclasses.replace(p, w="bf16")) | QUANTIZED)
def test_candidates_are_possible_few_and_different(of):
    found = candidates(of, MACHINE)
    assert found[0] == LinearConfig()
    assert 1 < len(found) <= COUNT
    assert len(set(found)) == len(found)
    assert [c for c in found if refuse(target(), of, c)] == []
    times = [predict(of, c, MACHINE) for c in found[1:]]
    assert times == sorted(times)
    assert times[0] > 0


def test_candidates_of_a_bucket_are_possible_for_every_height_in_it():
    """A config is measured at its bucket's edge and used below it."""
    of = problem(m=128, n=960, k=576)
    for config in candidates(of, MACHINE):
        for m in (97, 98, 127, 128):
            assert refuse(target(), at(of, m), config) == ""


def test_few_rows_stream_and_many_are_blocked():
    kinds = [
        {c.family for c in candidates(problem(m=m, n=4096, k=2048), MACHINE)[1:]} for m in (1, 512)
    ]
    assert "stream" in kinds[0]
    assert kinds[1] == {"blocked"}


def test_conftest_left_the_users_cache_alone(cache_dir):
    assert os.environ["LLMOPT_CACHE_DIR"] == str(cache_dir)
