"""Which kernels can do a problem on a GPU target, best first, with the reason of every refusal.

A kernel is named `<op>_<scheme>.<impl>`. The C++ kernels take FX nodes and are listed in native/kernels.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llmopt.launch import Launch, Problem, Tile
from llmopt.types import Target


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
    found = candidates(op, problem, target)
    for kernel, reason in found:
        if not reason:
            return kernel, kernel.configs(problem, target)[0]
    why = "; ".join(f"{k.name}: {r}" for k, r in found) or "no kernel is registered"
    raise ValueError(f"llmopt: no kernel for {op} {problem} on {target}: {why}")


def _reason(kernel: Kernel, problem: Problem, target: Target) -> str:
    if target.gpu is None:
        return "needs a GPU"
    reason = kernel.reject(problem, target)
    if reason or kernel.configs(problem, target):
        return reason
    return f"no tile fits the {target.gpu.smem_block} bytes of shared memory of {target}"
