"""All kernels of all forms compiled at once, by as many processes as there are cores, before they are launched one after the other.

The binaries lie in triton's cache, where its launcher looks first (tests/gpu/compile/test_precompile.py).
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

import torch
from llmopt.gpu.compile import binary, unique
from llmopt.launch import Launch
from llmopt.types import Target

from bench.gpu.forms import FORMS
from bench.gpu.forms.work import FULL, Sizes
from bench.gpu.session import Session

PHASE = "compile"
_launches: list[Launch] = []  # of the processes that are forked from this one
_META = torch.device("meta")


def precompile(session: Session) -> None:
    """Failures are results; those kernels fail again where they are launched."""
    if not session.full:
        session.record.add(PHASE, "all kernels", "triton", "skipped", detail="a rehearsal interprets them")  # fmt: skip
        return
    start, done = time.monotonic(), 0
    for kernel, reason in compiled(session.forms, FULL, session.target):
        done += 1
        if reason:
            session.record.add(PHASE, kernel, "triton", reason)
    seconds = time.monotonic() - start
    session.record.add(PHASE, f"{done} kernels", "triton", detail=f"{seconds:.0f} s in {os.cpu_count()} processes")  # fmt: skip


def compiled(forms: Sequence[str], sizes: Sizes, target: Target) -> Iterator[tuple[str, str]]:
    """(kernel, "" or what is wrong) of every distinct kernel of some forms, once it is compiled."""
    launches = [launch for name in forms for _, _, launch in FORMS[name](sizes, _META).kernels(target)]  # fmt: skip
    _launches[:] = unique(launches, target).values()
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        reasons = pool.map(_compile, range(len(_launches)), [target] * len(_launches))
        yield from zip((launch.kernel for launch in _launches), reasons, strict=True)


def _compile(number: int, target: Target) -> str:
    try:
        binary(_launches[number], target)
    except Exception as error:  # triton's compiler raises errors of every kind
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""
