"""GPUs, kernels and entries that tests of the GPU tuner share: no GPU, no compiler, no clock."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

from llmopt import kernels
from llmopt.gpu.device import Gpu, target_of
from llmopt.gpu.tune.environment import describe
from llmopt.gpu.tune.problems import facts, source_of
from llmopt.launch import GemmTile, LinearProblem
from llmopt.registry import KERNELS, Kernel
from llmopt.tune.database import Database, Entry
from llmopt.tune.environment import Environment
from llmopt.types import Target

kernels.load()

LINEAR = KERNELS["linear_f16.triton"]
# name, compute capability, SMs, GiB, bytes of shared memory a block may ask for
DEVICES = {
    "L4": ("NVIDIA L4", "89", 58, 24, 101376),
    "RTX4090": ("NVIDIA GeForce RTX 4090", "89", 128, 24, 101376),
    "H100": ("NVIDIA H100 80GB HBM3", "90", 132, 80, 232448),
    "H200": ("NVIDIA H200", "90", 132, 141, 232448),
    "H20": ("NVIDIA H20", "90", 78, 96, 232448),
    "H100 NVL": ("NVIDIA H100 NVL", "90", 132, 94, 232448),
    "H800": ("NVIDIA H800", "90", 132, 80, 232448),
}


def properties(name: str) -> SimpleNamespace:
    """What torch.cuda.get_device_properties says about a GPU."""
    seen, arch, sms, gib, smem = DEVICES[name]
    return SimpleNamespace(
        name=seen, major=int(arch[:-1]), minor=int(arch[-1]), multi_processor_count=sms, total_memory=gib << 30,
        shared_memory_per_block_optin=smem, shared_memory_per_block=49152, uuid="",
    )  # fmt: skip


def target(name: str = "H100") -> Target:
    """The target of a GPU as if it were here."""
    seen, arch, sms, _, smem = DEVICES[name]
    found, reason = target_of(Gpu("cuda", arch, seen, sms, smem))
    assert found is not None, reason
    return found


def environment(name: str = "H100", **more: str | int) -> Environment:
    given = {**describe(properties(name), target(name)), "driver": "580.1", "measured": "cold L2"}
    return Environment.of({**given, **more})


def database(root: Path, name: str = "H100", **more: str | int) -> Database:
    return Database(root, environment(name, **more))


def problem(m: int = 128, n: int = 4096, k: int = 4096, **more) -> LinearProblem:
    return LinearProblem(m, n, k, "fp16", **more)


TILE = GemmTile(64, 64, 64, 4, 3)


def entry(
    of: LinearProblem | None = None,
    config: GemmTile | dict | None = TILE,
    us: float = 80.0,
    kernel: Kernel = LINEAR,
) -> Entry:
    """A measurement of a kernel as it is now."""
    given = config or {}
    fields = dataclasses.asdict(given) if isinstance(given, GemmTile) else given
    found = facts(kernel, of or problem(), source_of(kernel))
    return Entry(found, fields, us, 100.0, 0.5, "gained a lot", {"default": 100.0})
