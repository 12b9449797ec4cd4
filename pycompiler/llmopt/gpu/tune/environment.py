"""What a measurement on a GPU is true for: the GPU as its driver describes it, the versions around it, and how time was taken.

Read from the device when there is one. The facts of a GPU that is not here, which predictions are made for, are those of its row in
gpus.py.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llmopt.gpus import Part
from llmopt.tune.environment import SCHEMA, UNKNOWN, Environment
from llmopt.types import Target

Facts = dict[str, str | int]
POLICY = "median of eager launches, cold L2"
PREDICTED = "never: predicted by the model of llmopt"
_GIB = 1 << 30
_LIKE = 0.10  # by how much multiprocessors and memory of a GPU that lends may differ
# What the driver's tool calls a fact, and our name of it.
_SMI = {
    "clocks.max.sm": "clock_sm",
    "clocks.max.memory": "clock_memory",
    "power.limit": "power_limit",
    "mig.mode.current": "mig",
    "driver_version": "driver",
}
_AMD_DRIVER = Path("/sys/module/amdgpu/version")
Run = Callable[[Sequence[str]], str]  # runs a command and gives what it prints; "" where it cannot


def gpu_environment(target: Target, device: torch.device, run: Run | None = None) -> Environment:
    """The environment of measurements on a GPU of this machine."""
    properties = torch.cuda.get_device_properties(device)
    number = device.index if device.index is not None else torch.cuda.current_device()
    described = describe(properties, target)
    return Environment.of(
        {**described, **_driver(properties, number, target, run or _run), **versions()}
    )


def describe(properties: Any, target: Target) -> Facts:
    """A GPU as torch describes it."""
    smem = getattr(properties, "shared_memory_per_block_optin", 0)
    return {
        "schema": SCHEMA,
        "device": target.device,
        "name": properties.name,
        "generation": target.tier,
        "capability": f"{properties.major}.{properties.minor}",
        "sms": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / _GIB),
        "smem_optin": smem or properties.shared_memory_per_block,
    }


def versions() -> Facts:
    """What compiles and launches the kernels, and how they are timed."""
    import triton

    from llmopt.gpu.compile import assembler_version
    from llmopt.gpu.run import FP_FUSION

    is_amd = torch.version.hip is not None
    return {
        "triton": triton.__version__,
        "torch": torch.__version__,
        "runtime": f"ROCm {torch.version.hip}" if is_amd else f"CUDA {torch.version.cuda}",
        "assembler": "LLVM of triton" if is_amd else f"ptxas {assembler_version()}",
        "fp_fusion": int(FP_FUSION),
        "measured": POLICY,
    }


def is_predicted(environment: Environment) -> bool:
    """True where nobody measured."""
    return dict(environment.facts).get("measured") == PREDICTED


def predicted_environment(part: Part) -> Environment:
    """The environment of what the model says about a GPU: no driver, no versions, never measured."""
    gpu = part.target.gpu
    assert gpu is not None
    return Environment.of(
        {
            "schema": SCHEMA,
            "device": part.target.device,
            "name": part.name,
            "generation": part.target.tier,
            "sms": gpu.sms,
            "memory_gib": part.gib,
            "measured": PREDICTED,
        }
    )


def is_alike(ours: Environment, theirs: Environment) -> bool:
    """True when measurements of one GPU may be lent to another: same generation, sizes within a tenth. Memory goes with bandwidth."""
    mine, other = dict(ours.facts), dict(theirs.facts)
    same = ("schema", "device", "generation", "capability", "measured")
    if is_predicted(ours) or any(mine.get(n) != other.get(n) for n in same):
        return False
    return all(_near(mine.get(name), other.get(name)) for name in ("sms", "memory_gib"))


def _near(a: str | int | None, b: str | int | None) -> bool:
    return isinstance(a, int) and isinstance(b, int) and abs(a - b) <= _LIKE * max(a, b)


def _driver(properties: Any, number: int, target: Target, run: Run) -> Facts:
    """Clocks, power limit, MIG and driver, each "unknown" where nobody says."""
    if target.device == "hip":
        found: Mapping[str, str] = {"driver": _read(_AMD_DRIVER)}
    else:
        # torch numbers only visible devices; the UUID is the same for everybody.
        which = f"GPU-{uuid}" if (uuid := getattr(properties, "uuid", "")) else str(number)
        text = run(["nvidia-smi", f"--id={which}", f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader"])  # fmt: skip
        values = [value.strip() for value in text.strip().split(",")]
        found = dict(zip(_SMI.values(), values, strict=True)) if len(values) == len(_SMI) else {}
    return {name: found.get(name) or UNKNOWN for name in _SMI.values()}


@functools.lru_cache(maxsize=16)
def _cached(command: tuple[str, ...]) -> str:
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _run(command: Sequence[str]) -> str:
    return _cached(tuple(command))


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
