"""How long a linear takes on this machine under a scheme: our own kernels, timed alone over copies of the weight in turn."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmopt.auto.plans import LayerShape
from llmopt.native.linear_quantized import PLANES
from llmopt.native.program import DTYPE_CODES, OneOp
from llmopt.ops import activation
from llmopt.quant.schemes import Scheme
from llmopt.target import target
from llmopt.weights import packed_bytes, packed_code_bytes

SECONDS = 0.01  # of calls for one number
WEIGHT_BYTES = 2**27  # that the calls go through
MOST_COPIES = 32
FILL = 0x3C  # as f32, f16 and bf16 an ordinary number, as a code 60

Bench = Callable[[Sequence[Callable[[], None]]], float]  # calls → seconds of one


def fastest_of(calls: Sequence[Callable[[], None]]) -> float:
    """Seconds of the fastest call, of as many as SECONDS take, each two times at least."""
    best, end = float("inf"), time.perf_counter() + SECONDS
    rounds = 0
    while rounds < 2 or time.perf_counter() < end:
        for call in calls:
            start = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - start)
            if rounds >= 2 and time.perf_counter() >= end:
                break
        rounds += 1
    return best


@functools.lru_cache(maxsize=1024)
def _measured(
    shape: LayerShape, scheme: Scheme | None, bench: Bench, tier: str, threads: int
) -> float:
    return bench(_calls(shape, scheme))


def layer_seconds(shape: LayerShape, scheme: Scheme | None, bench: Bench = fastest_of) -> float:
    """Seconds of one linear of this shape under a scheme (None: exact), measured once per process, tier and threads.

    bench: times calls of the same work over different weights.
    """
    return _measured(shape, scheme, bench, target().tier, torch.get_num_threads())


def _calls(shape: LayerShape, scheme: Scheme | None) -> list[OneOp]:
    """The same linear over copies of its packed weight, which hold ordinary numbers."""
    width = target().panel_width
    ints = [shape.n, shape.k]
    act = [activation.CODES["silu" if shape.gated else "none"], int(shape.gated)]
    if scheme is None:
        op, size = "linear", packed_bytes(shape.n, shape.k, shape.dtype.itemsize, width)
        ints += [DTYPE_CODES[shape.dtype], *act, 0]
    else:
        group = scheme.group_of(shape.k)
        op, size = "linear_quantized", packed_code_bytes(shape.n, shape.k // group, scheme, width)
        ints += [DTYPE_CODES[torch.uint8], *act, 0]
        ints += [scheme.bits, group, int(not scheme.symmetric), PLANES[scheme.activations]]
    size = -(-size // 4096) * 4096
    copies = max(1, min(MOST_COPIES, WEIGHT_BYTES // size))
    memory = torch.full((copies, size), FILL, dtype=torch.uint8)
    x = torch.full((shape.m, shape.k), 0.5, dtype=shape.dtype)
    y = torch.empty(shape.m, shape.n // 2 if shape.gated else shape.n, dtype=shape.dtype)

    def call(packed: Tensor) -> OneOp:
        return OneOp(op, [x, packed, None, None, y, None, None], ints, [0.0, 1.0, 0.0])

    return [call(packed) for packed in memory]
