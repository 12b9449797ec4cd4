"""What a measurement is true for: the machine and how it is set, the build of the kernels, the number of threads.

An environment is a list of named facts, whatever the device: other devices give other facts. What a machine does not tell is "unknown".
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmopt import _C
from llmopt.types import Target

UNKNOWN = "unknown"
SCHEMA = 1  # of the database's files: a change makes all that was measured before a miss


@dataclass(frozen=True)
class Environment:
    """Named facts; equal facts are one environment."""

    facts: tuple[tuple[str, str | int], ...]

    @classmethod
    def of(cls, facts: Mapping[str, str | int]) -> Environment:
        return cls(tuple(facts.items()))

    @property
    def digest(self) -> str:
        """The name of this environment's directory."""
        text = json.dumps(dict(self.facts), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def difference(self, other: Environment) -> str:
        """The facts of `other` that are not ours, in words."""
        ours, theirs = dict(self.facts), dict(other.facts)
        names = [n for n in (*ours, *(n for n in theirs if n not in ours))]
        return ", ".join(
            f"{n} {theirs.get(n, 'unknown')} (here {ours.get(n, 'unknown')})"
            for n in names
            if ours.get(n) != theirs.get(n)
        )

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.facts)


def cpu_environment(target: Target, threads: int, root: Path = Path("/")) -> Environment:
    """This CPU as kernels of a tier see it, and what this process is given of it. root: where the system's files are."""
    return Environment.of(
        {
            "schema": SCHEMA,
            "device": target.device,
            "kernels": _kernel_build(),
            "name": target.name,
            "cpu": _processor(root),
            "tier": target.tier,
            "threads": threads,
            "cpus": len(os.sched_getaffinity(0)),  # that this process may run on
            "huge_pages": _huge_pages(root),
            **caches(root),
        }
    )


@functools.lru_cache(maxsize=1)
def _kernel_build() -> str:
    """The kernels' build: any other binary may be faster elsewhere."""
    return hashlib.sha256(Path(_C.__file__).read_bytes()).hexdigest()[:16]


@functools.lru_cache(maxsize=1)
def _processor(root: Path) -> str:
    """The first CPU's maker, family, model and stepping: in clouds many have one name, such as "AMD EPYC"."""
    first, _, _ = _read(root / "proc/cpuinfo").partition("\n\n")
    lines = (line.partition(":") for line in first.splitlines())
    given = {name.strip(): value.strip() for name, _, value in lines}
    words = {"vendor_id": "", "cpu family": "family ", "model": "model ", "stepping": "stepping "}
    return " ".join(word + given[n] for n, word in words.items() if given.get(n)) or UNKNOWN


def _huge_pages(root: Path) -> str:
    """Who is given huge pages, as Linux has it: "always", "madvise" (packed weights ask for them) or "never"."""
    modes = _read(root / "sys/kernel/mm/transparent_hugepage/enabled").split()
    return next((mode.strip("[]") for mode in modes if mode.startswith("[")), UNKNOWN)


@functools.lru_cache(maxsize=1)
def caches(root: Path = Path("/")) -> dict[str, str]:
    """Data caches of the first CPU as Linux names their sizes: {"L1": "48K", "L2": ...}; empty where it does not say."""
    found = {}
    for index in sorted((root / "sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_read(index / name) for name in ("level", "type", "size"))
        if level and size and kind not in ("", "Instruction"):
            found[f"L{level}"] = size
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
