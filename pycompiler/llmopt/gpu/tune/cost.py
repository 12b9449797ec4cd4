"""A model of a tile's time on a GPU, made to rank tiles: arithmetic, memory and latency against each other, in waves of blocks.

Its one blind test (int8 products on an A100 against tables that others measured) found the measured best first for 16 rows and fewer,
and within 1.55 times of the model's own best above. It was fitted to no GPU: what it says is *predicted*.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from llmopt.gpus import Part
from llmopt.launch import AttentionProblem, AttentionTile, GemmTile, LinearProblem, Tile
from llmopt.registry import Kernel

MOST_REGISTERS = 255  # of a thread
_ITEM_BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "i8": 1.0, "w8a8": 1.0, "w8a16": 1.0}
_ITEM_BYTES |= {"w4a16": 0.5, "w4a8": 0.5}
_BLOCKS_SM = 32  # at most
_SMEM_RESERVED = 1024  # bytes of each block that the system takes
_DRAM_SHARE = 0.85  # of the stated bandwidth, that streams reach
_LOAD_SECONDS = 0.7e-6  # from a request to its data
_STEP_SECONDS = 0.55e-6  # the same as a pipeline of one stage meets it
_LAUNCH_SECONDS = 2e-6
_SERIAL = 0.05  # of what does not bind, that does not overlap with what does
_SMEM_CLOCK = 128.0  # bytes a multiprocessor reads from shared memory in a clock
_L2_CLOCK = 0.4 * 64.0  # bytes it gets from the L2 cache
_LANES = 128.0  # fp32 multiply-adds of a multiprocessor without tensor cores in a clock
_STEP_CLOCKS = 40.0  # of addresses, barriers and branches that a K step cannot hide


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes, or is thought to take."""

    registers: int  # of a thread
    shared: int  # bytes of a block
    spills: int = 0


@dataclass(frozen=True)
class Work:
    """What one launch does, in blocks that all do the same."""

    blocks: int
    steps: float  # of one block: K steps, or blocks of keys
    flops: float  # of a step, with what is padded
    clocks: float  # of a step, without tensor cores: widening, exponentials
    step_bytes: float  # a block fetches for a step
    smem_bytes: float  # a block reads from shared memory for a step
    useful: float  # of all steps, without what is padded
    once: float  # bytes the launch must move to or from memory
    again: float  # bytes that splits exchange
    is_integer: bool = False
    uses_tensor_cores: bool = True


@dataclass(frozen=True)
class Least:
    """What a problem takes at least, whatever computes it."""

    flops: float
    bytes: float  # to or from memory
    is_integer: bool


@dataclass(frozen=True)
class Prediction:
    """What the model thinks of a tile."""

    seconds: float
    blocks_sm: int  # blocks of one multiprocessor at a time
    limit: str  # what keeps it from more
    waves: float  # how many times all multiprocessors are filled
    bound: str  # "memory", "compute" or "latency"

    def __str__(self) -> str:
        return (
            f"{self.bound}-bound, {self.waves:.2f} waves of {self.blocks_sm} blocks an SM (limited by {self.limit}), "
            f"{self.seconds * 1e6:.1f} us"
        )


def predict(
    kernel: Kernel, problem: Any, tile: Tile, part: Part, resources: Resources
) -> Prediction | None:
    """What a tile does with a problem; None where not even one block fits a multiprocessor."""
    gpu = part.target.gpu
    assert gpu is not None
    work = work_of(kernel, problem, tile, part)
    blocks_sm, limit = occupancy(tile, part, resources)
    if blocks_sm < 1:
        return None
    slots = gpu.sms * blocks_sm
    waves = math.ceil(work.blocks / slots)
    active = min(work.blocks, slots)
    per_sm = math.ceil(active / gpu.sms)
    overlap = max(1, min(tile.num_stages - 1, 3))
    peak = gpu.int8_ops if work.is_integer else gpu.f16_flops
    peak = peak if work.uses_tensor_cores else 2 * _LANES * gpu.sms * part.clock
    clocks = (
        max(work.flops * gpu.sms * part.clock / peak, work.smem_bytes / _SMEM_CLOCK) + work.clocks
    )
    clocks += _STEP_CLOCKS / overlap / per_sm
    compute = waves * work.steps * clocks * per_sm / part.clock
    in_flight = active * max(1, tile.num_stages - 1) * work.step_bytes
    bandwidth = min(_DRAM_SHARE * gpu.bandwidth, in_flight / _LOAD_SECONDS)
    l2 = (work.blocks * work.steps * work.step_bytes + work.again) / (
        gpu.sms * part.clock * _L2_CLOCK
    )
    memory = max(work.once / bandwidth, l2)
    latency = waves * work.steps * _STEP_SECONDS / max(1, tile.num_stages - 1)
    exchange = (
        work.again / max(1, work.blocks) / (part.clock * _L2_CLOCK)
    )  # the last block adds up alone
    times = {"compute": compute, "memory": memory, "latency": latency}
    bound = max(times, key=lambda name: times[name])
    longest = times[bound]
    seconds = longest + _SERIAL * (sum(times.values()) - longest) + exchange + _LAUNCH_SECONDS
    return Prediction(seconds, blocks_sm, limit, work.blocks / slots, bound)


def roof(problem: Any, part: Part, seconds: float) -> float:
    """The share of the limit that binds, memory or arithmetic as the maker states them, that a time reaches."""
    gpu = part.target.gpu
    assert gpu is not None
    least = least_of(problem)
    peak = gpu.int8_ops if least.is_integer else gpu.f16_flops
    return max(least.bytes / gpu.bandwidth, least.flops / peak) / seconds


def occupancy(tile: Tile, part: Part, resources: Resources) -> tuple[int, str]:
    """(blocks a multiprocessor keeps at a time, what limits them)."""
    gpu = part.target.gpu
    assert gpu is not None
    threads = tile.num_warps * gpu.warp_size
    warp_registers = math.ceil(resources.registers * gpu.warp_size / 256) * 256
    limits = {
        "blocks": _BLOCKS_SM,
        "threads": part.threads_sm // threads,
        "registers": gpu.registers // max(1, warp_registers * tile.num_warps),
        "shared memory": _BLOCKS_SM,
    }
    if resources.shared > gpu.smem_block:
        limits["shared memory"] = 0
    elif resources.shared:
        limits["shared memory"] = max(1, gpu.smem_sm // (resources.shared + _SMEM_RESERVED))
    name = min(limits, key=lambda n: limits[n])
    return limits[name], name


def estimate(kernel: Kernel, problem: Any, tile: Tile, part: Part) -> Resources:
    """What a tile is thought to take before it is compiled."""
    gpu = part.target.gpu
    assert gpu is not None
    threads = tile.num_warps * gpu.warp_size
    if isinstance(tile, GemmTile):
        weights = 2 if problem.gated else 1
        if tile.block_m == 1:
            return Resources(min(MOST_REGISTERS, 40 + 2 * weights * tile.block_n * tile.block_k // threads), 1024)  # fmt: skip
        x, w = _operand_bytes(problem)
        shared = tile.smem_bytes(x, w, weights)
        sums = tile.block_m * tile.block_n * weights / threads
        return Resources(min(MOST_REGISTERS, int(48 + 1.2 * sums)), min(shared, gpu.smem_block))
    assert isinstance(tile, AttentionTile)
    size = _ITEM_BYTES[problem.dtype]
    pair = tile.block_n * (problem.head_dim + problem.value_dim) * _ITEM_BYTES[problem.kv_dtype]
    shared = int(tile.block_m * problem.head_dim * size + tile.num_stages * pair)
    sums = tile.block_m * (problem.value_dim + tile.block_n) / threads
    return Resources(min(MOST_REGISTERS, int(56 + 1.2 * sums)), min(shared, gpu.smem_block))


def least_of(problem: Any) -> Least:
    """Operations without what is padded, and every operand read or written once."""
    if isinstance(problem, LinearProblem):
        p, weights = problem, 2 if problem.gated else 1
        x, w = _operand_bytes(p)
        groups = 0 if p.scheme == "f16" else p.k // p.group if p.group else 1
        scales, output = 4.0 * p.n * weights * groups, p.m * p.n * _ITEM_BYTES[p.dtype]
        num_bytes = p.m * p.k * x + p.n * p.k * w * weights + scales + output
        return Least(2.0 * p.m * p.n * p.k * weights, num_bytes, p.scheme.endswith("a8"))
    a = problem
    keys, share, columns = *_keys(a), a.head_dim + a.value_dim
    output = a.batch * a.heads * a.q_len * columns * _ITEM_BYTES[a.dtype]
    num_bytes = a.batch * a.kv_heads * keys * columns * _ITEM_BYTES[a.kv_dtype] + output
    return Least(2.0 * a.batch * a.heads * a.q_len * keys * share * columns, num_bytes, False)


def _keys(p: AttentionProblem) -> tuple[int, float]:
    """(keys that a query may see, which share of them it sees on average)."""
    keys = min(p.kv_len, p.window + p.q_len) if p.window else p.kv_len
    return keys, 0.5 if p.causal and p.q_len == p.kv_len and not p.window else 1.0  # the triangle


def work_of(kernel: Kernel, problem: Any, tile: Tile, part: Part) -> Work:
    """What a launch of a problem does under a tile."""
    if isinstance(problem, LinearProblem):
        assert isinstance(tile, GemmTile)
        return _product(kernel, problem, tile, part)
    assert isinstance(problem, AttentionProblem)
    assert isinstance(tile, AttentionTile)
    return _attention(problem, tile, kernel.name.startswith("attention_decode"))


def _operand_bytes(p: LinearProblem) -> tuple[float, float]:
    """Bytes of an element of x and of w as kernels read them."""
    if p.scheme == "f16":
        return _ITEM_BYTES[p.dtype], _ITEM_BYTES[p.dtype]
    return (1.0 if p.scheme.endswith("a8") else _ITEM_BYTES[p.dtype]), _ITEM_BYTES[p.scheme]


def _product(kernel: Kernel, p: LinearProblem, c: GemmTile, part: Part) -> Work:
    assert part.target.gpu is not None
    x, w = _operand_bytes(p)
    weights = 2 if p.gated else 1
    tiles = math.ceil(p.m / c.block_m) * math.ceil(p.n / c.block_n)
    blocks, steps = tiles * c.split_k, math.ceil(math.ceil(p.k / c.block_k) / c.split_k)
    if kernel.name.endswith("_tma.triton"):  # blocks stay for many tiles
        blocks = min(tiles, part.target.gpu.sms)
        steps *= math.ceil(tiles / blocks)
    flops = 2.0 * c.block_m * c.block_n * c.block_k * weights
    high = min(c.block_m // 16, max(1, math.isqrt(c.num_warps))) or 1
    wide = max(1, c.num_warps // high)
    smem = c.block_m * c.block_k * x * wide + c.block_n * c.block_k * w * high * weights
    widened = c.block_n * c.block_k * weights / _LANES if x != w else 0.0
    least = least_of(p)
    passes = 2.0 if p.norm != "none" else 1.0  # statistics first
    return Work(
        blocks=blocks,
        steps=steps,
        flops=flops,
        clocks=widened,
        step_bytes=(min(c.block_m, p.m) * x * passes + c.block_n * w * weights) * c.block_k,
        smem_bytes=0.0 if c.block_m == 1 else smem,
        useful=least.flops,
        once=least.bytes,
        again=2.0 * 4.0 * c.split_k * tiles * c.block_m * c.block_n * weights if c.split_k > 1 else 0.0,
        is_integer=least.is_integer,
        uses_tensor_cores=c.block_m > 1,
    )  # fmt: skip


def _attention(p: AttentionProblem, c: AttentionTile, is_decode: bool) -> Work:
    """is_decode: one block has all rows of a kv head, and keys are split; else a block has rows of one head."""
    columns = p.head_dim + p.value_dim
    keys, share = _keys(p)
    heads, rows = (p.kv_heads, 1) if is_decode else (p.heads, math.ceil(p.q_len / c.block_m))
    size = _ITEM_BYTES[p.kv_dtype]
    exponentials = c.block_m * c.block_n * 8.0 / _LANES
    widened = c.block_n * columns / _LANES if p.kv_dtype != p.dtype else 0.0
    least = least_of(p)
    again = 8.0 * p.batch * heads * c.splits * c.block_m * p.value_dim if c.splits > 1 else 0.0
    return Work(
        blocks=p.batch * heads * rows * c.splits,
        steps=max(1.0, share * math.ceil(math.ceil(keys / c.block_n) / c.splits)),
        flops=2.0 * c.block_m * c.block_n * columns,
        clocks=exponentials + widened,
        step_bytes=c.block_n * columns * size,
        smem_bytes=c.block_n * columns * size * max(1, c.num_warps // 2),
        useful=least.flops,
        once=least.bytes,
        again=again,
    )
