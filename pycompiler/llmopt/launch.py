"""Frozen facts of GPU kernels: problems, tiles, launches."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any


@functools.lru_cache(maxsize=1024)
def _pairs(config: Any) -> tuple[tuple[str, int], ...]:
    options = ("num_warps", "num_stages")
    pairs = dataclasses.asdict(config).items()
    return tuple((name.upper(), value) for name, value in pairs if name not in options)


def _constexprs(config: Any) -> dict[str, int]:
    """block_m=64 → BLOCK_M=64; launch options keep their own names and are left out."""
    return dict(_pairs(config))


@dataclass(frozen=True)
class GemmTile:
    """How one block computes its part of a matrix product."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3
    split_k: int = 1  # blocks that share one tile of the result, the last one to finish adds up
    group_m: int = 8  # row tiles that run next to each other, for the L2 cache

    def constexprs(self) -> dict[str, int]:
        return _constexprs(self)

    def smem_bytes(self, x_itemsize: float, w_itemsize: float, weights: int = 1) -> int:
        """Shared memory of the pipeline's stages, at most; what a compiled kernel needs is in its metadata."""
        x = self.block_m * x_itemsize
        w = self.block_n * w_itemsize * weights
        return int(self.num_stages * self.block_k * (x + w))


@dataclass(frozen=True)
class AttentionTile:
    """How one block attends: query rows × keys at a time; splits: blocks that share the keys of one head."""

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2
    splits: int = 1

    def constexprs(self) -> dict[str, int]:
        return _constexprs(self)


@dataclass(frozen=True)
class RowTile:
    """How one block handles rows: block_k columns at a time."""

    block_k: int
    num_warps: int = 4
    num_stages: int = 1

    def constexprs(self) -> dict[str, int]:
        return _constexprs(self)


@dataclass(frozen=True)
class LinearProblem:
    """One linear: y [M, N] = epilogue(x [M, K] · wᵀ), in words a kernel can refuse."""

    m: int
    n: int
    k: int
    dtype: str  # of x and y: "fp32", "fp16", "bf16"
    scheme: str = "f16"  # "f16": weights as x; else a name of quant/schemes.py
    group: int = 0  # inputs that share a scale; 0: all K
    act: str = "none"
    gated: bool = False
    norm: str = "none"  # "rms" or "layer" in front
    offsets: bool = False  # of weights that are codes


LARGEST_GPU_HEAD = 256  # of attention on GPUs


@dataclass(frozen=True)
class AttentionProblem:
    """One attention: q [B, H, Sq, D] over keys [B, Hkv, Skv, D]."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    value_dim: int
    dtype: str
    kv_dtype: str  # of values: dtype, or "i8" with scales
    causal: bool = False
    window: int = 0
    special: bool = False  # a mask, a softcap, or heads of one query that do not lie densely
    qk: str = (
        "same"  # what queries and keys are multiplied in: as they are, or both rounded to "i8"
    )


@dataclass(frozen=True)
class RowProblem:
    """Rows of k columns, each handled alone."""

    rows: int
    k: int
    dtype: str


@dataclass(frozen=True)
class ChainProblem:
    """A chain of pointwise operations, program and results as in ops/pointwise.py, over rows of k columns."""

    rows: int
    k: int
    dtype: str  # of the first result
    inputs: int
    program: tuple[tuple, ...]
    results: tuple[int, ...]

    @property
    def reduces(self) -> bool:
        return any(op == "reduce" for op, *_ in self.program)


Problem = LinearProblem | AttentionProblem | RowProblem | ChainProblem
Tile = GemmTile | AttentionTile | RowTile


@dataclass(frozen=True)
class Descriptor:
    """A matrix a GPU's copy engine reads in blocks (a TMA descriptor, made by the host)."""

    tensor: Any  # [rows, columns], dense rows
    block: tuple[int, int]


@dataclass(frozen=True)
class Launch:
    """One kernel launch, ready to run, print or cross-compile."""

    kernel: str  # "linear_f16.triton"
    function: Any  # the @triton.jit function
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # by parameter: tensors, descriptors, numbers, None
    constants: dict[str, Any]  # by parameter: what is compiled in
    num_warps: int = 4
    num_stages: int = 1
    reads: tuple[str, ...] = ()  # the arguments it reads
    writes: tuple[str, ...] = ()  # the arguments it writes
    config_source: str = ""  # where its tile comes from; "" where nobody chose between tiles
