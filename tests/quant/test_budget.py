"""The choice within an accuracy budget, with made-up measurements."""

from __future__ import annotations

import itertools
import random

import pytest
from llmopt.quant.budget import Candidate, decide

EXACT = Candidate("exact", 100e-6, 0.0)
W8A16 = Candidate("w8a16", 60e-6, 0.001)
W8A8 = Candidate("w8a8", 30e-6, 0.004)
W4A16 = Candidate("w4a16", 20e-6, 0.02)
ALL = (EXACT, W8A16, W8A8, W4A16)


def reasons(decision) -> dict:
    return {(r.layer, r.bucket, r.candidate.scheme): r.reason for r in decision.rows}


def test_the_fastest_inside_the_budget() -> None:
    found = decide({"a": {"decode": ALL}}, budget=0.01)
    assert found.schemes == {"decode": {"a": "w8a8"}}
    assert found.divergence == {"decode": 0.004}
    why = reasons(found)
    assert why["a", "decode", "w8a8"] == ""
    assert why["a", "decode", "w8a16"] == "60.0 µs is not faster than w8a8 with 30.0 µs"
    assert "add 0.01600 to the divergence, and 0.00600" in why["a", "decode", "w4a16"]
    assert "chosen" in str(found)


def test_layers_share_the_budget() -> None:
    found = decide({name: {"decode": ALL} for name in "abc"}, budget=0.01)
    assert sum(found.divergence.values()) <= 0.01
    assert sorted(found.schemes["decode"].values()) == ["w8a16", "w8a8", "w8a8"]


def test_ranges_of_m_are_chosen_apart() -> None:
    slow = Candidate("w8a8", 200e-6, 0.001)
    found = decide({"a": {"decode": (EXACT, slow), "prefill": (EXACT, W8A8)}})
    assert found.schemes == {"decode": {"a": "exact"}, "prefill": {"a": "w8a8"}}
    assert "not faster than exact" in reasons(found)["a", "decode", "w8a8"]


def test_a_choice_that_no_step_of_the_hull_reaches() -> None:
    mild, wild = Candidate("w8a16", 90e-6, 0.009), Candidate("w4a16", 10e-6, 0.02)
    assert decide({"a": {"": (EXACT, mild, wild)}}, 0.01).schemes[""] == {"a": "w8a16"}


def test_a_budget_that_nothing_meets() -> None:
    found = decide({"a": {"decode": ALL}}, budget=0.0005)
    assert found.schemes == {"decode": {"a": "exact"}}
    assert (
        found.note
        == "every layer stays exact: no faster scheme stays inside the accuracy budget of 0.0005"
    )
    assert str(found).startswith(found.note)
    nothing_faster = decide({"a": {"": (EXACT, Candidate("w8a8", 1.0, 0.0))}})
    assert nothing_faster.note == "every layer stays exact: no scheme is faster here"


def test_the_check_of_the_whole_has_the_last_word() -> None:
    cost = {"exact": 0.0, "w8a16": 0.002, "w8a8": 0.006, "w4a16": 0.1}
    asked = []

    def check(choice):
        asked.append(dict(choice))
        return sum(cost[s] for s in choice.values())

    found = decide({name: {"": ALL} for name in "ab"}, 0.01, check)
    assert asked[0] == {"a": "w8a8", "b": "w8a8"}
    assert found.divergence[""] == check(found.schemes[""]) <= 0.01
    assert sorted(found.schemes[""].values()) == ["w8a16", "w8a8"]
    assert "measured together" in " ".join(reasons(found).values())


def test_a_check_that_nothing_passes_leaves_everything_exact() -> None:
    free = Candidate("w8a16", 50e-6, 0.0)  # seemed free alone
    for own in (ALL, (EXACT, free, W8A8)):
        found = decide({name: {"": own} for name in "ab"}, 0.01, lambda choice: 1.0)
        assert set(found.schemes[""].values()) == {"exact"}
        assert "stays exact" in found.note


def test_near_the_best_choice_of_all() -> None:
    rng = random.Random(0)
    for _ in range(50):
        layers = {
            str(i): {"": (EXACT, *(Candidate(f"s{j}", rng.uniform(1e-5, 1e-4), rng.uniform(0, 0.01))
                                   for j in range(3)))}
            for i in range(4)
        }  # fmt: skip
        found = decide(layers, 0.01)
        own = {name: {c.scheme: c for c in b[""]} for name, b in layers.items()}
        taken = sum(own[name][s].seconds for name, s in found.schemes[""].items())
        spent = sum(own[name][s].divergence for name, s in found.schemes[""].items())
        possible = [
            sum(c.seconds for c in choice)
            for choice in itertools.product(*(b[""] for b in layers.values()))
            if sum(c.divergence for c in choice) <= 0.01
        ]
        assert spent <= 0.01
        assert taken <= 1.35 * min(possible)


@pytest.mark.parametrize(
    ("candidates", "budget", "words"),
    [
        (ALL, -1.0, "accuracy_budget=-1.0"),
        (ALL, float("nan"), "accuracy_budget=nan"),
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
        decide({"a": {"": candidates}}, budget)
