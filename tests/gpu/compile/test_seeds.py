"""Every tile of kernels/tuned compiles for its GPU, spills nothing and fits."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from llmopt import kernels
from llmopt.gpu.compile import compiled
from llmopt.gpu.tune.problems import example, operands, tile_of
from llmopt.gpus import Part, part_named
from llmopt.launch import Tile
from llmopt.registry import KERNELS, Kernel

from tests.gpu.compile.test_predict import SHIPPED, problem_of, shipped_for

kernels.load()
Seed = tuple[Kernel, Any, Tile]


def seeds_of(part: Part) -> list[Seed]:
    """What the file of a GPU makes its kernels run with, each code once: it depends on neither activation nor most sizes."""
    found: dict[tuple, Seed] = {}
    for entry in shipped_for(part.name).values():
        kernel, problem = KERNELS[str(entry.problem["kernel"])], problem_of(entry)
        default = kernel.configs(problem, part.target)[0]
        tile = tile_of(kernel, entry.config, problem, part.target) if entry.config else default
        sizes = {n: v % 16 for n, v in dataclasses.asdict(problem).items() if n in ("m", "n", "k", "q_len", "kv_len")}  # fmt: skip
        key = kernel.name, tile, dataclasses.replace(problem, **sizes, **({"act": "none"} if "m" in sizes else {}))  # fmt: skip
        found.setdefault(key, (kernel, problem, tile))
    return list(found.values())


def assert_usable(seed: Seed, part: Part) -> None:
    import torch

    kernel, problem, tile = seed
    launch = example(kernel, problem, tile, part.target, operands(kernel.op, problem, torch.device("meta")))  # fmt: skip
    assert compiled(launch, part.target).problems(part.target) == [], seed


@pytest.mark.parametrize("name", SHIPPED)
def test_every_seed_compiles(name):
    part = part_named(name)
    seeds = seeds_of(part)
    assert len(seeds) > 20
    for seed in seeds:
        assert_usable(seed, part)
