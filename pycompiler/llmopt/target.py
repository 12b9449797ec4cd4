"""What machine is this → Target."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

from llmopt import _C, settings
from llmopt.types import Target


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
