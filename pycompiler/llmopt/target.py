"""What machine is this → Target; and the GPU generations kernels are compiled for."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

from llmopt import _C, settings
from llmopt.types import GpuFacts, Target

_KIB = 1024
# One row per GPU generation: the facts of the part that predictions are made for. Shared memory per block is the opt-in limit.
GPUS = (
    # arch, warp, smem block, smem SM, SMs, registers, bytes/s, f16 flop/s, int8 op/s, TMA: dense peaks as their makers state them
    Target("cuda", "sm_80", "A100 SXM", 0,
           GpuFacts("80", 32, 163 * _KIB, 164 * _KIB, 108, 65536, 2.04e12, 312e12, 624e12, False)),
    Target("cuda", "sm_89", "RTX 4090", 0,
           GpuFacts("89", 32, 99 * _KIB, 100 * _KIB, 128, 65536, 1.01e12, 165e12, 661e12, False)),
    Target("cuda", "sm_90", "H100 SXM", 0,
           GpuFacts("90", 32, 227 * _KIB, 228 * _KIB, 132, 65536, 3.35e12, 989e12, 1979e12, True)),
    Target("cuda", "sm_100", "B200", 0,
           GpuFacts("100", 32, 227 * _KIB, 228 * _KIB, 148, 65536, 8.0e12, 2250e12, 4500e12, True)),
    Target("cuda", "sm_120", "RTX 5090", 0,
           GpuFacts("120", 32, 99 * _KIB, 100 * _KIB, 170, 65536, 1.79e12, 210e12, 838e12, True)),
    Target("hip", "gfx942", "MI300X", 0,
           GpuFacts("gfx942", 64, 64 * _KIB, 64 * _KIB, 304, 131072, 5.3e12, 1307e12, 2615e12, False)),
)  # fmt: skip


def gpu_target(name: str) -> Target:
    """The GPU target of "cuda:90" or "hip:gfx942"; raises ValueError that names those that exist."""
    for row in GPUS:
        assert row.gpu is not None
        if name == f"{row.device}:{row.gpu.arch}":
            return row
    known = ", ".join(f"{row.device}:{row.gpu.arch}" for row in GPUS if row.gpu)
    device, _, arch = name.partition(":")
    old = device == "cuda" and arch.isdigit() and int(arch) < 80
    why = "is too old (tensor cores for bf16 begin with 80)" if old else "does not exist"
    raise ValueError(f"llmopt: target={name!r} {why}; possible: cpu, {known}")


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@functools.lru_cache(maxsize=8)
def _target(isa: str | None) -> Target:
    available = tuple(_C.tiers())
    tier = isa or available[0]
    if tier not in available:
        built = ", ".join(_C.tiers(supported_only=False))
        raise ValueError(
            f"LLMOPT_CPU_ISA={tier!r}: this CPU runs {', '.join(available)}; this build has {built}"
        )
    return Target(device="cpu", tier=tier, name=_cpu_name(), panel_width=_C.panel_width(tier))


def target() -> Target:
    """The machine this process runs on, with the CPU tier its kernels use.

    Raises ValueError when LLMOPT_CPU_ISA names a tier that does not exist or that this CPU lacks.
    """
    return _target(settings.cpu_isa())
