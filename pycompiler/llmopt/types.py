"""Frozen facts that every other file speaks in: targets, problems and configs of kernels. Quantisation schemes are in quant/schemes.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class GpuFacts:
    """What a kernel may count on per GPU generation, and the part that stands for it in predictions."""

    arch: str  # "80" for sm_80, "gfx942": what the compiler is told
    warp_size: int
    smem_block: int  # bytes of shared memory one block may have
    smem_sm: int  # bytes of shared memory of one multiprocessor
    sms: int  # multiprocessors of the part named in Target.name
    registers: int  # 32-bit registers of one multiprocessor
    bandwidth: float  # bytes/s of its memory
    f16_flops: float  # dense, per second
    int8_ops: float  # dense, per second
    has_tma: bool


@dataclass(frozen=True)
class Target:
    """A machine kernels are chosen for."""

    device: str  # "cpu", "cuda" or "hip"
    tier: str  # CPU instruction tier, e.g. "avx512_vnni"; GPU generation, e.g. "sm_90"
    name: str  # what the hardware calls itself
    panel_width: int  # columns of one packed weight panel (NR); 0 on GPUs
    gpu: GpuFacts | None = None

    def __str__(self) -> str:
        return f"{self.device}:{self.tier}"


@dataclass(frozen=True)
class LinearProblem:
    """What a linear multiplies and what is fused into it: all that its time depends on."""

    op: str  # "linear" or "linear_quantized"
    m: int | None  # rows of x; None where they change from call to call
    n: int  # columns of all weights together
    k: int
    x: str  # short dtype names: "f32", "f16", "bf16"
    w: str  # or "q8", "q4"
    y: str
    gated: bool = False
    norm: str = "none"
    act: str = "none"
    bias: bool = False
    residual: bool = False
    group: int = 0  # of quantised weights: inputs that share a scale
    offsets: bool = False
    planes: int = 0  # signed bytes an activation is as exact as the sum of
    exact: bool = False  # results as over f32 weights, for which the codes stand as they are
    hint: int = field(default=0, compare=False)  # M of the call that is compiled, where m is None

    def facts(self) -> dict[str, str | int]:
        """What the problem is, as plain values; problems with the same facts are the same."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.compare}
        return {name: int(v) if isinstance(v, bool) else v for name, v in given.items()}

    def __str__(self) -> str:
        m = "M" if self.m is None else self.m
        group = f"/{self.group}" if self.group else ""
        return f"{m}x{self.n}x{self.k} {self.x}·{self.w}{group}"


LINEAR_FAMILIES = (
    "auto",
    "stream",
    "blocked",
    "unpack",
)  # LinearFamily in csrc/cpu/linear/tuning.h


@dataclass(frozen=True)
class LinearConfig:
    """How a linear is cut; what is 0 or "auto" is left to the kernel's own rules. Fields as in csrc/cpu/linear/tuning.h."""

    family: str = (
        "auto"  # stream: read once (GEMV); blocked: panels in L2 (GEMM); unpack: widened first
    )
    rows: int = 0  # of a register tile, at most (MR)
    k_block: int = 0
    span: int = 0  # panels of a chunk
    tiles: int = 0  # register tiles of a chunk
    ahead: int = 0  # bytes a stream prefetches ahead

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> LinearConfig:
        """The config with these fields; raises ValueError for fields and values that do not exist."""
        known = {f.name for f in fields(cls)}
        if set(given) - known:
            raise ValueError(f"a config has no field {min(set(given) - known)!r}")
        config = cls(**given)
        if config.family not in LINEAR_FAMILIES:
            raise ValueError(f"family {config.family!r}: possible: {', '.join(LINEAR_FAMILIES)}")
        if any(type(v) is not int or v < 0 for v in astuple(config)[1:]):
            raise ValueError(f"a field of {config} is not a whole number")
        return config

    def given(self) -> dict[str, Any]:
        """The fields that are not left to the kernel."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) != f.default}

    def row(self, largest_m: int) -> tuple[int, ...]:
        """The ints of one row of a step's tuning, for heights up to largest_m."""
        return (largest_m, LINEAR_FAMILIES.index(self.family), *astuple(self)[1:])

    def __str__(self) -> str:
        words = [v if k == "family" else f"{k}={v}" for k, v in self.given().items()]
        return " ".join(words) or "default"


EVERY_M = 1 << 40  # the largest M of a config that is for all of them


@dataclass(frozen=True)
class Choice:
    """The configs of a linear's step and where they come from."""

    rows: tuple[tuple[int, LinearConfig], ...] = ()  # (largest M it is for, config), M ascending
    source: str = "default: nobody was asked"

    def ints(self) -> list[int]:
        """What stands behind the op's own ints; nothing where all is left to the kernel."""
        if all(config == LinearConfig() for _, config in self.rows):
            return []
        return [len(self.rows), *(i for m, config in self.rows for i in config.row(m))]

    def at(self, m: int) -> LinearConfig:
        """The config that M rows run with."""
        return next((config for most, config in self.rows if m <= most), LinearConfig())

    def __str__(self) -> str:
        """The configs in words; "" where all is left to the kernel."""
        if not self.ints():
            return ""
        if self.rows[0][0] == EVERY_M:
            return str(self.rows[0][1])
        return "; ".join(
            f"{'any other M' if m == EVERY_M else f'M<={m}'}: {config}" for m, config in self.rows
        )
