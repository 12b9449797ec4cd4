"""llmopt tune for GPUs where there is none: what is missing, what is kept, and wrong use in one sentence."""

from __future__ import annotations

import pytest
import torch
from llmopt.cli import main
from llmopt.gpu.tune import lookup, predict, tuning
from llmopt.gpu.tune.environment import predicted_environment
from llmopt.gpus import part_named
from llmopt.tune.database import Database

from tests.tune.gpu import LINEAR, TILE, database, entry, problem, target


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main(["tune", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_without_a_gpu_it_says_what_is_missing(capsys):
    code, _, err = run(capsys, "16x64x64", "--target", "cuda:90", "--gpu", "H200")
    assert code == 1
    assert "no GPU of cuda:sm_90 is here to measure on: torch" in err
    assert "--predict keeps what the model says about H200" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--target", "cuda:91", "--predict"), "does not exist; possible: cpu, cuda:80"),
        (("--target", "cuda:90", "--gpu", "V9", "--predict"), "nothing is known about a GPU 'V9'; possible: A100"),
        (("--target", "cuda:90", "--gpu", "L4", "--predict"), "--gpu L4 is a cuda:sm_89, not the cuda:sm_90"),
        (("--target", "cuda:90"), "nothing to do"),
        (("1x2x3", "--predict"), "--gpu, --predict and -o are for a GPU"),
        (("--target", "cuda:90", "--show", "-o", "x.json"), "is for --predict"),
        (("--target", "cuda:90", "--show", "--threads", "2"), "for the CPU"),
        (("1x33x50", "--precision", "w8a8", "--target", "cuda:90", "--predict"), "groups of 64 do not divide"),
        (("a", "b", "--target", "cuda:90", "--predict"), "one model at a time"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_use_is_one_sentence(capsys, arguments, words):
    code, _, err = run(capsys, *arguments)
    assert code == 1
    assert words in err
    assert "Traceback" not in err


def test_show_export_and_import_are_of_all_devices(capsys, cache_dir, tmp_path, monkeypatch):
    root = cache_dir / "tune"
    assert "nothing is kept for this GPU" in run(capsys, "--target", "cuda:89", "--show")[1]
    Database(root, predicted_environment(part_named("L4"))).put(entry(config=TILE))
    database(root, "L4").put(entry())
    path = tmp_path / "tuned.json"
    code, out, _ = run(capsys, "--target", "cuda:89", "--gpu", "L4", "--show", "--export", path)
    assert code == 0
    assert "measured never: predicted" in out
    assert "block_m=64" in out
    assert "elsewhere: 1 entries; name NVIDIA L4 (here L4)" in out
    assert "2 entries, 1 of them predicted, written to" in out
    assert "2 entries, 1 of them predicted, written to" in run(capsys, "--export", path)[1]
    monkeypatch.setenv("LLMOPT_CACHE_DIR", str(tmp_path / "another"))
    code, out, _ = run(capsys, "--target", "cuda:89", "--gpu", "L4", "--import", path, "--show")
    assert code == 0
    assert out.count("1 measurements added") == 2
    assert "block_m=64" in out
    assert "elsewhere: 1 measurements" in run(capsys, "--show")[1]


def test_with_a_gpu_it_measures_once_what_can_run(capsys, cache_dir, monkeypatch):
    """Every possible kernel of a shape, at its bucket; what is kept is not measured again unless asked."""
    known, calls = database(cache_dir / "tune", "L4"), []

    def measure(self, kernel, of):
        calls.append((kernel.name, of.m))
        return entry(of, kernel=kernel), True

    here = torch.device("meta"), target("L4")
    monkeypatch.setattr(lookup, "local", lambda *_: here)
    monkeypatch.setattr(lookup, "database", lambda *_: known)
    monkeypatch.setattr(tuning.Tuning, "measure", measure)
    code, out, _ = run(capsys, "2x4096x4096", "100x4096x4096", "--target", "cuda:89")
    assert code == 0
    assert "NVIDIA L4 (cuda:sm_89): measured" in out
    assert calls == [("linear_f16_gemv.triton", 2), ("linear_f16.triton", 2), ("linear_f16.triton", 128)]  # fmt: skip
    assert known.get(entry(problem(128)).key)[0] == entry(problem(128), kernel=LINEAR)
    run(capsys, "100x4096x4096", "--target", "cuda:89")
    assert len(calls) == 3
    run(capsys, "100x4096x4096", "--target", "cuda:89", "--again")
    assert len(calls) == 4


MODEL = """
import torch

def tiny():
    layers = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.GELU(), torch.nn.Linear(96, 64))
    return layers.half(), {"input": torch.zeros(20, 64, dtype=torch.float16)}
"""


def test_a_models_launches_are_found_without_a_gpu(capsys, monkeypatch, tmp_path):
    """What its plan asks for, at the sizes that are measured; nothing runs."""
    (tmp_path / "model.py").write_text(MODEL)
    asked = []

    def predict_all(given, part, said):
        asked.extend(given)
        return [], ["one reason"]

    monkeypatch.setattr(predict, "predict_all", predict_all)
    code, out, _ = run(
        capsys, f"{tmp_path}/model.py:tiny", "--target", "cuda:90", "--gpu", "H200", "--predict"
    )
    assert code == 0
    assert "left out: one reason" in out
    shapes = [(a.op, a.problem.m, a.problem.n, a.problem.k, a.problem.act) for a in asked]
    assert shapes == [("linear", 24, 96, 64, "gelu_erf"), ("linear", 24, 64, 96, "none")]
