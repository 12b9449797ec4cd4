"""Which configs of a linear are worth measuring: all that are possible, ranked by a model of their time.

The model knows the machine by its probes: multiplications at the rate of FMA or of bytes less what a low register tile loses, weights at
the read rate, rows passing L2 once per chunk, and threads that wait at the end for the last chunk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

from llmopt import _C
from llmopt.native.probe import Probe
from llmopt.native.segment import SHORT_DTYPES
from llmopt.program import DTYPE_CODES
from llmopt.types import EVERY_M, Choice, LinearConfig, LinearProblem, Target

COUNT = 12  # likeliest configs that are measured, the default among them
_ALIKE = (
    3  # of them that differ only in how they are cut: the model may be wrong about a whole kind
)
_ITEM_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8": 1.0, "q4": 0.5}
_L2_RATE = 5.0  # times the read rate at which rows come again from the caches
_CHUNK_SECONDS = 0.3e-6  # to take a chunk and start its stream
_HEIGHTS = 4  # of register tiles: the largest that differ
_FAMILIES = {
    "f32": ("blocked", "stream"),
    "f16": ("blocked", "unpack", "stream"),
    "bf16": ("blocked", "unpack", "stream"),
    "q8": ("blocked", "stream"),
    "q4": ("unpack", "stream"),
}
_AHEAD = (1024, 2048, 4096, 8192, 16384)
_K_BLOCKS = (256, 512, 1024, 2048)
_SPANS = (1, 2, 3, 4, 6, 8)
_STREAM_RATE = (0.7, 0.85, 0.95, 1.0)  # of the read rate, by panels that are read side by side ...
_STREAM_SUMS = 12  # ... as many as this many rows of sums fit the registers
_CODES = {SHORT_DTYPES[dtype]: code for dtype, code in DTYPE_CODES.items() if dtype in SHORT_DTYPES}


@dataclass(frozen=True)
class Machine:
    """What the model knows about where a problem runs."""

    target: Target
    threads: int
    probe: Probe

    def tile_rows(self, problem: LinearProblem) -> int:
        """Rows of the largest register tile, in rows of x."""
        return max(1, _C.tile_rows(self.target.tier, problem.op) // max(1, problem.planes))


def op_ints(problem: LinearProblem) -> list[int]:
    """The op's own ints, as far as its tuning and its time depend on them."""
    if problem.op == "linear":
        return [problem.n, problem.k, _CODES[problem.w], 0, int(problem.gated), 0]
    bits, offsets = (8 if problem.w == "q8" else 4), int(problem.offsets)
    form = [bits, problem.group, offsets, problem.planes, int(problem.exact)]
    return [problem.n, problem.k, DTYPE_CODES[torch.uint8], 0, int(problem.gated), 0, *form]


def refuse(target: Target, problem: LinearProblem, config: LinearConfig) -> str:
    """Why a problem cannot run with a config on a target, in the words of the kernels' contracts; "" when it can."""
    tuning = Choice(((EVERY_M, config),)).ints()
    return _C.refuse_tuning(target.tier, problem.op, op_ints(problem) + tuning)


def candidates(problem: LinearProblem, machine: Machine) -> list[LinearConfig]:
    """The default, then the likeliest configs of a problem, best first; problem.m is a number."""
    space = set(_space(problem, machine)) - {LinearConfig()}
    ranked = sorted(space, key=lambda c: (predict(problem, c, machine), c.row(0)))
    chosen, alike = [LinearConfig()], Counter[tuple[object, ...]]()
    for config in ranked:
        kind = (config.family, config.rows, config.k_block, config.ahead)
        if len(chosen) == COUNT:
            break
        if alike[kind] < _ALIKE and not refuse(machine.target, problem, config):
            chosen.append(config)
            alike[kind] += 1
    return chosen


def _space(problem: LinearProblem, machine: Machine) -> Iterator[LinearConfig]:
    assert problem.m is not None
    m, rows = problem.m, machine.tile_rows(problem)
    panels = -(-problem.n // machine.target.panel_width)
    shares = {max(1, panels // (machine.threads * c)) for c in (1, 2, 4, 8, 16)}
    spans = sorted({1, *shares, *(s for s in (2, 3, 4, 8) if s <= panels)})
    if m <= rows:
        for span, ahead in product(spans, (0, *_AHEAD)):
            yield LinearConfig("stream", span=span, ahead=ahead)
    heights = sorted({-(-m // -(-m // r)) for r in range(max(1, rows // 2), rows + 1)})[-_HEIGHTS:]
    planes = max(1, problem.planes)
    for height, family in product(heights, _FAMILIES[problem.w]):
        tiles = -(-m // height)
        if family == "stream" and not 1 < tiles <= 4:  # one tile's streams are above
            continue
        blocks = {0, *(-(-tiles // c) for c in (1, 2, 4, 8) if tiles >= 2 * c)}
        k_blocks = [0, *(b for b in _K_BLOCKS if b < problem.k)]
        if problem.op == "linear_quantized":
            k_blocks = [0]  # panels of codes are not cut along K
        choices = product(spans, (0,)) if family == "stream" else product(_SPANS, k_blocks)
        for (span, k_block), per_chunk in product(choices, sorted(blocks)):
            yield LinearConfig(family, height * planes, k_block, span, per_chunk)


def predict(problem: LinearProblem, config: LinearConfig, machine: Machine) -> float:
    """Seconds of one call as the model sees it: good enough to rank configs, no more."""
    assert problem.m is not None
    m, n, k, probe = problem.m, problem.n, problem.k, machine.probe
    peak = probe.fma_flops
    if problem.op == "linear_quantized" and probe.byte_ops > 0:
        peak = max(probe.byte_ops, probe.nibble_ops if problem.w == "q4" else 0.0)
    height = (config.rows // max(1, problem.planes)) or machine.tile_rows(problem)
    tiles = -(-m // height)
    height = -(-m // tiles)
    panels = -(-n // machine.target.panel_width)
    span = max(1, config.span)
    per_chunk = config.tiles or tiles
    chunks = -(-panels // span) * -(-tiles // per_chunk)
    # Two vectors of weights and a broadcast a row: a low tile waits for loads. Widening on the way takes FMA slots.
    widens = config.family in ("blocked", "stream") and problem.w in ("f16", "bf16", "q4")
    efficiency = height / (height + (2.0 if widens else 1.0))
    compute = 2.0 * m * n * k * max(1, problem.planes) / peak / efficiency
    read = n * k * _ITEM_BYTES[problem.w] / probe.read_bytes
    if config.family == "stream":
        side_by_side = min(span, len(_STREAM_RATE), max(1, _STREAM_SUMS // height))
        read /= _STREAM_RATE[side_by_side - 1]
    waiting = -(-chunks // machine.threads) * machine.threads / chunks
    rows_bytes = m * k * (4.0 if problem.op == "linear" else max(1, problem.planes))
    passes = -(-panels // span) / machine.threads
    again = passes * rows_bytes / (probe.read_bytes * _L2_RATE)
    k_blocks = -(-k // config.k_block) if config.k_block else 1
    sums = (k_blocks - 1) * 8.0 * m * n / (probe.read_bytes * _L2_RATE)
    overhead = chunks / machine.threads * _CHUNK_SECONDS
    unpack = n * k * 4.0 / (probe.read_bytes * _L2_RATE) if config.family == "unpack" else 0.0
    unpack *= -(-tiles // per_chunk)
    # What of reading and arithmetic does not overlap: a single tile is best fetched by its own stream, several by the tiles before.
    serial = 0.05 if config.family == "stream" and tiles == 1 else 0.15 if tiles > 1 else 0.3
    overlapped = max(compute, read) + serial * min(compute, read)
    return (overlapped + again + sums + unpack) * waiting + overhead + _ahead_cost(config) * read


def _ahead_cost(config: LinearConfig) -> float:
    """What a prefetch distance is likely to lose: two to eight KiB do best on the machines we know."""
    if config.family != "stream" or config.ahead in (0, 2048, 4096, 8192):
        return 0.0
    return 0.02
