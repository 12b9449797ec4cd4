"""The search with a bench and a clock of the test's own: nothing here depends on the machine's speed."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable

import pytest
from llmopt.tune.search import BUDGET_SECONDS, WIN, search


class FakeBench:
    """Configs are names; a call takes what `us_of` says of the config and of how often it ran before."""

    def __init__(self, us_of: Callable[[str, int], float], overhead: float = 0.0) -> None:
        self.us_of, self.overhead = us_of, overhead
        self.calls: list[str] = []
        self.now = 0.0

    def __call__(self, config: str) -> float:
        us = self.us_of(config, self.calls.count(config))
        self.calls.append(config)
        self.now += us * 1e-6 + self.overhead
        return us

    def search(self, *candidates: str, budget: float = BUDGET_SECONDS):
        return search(candidates, self, budget, lambda: self.now)


def steady(**us: float) -> FakeBench:
    return FakeBench(lambda config, _: us[config])


def test_the_fastest_wins():
    result = steady(default=100, a=90, b=70, c=95).search("default", "a", "b", "c")
    assert result.config == "b"
    assert (result.us, result.default_us) == (70, 100)
    assert result.conclusive
    assert "+42.9 % and +42.9 %" in result.reason
    assert result.timings == {"default": 100, "a": 90, "b": 70, "c": 95}
    assert result.samples == {"default": [100] * 18, "b": [70] * 18}


def test_less_than_three_percent_is_not_enough():
    assert steady(default=100, a=98).search("default", "a").config == "default"
    assert steady(default=100, a=97.2).search("default", "a").config == "default"
    assert steady(default=100, a=97.0).search("default", "a").config == "a"


def test_slower_candidates_leave_the_default():
    result = steady(default=100, a=120, b=130).search("default", "a", "b")
    assert (result.config, result.us) == ("default", 100)
    assert "no candidate was faster" in result.reason


def test_alone_the_default_stays():
    result = steady(default=100).search("default")
    assert (result.config, result.conclusive) == ("default", False)
    assert result.reason == "there is no other candidate"


def test_a_win_must_come_twice():
    """A candidate that is fast until its first proof and slow in its second."""
    fast = 10_000.0

    def us_of(config: str, nth: int) -> float:
        return fast if config == "default" else (0.8 * fast if nth < 2 else fast)

    result = FakeBench(us_of).search("default", "a", budget=9 * fast * 1e-6)
    assert result.config == "default"
    assert "+25.0 % and +0.0 %: 3 % twice are needed" in result.reason


def test_a_loss_that_comes_first_counts_too():
    fast = 10_000.0

    def us_of(config: str, nth: int) -> float:
        return fast if config == "default" else (1.1 * fast if nth == 1 else 0.8 * fast)

    result = FakeBench(us_of).search("default", "a", budget=9 * fast * 1e-6)
    assert result.config == "default"
    assert "3 % twice" in result.reason


@pytest.mark.parametrize("seed", range(30))
def test_little_noise_never_beats_equals(seed):
    """Twelve equal configs, calls up to 2 % slower by chance: nobody wins."""
    generator = random.Random(seed)
    bench = FakeBench(lambda config, _: 100 * (1 + 0.02 * generator.random()))
    names = ["default", *(f"c{i}" for i in range(11))]
    assert bench.search(*names).config == "default"


def test_noise_seldom_beats_equals():
    """Calls up to a fifth slower by chance: 3 % are seen once in a sixth of the searches, twice in few."""
    names = ["default", *(f"c{i}" for i in range(11))]
    once = twice = 0
    for seed in range(100):
        generator = random.Random(seed)
        bench = FakeBench(lambda config, _, own=generator: 100 * (1 + 0.2 * own.random()))
        result = bench.search(*names)
        gains = re.findall(r"[+-][\d.]+(?= %)", result.reason)
        once += bool(gains) and float(gains[0]) >= 3
        twice += result.config != "default"
    assert once >= 12
    assert twice <= 8


@pytest.mark.parametrize("seed", range(30))
def test_a_clear_winner_is_found_under_noise(seed):
    """One call in ten takes three times as long, as when a neighbour has the core."""
    generator = random.Random(seed)

    def us_of(config: str, _: int) -> float:
        slow = 3.0 if generator.random() < 0.1 else 1.0
        return (60 if config == "c7" else 100) * slow * (1 + 0.05 * generator.random())

    names = ["default", *(f"c{i}" for i in range(11))]
    assert FakeBench(us_of).search(*names).config == "c7"


def test_the_first_call_is_nobodys_time():
    """The first touch of memory makes the default's first call slow; a candidate as fast as the default must not win by it."""
    bench = FakeBench(lambda config, nth: 5000 if (config, nth) == ("default", 0) else 100)
    result = bench.search("default", "a")
    assert (result.config, result.default_us) == ("default", 100)


@pytest.mark.parametrize("us", [1, 30, 400, 2_000, 5_000, 9_000, 20_000, 1_000_000])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.6])
def test_the_budget_holds(us, factor):
    """Whatever a call takes, its own overhead included, the time is not exceeded by more than two calls."""
    bench = FakeBench(lambda config, _: us if config == "default" else us * factor, overhead=2e-5)
    bench.search("default", *(f"c{i}" for i in range(11)))
    assert bench.now <= max(BUDGET_SECONDS, 2 * (us * 1e-6 + 2e-5)) + 4 * max(1, factor) * us * 1e-6


def test_calls_too_long_to_compare_say_so():
    bench = steady(default=20_000, a=1)
    result = bench.search("default", "a")
    assert (result.config, result.conclusive, len(bench.calls)) == ("default", False, 2)
    assert "a call takes 20.0 ms" in result.reason


def test_what_is_around_a_call_says_so():
    """Sixty calls of 0.1 ms would fit, but not sixty times what it takes to time one."""
    bench = FakeBench(lambda config, _: 100, overhead=9.9e-3)
    result = bench.search("default", "a")
    assert (result.config, result.conclusive) == ("default", False)
    assert "a call takes 100.0 us and to time it 10.0 ms of the 60.0 ms left" in result.reason


def test_longer_calls_try_fewer_candidates():
    names = ["default", *(f"c{i}" for i in range(11))]

    def tried(us: float) -> int:
        bench = FakeBench(lambda config, _: us)
        bench.search(*names)
        return len(set(bench.calls))

    counts = [tried(us) for us in (100, 1_000, 3_000, 5_000)]
    assert counts[0] == 12
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] >= 2


def test_half_of_the_field_leaves_in_each_round():
    """The slower half; who stays runs twice as often, until two are left beside the default."""
    names = [f"c{i}" for i in range(11)]  # each faster than those before it
    bench = steady(default=50, **{name: 200 - 10 * i for i, name in enumerate(names)})
    bench.search("default", *names)
    repeats = bench.calls.count("c0")
    start = 2  # after two calls to warm up
    for i, field in enumerate((names, names[6:], names[9:])):
        want = sorted(["default", *field] * (repeats << i))
        assert sorted(bench.calls[start : start + len(want)]) == want
        start += len(want)
    assert start == len(bench.calls)


def test_rounds_are_interleaved():
    """No config runs twice in a row while there are several: a slow moment meets all alike."""
    bench = steady(default=100, a=90, b=80, c=95)
    bench.search("default", "a", "b", "c")
    runs = [len(list(group)) for _, group in itertools.groupby(bench.calls)]
    assert max(runs[1:]) <= 2  # two of the proof meet where the order turns
    assert runs[0] <= 3  # warming up


def test_a_win_is_three_percent():
    assert WIN == 1.03
