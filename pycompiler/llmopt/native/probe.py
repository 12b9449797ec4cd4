"""What this machine can do at best, measured now: the yardstick of benchmarks and of the tuner.

In: a number of threads, and how much memory the work reads before it reads the same again: the smaller that is, the more of it
caches shared by many cores hold. Out: a `Probe` with FLOP/s, int8 OP/s and bytes/s. A call takes twenty to a hundred and fifty
milliseconds, so that it can stand right before and right after what it is compared with: on shared machines the limits move.
`glance` is for what itself takes no longer than that.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from time import perf_counter

import torch

from llmopt import _C
from llmopt.program import OneOp
from llmopt.target import target

READ_BYTES = (
    128 << 20
)  # where nobody says how much the work reads; four times the L3 of common machines
LEAST_READ_BYTES = 32 << 20  # more than the L2 of cores
MOST_READ_BYTES = 512 << 20  # what a probe may take of a machine's memory
CHUNKS_PER_THREAD = 8  # unequal cores share the work
ITERATIONS = 20_000
REPEATS = 3
READS = 8  # a large L3 keeps more of what is read again until about the sixth time
CHAINS = 12  # kChains in csrc/cpu/probe.cpp
LANE_OPS = 8  # of one 32-bit lane in a product of bytes: four multiplications and four additions
WORD_LANE_OPS = 4  # in one of 16-bit words
TILE_SUMS = 4  # kTileSums in csrc/cpu/probe.cpp
TILE_ITERATIONS = 5_000
TILE_FLOPS = 16 * 16 * 32 * 2  # of one product of bf16 tiles
TILE_OPS = 16 * 16 * 64 * 2  # of one product of byte tiles
UNSTEADY = 0.10  # how far probes of a quiet machine may differ

# Products of bf16 tiles that one product of this dtype is made of (docs/adr/0004).
TILE_PRODUCTS = {"bf16": 1, "f16": 3, "f32": 6, "f32·bf16": 3, "f32·f16": 5}


@dataclass(frozen=True)
class Probe:
    """Attainable rates per second; those of instructions that the tier lacks are 0.0."""

    fma_flops: float
    byte_ops: float  # exact products of bytes by vector instructions
    read_bytes: float
    tile_flops: float = 0.0  # products of bf16 on tile registers
    tile_ops: float = 0.0  # products of bytes on tile registers
    nibble_ops: float = 0.0  # of codes below 16 with bytes, where that is faster
    word_ops: float = 0.0  # exact products of 16-bit words, where they are faster than FMA

    def is_near(self, other: Probe) -> bool:
        """Nothing disturbed the machine between the two, or both of them."""
        pairs = ((self.fma_flops, other.fma_flops), (self.read_bytes, other.read_bytes))
        return all(abs(a - b) <= UNSTEADY * max(a, b) for a, b in pairs)

    def best(self, other: Probe) -> Probe:
        """The higher of each rate."""
        return Probe(*map(max, astuple(self), astuple(other)))

    def linear_peak(self, dtype: str, products: int = 1, instead: str = "f32") -> float:
        """Multiplications and additions per second of a linear at best. dtype: what it multiplies, f32, f16, bf16, f32·bf16 or f32·f16
        (rows and weights), s8, or s4 for codes of 4 bits with bytes; products: of those one product is made of, where one of `instead`
        would do."""
        if dtype in ("s8", "s4"):
            ops = max(self.byte_ops, self.tile_ops, self.nibble_ops if dtype == "s4" else 0.0)
            least = self.linear_peak(instead) if products > 1 or not ops else 0.0
            return max(ops / products, least, self.word_ops if products > 1 else 0.0)
        words = 0.0 if dtype.startswith("f32") else self.word_ops
        return max(self.fma_flops, words, self.tile_flops / TILE_PRODUCTS[dtype])


class _ReadMemory:
    """What the read probe reads: kept, since filling it takes longer than reading it."""

    def __init__(self) -> None:
        self._memory: _C.Memory | None = None

    def buffer(self, num_bytes: int) -> torch.Tensor:
        """Zeros in huge pages, like packed weights: with small ones the page walks are measured too."""
        if self._memory is None or self._memory.bytes < num_bytes:
            self._memory = None  # before there is another
            self._memory = _C.Memory(num_bytes)
            # Pages nobody wrote all read from one page of zeros, which would measure a cache.
            ctypes.memset(self._memory.address, 0, num_bytes)
        memory = (ctypes.c_uint8 * num_bytes).from_address(self._memory.address)
        return torch.frombuffer(memory, dtype=torch.uint8)

    def shrink(self) -> None:
        """Gives back what is beyond READ_BYTES."""
        if self._memory is not None and self._memory.bytes > READ_BYTES:
            self._memory = None


_READ_MEMORY = _ReadMemory()


@functools.lru_cache(maxsize=8)
def _ops(tier: str, threads: int) -> dict[str, tuple[OneOp, float]]:
    """The probes a tier has: the op and how much one call of it does."""
    chunks = CHUNKS_PER_THREAD * threads
    sink = torch.zeros(chunks)
    lanes = _C.panel_width(tier) // 2
    byte_ops = chunks * ITERATIONS * CHAINS * lanes * LANE_OPS
    known = {
        "probe_fma": ([sink], [ITERATIONS], chunks * ITERATIONS * CHAINS * 2 * lanes),
        "probe_bytes": ([sink], [ITERATIONS], byte_ops),
        "probe_nibbles": ([sink], [ITERATIONS], byte_ops),
        "probe_words": ([sink], [ITERATIONS], byte_ops / LANE_OPS * WORD_LANE_OPS),
        "probe_tile_bf16": (
            [sink],
            [TILE_ITERATIONS],
            chunks * TILE_ITERATIONS * TILE_SUMS * TILE_FLOPS,
        ),
        "probe_tile_s8": (
            [sink],
            [TILE_ITERATIONS],
            chunks * TILE_ITERATIONS * TILE_SUMS * TILE_OPS,
        ),
    }
    return {
        name: (OneOp(name, tensors, ints, tier=tier, threads=threads), float(work))
        for name, (tensors, ints, work) in known.items()
        if name in _C.tier_ops(tier)
    }


def _rate(op: OneOp, work: float) -> float:
    start = perf_counter()
    op()
    return work / (perf_counter() - start)


def measure(
    threads: int, tier: str | None = None, read_bytes: float = READ_BYTES, reads: int = READS
) -> Probe:
    """The best of a few runs of each probe.

    tier: the one that kernels use here where none is given; read_bytes: that the work reads before it reads the same again, 0 to read
    nothing, which leaves shared caches as they are and the rate 0.0; reads: how often the probe reads it.
    """
    ops = _ops(tier or target().tier, threads)
    rates = {n: max(_rate(*op) for _ in range(REPEATS)) for n, op in ops.items()}
    if not read_bytes:
        return _probe(rates, 0.0)
    op = _read_op(threads, tier, read_bytes)
    return _probe(rates, max(_rate(*op) for _ in range(reads)))


def glance(threads: int, tier: str | None = None) -> Probe:
    """One run of the FMA and the read probe each, in a fifth of the time; the other rates are 0.0."""
    fma = _ops(tier or target().tier, threads)["probe_fma"]
    return _probe({"probe_fma": _rate(*fma)}, _rate(*_read_op(threads, tier, READ_BYTES)))


def give_back() -> None:
    """Lets go of the memory that probes of more than READ_BYTES took."""
    _READ_MEMORY.shrink()


def _read_op(threads: int, tier: str | None, read_bytes: float) -> tuple[OneOp, float]:
    """Reads so much, from LEAST_ to MOST_READ_BYTES."""
    num_bytes = int(min(max(read_bytes, LEAST_READ_BYTES), MOST_READ_BYTES))
    tensors = [_READ_MEMORY.buffer(num_bytes), torch.zeros(CHUNKS_PER_THREAD * threads)]
    op = OneOp("probe_read", tensors, [], tier=tier or target().tier, threads=threads)
    return op, float(num_bytes)


def _probe(rates: Mapping[str, float], read_bytes: float) -> Probe:
    return Probe(
        rates["probe_fma"],
        rates.get("probe_bytes", 0.0),
        read_bytes,
        rates.get("probe_tile_bf16", 0.0),
        rates.get("probe_tile_s8", 0.0),
        rates.get("probe_nibbles", 0.0),
        rates.get("probe_words", 0.0),
    )
