"""Measuring GPU kernels with a bench of the test's own: which tiles are tried, which win, and what is said of the others."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from llmopt.gpu.tune.candidates import COUNT, Candidate, likely, seeds
from llmopt.gpu.tune.cost import Resources, estimate, occupancy, predict, roof
from llmopt.gpu.tune.problems import source_of, words
from llmopt.gpu.tune.tuning import Tuning
from llmopt.gpus import part_named, stand_in
from llmopt.launch import AttentionProblem, GemmTile
from llmopt.registry import KERNELS, possible, refuse
from llmopt.target import GPUS

from tests.tune.gpu import LINEAR, TILE, problem, target

DEVICE = torch.device("meta")
L4 = part_named("L4")


class FakeBench:
    """Tiles take what `us_of` says; those in `broken` do not run."""

    def __init__(self, us_of, broken=()) -> None:
        self.us_of, self.broken, self.tried = us_of, broken, []

    def reject(self, tile) -> str:
        self.tried.append(tile)
        return "it does not run" if tile in self.broken else ""

    def __call__(self, tile) -> float:
        return self.us_of(tile)


def look(kernel, of, tile, part, _target):
    """A compiler that always succeeds."""
    taken = estimate(kernel, of, tile, part)
    found = predict(kernel, of, tile, part, taken)
    return (None, "not one block fits") if found is None else (Candidate(tile, taken, found), "")


def measure(bench, of=None, looked=look):
    return Tuning(target("L4"), DEVICE, 60.0, lambda *_: bench, looked).measure(
        LINEAR, of or problem()
    )


def tried(of=None) -> list[GemmTile]:
    return likely(LINEAR, of or problem(), stand_in(target("L4")))


def test_the_fastest_tile_wins_and_is_kept_under_the_kernels_source():
    fastest = tried()[7]
    entry, conclusive = measure(FakeBench(lambda tile: 50.0 if tile == fastest else 100.0))
    assert conclusive
    assert entry.config == dataclasses.asdict(fastest)
    assert (entry.us, entry.default_us) == (50.0, 100.0)
    assert entry.problem["source"] == source_of(LINEAR)
    assert entry.problem["kernel"] == LINEAR.name
    assert entry.timings[words(tried()[0])] == 100.0
    part = stand_in(target("L4"))
    assert entry.roof == pytest.approx(roof(problem(), part, 50e-6))


def test_less_than_three_percent_leaves_the_default():
    fastest = tried()[3]
    entry, _ = measure(FakeBench(lambda tile: 98.0 if tile == fastest else 100.0))
    assert entry.config == {}
    assert "3 % twice" in entry.reason


def test_what_does_not_run_or_fit_is_left_out():
    every = tried()
    spilling = set(every[5:9])

    def looked(kernel, of, tile, part, there):
        return (None, "8 spilled") if tile in spilling else look(kernel, of, tile, part, there)

    bench = FakeBench(lambda tile: 10.0 if tile in (every[5], every[10]) else 100.0, {every[10]})
    entry, _ = measure(bench, looked=looked)
    assert entry.config == {}
    assert not spilling & set(bench.tried)
    assert entry.reason.endswith("5 tiles do not fit")


def test_the_default_is_measured_whatever_the_compiler_says_of_it():
    default = tried()[0]

    def looked(*_):
        return None, "8 spilled"

    entry, conclusive = measure(FakeBench(lambda _: 100.0), looked=looked)
    assert (entry.config, entry.us, conclusive) == ({}, 100.0, False)
    with pytest.raises(
        ValueError, match=r"the default of linear_f16.triton cannot be measured: it"
    ):
        measure(FakeBench(lambda _: 1.0, {default}))


PROBLEMS = [
    ("linear", problem(1)),
    ("linear", problem(16, gated=True, norm="rms")),
    ("linear", problem(4096)),
    ("linear_quantized", problem(64, scheme="w8a8", group=64)),
    ("linear_quantized", problem(1, scheme="w4a16", group=32)),
    ("attention", AttentionProblem(1, 32, 8, 1, 4096, 128, 128, "fp16", "fp16", True)),
    ("attention", AttentionProblem(1, 32, 8, 1024, 1024, 128, 128, "fp16", "i8", True)),
]


@pytest.mark.parametrize("here", GPUS, ids=str)
def test_candidates_are_many_possible_and_have_all_seeds(here):
    for op, of in PROBLEMS:
        for kernel in possible(op, of, here):
            found = likely(kernel, of, stand_in(here))
            assert found[0] == kernel.configs(of, here)[0]
            assert len(set(found)) == len(found)
            assert set(seeds(kernel, of, here)) <= set(found)
            assert len(found) >= min(25, COUNT)
            assert [t for t in found[1:] if refuse(kernel, t, of, here)] == []


def test_occupancy_is_what_runs_out_first():
    tile = GemmTile(64, 64, 64, 4, 3)
    a100 = part_named("A100")
    assert occupancy(tile, a100, Resources(64, 0)) == (8, "registers")
    assert occupancy(tile, a100, Resources(128, 48 << 10)) == (3, "shared memory")
    assert occupancy(tile, a100, Resources(32, 0)) == (16, "threads")
    assert occupancy(tile, a100, Resources(128, 200 << 10)) == (0, "shared memory")
    assert occupancy(tile, part_named("L4"), Resources(32, 0)) == (12, "threads")


def predicted(part, of, tile=TILE):
    return predict(LINEAR, of, tile, part, Resources(128, 49152))


def test_the_model_knows_what_binds():
    wide = GemmTile(128, 128, 64, 8, 2)
    small, large = predicted(L4, problem(16)), predicted(L4, problem(4096), wide)
    assert (small.bound, large.bound) == ("memory", "compute")
    # The weights alone take this long, and a GPU with three times the bandwidth is about as much faster.
    assert small.seconds > 2 * 4096 * 4096 / L4.target.gpu.bandwidth
    assert small.seconds / predicted(part_named("RTX4090"), problem(16)).seconds > 2.5


def test_a_half_filled_wave_costs_a_whole_one():
    slots = predicted(L4, problem(64, n=64 * 58)).blocks_sm * 58
    full = predicted(L4, problem(64, n=64 * slots))
    more = predicted(L4, problem(64, n=64 * (slots + 1)))
    assert (full.waves, round(more.waves, 3)) == (1.0, round(1 + 1 / slots, 3))
    assert more.seconds > full.seconds


def test_the_models_blind_test_holds_its_first_rank():
    """8-bit products on an A100 with 16 rows: what others measured to be the fastest is the model's first of these."""
    kernel = KERNELS["linear_w8a8.triton"]
    of = problem(16, n=1536, k=7168, scheme="w8a8")
    part = part_named("A100")
    sizes = ((bm, bn, w) for bm in (16, 32, 64, 128) for bn in (32, 64, 128) for w in (4, 8))
    tiles = [GemmTile(bm, bn, 128, w, s) for bm, bn, w in sizes for s in (3, 5)]
    fitting = [t for t in tiles if not refuse(kernel, t, of, part.target)]
    seconds = {t: predict(kernel, of, t, part, estimate(kernel, of, t, part)).seconds for t in fitting}  # fmt: skip
    assert seconds[GemmTile(16, 32, 128, 4, 5)] <= 1.05 * min(seconds.values())
