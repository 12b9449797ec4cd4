"""Which kernels can do a problem on a GPU target, best first, with the reason of every refusal.

A kernel is named `<op>_<scheme>.<impl>`. The C++ kernels take FX nodes and are listed in native/kernels.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmopt.launch import Launch, Problem, Tile
from llmopt.types import Target

MOST_THREADS = 1024  # of one block, on all GPUs
MOST_STAGES = 8


@dataclass(frozen=True)
class Kernel:
    """One way to do an op on a GPU. `reject` gives "" or the reason; the first of `configs` is the default.

    launch(problem, config, target, **operands) gives the launches, on tensors of any device, meta included.
    """

    name: str
    op: str
    rank: int  # best first: the lowest rank that does not refuse is chosen
    reject: Callable[[Any, Target], str]  # each takes the kind of Problem its op has
    configs: Callable[[Any, Target], Sequence[Tile]]
    launch: Callable[..., Launch]
    function: Any = None  # the @triton.jit function; None where tiles are not tuned
    # Why a tile cannot compute a problem here, or ""; None: only warps and stages may differ from those of `configs`.
    reject_tile: Callable[[Any, Any, Target], str] | None = None
    # A digest of what it is built from, where `function` does not say.
    source: Callable[[], str] | None = None


@dataclass(frozen=True)
class Chosen:
    """What one launch runs with, and where that comes from."""

    kernel: Kernel
    config: Tile
    source: str  # "tuned: ...", "borrowed ...", "predicted: ..." or "default: <reason>"


Chooser = Callable[[str, Problem, Target], Chosen]  # raises ValueError where no kernel is possible
KERNELS: dict[str, Kernel] = {}


def register(kernel: Kernel) -> None:
    """Adds a kernel; a name is given once."""
    if kernel.name in KERNELS:
        raise ValueError(f"kernel {kernel.name} is registered twice")
    KERNELS[kernel.name] = kernel


def candidates(op: str, problem: Problem, target: Target) -> list[tuple[Kernel, str]]:
    """Every kernel of an op, best first, with the reason why it cannot do this problem here, or ""."""
    kernels = sorted((k for k in KERNELS.values() if k.op == op), key=lambda k: k.rank)
    return [(k, _reason(k, problem, target)) for k in kernels]


def choose(op: str, problem: Problem, target: Target) -> tuple[Kernel, Tile]:
    """The best kernel with its default configuration; raises ValueError with every refusal when there is none."""
    kernel = possible(op, problem, target)[0]
    return kernel, kernel.configs(problem, target)[0]


def by_default(op: str, problem: Problem, target: Target) -> Chosen:
    """A Chooser that asks nobody."""
    return Chosen(*choose(op, problem, target), "default: nobody was asked")


def possible(op: str, problem: Problem, target: Target) -> list[Kernel]:
    """The kernels that can do a problem, best first; raises ValueError with every refusal when there is none."""
    found = candidates(op, problem, target)
    able = [kernel for kernel, reason in found if not reason]
    if able:
        return able
    why = "; ".join(f"{k.name}: {r}" for k, r in found) or "no kernel is registered"
    raise ValueError(f"llmopt: no kernel for {op} {problem} on {target}: {why}")


def refuse(kernel: Kernel, config: Tile, problem: Problem, target: Target) -> str:
    """Why a tile from elsewhere cannot be used for a problem, or "". The kernel itself must be possible."""
    assert target.gpu is not None
    default = kernel.configs(problem, target)[0]
    if type(config) is not type(default):
        return f"{kernel.name} takes a {type(default).__name__}, not a {type(config).__name__}"
    threads = config.num_warps * target.gpu.warp_size
    if threads > MOST_THREADS or config.num_warps & (config.num_warps - 1):
        return f"{config.num_warps} warps: powers of two up to {MOST_THREADS // target.gpu.warp_size} are possible"
    if config.num_stages > MOST_STAGES:
        return f"{config.num_stages} stages: up to {MOST_STAGES} are possible"
    if kernel.reject_tile is not None:
        return kernel.reject_tile(config, problem, target)
    given = {replace(c, num_warps=config.num_warps, num_stages=config.num_stages)
             for c in kernel.configs(problem, target)}  # fmt: skip
    return "" if config in given else f"{config} is no tile of {kernel.name} for this problem"


def _reason(kernel: Kernel, problem: Problem, target: Target) -> str:
    if target.gpu is None:
        return "needs a GPU"
    reason = kernel.reject(problem, target)
    if reason or kernel.configs(problem, target):
        return reason
    return f"no tile fits the {target.gpu.smem_block} bytes of shared memory of {target}"
