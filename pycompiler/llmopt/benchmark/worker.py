"""One system in a process of its own: no compiled code, threads or cache shared with another.

The parent sends (command, phase) over a pipe and gets ("ok", value) or ("error", sentence). While
it waits a worker sleeps, so the systems do not disturb one another.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import resource
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from llmopt.benchmark.accuracy import outputs
from llmopt.benchmark.phases import Phase, Runner, run_once, sample
from llmopt.benchmark.systems import SYSTEMS
from llmopt.benchmark.work import Form, work_of
from llmopt.models import DTYPES, LoadedModel, load
from llmopt.models.errors import sentence

LEAST_SECONDS = 0.3  # a measurement repeats short calls until this much time has been measured


@dataclass(frozen=True)
class Job:
    """What a worker is to build."""

    system: str
    model: str
    dtype: str
    threads: int
    random_weights: bool
    debug: bool = False  # send whole tracebacks


class WorkerError(Exception):
    """A system that failed; the message is its own."""


class Worker:
    """The parent's end: starts the process, sends commands; an error becomes WorkerError."""

    def __init__(self, job: Job, phases: Sequence[Phase]) -> None:
        # spawn: a fork would inherit torch's thread pool in a broken state
        context = multiprocessing.get_context("spawn")
        self.job = job
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, job, phases), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, command: str, phase: Phase | None = None) -> Any:
        try:
            self._pipe.send((command, phase))
            status, value = self._pipe.recv()
        except (EOFError, BrokenPipeError) as error:
            self._process.join(timeout=5)
            code = self._process.exitcode
            raise WorkerError(f"its process ended with exit code {code}") from error
        if status == "error":
            raise WorkerError(value)
        return value

    def stop(self) -> None:
        self._pipe.close()
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def serve(pipe: Connection, job: Job, phases: Sequence[Phase]) -> None:
    """The worker's end: answers commands until the pipe closes."""
    state: _State | None = None
    if not job.debug:  # exporters and compilers chat; what fails is sent back as the answer
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # some do it with progress bars
    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):  # the parent is gone
        while True:
            command, phase = pipe.recv()
            try:
                state = state or _State(job, phases)
                answer = ("ok", getattr(state, command)(phase))
            # whatever a peer raises is that peer's result: the others go on
            except Exception as error:
                answer = ("error", traceback.format_exc() if job.debug else sentence(error))
            pipe.send(answer)


class _State:
    """A loaded model and its runner; one method per command."""

    def __init__(self, job: Job, phases: Sequence[Phase]) -> None:
        torch.set_num_threads(job.threads)
        self.job = job
        self.phases = phases
        self.loaded: LoadedModel = load(job.model, DTYPES[job.dtype], job.random_weights)
        self.runner: Runner | None = None

    def work(self, phase: Phase) -> Any:
        """Counted on the eager model, before anything is compiled."""
        return work_of(self.loaded, phase)

    def form(self, _: None) -> Form | None:
        """How the system keeps this model, for its roof."""
        form = SYSTEMS[self.job.system].form
        return form(self.loaded.model) if callable(form) else form

    def build(self, _: None) -> None:
        """Builds the system, once, without running it."""
        self._built()

    def _built(self) -> Runner:
        with torch.inference_mode():
            if self.runner is None:
                self.runner = SYSTEMS[self.job.system].build(self.loaded, self.phases)
        return self.runner

    def start(self, _: None) -> float:
        """Builds the system and warms it up; returns the seconds beyond those of a warm pass.

        Two passes over all phases: compilers that see sizes change compile a second time.
        """
        with torch.inference_mode():
            start = time.perf_counter()
            runner = self._built()
            for _round in range(2):
                for phase in self.phases:
                    run_once(runner, self.loaded, phase)
            cold = time.perf_counter() - start
            start = time.perf_counter()
            for phase in self.phases:
                run_once(runner, self.loaded, phase)
            return cold - 2 * (time.perf_counter() - start)

    def measure(self, phase: Phase) -> float:
        """Seconds of one pass, the mean of as many as fill LEAST_SECONDS."""
        assert self.runner is not None, "start comes first"
        total, passes = 0.0, 0
        with torch.inference_mode():
            while total < LEAST_SECONDS:
                total += run_once(self.runner, self.loaded, phase)
                passes += 1
        return total / passes

    def outputs(self, _: None) -> tuple[str, np.ndarray | None]:
        """The kind of model, and what `accuracy.compare` compares; as an array, which needs no shared memory."""
        assert self.runner is not None, "build comes first"
        with torch.inference_mode():
            return self.loaded.kind, outputs(self.runner, self.loaded, self.phases)

    def sample(self, phase: Phase) -> torch.Tensor:
        assert self.runner is not None, "start comes first"
        with torch.inference_mode():
            return sample(self.runner, self.loaded, phase)

    def peak_mib(self, _: None) -> float:
        """The most memory the process has held, in MiB."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
