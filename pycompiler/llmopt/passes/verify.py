"""verify: after every pass the graph must be well formed; on request it must also compute what it computed before."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from llmopt import autocast
from llmopt.graph import fake
from llmopt.ops import ALL


class BrokenGraph(AssertionError):
    """A pass left a graph that is malformed or computes something else; the message names the pass."""


def check_form(graph: fx.Graph, pass_name: str) -> None:
    """Every node reads only earlier nodes, every llmopt node is an op with an example value."""
    try:
        graph.lint()
    except RuntimeError as error:
        raise BrokenGraph(f"pass {pass_name}: {error}") from error
    for node in graph.nodes:
        ours = node.op == "call_function" and getattr(node.target, "__module__", "").startswith(
            "llmopt.ops."
        )
        if ours and node.target not in ALL:
            raise BrokenGraph(f"pass {pass_name}: {node.target} is not an op")
        if ours and fake(node) is None:
            raise BrokenGraph(f"pass {pass_name}: {node.name} has no example value")


@dataclass(frozen=True)
class Values:
    """The tensors a graph returns, and those of its inputs that it wrote into, by place."""

    results: list[torch.Tensor]
    written: dict[int, torch.Tensor]

    def named(self) -> dict[str, torch.Tensor]:
        results = {f"result {i}": t for i, t in enumerate(self.results)}
        return results | {f"input {i}, written in place,": t for i, t in self.written.items()}


def run_again(gm: fx.GraphModule, inputs: Sequence[Any], pass_name: str) -> Values:
    """What the graph computes after a pass; raises BrokenGraph when it no longer runs."""
    gm.recompile()
    try:
        return run_copy(gm, inputs)
    except Exception as error:
        raise BrokenGraph(
            f"pass {pass_name}: the graph no longer runs: {type(error).__name__}: {error}"
        ) from error


def run_copy(gm: fx.GraphModule, inputs: Sequence[Any]) -> Values:
    """What a graph computes from copies of the inputs, so that in-place operations leave the originals alone."""
    copies = [i.clone() if isinstance(i, torch.Tensor) else i for i in inputs]
    with torch.no_grad():
        result = copy.copy(gm)(*copies)
    flat, _ = torch.utils._pytree.tree_flatten(result)
    written = {
        i: now
        for i, (was, now) in enumerate(zip(inputs, copies, strict=True))
        if type(now) is torch.Tensor and now.layout is torch.strided and not torch.equal(was, now)
    }
    return Values([t for t in flat if isinstance(t, torch.Tensor)], written)


# What a pass that rounds may change, of the largest value: activations to 8 bits lose 1/254 of their largest at every linear.
_ROUNDING = {"quantize": 0.1}


def check_values(before: Values, after: Values, pass_name: str) -> None:
    """Both graphs gave the same tensors up to rounding; raises BrokenGraph with the largest difference."""
    old, new = len(before.results), len(after.results)
    if old != new:
        raise BrokenGraph(f"pass {pass_name}: {new} results instead of {old}")
    if before.written.keys() != after.written.keys():
        places = sorted(before.written.keys() ^ after.written.keys())
        raise BrokenGraph(f"pass {pass_name}: inputs {places} are written before or after it only")
    for (name, a), b in zip(before.named().items(), after.named().values(), strict=True):
        _check_value(name, a, b, pass_name)


def _check_value(name: str, a: torch.Tensor, b: torch.Tensor, pass_name: str) -> None:
    if a.shape != b.shape or a.dtype != b.dtype:
        raise BrokenGraph(
            f"pass {pass_name}: {name} is {b.shape} {b.dtype} instead of {a.shape} {a.dtype}"
        )
    if not a.dtype.is_floating_point or a.numel() == 0:
        if not torch.equal(a, b):
            raise BrokenGraph(f"pass {pass_name}: integer {name} differs")
        return
    short = autocast.is_on()  # products inside are of its dtype, whatever the result is
    bound = {torch.float32: 6e-2 if short else 2e-3, torch.float64: 1e-6}.get(a.dtype, 6e-2)
    bound = max(bound, _ROUNDING.get(pass_name, 0.0))
    scale = a.double().nan_to_num().abs().max().clamp_min(1e-6)
    difference = (a.double() - b.double()).nan_to_num().abs().max() / scale
    if difference > bound:
        raise BrokenGraph(
            f"pass {pass_name}: {name} differs by {difference:.2g} of its largest value"
        )
