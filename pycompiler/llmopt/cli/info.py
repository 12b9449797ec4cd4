"""`llmopt info`: what this machine is, what the kernels reach on it, and what is set."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from typing import Any

PACKAGES = ("llmopt", "torch", "transformers", "numpy")


def add(commands: Any) -> None:
    parser = commands.add_parser("info", help="this machine, its limits, versions and settings")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    facts = _facts()
    if args.json:
        print(json.dumps(facts, indent=1))
        return 0
    for name, value in facts.items():
        if not isinstance(value, dict):
            print(f"{name:<12}{value}")
            continue
        print(name)
        for key, text in value.items():
            print(f"  {key:<18}{text}")
    return 0


def _facts() -> dict[str, Any]:
    import torch

    from llmopt import _C, settings
    from llmopt.native.probe import measure
    from llmopt.target import target

    here = target()
    threads = torch.get_num_threads()
    probe = measure(threads)
    read = f"{probe.read_bytes / 1e9:.1f} GB/s"
    integers = f"{probe.byte_ops / 1e9:.0f} GOP/s" if probe.byte_ops else "not on this tier"
    return {
        "machine": f"{here.name}, {threads} threads of {os.cpu_count()} CPUs",
        "target": str(here),
        "tiers": f"{', '.join(_C.tiers())} (built: {', '.join(_C.tiers(supported_only=False))})",
        "measured": {
            "fp32 FMA": f"{probe.fma_flops / 1e9:.0f} GFLOP/s",
            "int8 dot product": integers,
            "memory read": read,
        },
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in PACKAGES}},
        "cache": _cache(settings.cache_dir()),
        "environment": {
            name: "not set" if value is None else repr(value)
            for name, value in settings.variables().items()
        },
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cache(folder: Any) -> str:
    if not folder.exists():
        return f"{folder} (not there yet)"
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    state = "writable" if os.access(folder, os.W_OK) else "not writable"
    return f"{folder} ({state}, {num_bytes / 2**20:.0f} MiB)"
