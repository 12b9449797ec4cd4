"""GPUs with a row of their own: the facts predictions are made from, and the names their drivers give them.

target.py has one row per generation, which is all that compiling needs; two GPUs of a generation may differ three times in speed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmopt.target import gpu_target
from llmopt.types import Target


@dataclass(frozen=True)
class Part:
    """One GPU as it is sold."""

    target: Target  # its generation's, with its own name, multiprocessors and speeds
    gib: int  # of memory
    clock: float  # Hz at which the stated peaks hold
    threads_sm: int  # that one multiprocessor keeps
    seen_as: tuple[str, ...]  # what torch reports

    @property
    def name(self) -> str:
        return self.target.name


def _part(
    name: str, target: str, sms: int, bandwidth: float, f16: float, int8: float, gib: int, ghz: float,
    threads: int, *seen_as: str,
) -> Part:  # fmt: skip
    row = gpu_target(target)
    assert row.gpu is not None
    facts = replace(row.gpu, sms=sms, bandwidth=bandwidth, f16_flops=f16, int8_ops=int8)
    return Part(replace(row, name=name, gpu=facts), gib, ghz * 1e9, threads, seen_as)


# name, generation, SMs, bytes/s, f16 flop/s and int8 op/s (dense, sums in fp32), GiB, GHz, threads of an SM, names: as makers state them.
# The first of a generation stands for it where no GPU is named.
PARTS = (
    _part("A100", "cuda:80", 108, 2.04e12, 312e12, 624e12, 80, 1.41, 2048, "NVIDIA A100-SXM4-80GB"),
    _part("A100-40GB", "cuda:80", 108, 1.555e12, 312e12, 624e12, 40, 1.41, 2048, "NVIDIA A100-SXM4-40GB"),
    _part("RTX4090", "cuda:89", 128, 1.01e12, 165e12, 661e12, 24, 2.52, 1536, "NVIDIA GeForce RTX 4090"),
    _part("L4", "cuda:89", 58, 0.30e12, 121e12, 242e12, 24, 2.04, 1536, "NVIDIA L4"),
    _part("H100", "cuda:90", 132, 3.35e12, 989e12, 1979e12, 80, 1.83, 2048, "NVIDIA H100 80GB HBM3"),
    _part("H200", "cuda:90", 132, 4.8e12, 989e12, 1979e12, 141, 1.83, 2048, "NVIDIA H200"),
    _part("H20", "cuda:90", 78, 4.0e12, 148e12, 296e12, 96, 1.98, 2048, "NVIDIA H20"),
    _part("B200", "cuda:100", 148, 8.0e12, 2250e12, 4500e12, 180, 1.85, 2048, "NVIDIA B200"),
    _part("RTX5090", "cuda:120", 170, 1.79e12, 210e12, 838e12, 32, 2.41, 1536, "NVIDIA GeForce RTX 5090"),
    _part("MI300X", "hip:gfx942", 304, 5.3e12, 1307e12, 2615e12, 192, 2.1, 2048, "AMD Instinct MI300X"),
)  # fmt: skip


def part_named(name: str) -> Part:
    """The GPU of a name such as "H100" or "RTX 4090"; raises ValueError that names those that exist."""
    for part in PARTS:
        if _plain(name) in map(_plain, (part.name, *part.seen_as)):
            return part
    raise ValueError(
        f"llmopt: nothing is known about a GPU {name!r}; possible: {', '.join(p.name for p in PARTS)}"
    )


def part_of(target: Target) -> Part | None:
    """What is known about the GPU of a target: by the name its driver gives it, or as the one that stands for its generation."""
    for part in PARTS:
        if target.name in (part.name, *part.seen_as):
            return part
    stands = next((p for p in PARTS if p.target.tier == target.tier), None)
    return stands if stands is not None and target == _generation(stands) else None


def stand_in(target: Target) -> Part:
    """The facts to rank tiles by on a GPU that has no row: those of its generation's first, with its own multiprocessors."""
    part = part_of(target) or next(p for p in PARTS if p.target.tier == target.tier)
    assert part.target.gpu is not None
    assert target.gpu is not None
    facts = replace(part.target.gpu, sms=target.gpu.sms, smem_block=target.gpu.smem_block)
    return replace(part, target=replace(part.target, gpu=facts))


def _generation(part: Part) -> Target:
    assert part.target.gpu is not None
    return gpu_target(f"{part.target.device}:{part.target.gpu.arch}")


def _plain(name: str) -> str:
    return name.casefold().replace(" ", "").replace("-", "")
