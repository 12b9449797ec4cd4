"""bench/gpu_session.sh --rehearse, in its small form: the same phases over a few kernels, and what they say when something is wrong."""

from __future__ import annotations

import json
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from llmopt.gpu import device, graphs, launching
from llmopt.native import cuda
from llmopt.registry import KERNELS
from llmopt.target import gpu_target

from bench.gpu import ceilings, clock, end_to_end, forms, phases, session, stand_in
from bench.gpu.forms.work import FULL
from bench.gpu.record import Record
from bench.gpu.subject import Subject

FEW = ["linear, 1 row", "w8a8, 1 row", "SwiGLU"]


@pytest.fixture(autouse=True)
def _afterwards(monkeypatch):
    """What a rehearsal replaces is put back."""
    monkeypatch.setattr(device, "gpu_of", device.gpu_of)
    monkeypatch.setattr(graphs, "recorder_of", graphs.recorder_of)


def rehearse(folder, *only: str) -> int:
    chosen = [word for name in only for word in ("--only", name)]
    return session.main(["--rehearse", "--models", "own", "--output", str(folder), *chosen])


def only(monkeypatch, *names: str) -> None:
    monkeypatch.setattr(phases, "PHASES", {name: phases.PHASES[name] for name in names})


def results(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_a_rehearsal_runs_every_phase_and_measures_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMOPT_TUNE", "1")
    assert rehearse(tmp_path, *FEW) == 0
    found = results(tmp_path)
    assert {r["source"] for r in found} == {"rehearsed"}
    assert {r["phase"] for r in found} >= {p for p in phases.PHASES if p != "models"} | {"models"}
    checked = {(r["what"], r["system"]) for r in found if r["phase"] == "correctness"}
    assert ("linear, 1 row", "linear_f16_gemv.triton") in checked
    assert ("linear, 1 row", "linear_f16.triton") in checked
    systems = {r["system"] for r in found if r["phase"] == "models" and r["outcome"] == "ok"}
    assert systems == {"eager", "llmopt reduce-overhead"}
    (tuned,) = (r for r in found if r["phase"] == "tuning")
    assert tuned["detail"] == "a rehearsal has no times"
    table = (tmp_path / "table.md").read_text()
    assert table.startswith("Rehearsed on")
    assert "cuBLAS" in table
    assert {p.name for p in tmp_path.glob("*.png")} == {"ceilings.png", "kernels.png", "models.png"}


def test_kernels_in_cuda_are_checked_and_timed_beside_tritons(tmp_path, monkeypatch, emulator):
    """As on an H100 for which csrc/cuda is built, with the emulator in its place: the kernels that are not slower than Triton's there."""
    monkeypatch.setattr(phases, "run", launching.run)  # which shows the emulator its tensors
    only(monkeypatch, "correctness", "kernels")
    forms = ["w8a8, 1 row", "w8a8, prompt", "attention, decode, int8 cache"]
    assert rehearse(tmp_path, *forms) == 0
    ours = ("linear_w8a8", "linear_w8a8_gemm", "attention_decode")
    theirs = ("linear_w8a8", "linear_w8a8", "attention_decode")
    for phase in ("correctness", "kernels"):
        seen = {(r["what"], r["system"]) for r in results(tmp_path) if r["phase"] == phase and r["outcome"] == "ok"}  # fmt: skip
        assert seen >= {(form, f"{name}.cuda") for form, name in zip(forms, ours, strict=True)}
        assert seen >= {(form, f"{name}.triton") for form, name in zip(forms, theirs, strict=True)}


def test_a_wrong_kernel_is_a_failure_and_the_session_goes_on(tmp_path, monkeypatch):
    right = phases.run

    def wrong(launch):
        right(launch)
        if launch.kernel == "swiglu.triton":
            launch.arguments["y_ptr"].neg_()

    monkeypatch.setattr(phases, "run", wrong)
    only(monkeypatch, "correctness")
    assert rehearse(tmp_path, "SwiGLU", "softmax") == 1
    outcomes = {r["system"]: r["outcome"] for r in results(tmp_path)}
    assert "AssertionError" in outcomes["swiglu.triton"]
    assert outcomes["softmax.triton"] == "ok"
    assert "swiglu.triton: AssertionError" in (tmp_path / "table.md").read_text()


def test_a_phase_that_raises_leaves_the_others_the_table_and_the_plots(tmp_path, monkeypatch):
    def broken(_):
        raise RuntimeError("no kernel of that name")

    several = {"broken": phases.Phase(broken), "kernels": phases.PHASES["kernels"]}
    monkeypatch.setattr(phases, "PHASES", several)
    assert rehearse(tmp_path, "SwiGLU") == 1
    outcomes = {(r["phase"], r["outcome"]) for r in results(tmp_path)}
    assert outcomes == {("broken", "RuntimeError: no kernel of that name"), ("kernels", "ok")}
    assert "broken: as a whole, session: RuntimeError" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "kernels.png").exists()


def test_a_session_without_a_gpu_and_a_form_that_does_not_exist_are_errors(tmp_path, capsys):
    assert session.main(["--output", str(tmp_path)]) == 2
    assert "--rehearse" in capsys.readouterr().err
    assert rehearse(tmp_path, "convolution") == 2
    assert "possible: linear, 1 row" in capsys.readouterr().err
    assert session.main(["--rehearse", "--phase", "training"]) == 2
    assert "possible: compile, ceilings" in capsys.readouterr().err


def test_out_of_time_is_said(tmp_path):
    target = stand_in.install()
    record = Record(tmp_path, {}, "rehearsed")
    late = session.Session(torch.device("cpu"), target, clock.REHEARSED, record, FEW, 0.0, False)
    phases.correctness(late)
    assert {(r.outcome, r.detail) for r in record.results} == {("skipped", "out of time")}


def test_ops_without_a_form_are_named(tmp_path, monkeypatch):
    """All forms were asked for, and there is one: every other op is said to be left out."""
    monkeypatch.setattr(phases, "FORMS", {"SwiGLU": forms.FORMS["SwiGLU"]})
    record = Record(tmp_path, {}, "rehearsed")
    soon = time.monotonic() + 60
    target = stand_in.install()
    some = session.Session(
        torch.device("cpu"), target, clock.REHEARSED, record, ("SwiGLU",), soon, False
    )
    phases.correctness(some)
    left_out = {r.what for r in record.results if r.outcome == "skipped"}
    assert left_out == {k.op for k in KERNELS.values()} - {"swiglu"}


def test_a_fault_and_a_hang_end_their_process_alone(tmp_path):
    record = Record(tmp_path, {}, "measured")
    on_gpu = session.Session(
        torch.device("cpu"), gpu_target("cuda:90"), clock.REHEARSED, record, (), time.monotonic() + 60, True
    )  # fmt: skip
    on_gpu.apart("kernels", "one", "system", lambda: os.kill(os.getpid(), signal.SIGKILL))
    on_gpu.apart("kernels", "two", "system", lambda: time.sleep(60), 0.3)
    on_gpu.apart("kernels", "three", "system", lambda: os._exit(3))
    on_gpu.apart("kernels", "four", "system", lambda: record.add("kernels", "four", "system"))
    assert [(r.what, r.outcome) for r in record.results] == [
        ("one", "its process was ended by SIGKILL"),
        ("two", "stopped after 0 s"),
        ("three", "its process ended with exit code 3"),
        ("four", "ok"),
    ]


def test_times_are_seen_beside_what_the_gpu_reaches(tmp_path):
    record = Record(tmp_path, {}, "measured")
    made = forms.FORMS["w8a8, prompt"](FULL, torch.device("meta"))
    assert ceilings.floor(record, made) == 0.0
    for what, seconds in (("copy", 1e-3), ("fp16 product", 1e-3), ("int8 product", 2e-3)):
        record.add("ceilings", what, "PyTorch", "ok", seconds, "", 1e12, 1e9)
    # 17 GFLOP at 500 TFLOP/s take longer than 23 MB at 1 TB/s.
    assert ceilings.floor(record, made) == pytest.approx(made.flops / 500e12)
    record.add("kernels", "x", "y", "ok", 4e-5, floor=1e-5)
    assert record.results[-1].percent == pytest.approx(25)
    assert "| 25.0 |" in record.write_table().read_text()


def test_the_process_that_forks_leaves_the_gpu_alone(tmp_path, monkeypatch):
    """What has opened the driver has no GPU in its forks."""

    def opened(*_):
        raise AssertionError("the driver was opened")

    monkeypatch.setattr(cuda, "missing", opened)
    monkeypatch.setattr(cuda, "library", opened)
    monkeypatch.setattr(torch.cuda, "_lazy_init", opened)
    monkeypatch.setattr(
        phases.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0, stdout="")
    )
    forked = []
    monkeypatch.setattr(
        session.Session, "apart", lambda _, phase, what, *more: forked.append((phase, what))
    )
    record = Record(tmp_path / "gpu", {}, "measured")
    target, soon = gpu_target("cuda:90"), time.monotonic() + 60
    whole = session.Session(torch.device("cuda:0"), target, clock.MEASURED, record, (), soon, True)
    assert session.run(whole) == 0
    assert {phase for phase, _ in forked} == set(phases.PHASES) - {"tuning"}
    assert ("models", "own Llama, 4 layers") in forked


@pytest.mark.parametrize("change", [lambda x: x + 0.1, lambda x: x * float("nan")])
def test_a_model_with_other_results_is_not_timed(tmp_path, monkeypatch, change):
    subject = Subject(torch.nn.Identity(), lambda run: (run(torch.ones(2, 3)), None))
    wrong = end_to_end.Model("a model", lambda *_: subject, ("llmopt",), ("llmopt",))
    monkeypatch.setattr(end_to_end, "_models", lambda: iter([wrong]))
    monkeypatch.setattr(torch, "compile", lambda *_, **__: change)
    only(monkeypatch, "models")
    assert session.main(["--rehearse", "--output", str(tmp_path)]) == 1
    (result,) = (r for r in results(tmp_path) if r["outcome"] != "skipped")
    assert "results differ from eager's by" in result["outcome"]
    assert result["seconds"] is None


def test_a_time_that_contains_the_host_says_so(monkeypatch):
    def refuse(call):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(clock, "_between_clearings", refuse)
    monkeypatch.setattr("triton.testing.do_bench", lambda *_, **__: 2.0)
    timed = clock.MEASURED.time(lambda: None)
    assert timed.seconds == 2e-3
    assert timed.note.endswith("no CUDA graph: operation not permitted when stream is capturing")


@pytest.mark.parametrize("form", forms.FORMS)
def test_every_form_has_kernels_that_take_its_operands(form):
    made = forms.FORMS[form](FULL, torch.device("meta"))
    assert list(made.kernels(gpu_target("cuda:90")))
