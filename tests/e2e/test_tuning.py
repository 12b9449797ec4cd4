"""Tuning seen from outside: plans, explain, mode="max-autotune" and the command line."""

from __future__ import annotations

import re
from pathlib import Path

import llmopt
import pytest
import torch
from llmopt.cli import main
from llmopt.compiled import alive
from llmopt.target import target
from llmopt.tune import lookup
from llmopt.tune.environment import Environment
from llmopt.types import LinearConfig, LinearProblem

from tests.tune.problems import database, entry, tune_patiently


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMOPT_TUNE", "1")
    monkeypatch.setenv("LLMOPT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Linear(96, 32)).eval()


def put(m: int, n: int, k: int, config: LinearConfig) -> None:
    of = LinearProblem("linear", m, n, k, "f32", "f32", "f32", bias=True)
    lookup.database(target(), torch.get_num_threads()).put(entry(of, config))


def plan() -> str:
    return str([g.plan for g in alive() if g.plan is not None][-1])


def check(net: torch.nn.Module, compiled, rows: int) -> None:
    x = torch.randn(rows, 64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), net(x), atol=1e-5, rtol=1e-5)


def test_a_plan_uses_what_was_measured_and_shows_it():
    put(24, 96, 64, LinearConfig("blocked", rows=2, span=1, tiles=3))
    net = model()
    check(net, torch.compile(net, backend="llmopt"), 20)
    assert "linear.cpu 96x64 bias [blocked rows=2 span=1 tiles=3]" in plan()
    assert "linear.cpu 32x96 bias " in plan()


def test_a_plan_whose_height_changes_carries_a_row_for_each():
    put(24, 96, 64, LinearConfig(rows=2))
    put(4, 96, 64, LinearConfig("stream", span=3))
    net = model()
    compiled = torch.compile(net, backend="llmopt", dynamic=True)
    for rows in (20, 3, 2, 5, 70):
        check(net, compiled, rows)
    assert "[M<=2: default; M<=4: stream span=3; M<=16: default; M<=24: rows=2]" in plan()


def test_explain_says_where_configs_come_from():
    put(24, 96, 64, LinearConfig(rows=2))
    report = llmopt.explain(torch.compile(model(), backend="llmopt"), torch.randn(20, 64))
    tuned, default = report.steps
    assert (tuned.config, default.config) == ("rows=2", "")
    assert tuned.config_source.startswith("tuned: 10.0 us, by its own rules 12.5 us")
    assert default.config_source == "default: not measured on this machine"
    text = str(report)
    assert "configs: 1 tuned" in text
    assert "configs: 1 default: not measured on this machine" in text
    assert "config: rows=2; tuned: 10.0 us" in text


def test_explain_says_what_is_borrowed():
    put(24, 80, 64, LinearConfig(rows=2))
    report = llmopt.explain(torch.compile(model(), backend="llmopt"), torch.randn(20, 64))
    assert report.steps[0].config_source.startswith("borrowed from 24x80x64: ")
    assert "configs: 1 borrowed" in str(report)


def test_a_damaged_database_costs_nothing_but_the_tuning():
    put(24, 96, 64, LinearConfig(rows=2))
    known = lookup.database(target(), torch.get_num_threads())
    for path in known.folder.iterdir():
        path.write_bytes(b"\0" * 100)
    lookup._database.cache_clear()  # as a new process
    net = model()
    check(net, torch.compile(net, backend="llmopt"), 20)
    assert "[" not in plan().split("linear.cpu 96x64 bias")[1].split("_")[0]


def test_max_autotune_measures_and_gives_the_same(cache_dir, monkeypatch):
    tune_patiently(monkeypatch)
    net = model()
    check(net, torch.compile(net, backend="llmopt", mode="max-autotune"), 20)
    sources = [r.config_source for g in alive()[-1:] for r in g.plan.records()]
    assert len(sources) == 2
    assert all(s.startswith(("tuned: ", "default: measured, and ")) for s in sources), sources
    known = lookup.database(target(), torch.get_num_threads())
    measured = database(known.root, known.environment).entries()  # what is kept was compared
    assert len(measured) == 2
    assert all(len(e.timings) > 1 for e in measured), measured
    reasons = [e.reason for e in measured]
    assert all(any(r in s for r in reasons) for s in sources), (sources, reasons)


def test_default_mode_measures_nothing(cache_dir):
    net = model()
    check(net, torch.compile(net, backend="llmopt"), 20)
    assert not cache_dir.exists()


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


BUDGET = ("--budget", "2000")  # ms: tests share their machine


def test_tune_shapes(capsys, tmp_path):
    picture = tmp_path / "gains.png"
    code, out, err = run(capsys, "tune", "3x96x64", "20x32x96", *BUDGET, "--plot", picture)
    assert code == 0, err
    assert re.search(r"4x96x64 f32·f32.*%", out)  # the bucket of 3
    assert "24x32x96" in out
    for heading in ("shape", "default us", "best us", "gain", "% of roof", "source"):
        assert heading in out
    assert "measuring 2 shapes" in err
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(lookup.database(target(), torch.get_num_threads()).entries()) == 2


@pytest.mark.parametrize("precision", ["w8a8", "w4a16"])
def test_tune_shapes_of_quantised_weights(capsys, precision):
    code, out, err = run(
        capsys, "tune", "4x96x128", "--precision", precision, "--dtype", "bf16", *BUDGET
    )
    assert code == 0, err
    assert f"bf16·q{precision[1]}" in out


@pytest.fixture
def function(tmp_path: Path) -> str:
    (tmp_path / "two.py").write_text(
        "import torch\n\ndef build():\n"
        "    net = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 32))\n"
        "    return net, {'input': torch.randn(20, 64)}\n"
    )
    return f"{tmp_path / 'two.py'}:build"


def test_tune_a_model_then_its_plans_are_tuned(capsys, function):
    code, out, err = run(capsys, "tune", function, *BUDGET)
    assert code == 0, err
    assert "24x96x64 f32·f32" in out
    assert "relu+bias" in out
    torch._dynamo.reset()
    code, out, err = run(capsys, "explain", function)
    assert code == 0, err
    assert "not measured" not in out
    assert out.count("config: ") == 2


def test_what_was_measured_is_not_measured_again(capsys):
    put(24, 96, 64, LinearConfig(rows=2))
    put_plain = LinearProblem("linear", 24, 96, 64, "f32", "f32", "f32")
    lookup.database(target(), torch.get_num_threads()).put(entry(put_plain, LinearConfig(rows=3)))
    code, out, _ = run(capsys, "tune", "20x96x64")
    assert code == 0
    assert "rows=3" in out
    assert "kept" in out
    code, out, _ = run(capsys, "tune", "20x96x64", "--again", *BUDGET)
    assert code == 0
    assert "kept" not in out


def test_show_export_import(capsys, tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    assert "nothing was measured in this environment" in run(capsys, "tune", "--show")[1]
    put(24, 96, 64, LinearConfig(rows=2))
    code, out, _ = run(capsys, "tune", "--show", "--export", path)
    assert code == 0
    assert "24x96x64" in out
    assert "rows=2" in out
    assert "1 measurements written" in out
    monkeypatch.setenv("LLMOPT_CACHE_DIR", str(tmp_path / "another"))
    code, out, _ = run(capsys, "tune", "--import", path)
    assert code == 0
    assert "1 measurements added, 0 were there already" in out
    assert "rows=2" in run(capsys, "tune", "--show")[1]


def test_an_import_from_another_machine_is_kept_apart(capsys, tmp_path):
    path = tmp_path / "tuned.json"
    put(24, 96, 64, LinearConfig(rows=2))
    run(capsys, "tune", "--export", path)
    threads = torch.get_num_threads()
    code, out, _ = run(capsys, "tune", "--threads", threads + 1, "--import", path, "--show")
    torch.set_num_threads(threads)
    assert code == 0
    assert f"not used here: threads {threads} (here {threads + 1})" in out
    assert "elsewhere: 1 measurements" in out


def test_what_an_older_version_measured_is_shown_and_carried_but_not_used(capsys, tmp_path):
    """It told neither the model of the CPU nor its affinity nor huge pages."""
    path = tmp_path / "tuned.json"
    known = lookup.database(target(), torch.get_num_threads())
    facts = dict(known.environment.facts)
    new = {n: facts.pop(n) for n in ("cpu", "cpus", "huge_pages")}
    of = LinearProblem("linear", 24, 96, 64, "f32", "f32", "f32", bias=True)
    database(known.root, Environment.of(facts)).put(entry(of, LinearConfig(rows=2)))
    differs = ", ".join(f"{n} unknown (here {value})" for n, value in new.items())
    code, out, _ = run(capsys, "tune", "--show", "--export", path)
    assert code == 0
    assert f"cpu {new['cpu']}, " in out
    assert "nothing was measured in this environment" in out
    assert f"elsewhere: 1 measurements; {differs}" in out
    code, out, _ = run(capsys, "tune", "--import", path)
    assert code == 0
    assert f"0 measurements added, 1 were there already; not used here: {differs}" in out
    report = llmopt.explain(torch.compile(model(), backend="llmopt"), torch.randn(20, 64))
    assert report.steps[0].config_source == (
        f"default: nothing was measured in this environment; elsewhere: {differs}"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "nothing to do"),
        (("0x3x4",), "'0x3x4' is no shape: expected MxNxK"),
        (("16x576",), "'16x576' is no shape: expected MxNxK"),
        (("1x2x3", "smollm2"), "either shapes MxNxK or one model"),
        (("smollm2", "minilm"), "one model at a time"),
        (("1x33x50", "--precision", "w8a8"), "groups of 64 do not divide its 50 inputs"),
        (("1x33x96", "--precision", "w8a8", "--group", 128), "groups of 128 do not divide"),
        (("1x33x96", "--group", 32), "group is for precision="),
        (("1x2x3", "--plot", "x.jpg"), "the picture is a .png"),
        (("--import", "/nowhere/x.json"), "cannot be read"),
    ],
    ids=str,
)
def test_wrong_use_is_one_sentence(capsys, arguments, words):
    code, _, err = run(capsys, "tune", *arguments)
    assert code == 1
    assert words in err
    assert "Traceback" not in err


def test_tuning_that_is_off_says_so(capsys, monkeypatch):
    monkeypatch.setenv("LLMOPT_TUNE", "0")
    code, _, err = run(capsys, "tune", "1x2x3")
    assert code == 1
    assert "LLMOPT_TUNE=0" in err


def test_shapes_are_tuned_in_the_groups_asked_for(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    groups = ("--precision", "w8a8", "--group", "channel")
    code, out, err = run(capsys, "tune", "1x32x96", *groups, "--budget", 5)
    assert code == 0, err
    assert "q8/96" in out
