"""The phases of a session, in order: kernels compiled, the GPU's ceilings, is every kernel right, times of kernels and models, tuning."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from llmopt.gpu.run import run
from llmopt.registry import KERNELS

from bench.gpu.ceilings import ceilings, floor
from bench.gpu.end_to_end import end_to_end
from bench.gpu.forms import FORMS
from bench.gpu.forms.work import FULL, SMALL, Work
from bench.gpu.precompile import precompile
from bench.gpu.session import ROOT, Session
from tests.tolerance import assert_close


def correctness(session: Session) -> None:
    """Every kernel that takes a form, with every config, against float64."""
    reached = set()
    for name in session.forms:
        made = _work(session, "correctness", name)
        if made is None:
            continue
        reached.add(made.op)
        want = made.reference()
        for kernel, config, launch in _kernels(session, made):

            def check(launch: Any = launch, want: torch.Tensor = want, made: Work = made) -> None:
                made.output.zero_()
                run(launch)
                _compare(made, want)
                session.record.add("correctness", name, kernel, detail=str(config))  # noqa: B023

            session.attempt("correctness", f"{name} {config}", kernel, check)
    if tuple(session.forms) == tuple(FORMS):
        for op in sorted({k.op for k in KERNELS.values()} - reached):
            session.record.add("correctness", op, "every kernel", "skipped", detail="no form in bench/gpu/forms")  # fmt: skip


def cuda_kernels(session: Session) -> None:
    """The CUDA C++ kernels against PyTorch, bare and under compute-sanitizer, each in a process of its own."""
    from llmopt.native import cuda

    phase, what = "CUDA C++ kernels", "all of csrc/cuda"
    if session.full:
        torch.zeros(1, device=session.device)  # a context for the driver to find
    if reason := cuda.missing():
        session.record.add(phase, what, "bare", "skipped", detail=reason)
        return
    command = [sys.executable, "-m", "bench.gpu.cuda_kernels"]
    tool = shutil.which("compute-sanitizer")
    lines: dict[str, list[str]] = {"bare": command}
    for check in ("memcheck", "racecheck"):
        if tool is None:
            session.record.add(phase, what, check, "skipped", detail="compute-sanitizer is not installed")  # fmt: skip
            continue
        lines[check] = [tool, "--tool", check, "--error-exitcode", "9", *command]
    for system, line in lines.items():

        def passes(system: str = system, line: list[str] = line) -> None:
            done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False, timeout=180)  # fmt: skip
            if done.returncode:
                raise RuntimeError(f"exit code {done.returncode}: {(done.stderr or done.stdout)[-300:]}")  # fmt: skip
            session.record.add(phase, what, system, detail=Path(line[0]).name)

        session.attempt(phase, what, system, passes)


def microbenchmarks(session: Session) -> None:
    """Default configs of every kernel beside PyTorch's own and Inductor's: the GPU's time alone, L2 cold."""
    for name in session.forms:
        made = _work(session, "kernels", name)
        if made is None:
            continue
        calls: dict[str, tuple[Callable[[], Any], str]] = {}
        for kernel, config, launch in _kernels(session, made):
            calls.setdefault(kernel, (lambda launch=launch: run(launch), str(config)))  # type: ignore[misc]
        calls |= {peer: (call, "") for peer, call in made.peers.items()}
        if made.compiled is not None:
            torch._dynamo.reset()
            inductor = torch.compile(made.compiled, backend=_inductor(session))
            calls["Inductor"] = (lambda f=inductor, m=made: f(*m.inputs), "")  # type: ignore[misc]
        for system, (call, config) in calls.items():

            def time(system: str = system, call: Any = call, detail: str = config, made: Work = made) -> None:  # fmt: skip
                call()  # compiles
                timed = session.clock.time(call)
                detail = " ".join(filter(None, (detail, timed.note)))
                session.record.add(
                    "kernels", name, system, "ok", timed.seconds, detail, made.flops, made.bytes,  # noqa: B023
                    floor(session.record, made),
                )  # fmt: skip

            session.attempt("kernels", name, system, time)


def tuning(session: Session) -> None:
    """`llmopt tune` on a layer that has every shape, for the time that is left; what it keeps goes to kernels/tuned/."""
    generation = session.target.gpu
    assert generation is not None
    target = ["--target", f"{session.target.device}:{generation.arch}"]
    model = "to_tune" if session.full else "to_rehearse"
    kept = ROOT / "kernels" / "tuned" / f"{session.record.folder.name}.measured.json"
    measure = ["tune", f"bench/gpu/model.py:{model}", *target]
    export = ["tune", *target, "--export", str(kept)]

    def tune(arguments: list[str], seconds: float) -> None:
        what = " ".join(["llmopt", *arguments])
        command = [sys.executable, "-m", "llmopt.cli", *arguments]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=seconds)  # fmt: skip
        except subprocess.TimeoutExpired:
            session.record.add("tuning", what, "llmopt", detail="stopped at the deadline: what was measured is kept")  # fmt: skip
            return
        if not session.full and "is here to measure on" in done.stderr:
            session.record.add(
                "tuning", what, "llmopt", "skipped", detail="a rehearsal has no times"
            )
            return
        if done.returncode:
            raise RuntimeError(f"exit code {done.returncode}: {done.stderr[-300:]}")
        session.record.add("tuning", what, "llmopt")

    session.attempt("tuning", "measure", "llmopt", lambda: tune(measure, max(session.left - _EXPORT_SECONDS, 5.0)))  # fmt: skip
    if session.full:
        kept.parent.mkdir(exist_ok=True)
        session.attempt("tuning", "export", "llmopt", lambda: tune(export, 60.0))


@dataclass(frozen=True)
class Phase:
    """A part of a session; uses_gpu: itself, not in processes it starts."""

    work: Callable[[Session], None]
    uses_gpu: bool = False


PHASES = {
    "compile": Phase(precompile, uses_gpu=True),  # asking kernels what they take opens the driver
    "ceilings": Phase(ceilings, uses_gpu=True),
    "correctness": Phase(correctness, uses_gpu=True),
    "CUDA C++ kernels": Phase(cuda_kernels, uses_gpu=True),
    "kernels": Phase(microbenchmarks, uses_gpu=True),
    "models": Phase(end_to_end),
    "tuning": Phase(tuning),
}
_EXPORT_SECONDS = 20.0  # left for writing what tuning found


def _work(session: Session, phase: str, name: str) -> Work | None:
    """The operands of a form; None where the deadline has passed or they cannot be made, which is a result."""
    made: list[Work] = []
    sizes = FULL if session.full else SMALL

    def make() -> None:
        torch.manual_seed(0)
        made.append(FORMS[name](sizes, session.device))

    session.attempt(phase, name, "operands", make)
    return made[0] if made else None


def _kernels(session: Session, made: Work) -> list[tuple[str, Any, Any]]:
    """Every config of every kernel; in a rehearsal each kernel's default, since the interpreter runs all tiles alike."""
    found = list(made.kernels(session.target))
    if session.full:
        return found
    return list({kernel: (kernel, c, launch) for kernel, c, launch in reversed(found)}.values())


def _compare(made: Work, want: torch.Tensor) -> None:
    got = made.output
    if made.may_differ:
        far = (got.double() - want).abs().max().item()
        assert far <= made.may_differ, f"whole numbers differ by {far:g}"
        return
    assert_close(got.cpu(), want.cpu())


def _inductor(session: Session) -> str:
    """Inductor, whose compiler a rehearsal does not wait for."""
    return "inductor" if session.full else "eager"
