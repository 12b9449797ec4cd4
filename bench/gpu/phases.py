"""The phases of a session, in order: is every kernel right, do the CUDA kernels hold, times of kernels and of a model, tuning."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from llmopt.gpu.run import run
from llmopt.registry import KERNELS

from bench.gpu import model as llama
from bench.gpu.forms import FORMS
from bench.gpu.forms.work import FULL, SMALL, Work
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
    """Default configs of every kernel beside PyTorch's own and Inductor's, L2 cold."""
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
                seconds = session.clock.seconds(call)
                session.record.add(
                    "kernels", name, system, "ok", seconds, detail, made.flops, made.bytes  # noqa: B023
                )  # fmt: skip

            session.attempt("kernels", name, system, time)


def end_to_end(session: Session) -> None:
    """Prefill and one decoding step of a Llama: eager, llmopt in two modes, Inductor; each against eager's logits."""
    sizes, layers = (FULL, 4) if session.full else (SMALL, 1)
    model = llama.llama(sizes, layers, session.device)
    given = llama.prompt(sizes, session.device)
    token = {"ids": given["ids"][:, :1], "positions": given["positions"][-1:] + 1}
    systems: dict[str, dict[str, Any]] = {
        "eager": {},
        "llmopt": {"backend": "llmopt"},
        "llmopt reduce-overhead": {"backend": "llmopt", "mode": "reduce-overhead"},
        "Inductor": {"backend": _inductor(session)},
    }
    if not session.full:  # a rehearsal does not wait for every compiler
        systems = {name: systems[name] for name in ("eager", "llmopt reduce-overhead")}
    with torch.no_grad():
        want, cache = model(**given)
        next_want, _ = model(**token, cache=cache)
        for system, how in systems.items():
            torch._dynamo.reset()
            steps = _Steps(torch.compile(model, **how) if how else model, given, token)
            session.attempt("model", "prefill", system, lambda s=steps, n=system: _timed(session, "prefill", n, s.prefill, want, s))  # type: ignore[misc]  # fmt: skip
            session.attempt("model", "decode", system, lambda s=steps, n=system: _timed(session, "decode", n, s.decode, next_want, s))  # type: ignore[misc]  # fmt: skip


class _Steps:
    """A model's two kinds of calls; each decoding step appends to the cache of the one before."""

    def __init__(
        self, run: Callable[..., Any], given: dict[str, Any], token: dict[str, Any]
    ) -> None:
        self._run, self._given, self._token = run, given, token
        self._prompt: llama.Cache = []
        self._cache: llama.Cache = []

    def prefill(self) -> torch.Tensor:
        logits, self._prompt = self._run(**self._given)
        return logits

    def restart(self) -> None:
        """The next decoding step is the first after the prompt."""
        self._cache = self._prompt

    def decode(self) -> torch.Tensor:
        logits, self._cache = self._run(**self._token, cache=self._cache)
        return logits


def _timed(
    session: Session,
    what: str,
    system: str,
    call: Callable[[], torch.Tensor],
    truth: torch.Tensor,
    steps: _Steps,
) -> None:
    """Timed steps of decoding append to each other from the prompt on, as in use: a cache that begins anew is copied."""
    steps.restart()
    _close(call(), truth)
    call()  # lengths become symbols, graphs are captured
    steps.restart()
    _close(call(), truth)
    session.record.add("model", what, system, "ok", session.clock.seconds(call))


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


PHASES = (correctness, cuda_kernels, microbenchmarks, end_to_end, tuning)
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


def _close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Logits of a model: as far apart as roundings on the way add up to, far from another model's."""
    error = ((got.double() - want.double()).square().mean() / want.double().square().mean()).sqrt()
    assert error < 2e-2, f"logits differ from eager's by {error:.3g} of their RMS"


def _inductor(session: Session) -> str:
    """Inductor, whose compiler a rehearsal does not wait for."""
    return "inductor" if session.full else "eager"
