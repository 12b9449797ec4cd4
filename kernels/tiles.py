"""Which tiles a kernel with a matrix product can run with, whoever proposes them: a tuner, a file of another machine, a person."""

from __future__ import annotations

from llmopt.counters import MOST_TILES
from llmopt.launch import AttentionProblem, AttentionTile, GemmTile, LinearProblem
from llmopt.types import Target

LEAST_BLOCK = 16  # rows and columns of one instruction of a tensor core
_ACCUMULATORS = (
    128  # fp32 registers of a thread, of 255 in all; the rest is for operands and addresses
)


def reject_product(
    c: GemmTile, p: LinearProblem, t: Target, x_itemsize: float, w_itemsize: float, reserved: int = 0
) -> str:  # fmt: skip
    """Why a tile on tensor cores is impossible, or "". reserved: bytes of shared memory beside the pipeline's stages."""
    for name in ("block_m", "block_n", "block_k"):
        if reason := reject_block(name, getattr(c, name)):
            return reason
    weights = 2 if p.gated else 1
    smem = c.smem_bytes(x_itemsize, w_itemsize, weights) + reserved
    accumulators = c.block_m * c.block_n * weights
    return (
        reject_smem(smem, t)
        or reject_accumulators(accumulators, c.num_warps, t)
        or reject_splits(c, p)
    )


def reject_splits(c: GemmTile, p: LinearProblem) -> str:
    """Why K cannot be shared among so many blocks, or ""."""
    steps = -(-p.k // c.block_k)
    if c.split_k > steps:
        return f"split_k={c.split_k}: K={p.k} has {steps} steps of {c.block_k}"
    tiles = -(-p.m // c.block_m) * -(-p.n // c.block_n)
    if c.split_k > 1 and tiles > MOST_TILES:
        return f"{tiles} tiles are split, at most {MOST_TILES} can be"
    return "" if c.group_m > 0 else f"group_m={c.group_m}: 1 or more is possible"


def reject_attention(
    c: AttentionTile, p: AttentionProblem, t: Target, head: int, value: int
) -> str:
    """Why a tile of an attention is impossible, or "". head, value: columns of its blocks of keys and values."""
    for name in ("block_m", "block_n"):
        if reason := reject_block(name, getattr(c, name)):
            return reason
    size = 4 if p.dtype == "fp32" else 2
    # Without a pipeline keys are through before values come.
    keys = c.block_n * (c.num_stages * (head + value) if c.num_stages > 1 else max(head, value))
    smem = (c.block_m * head + keys) * size
    accumulators = c.block_m * (value + c.block_n)
    return reject_smem(smem, t) or reject_accumulators(accumulators, c.num_warps, t)


def reject_block(name: str, size: int) -> str:
    if size < LEAST_BLOCK or size & (size - 1):
        return f"{name}={size}: powers of two from {LEAST_BLOCK} are possible"
    return ""


def reject_smem(size: int, t: Target) -> str:
    limit = t.gpu.smem_block  # type: ignore[union-attr]
    return "" if size <= limit else f"{size} bytes of shared memory, {t} has {limit}"


def reject_accumulators(count: int, num_warps: int, t: Target) -> str:
    """Sums that do not fit a thread's registers; sm_100 has them in tensor memory, twice as many."""
    each = count // (num_warps * t.gpu.warp_size)  # type: ignore[union-attr]
    limit = 2 * _ACCUMULATORS if t.tier == "sm_100" else _ACCUMULATORS
    return "" if each <= limit else f"{each} sums a thread: up to {limit} are possible"
