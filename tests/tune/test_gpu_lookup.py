"""What GPU plans are told: tuned, borrowed, predicted or default, always with where it comes from, never an impossible tile."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from llmopt.gpu.device import Gpu
from llmopt.gpu.tune import lookup
from llmopt.gpu.tune.environment import predicted_environment
from llmopt.gpu.tune.lookup import Lookup, chooser_for, recording
from llmopt.gpu.tune.problems import KEYS, Asked, bucketed, facts
from llmopt.gpus import part_named
from llmopt.launch import AttentionProblem, GemmTile, RowProblem
from llmopt.native import cuda
from llmopt.registry import KERNELS, possible, refuse
from llmopt.target import GPUS, gpu_target
from llmopt.tune.database import Database, Entry
from llmopt.tune.exchange import write_file
from llmopt.tune.lookup import BUCKETS

from tests.tune.gpu import DEVICES, LINEAR, TILE, database, entry, environment, problem, target

# sm_89 has no TMA: linear_f16.triton is the first kernel for many rows.
LOCAL = "L4"
SHIPPED = lookup.shipped


@pytest.fixture(autouse=True)
def _no_package(monkeypatch):
    """Predictions of the package are no part of these tests."""
    monkeypatch.setattr(lookup, "shipped", lambda _: ({}, ""))


@pytest.fixture
def known(tmp_path) -> Database:
    return database(tmp_path / "tune", LOCAL)


def ask(known, of=None, measure=None, op="linear"):
    here = target(LOCAL)
    return Lookup(here, known, measure)(op, of or problem(), here)


def default(of=None) -> GemmTile:
    return LINEAR.configs(of or problem(), target(LOCAL))[0]


def test_a_measured_tile_is_used(known):
    known.put(entry())
    chosen = ask(known)
    assert (chosen.kernel, chosen.config) == (LINEAR, TILE)
    assert chosen.source == "tuned: 80.0 us, the default 100.0 us (gained a lot)"


def test_a_measured_default_says_why(known):
    known.put(dataclasses.replace(entry(config=None), reason="no candidate was faster"))
    chosen = ask(known)
    assert (chosen.config, chosen.source) == (
        default(),
        "default: measured, and no candidate was faster",
    )


def test_buckets_at_both_ends_and_behind(known):
    known.put(entry(problem(m=128)))
    for m in (97, 128):
        assert ask(known, problem(m=m)).source.startswith("tuned")
    for m in (64, 512):
        assert not ask(known, problem(m=m)).source.startswith("tuned")
    for low, high in itertools.pairwise(BUCKETS):
        assert [bucketed(problem(m=m)).m for m in (low, low + 1, high)] == [low, high, high]
    assert bucketed(problem(m=4097)).m == bucketed(problem(m=10**9)).m == 4096
    attention = AttentionProblem(1, 32, 8, 1, 129, 128, 128, "fp16", "fp16")
    assert bucketed(attention).kv_len == 256
    assert bucketed(dataclasses.replace(attention, kv_len=10**7)).kv_len == KEYS[-1]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (dataclasses.replace(TILE, num_stages=8, block_m=128, block_n=128), "bytes of shared memory, cuda:sm_89 has 101376"),
        (dataclasses.replace(TILE, num_warps=64), "64 warps: powers of two up to 32"),
        (dataclasses.replace(TILE, num_warps=3), "3 warps: powers of two"),
        (dataclasses.replace(TILE, block_n=48), "block_n=48: powers of two from 16"),
        (dataclasses.replace(TILE, block_m=256, block_n=128, num_warps=4, num_stages=1), "sums a thread"),
        (dataclasses.replace(TILE, split_k=128), "split_k=128: K=4096 has 64 steps"),
        (dataclasses.replace(TILE, num_stages=9), "9 stages"),
        ({"block_m": 64}, "without block_n"),
        ({"block_m": 64, "speed": 11}, "has no field 'speed'"),
        ({"block_m": 64, "block_n": "wide", "block_k": 64}, "block_n='wide' is not a whole number"),
        ({"block_m": 0, "block_n": 64, "block_k": 64}, "block_m=0"),
        ({"block_m": 64, "block_n": 64, "num_warps": 4, "splits": 2}, "has no field 'splits'"),
    ],
    ids=str,
)  # fmt: skip
def test_an_impossible_tile_is_a_miss_with_its_reason(known, config, words):
    known.put(entry(config=config))
    chosen = ask(known)
    assert chosen.config == default()
    assert chosen.source.startswith("default: its tile is impossible: ")
    assert words in chosen.source


def test_a_tile_that_only_some_sizes_of_a_bucket_can_have(known):
    """The rows of a decode block are those of the call, which its bucket's largest does not know."""
    decode = KERNELS["attention_decode.triton"]
    here = target(LOCAL)
    at = AttentionProblem(1, 24, 8, 8, 1024, 128, 128, "fp16", "fp16")
    tile = decode.configs(at, here)[0]
    source = entry(at, dataclasses.asdict(dataclasses.replace(tile, num_warps=8)), kernel=decode)
    known.put(source)
    assert ask(known, at, op="attention").source.startswith("tuned")
    chosen = ask(known, dataclasses.replace(at, q_len=5), op="attention")
    assert "is impossible here: block_m=32: all 16 rows" in chosen.source
    assert refuse(chosen.kernel, chosen.config, dataclasses.replace(at, q_len=5), here) == ""


def test_another_kernel_source_is_another_key(known):
    found = entry()
    known.put(dataclasses.replace(found, problem={**found.problem, "source": "0" * 16}))
    assert ask(known).source.startswith("default: not measured on this machine")


def test_a_gpu_like_it_lends_and_others_do_not(tmp_path):
    root = tmp_path / "tune"
    for name in ("RTX4090", "H100"):
        database(root, name).put(entry())
    assert ask(database(root, LOCAL)).config == default()
    database(root, LOCAL, driver="570.0").put(entry())
    chosen = ask(database(root, LOCAL))
    assert chosen.config == TILE
    assert chosen.source == "borrowed from a GPU like it: driver 570.0 (here 580.1)"


def test_a_near_shape_lends(known):
    known.put(entry(problem(n=3072)))
    chosen = ask(known)
    assert (chosen.config, chosen.source) == (TILE, "borrowed from 128x3072x4096")
    assert ask(known, problem(n=16384)).config == default(problem(n=16384))
    assert ask(known, problem(gated=True)).source.startswith("default")


def predict(root, of=None, config=TILE, part="L4") -> None:
    fields = dataclasses.asdict(config)
    found = Entry(
        facts(LINEAR, of or problem()), fields, 50.0, 60.0, 0.5, "memory-bound, 1.20 waves", {}
    )
    Database(root, predicted_environment(part_named(part))).put(found)


def test_predictions_come_behind_measurements(cache_dir):
    root = cache_dir / "tune"
    predict(root)
    known = database(root, LOCAL)
    chosen = ask(known)
    assert (chosen.config, chosen.source) == (TILE, "predicted: memory-bound, 1.20 waves")
    near = ask(known, problem(n=5000, act="silu"))
    assert near.source == "predicted for 128x4096x4096: memory-bound, 1.20 waves"
    known.put(entry(config=None))
    assert ask(known).source.startswith("default: measured")


def test_predictions_are_for_one_gpu(cache_dir):
    predict(cache_dir / "tune", part="RTX4090")
    assert ask(database(cache_dir / "tune", LOCAL)).config == default()


def test_an_impossible_prediction_says_so(cache_dir):
    predict(cache_dir / "tune", config=dataclasses.replace(TILE, block_m=7))
    assert "its tile is impossible: block_m=7" in ask(database(cache_dir / "tune", LOCAL)).source


def test_without_the_gpu_predictions_are_what_there_is(cache_dir):
    here = gpu_target("cuda:90")
    chosen = chooser_for(here, "default")("linear", problem(m=8), here)
    assert chosen.config == LINEAR.configs(problem(m=8), here)[0]
    assert "no GPU of cuda:sm_90 is here" in chosen.source
    predict(cache_dir / "tune", problem(m=8), dataclasses.replace(TILE, block_m=16), "H100")
    chosen = chooser_for(here, "default")("linear", problem(m=5), here)
    assert chosen.source.startswith("predicted: ")


def test_tuning_that_is_off_says_so(monkeypatch):
    monkeypatch.setenv("LLMOPT_TUNE", "0")
    here = gpu_target("cuda:90")
    assert (
        chooser_for(here, "default")("linear", problem(), here).source == "default: LLMOPT_TUNE=0"
    )


def test_what_is_as_usual_is_no_part_of_a_key():
    """So that a problem's new field, whose default is what all problems had, leaves what was measured true."""
    assert set(facts(LINEAR, problem())) == {"kernel", "m", "n", "k", "dtype"}
    assert facts(LINEAR, problem(gated=True))["gated"] == 1


def test_rows_are_not_tuned(known):
    assert ask(known, RowProblem(4, 4096, "fp16"), op="norm").source == ""


def test_the_faster_kernel_takes_over_where_both_were_measured(known):
    """One row: the kernel without tensor cores comes first, unless it was measured to be slower."""
    one = problem(m=1)
    gemv, tensor = (k for k in possible("linear", one, target(LOCAL)))
    assert (gemv.name, tensor.name) == ("linear_f16_gemv.triton", "linear_f16.triton")
    known.put(entry(one, None, 50.0, tensor))
    assert ask(known, one).kernel is gemv
    known.put(entry(one, None, 51.0, gemv))
    assert ask(known, one).kernel is gemv  # by less than 3 %
    known.put(entry(one, None, 60.0, gemv))
    assert ask(known, one).kernel is tensor


def test_what_nobody_measured_is_measured_once(known):
    calls = []

    def measure(kernel, at):
        calls.append((kernel.name, at))
        return entry(at), True

    here = target(LOCAL)
    asked = Lookup(here, known, measure)
    for m in (100, 128, 97):
        assert asked("linear", problem(m=m), here).config == TILE
    assert calls == [("linear_f16.triton", problem(m=128))]
    assert ask(known).source.startswith("tuned")


def test_a_full_gpu_leaves_the_default(known):
    def measure(*_):
        raise torch.OutOfMemoryError

    chosen = ask(known, measure=measure)
    assert chosen.config == default()
    assert chosen.source.startswith("default: the GPU has no memory left to measure in")


def failing(names):
    """A measurement that cannot be made of these kernels; others take 50 us."""

    def measure(kernel, at):
        if kernel.name in names:
            raise RuntimeError("an illegal instruction\nat line 7")
        return entry(at, None, 50.0, kernel), True

    return measure


def test_an_alternative_that_cannot_be_measured_leaves_the_first(known, caplog):
    one, here = problem(m=1), target(LOCAL)
    asked = Lookup(here, known, failing({"linear_f16.triton"}))
    chosen = asked("linear", one, here)
    assert chosen.kernel.name == "linear_f16_gemv.triton"
    assert chosen.source.startswith("default: measured")
    said = "linear_f16.triton cannot be measured at 1x4096x4096 fp16: RuntimeError: an illegal instruction"
    assert [record.getMessage() for record in caplog.records] == [said]
    asked("linear", one, here)  # what failed is not tried again
    assert len(caplog.records) == 1


def test_what_the_first_kernel_raises_is_the_users(known):
    with pytest.raises(RuntimeError, match="an illegal instruction"):
        ask(known, problem(m=1), failing({"linear_f16_gemv.triton"}))


@pytest.fixture
def with_cuda(monkeypatch):
    """As where csrc/cuda is built and can run."""
    monkeypatch.setattr(cuda, "missing", lambda: "")
    monkeypatch.setattr(cuda, "library", lambda: SimpleNamespace(digest="ab" * 32))


@pytest.mark.usefixtures("with_cuda")
def test_cuda_kernels_run_until_a_triton_kernel_was_measured_to_be_faster(known):
    of = problem(m=1, scheme="w8a8")
    ours, theirs = KERNELS["linear_w8a8.cuda"], KERNELS["linear_w8a8.triton"]
    chosen = ask(known, of, op="linear_quantized")
    assert (chosen.kernel, chosen.source[:8]) == (ours, "default:")
    known.put(entry(of, None, 50.0, theirs))
    assert (
        ask(known, of, op="linear_quantized").kernel is ours
    )  # nobody knows whether 50 us are fast
    known.put(entry(of, None, 50.5, ours))
    assert ask(known, of, op="linear_quantized").kernel is ours  # less than 3 % apart
    known.put(entry(of, None, 60.0, ours))
    assert ask(known, of, op="linear_quantized").kernel is theirs


@pytest.mark.usefixtures("with_cuda")
def test_the_gemm_in_cuda_runs_where_it_was_measured_to_be_faster(known):
    of = problem(m=128, scheme="w8a8")
    ours, theirs = KERNELS["linear_w8a8_gemm.cuda"], KERNELS["linear_w8a8.triton"]
    assert ask(known, of, op="linear_quantized").kernel is theirs
    known.put(entry(of, None, 50.0, theirs))
    known.put(entry(of, None, 40.0, ours))
    assert ask(known, of, op="linear_quantized").kernel is ours


@pytest.mark.usefixtures("with_cuda")
def test_another_build_of_cuda_kernels_is_not_the_one_that_was_measured(known, monkeypatch):
    of, ours = problem(m=1, scheme="w8a8"), KERNELS["linear_w8a8.cuda"]
    known.put(entry(of, None, 60.0, ours))
    asked = Lookup(target(LOCAL), known)
    assert asked.entry(ours, of)[0] is not None
    monkeypatch.setattr(cuda, "library", lambda: SimpleNamespace(digest="cd" * 32))
    assert asked.entry(ours, of)[0] is None


def test_the_gpu_that_the_model_is_on_measures(monkeypatch):
    """Of two GPUs that are alike, the second: the first may be busy with something else."""
    first, second = (torch.device("cuda", number) for number in range(2))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    seen, arch, sms, _, smem = DEVICES["L4"]
    monkeypatch.setattr(lookup, "gpu_of", lambda _: Gpu("cuda", arch, seen, sms, smem))
    here = target(LOCAL)
    assert lookup.local(here) == (first, here)
    assert lookup.local(here, second) == (second, here)
    monkeypatch.setattr(lookup, "database", lambda *_: None)
    chooser = chooser_for(here, "max-autotune", second)
    assert chooser._measure.__self__._device == second


def test_nothing_is_measured_while_a_graph_is_captured(known, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    def measure(*_):
        raise AssertionError("a graph is being captured")

    assert ask(known, measure=measure).config == default()


def test_problems_of_plans_are_recorded_once(known):
    here = target(LOCAL)
    asked = Lookup(here, known)
    with recording() as found:
        for m in (100, 128, 600):
            asked("linear", problem(m=m), here)
    assert found == [Asked("linear", problem(m=128)), Asked("linear", problem(m=1024))]


def test_empty_problems_are_left_alone(known):
    empty = AttentionProblem(1, 8, 8, 0, 4, 64, 64, "fp16", "fp16")
    assert ask(known, empty, op="attention").source == ""


PROBLEMS = [
    ("linear", problem(m, n, k, gated=gated))
    for m in (1, 2, 5, 16, 17, 64, 100, 4096)
    for n, k in ((4096, 4096), (100, 48))
    for gated in (False, True)
] + [
    ("linear_quantized", problem(m, scheme=scheme, group=group))
    for m in (1, 16, 64, 4096)
    for scheme in ("w8a8", "w4a16")
    for group in (0, 32, 128)
] + [
    ("attention", AttentionProblem(1, 32, 8, q, 2048, d, d, "fp16", kv))
    for q in (1, 512)
    for d in (64, 128, 256)
    for kv in ("fp16", "i8")
]  # fmt: skip


@pytest.mark.parametrize("here", GPUS, ids=str)
def test_kernels_own_tiles_are_possible(here):
    for op, of in PROBLEMS:
        for kernel in possible(op, of, here):
            for tile in kernel.configs(of, here):
                assert refuse(kernel, tile, of, here) == "", (kernel.name, of, tile)


@pytest.fixture
def package(monkeypatch, tmp_path):
    """A folder that stands for the package's kernels, with an empty one for its files."""
    monkeypatch.setattr(lookup, "shipped", SHIPPED)
    monkeypatch.setattr(lookup.importlib.resources, "files", lambda _: tmp_path)
    folder = tmp_path / lookup.FOLDER
    folder.mkdir()
    return folder


def test_a_damaged_file_of_the_package_is_a_miss(package, known):
    path = package / "l4.json"
    own = predicted_environment(part_named("L4"))
    write_file(path, {own: [entry()]})
    whole = path.read_text()
    assert SHIPPED(lambda e: e == own) == ({own: [entry()]}, "")
    assert SHIPPED(lambda _: False) == ({}, "")
    for content in ("{", "[]", whole.replace("80.0", "1.0"), whole[:-40]):
        path.write_text(content)
        assert "l4.json cannot be used: " in ask(known).source
        assert ask(known).config == default()


def test_measurements_of_the_package_are_lent(package, tmp_path):
    """What a session on a GPU exported into the package serves GPUs like that one, whatever else is in the file."""
    theirs = environment(LOCAL, driver="570.0")
    other = environment("RTX4090")
    write_file(package / "session.json", {other: [entry(config=None)], theirs: [entry()]})
    chosen = ask(database(tmp_path / "tune", LOCAL))
    assert chosen.config == TILE
    assert chosen.source == "borrowed from a GPU like it: driver 570.0 (here 580.1)"


def test_environments_of_measurements_name_the_gpu():
    assert dict(environment("L4").facts)["name"] == "NVIDIA L4"
