"""Environment variables: the only file that reads them, so this is also their list.

LLMOPT_DEBUG      0..4: 1 fallbacks and their reasons, 2 the plan, 3 the graph after each pass, 4 everything
LLMOPT_CPU_ISA    use this CPU tier (scalar, avx2, avx512, avx512_vnni, amx) instead of the best one
LLMOPT_CACHE_DIR  where converted weights, mapped weights and tuning results are kept; default: the user's cache directory
LLMOPT_DISABLE    comma-separated names of passes to leave out, for bisecting; "guards": guards.py
LLMOPT_TUNE       0: leave every kernel to its own rules, whatever was measured for it
LLMOPT_VERIFY     1: after every pass, run the graph on example inputs and compare with the graph before it
"""

from __future__ import annotations

import os
from pathlib import Path


def debug_level() -> int:
    """LLMOPT_DEBUG as a number; raises ValueError when it is not 0..4."""
    text = os.environ.get("LLMOPT_DEBUG", "0")
    if text not in {"0", "1", "2", "3", "4"}:
        raise ValueError(f"LLMOPT_DEBUG={text!r}: expected one of 0, 1, 2, 3, 4")
    return int(text)


def cpu_isa() -> str | None:
    """The CPU tier asked for, or None for the best one."""
    return os.environ.get("LLMOPT_CPU_ISA") or None


def cache_dir() -> Path:
    """The cache directory (not created here)."""
    explicit = os.environ.get("LLMOPT_CACHE_DIR")
    if explicit:
        return Path(explicit)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "llmopt"


def disabled_passes() -> frozenset[str]:
    names = os.environ.get("LLMOPT_DISABLE", "")
    return frozenset(n.strip() for n in names.split(",") if n.strip())


def tuning() -> bool:
    """Whether measured configs are used; raises ValueError when LLMOPT_TUNE is neither 0 nor 1."""
    return _switch("LLMOPT_TUNE", "1")


def verify_passes() -> bool:
    """LLMOPT_VERIFY; raises ValueError when it is neither 0 nor 1."""
    return _switch("LLMOPT_VERIFY", "0")


def _switch(name: str, default: str) -> bool:
    text = os.environ.get(name) or default
    if text not in {"0", "1"}:
        raise ValueError(f"{name}={text!r}: expected 0 or 1")
    return text == "1"


def variables() -> dict[str, str | None]:
    """Every variable of the list above with its value in this process, None where it is not set."""
    names = [line.split()[0] for line in (__doc__ or "").splitlines() if line.startswith("LLMOPT_")]
    return {name: os.environ.get(name) for name in names}
