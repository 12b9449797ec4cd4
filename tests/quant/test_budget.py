"""The choice within an accuracy budget, with made-up measurements."""

from __future__ import annotations

import itertools
import random

import pytest
from llmopt.quant.budget import MOST_CHECKS, Candidate, decide

EXACT = Candidate("exact", 100e-6, 0.0)
W8A16 = Candidate("w8a16", 60e-6, 0.001)
W8A8 = Candidate("w8a8", 30e-6, 0.004)
W4A16 = Candidate("w4a16", 20e-6, 0.02, "decode 2.0 µs, prefill 18.0 µs")
ALL = (EXACT, W8A16, W8A8, W4A16)


def reasons(decision) -> dict:
    return {(r.layer, r.candidate.plan): r.reason for r in decision.rows}


def test_the_fastest_inside_the_budget() -> None:
    found = decide({"a": ALL}, budget=0.01)
    assert found.choice == {"a": "w8a8"}
    assert found.divergence == 0.004
    why = reasons(found)
    assert why["a", "w8a8"] == ""
    assert why["a", "w8a16"] == "60.0 µs is not faster than w8a8 with 30.0 µs"
    assert "add 0.01600 to the divergence, and 0.00600" in why["a", "w4a16"]
    assert found.summary() == "w8a8 x1; KL 0.00400 of at most 0.01"
    lines = str(found).splitlines()
    assert lines[0] == found.summary()
    assert "w8a8   30.0 µs  KL 0.00400  chosen" in lines[3]
    assert "w4a16  decode 2.0 µs, prefill 18.0 µs  KL 0.02000  refused: it would" in lines[4]


def test_layers_share_the_budget() -> None:
    found = decide(dict.fromkeys("abc", ALL), budget=0.01)
    assert found.divergence <= 0.01
    assert sorted(found.choice.values()) == ["w8a16", "w8a8", "w8a8"]


def test_a_choice_that_no_step_of_the_hull_reaches() -> None:
    mild, wild = Candidate("w8a16", 90e-6, 0.009), Candidate("w4a16", 10e-6, 0.02)
    assert decide({"a": (EXACT, mild, wild)}, 0.01).choice == {"a": "w8a16"}


def test_a_budget_that_nothing_meets() -> None:
    found = decide({"a": ALL}, budget=0.0005)
    assert found.choice == {"a": "exact"}
    assert (
        found.note
        == "every layer stays exact: no faster scheme stays inside the accuracy budget of 0.0005"
    )
    assert str(found).startswith(found.note)
    nothing_faster = decide({"a": (EXACT, Candidate("w8a8", 1.0, 0.0))})
    assert nothing_faster.note == "every layer stays exact: no scheme is faster here"


def test_the_check_of_the_whole_has_the_last_word() -> None:
    cost = {"exact": 0.0, "w8a16": 0.002, "w8a8": 0.006, "w4a16": 0.1}
    asked = []

    def check(choice):
        asked.append(dict(choice))
        return sum(cost[s] for s in choice.values())

    found = decide(dict.fromkeys("ab", ALL), 0.01, check)
    assert asked[0] == {"a": "w8a8", "b": "w8a8"}
    assert found.divergence == check(found.choice) <= 0.01
    assert sorted(found.choice.values()) == ["w8a16", "w8a8"]
    assert "measured together" in " ".join(reasons(found).values())


@pytest.mark.parametrize("measured", [1.0, 0.0101, float("inf"), float("nan")])
def test_a_check_that_nothing_passes_leaves_everything_exact(measured: float) -> None:
    free = Candidate("w8a16", 50e-6, 0.0)  # seemed free alone
    asked = []

    def check(choice):
        asked.append(choice)
        return measured

    for own in (ALL, (EXACT, free, W8A8)):
        asked.clear()
        found = decide(dict.fromkeys("ab", own), 0.01, check)
        assert set(found.choice.values()) == {"exact"}
        assert "stays exact" in found.note
        assert len(asked) <= MOST_CHECKS


def test_near_the_best_choice_of_all() -> None:
    rng = random.Random(0)
    for _ in range(50):
        layers = {
            str(i): (EXACT, *(Candidate(f"s{j}", rng.uniform(1e-5, 1e-4), rng.uniform(0, 0.01))
                              for j in range(3)))
            for i in range(4)
        }  # fmt: skip
        found = decide(layers, 0.01)
        own = {name: {c.plan: c for c in all_} for name, all_ in layers.items()}
        taken = sum(own[name][s].seconds for name, s in found.choice.items())
        spent = sum(own[name][s].divergence for name, s in found.choice.items())
        possible = [
            sum(c.seconds for c in choice)
            for choice in itertools.product(*layers.values())
            if sum(c.divergence for c in choice) <= 0.01
        ]
        assert spent <= 0.01
        assert taken <= 1.35 * min(possible)


@pytest.mark.parametrize(
    ("candidates", "budget", "words"),
    [
        (ALL, -1.0, "accuracy_budget=-1.0"),
        (ALL, float("nan"), "accuracy_budget=nan"),
        (ALL, "small", "accuracy_budget='small' is not a number"),
        (ALL, True, "accuracy_budget=True is not a number"),
        ((W8A8,), 0.01, "needs one candidate 'exact'"),
        (
            (EXACT, Candidate("w8a8", float("nan"), 0.1)),
            0.01,
            "a as w8a8 has no usable measurement",
        ),
        ((EXACT, Candidate("w8a8", 1.0, float("nan"))), 0.01, "no usable measurement"),
    ],
)
def test_bad_numbers(candidates, budget, words) -> None:
    with pytest.raises(ValueError, match=words):
        decide({"a": candidates}, budget)
