"""What the GPU at hand reaches at most: its rates of reading, copying and matrix products; and the time of a launch that does nothing.

A kernel's floor is the longer of its bytes at the faster rate of the two and its operations at the rate of products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.gpu.forms.work import Work
from bench.gpu.record import Record
from bench.gpu.session import Session

PHASE = "ceilings"
_READ, _COPY, _NOTHING = "read", "copy", "one number"
_PRODUCTS = {"fp16": "fp16 product", "int8": "int8 product"}


def ceilings(session: Session) -> None:
    """Before all else that is timed: what later phases are compared with."""
    device, n = session.device, 8192 if session.full else 64
    source = torch.zeros(16 * n * n, dtype=torch.int8, device=device)
    copy, number = torch.empty_like(source), torch.zeros(1, device=device)
    a, b, c = (torch.randn(n, n, device=device).half() for _ in range(3))
    p, q = (torch.randint(-127, 128, (n, n), dtype=torch.int8, device=device) for _ in range(2))
    flops = 2.0 * n**3
    rows: tuple[tuple[str, Callable[[], Any], float, float], ...] = (
        (_READ, lambda: torch.amax(source.view(torch.float32)), 0.0, 1.0 * source.numel()),
        (_COPY, lambda: copy.copy_(source), 0.0, 2.0 * source.numel()),
        (_PRODUCTS["fp16"], lambda: torch.mm(a, b.T, out=c), flops, 0.0),
        (_PRODUCTS["int8"], lambda: torch._int_mm(p, q.T), flops, 0.0),
        (_NOTHING, lambda: number.add_(1), 0.0, 0.0),
    )
    for what, call, operations, num_bytes in rows:

        def time(what=what, call=call, operations=operations, num_bytes=num_bytes) -> None:
            timed = session.clock.time(call)
            session.record.add(
                PHASE, what, "PyTorch", "ok", timed.seconds, timed.note, operations, num_bytes
            )

        session.attempt(PHASE, what, "PyTorch", time)


def floor(record: Record, made: Work) -> float:
    """Seconds under which this GPU cannot be, by the ceilings of this session; 0 where they were not measured."""
    found = {r.what: r for r in record.results if r.phase == PHASE and r.outcome == "ok"}
    rates = [found[what].gbytes or 0.0 for what in (_READ, _COPY) if what in found]
    product = found.get(_PRODUCTS[made.products])
    if not rates or product is None or not product.tflops:
        return 0.0
    return max(made.bytes / max(rates) / 1e9, made.flops / product.tflops / 1e12)
