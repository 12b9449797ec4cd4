"""Predicted tiles: those of the package are possible wherever they are used, and are what the model says today."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
from llmopt import kernels
from llmopt.cli import main
from llmopt.gpu.tune.environment import predicted_environment
from llmopt.gpu.tune.lookup import Lookup, shipped
from llmopt.gpu.tune.predict import first_tuned, predicted, standard_problems
from llmopt.gpu.tune.problems import facts, tile_of
from llmopt.gpus import part_named
from llmopt.launch import AttentionProblem, LinearProblem
from llmopt.registry import KERNELS, possible, refuse
from llmopt.tune.database import Entry, key_of
from llmopt.tune.exchange import entries_of
from llmopt.tune.lookup import BUCKETS

kernels.load()

LINEAR = KERNELS["linear_f16.triton"]
SHIPPED = ("A100", "H100", "H200", "L4", "RTX4090", "MI300X")


def shipped_for(name: str) -> dict[str, Entry]:
    environment = predicted_environment(part_named(name))
    found, wrong = shipped(lambda e: e == environment)
    assert wrong == ""
    return {entry.key: entry for entry in found[environment]}


def problem_of(entry) -> LinearProblem | AttentionProblem:
    kind = AttentionProblem if "heads" in entry.problem else LinearProblem
    given = {f.name: entry.problem[f.name] for f in dataclasses.fields(kind) if f.name in entry.problem}  # fmt: skip
    return kind(**given)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_package_predicts_all_standard_problems(name):
    part = part_named(name)
    found = shipped_for(name)
    wanted = [facts(first_tuned(a, part), a.problem) for a in standard_problems()]
    assert len(wanted) > 300
    assert set(found) >= set(map(key_of, wanted))
    for entry in found.values():
        assert "waves" in entry.reason
        assert "limited by" in entry.reason
        assert "registers" in entry.reason
        assert 0 < entry.us <= entry.default_us


@pytest.mark.parametrize("name", SHIPPED)
def test_every_predicted_tile_is_possible_at_both_ends_of_its_bucket(name):
    target = part_named(name).target
    below = {high: low + 1 for low, high in itertools.pairwise((0, *BUCKETS))}
    for entry in shipped_for(name).values():
        of, kernel = problem_of(entry), KERNELS[str(entry.problem["kernel"])]
        ends = [dataclasses.replace(of, m=m) for m in (below[of.m], of.m)] if isinstance(of, LinearProblem) else [of]  # fmt: skip
        for end in ends:
            if entry.config and not kernel.reject(end, target):
                assert refuse(kernel, tile_of(kernel, entry.config, end, target), end, target) == ""


def test_predictions_differ_from_the_defaults_somewhere():
    assert sum(bool(entry.config) for name in SHIPPED for entry in shipped_for(name).values()) > 0


def test_one_behind_an_edge_is_the_next_buckets(monkeypatch, tmp_path):
    monkeypatch.setenv("LLMOPT_CACHE_DIR", str(tmp_path))  # without what somebody predicted here
    target = part_named("A100").target
    ask = Lookup(target, None)
    for low, high in itertools.pairwise(BUCKETS[4:]):
        of = LinearProblem(high, 4096, 4096, "fp16")
        entry = shipped_for("A100")[key_of(facts(LINEAR, of))]
        for m in (low + 1, high):
            chosen = ask("linear", dataclasses.replace(of, m=m), target)
            assert chosen.source == f"predicted: {entry.reason}"


@pytest.mark.parametrize(
    "of",
    [
        LinearProblem(1, 4096, 4096, "fp16"),
        LinearProblem(2, 2304, 768, "fp16"),
        LinearProblem(1, 768, 768, "fp16", "w4a16", 32, offsets=True),
        LinearProblem(64, 14336, 4096, "fp16", "w8a8", 64, "silu", gated=True),
    ],
    ids=str,
)
def test_an_entry_is_made_again(of):
    """A change of the kernel, its tiles, the model or the assembler shows here: `llmopt tune --predict -o` makes the files anew."""
    part = part_named("H100")
    op = "linear" if of.scheme == "f16" else "linear_quantized"
    kernel = possible(op, of, part.target)[0]
    made, reason = predicted(kernel, of, part)
    assert reason == ""
    assert made == shipped_for("H100")[made.key]


def test_the_command_says_that_nothing_was_measured(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMOPT_TUNE", "1")
    path = tmp_path / "h200.json"
    arguments = ["tune", "2x768x768", "--target", "cuda:90", "--gpu", "H200", "--predict"]
    assert main([*arguments, "-o", str(path)]) == 0
    assert "1 predictions for H200 written" in capsys.readouterr().out
    ((environment, (entry,)),) = entries_of(json.loads(path.read_text()))
    assert environment == predicted_environment(part_named("H200"))
    assert entry.problem["kernel"] == "linear_f16_gemv.triton"
