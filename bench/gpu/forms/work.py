"""A form's operands, its truth, and what they are cut from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from llmopt.launch import Launch, Problem
from llmopt.registry import candidates
from llmopt.types import Target
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """What the forms are cut from."""

    hidden: int
    wide: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    prompt: int
    cached: int


FULL = Sizes(4096, 14336, 32, 8, 128, 32000, 512, 4096)
SMALL = Sizes(128, 192, 2, 1, 64, 100, 17, 150)


@dataclass
class Work:
    """One problem with operands. `peers` are calls of PyTorch that do the same."""

    op: str
    problem: Problem
    operands: tuple[Any, ...]
    output: Tensor
    reference: Callable[[], Tensor]  # in float64
    peers: dict[str, Callable[[], Any]]
    flops: float
    bytes: float
    more: dict[str, Any] = field(default_factory=dict)
    compiled: Callable[..., Any] | None = None  # for torch.compile, with `inputs`
    inputs: tuple[Tensor, ...] = ()
    products: str = "fp16"  # whose matrix products its flops are: "fp16" or "int8"
    may_differ: int = 0  # of whole numbers: how far a tie may round the other way

    def kernels(self, target: Target) -> Iterator[tuple[str, Any, Launch]]:
        """(kernel, config, launch) of every kernel that takes the problem, its default config first."""
        for kernel, reason in candidates(self.op, self.problem, target):
            if not reason:
                for config in kernel.configs(self.problem, target):
                    launch = kernel.launch(
                        self.problem, config, target, *self.operands, **self.more
                    )
                    yield kernel.name, config, launch


Form = Callable[[Sizes, torch.device], Work]


def random(device: torch.device, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=device) * scale).half()


def random_codes(device: torch.device, *shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, device=device, dtype=torch.int8)


def size(*tensors: Tensor) -> float:
    """Bytes."""
    return float(sum(t.numel() * t.element_size() for t in tensors))
