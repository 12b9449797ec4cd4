"""What a measurement is true for: the machine, the build of the kernels, the number of threads.

An environment is a list of named facts, whatever the device: other devices give other facts.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmopt import _C
from llmopt.types import Target

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


def cpu_environment(target: Target, threads: int) -> Environment:
    """This CPU as kernels of a tier see it."""
    return Environment.of(
        {
            "schema": SCHEMA,
            "device": target.device,
            "kernels": _kernel_build(),
            "name": target.name,
            "tier": target.tier,
            "threads": threads,
            **caches(),
        }
    )


@functools.lru_cache(maxsize=1)
def _kernel_build() -> str:
    """The kernels' build: any other binary may be faster elsewhere."""
    return hashlib.sha256(Path(_C.__file__).read_bytes()).hexdigest()[:16]


@functools.lru_cache(maxsize=1)
def caches() -> dict[str, str]:
    """Data caches of the first CPU as Linux names their sizes: {"L1": "48K", "L2": ...}; empty where it does not say."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (
            (index / name).read_text().strip() for name in ("level", "type", "size")
        )
        if kind != "Instruction":
            found[f"L{level}"] = size
    return found
