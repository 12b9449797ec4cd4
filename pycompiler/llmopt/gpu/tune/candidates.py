"""Which tiles of a kernel are worth compiling and measuring: its own and those of others, and their neighbours, ranked by the model.

The model prunes and never chooses: most of what it thinks likely is measured, together with all seeds. What compiling shows to spill or
not to fit is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from llmopt.gpu.compile import compiled
from llmopt.gpu.tune.cost import Prediction, Resources, estimate, predict
from llmopt.gpu.tune.problems import example, operands, standing_for, words
from llmopt.gpus import Part
from llmopt.launch import AttentionTile, GemmTile, LinearProblem, Tile
from llmopt.registry import Kernel, refuse
from llmopt.types import Target

COUNT = 32  # tiles that are kept for measuring, besides the seeds
_HALVED = ("block_m", "block_n", "block_k", "num_warps", "split_k", "splits")  # and doubled
# Up to which M, from and to which block_m tiles of other heights are seeds: beyond, blocks compute padding or read W too often.
_BLOCK_M = ((16, 1, 16), (64, 16, 64), (256, 32, 128), (None, 64, 256))
_HEIGHTS = (1, 16, 64, 512, 4096)  # at which kernels have tiles of their own
# Tiles that others measured to be the fastest on some GPU (vLLM's, SGLang's and Inductor's tables, FlexAttention): shapes, not timings.
_PRODUCTS = (
    GemmTile(16, 32, 128, 4, 5),
    GemmTile(16, 64, 128, 4, 5),
    GemmTile(16, 128, 128, 4, 4),
    GemmTile(16, 128, 256, 4, 3),
    GemmTile(32, 64, 128, 4, 4),
    GemmTile(64, 64, 128, 4, 4),
    GemmTile(64, 128, 64, 4, 3),
    GemmTile(64, 128, 128, 8, 3),
    GemmTile(128, 64, 128, 4, 3),
    GemmTile(128, 256, 64, 8, 3),
    GemmTile(256, 128, 64, 8, 4),
)
_ATTENTIONS = (
    AttentionTile(128, 64, 4, 3),
    AttentionTile(128, 128, 4, 3),
    AttentionTile(128, 64, 8, 3),
    AttentionTile(64, 64, 4, 3),
    AttentionTile(64, 32, 4, 3),
)


@dataclass(frozen=True)
class Candidate:
    """A tile, what it takes once compiled, and what the model thinks of it."""

    tile: Tile
    resources: Resources
    prediction: Prediction

    def __str__(self) -> str:
        return f"{words(self.tile)}: {self.prediction}"


def seeds(kernel: Kernel, problem: Any, target: Target) -> list[Tile]:
    """The default, the kernel's own tiles for this and other heights, and those that others measured; all of them possible."""
    found = [*kernel.configs(problem, target)]
    default = found[0]
    if isinstance(default, AttentionTile):
        given = (dataclasses.replace(tile, splits=default.splits) for tile in _ATTENTIONS)
        found += [dataclasses.replace(t, block_m=default.block_m) if default.splits > 1 else t for t in given]  # fmt: skip
    if isinstance(problem, LinearProblem):
        others: list[Any] = []
        for m in _HEIGHTS:
            other = dataclasses.replace(problem, m=m)
            if not kernel.reject(other, target):
                others += kernel.configs(other, target)
        splits = getattr(default, "split_k", 1)
        others += [
            dataclasses.replace(t, block_k=problem.group or t.block_k, split_k=splits)
            for t in _PRODUCTS
        ]
        low, high = next(limits for most, *limits in _BLOCK_M if most is None or problem.m <= most)
        found += [t for t in others if low <= t.block_m <= high]
    return [
        t for t in dict.fromkeys(found) if t == default or not refuse(kernel, t, problem, target)
    ]


def likely(kernel: Kernel, problem: Any, part: Part, count: int = COUNT) -> list[Tile]:
    """The default, then seeds and the `count` likeliest tiles around them, best first by the model."""
    if kernel.function is None:  # chooses its tile itself
        return list(kernel.configs(problem, part.target))
    own = seeds(kernel, problem, part.target)
    default = own[0]
    around = {t for seed in own for t in _neighbours(seed)} - set(own)
    possible = [t for t in around if not refuse(kernel, t, problem, part.target)]

    def seconds(tile: Tile) -> tuple[float, str]:
        found = predict(kernel, problem, tile, part, estimate(kernel, problem, tile, part))
        return (float("inf") if found is None else found.seconds), words(tile)

    best = sorted(possible, key=seconds)[:count]
    return [default, *sorted({*own[1:], *best}, key=seconds)]


def _neighbours(seed: Tile) -> Iterator[Tile]:
    """Tiles one step of each field away, the seed among them."""
    given = dataclasses.asdict(seed)
    choices = {}
    for name, value in given.items():
        if name in _HALVED:
            choices[name] = sorted({max(1, value // 2), value, value * 2})
        elif name == "num_stages":
            choices[name] = sorted({max(1, value - 1), value, value + 1})
        else:
            choices[name] = [value]
    for values in product(*choices.values()):
        yield dataclasses.replace(seed, **dict(zip(choices, values, strict=True)))


def inspect(
    kernel: Kernel, problem: Any, tile: Tile, part: Part, target: Target
) -> tuple[Candidate | None, str]:
    """A tile as it compiles for a target and what the model thinks of it, or None and why it cannot be used."""
    stands = standing_for(kernel, problem, target)
    given = operands(kernel.op, stands, torch.device("meta"))
    launch = example(kernel, stands, _as_compiled(tile), target, given)
    found = compiled(launch, target)
    resources = Resources(found.registers, found.shared, found.spills)
    if problems := found.problems(target):
        return None, "; ".join(problems)
    prediction = predict(kernel, problem, tile, part, resources)
    if prediction is None:
        return None, f"{resources.registers} registers a thread: not one block fits"
    return Candidate(tile, resources, prediction), ""


def _as_compiled(tile: Tile) -> Tile:
    """The tile whose code stands for it: how many blocks share a tile changes no registers once there are two."""
    given = {
        n: min(v, 2) for n, v in dataclasses.asdict(tile).items() if n in ("split_k", "splits")
    }
    return dataclasses.replace(tile, **given)
