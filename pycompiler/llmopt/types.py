"""Frozen facts that every other file speaks in: targets. Quantisation schemes are in quant/schemes.py."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A machine kernels are chosen for."""

    device: str  # "cpu"; "cuda" and "hip" when their kernels come
    tier: str  # CPU instruction tier, e.g. "avx512_vnni"
    name: str  # what the hardware calls itself
    panel_width: int  # columns of one packed weight panel (NR)

    def __str__(self) -> str:
        return f"{self.device}:{self.tier}"
