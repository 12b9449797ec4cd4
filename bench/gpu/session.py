"""Everything a GPU is needed for, in one run of minutes: checks, tuning, times. `bench/gpu_session.sh` calls it.

Phases go on after a failure, stop at the deadline, and say what they left out. This process never uses the GPU: what does is forked from
it, so that a GPU fault ends one phase or one model. With --rehearse the same code runs where there is no GPU, in one process: kernels in
triton's interpreter, small sizes, calls timed once; nothing it writes is a measurement.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from llmopt import kernels
from llmopt.gpu import device as gpu_device
from llmopt.types import Target

from bench.gpu.apart import apart
from bench.gpu.clock import MEASURED, REHEARSED, Clock
from bench.gpu.record import Record

ROOT = Path(__file__).parents[2]


@dataclass
class Session:
    """Where and how long the phases run."""

    device: torch.device
    target: Target
    clock: Clock
    record: Record
    forms: Sequence[str]
    deadline: float  # of time.monotonic()
    full: bool  # full sizes and every config
    models: Sequence[str] = ()  # patterns one of which is found in a run's name; none: all runs
    phases: Sequence[str] = ()  # names; none: all

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def attempt(self, phase: str, what: str, system: str, work: Callable[[], None]) -> None:
        """Runs one piece; what it raises is a result, and the session goes on."""
        if self.left < 0:
            self.record.add(phase, what, system, "skipped", detail="out of time")
            return
        try:
            work()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            self.record.add(phase, what, system, reason)

    def apart(
        self, phase: str, what: str, system: str, work: Callable[[], None], seconds: float = 600.0
    ) -> None:
        """`attempt` in a process of its own, for no longer than that and the time that is left; a rehearsal has no faults to keep apart."""
        if not self.full or self.left < 0:
            self.attempt(phase, what, system, work)
            return
        limit = min(seconds, self.left + _GRACE)
        reason = apart(lambda: self.attempt(phase, what, system, work), limit)
        self.record.reload()
        if reason:
            self.record.add(phase, what, system, reason)


_GRACE = 15.0  # seconds for what had begun at the deadline


def main(arguments: Sequence[str] | None = None) -> int:
    """0: all that ran was right; 1: something was not; 2: it cannot run here."""
    from bench.gpu.forms import FORMS
    from bench.gpu.phases import PHASES

    args = _arguments(arguments)
    for kind, given, known in (("form", args.only, FORMS), ("phase", args.phase, PHASES)):
        if unknown := set(given or ()) - set(known):
            print(
                f"gpu_session: no {kind} {min(unknown)!r}; possible: {', '.join(known)}",
                file=sys.stderr,
            )
            return 2
    try:
        session = rehearsal(args) if args.rehearse else on_gpu(args)
    except RuntimeError as error:
        print(f"gpu_session: {error}", file=sys.stderr)
        return 2
    return run(session)


def run(session: Session) -> int:
    """All phases, whatever one of them raises, then the table and the plots."""
    from bench.gpu import phases

    kernels.load()
    for name, phase in phases.PHASES.items():
        if session.phases and name not in session.phases:
            continue
        start = time.monotonic()
        run_it = session.apart if phase.uses_gpu else session.attempt
        run_it(name, "as a whole", "session", lambda p=phase: p.work(session))  # type: ignore[misc]
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    record = session.record
    print(record.write_table().read_text())
    try:
        print("plots:", *map(str, record.write_plots()))
    except ModuleNotFoundError as error:
        print(f"no plots: {error}: pip install matplotlib")
    failures = record.failures()
    print(f"{len(record.results)} results in {record.folder}, {len(failures)} failed")
    return 1 if failures else 0


def on_gpu(args: argparse.Namespace) -> Session:
    """Raises RuntimeError that says what is missing."""
    here, there = multiprocessing.Pipe(duplex=False)
    reason = apart(lambda: there.send(_gpu()), 60.0)
    if reason or not here.poll():
        raise RuntimeError(f"the GPU cannot be asked: {reason or 'no answer'}")
    device, target, missing = here.recv()
    if target is None:
        raise RuntimeError(missing)
    return _session(args, device, target, MEASURED)


def _gpu() -> tuple[torch.device | None, Target | None, str]:
    """The GPU and its target, or why there is none."""
    if not torch.cuda.is_available():
        return (
            None,
            None,
            "torch sees no GPU here; --rehearse runs everything but times in triton's interpreter",
        )
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = gpu_device.gpu_of(device)
    assert gpu is not None
    return device, *gpu_device.target_of(gpu)


def rehearsal(args: argparse.Namespace) -> Session:
    """CPU tensors count as an H100's, and kernels are interpreted. Raises RuntimeError where this process compiles them."""
    from llmopt.gpu.run import is_interpreting

    from bench.gpu import stand_in

    if not is_interpreting():
        raise RuntimeError("a rehearsal needs TRITON_INTERPRET=1 when Python starts; gpu_session.sh --rehearse sets it")  # fmt: skip
    target = stand_in.install()
    return _session(args, torch.device("cpu"), target, REHEARSED)


def _session(
    args: argparse.Namespace, device: torch.device, target: Target, clock: Clock
) -> Session:
    from bench.gpu.forms import FORMS

    folder = args.output or ROOT / "bench" / "sessions" / _slug(target.name)
    record = Record(Path(folder), machine(device, target), clock.source)
    deadline = time.monotonic() + 60 * args.minutes
    return Session(
        device, target, clock, record, args.only or tuple(FORMS), deadline, not args.rehearse,
        args.models or (), args.phase or (),
    )  # fmt: skip


def machine(device: torch.device, target: Target) -> dict[str, Any]:
    """What the numbers depend on."""
    import triton

    facts = {
        "gpu": target.name,
        "planned as": target.tier,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda or torch.version.hip or "none",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "host": platform.processor() or platform.machine(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
    }
    return facts | {"device": str(device)}


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return f"unknown: no {command[0]}"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.split("\n")[0].strip() or "unknown"


def _slug(name: str) -> str:
    return "_".join(name.lower().replace("/", " ").split())


_OPTIONS: dict[str, dict[str, Any]] = {
    "--rehearse": {"action": "store_true", "help": "run where there is no GPU; writes no measurement"},
    "--output": {"type": Path, "metavar": "FOLDER", "help": "default: bench/sessions/<gpu>"},
    "--minutes": {"type": float, "default": 9.0, "help": "no piece of work begins after that"},
    "--phase": {"action": "append", "metavar": "PHASE", "help": "just this one; may be repeated"},
    "--models": {"action": "append", "metavar": "PATTERN", "help": "of the runs of models, those that this pattern finds; may be repeated"},
    "--only": {"action": "append", "metavar": "FORM", "help": "of the kernels' forms, just this one; may be repeated"},
}  # fmt: skip


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("gpu_session", description=__doc__)
    for name, more in _OPTIONS.items():
        parser.add_argument(name, **more)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
