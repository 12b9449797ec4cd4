"""verify: after every pass the graph must be well formed; on request it must also compute what it computed before."""

from __future__ import annotations

import copy
from collections.abc import Sequence
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


def run_again(gm: fx.GraphModule, inputs: Sequence[Any], pass_name: str) -> list[torch.Tensor]:
    """What the graph returns after a pass; raises BrokenGraph when it no longer runs."""
    gm.recompile()
    try:
        return run_copy(gm, inputs)
    except Exception as error:
        raise BrokenGraph(
            f"pass {pass_name}: the graph no longer runs: {type(error).__name__}: {error}"
        ) from error


def run_copy(gm: fx.GraphModule, inputs: Sequence[Any]) -> list[torch.Tensor]:
    """The tensors a graph returns for copies of the inputs, so that in-place operations leave the originals alone."""
    copies = [i.clone() if isinstance(i, torch.Tensor) else i for i in inputs]
    with torch.no_grad():
        result = copy.copy(gm)(*copies)
    flat, _ = torch.utils._pytree.tree_flatten(result)
    return [t for t in flat if isinstance(t, torch.Tensor)]


# What a pass that rounds may change, of the largest value: activations to 8 bits lose 1/254 of their largest at every linear.
_ROUNDING = {"quantize": 0.1}


def check_values(before: list[torch.Tensor], after: list[torch.Tensor], pass_name: str) -> None:
    """Both graphs gave the same tensors up to rounding; raises BrokenGraph with the largest difference."""
    if len(before) != len(after):
        raise BrokenGraph(f"pass {pass_name}: {len(after)} results instead of {len(before)}")
    for i, (a, b) in enumerate(zip(before, after, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise BrokenGraph(
                f"pass {pass_name}: result {i} is {b.shape} {b.dtype} instead of {a.shape} {a.dtype}"
            )
        if not a.dtype.is_floating_point or a.numel() == 0:
            if not torch.equal(a, b):
                raise BrokenGraph(f"pass {pass_name}: integer result {i} differs")
            continue
        short = autocast.is_on()  # products inside are of its dtype, whatever the result is
        bound = {torch.float32: 6e-2 if short else 2e-3, torch.float64: 1e-6}.get(a.dtype, 6e-2)
        bound = max(bound, _ROUNDING.get(pass_name, 0.0))
        scale = a.double().nan_to_num().abs().max().clamp_min(1e-6)
        difference = (a.double() - b.double()).nan_to_num().abs().max() / scale
        if difference > bound:
            raise BrokenGraph(
                f"pass {pass_name}: result {i} differs by {difference:.2g} of its largest value"
            )
