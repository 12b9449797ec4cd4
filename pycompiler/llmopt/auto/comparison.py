"""What a budget is measured on: one result of a model, and how far quantised weights take it from the exact one.

Logits are compared by KL divergence. A softmax of embeddings or states means nothing: every other result is compared by half its
squared relative error, which is one minus the cosine while lengths agree. Both are quadratic in small errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from llmopt.graph import is_view, kind
from llmopt.ops.linear import parts as linear_parts
from llmopt.ops.linear_quantized import parts as quantized_parts
from llmopt.parameters import is_weight
from llmopt.quant.evaluate import POSITIONS_AT_ONCE, divergence

WORST = 1e6  # stands for a distance that is infinite or NaN

_PARTS = {"llmopt.linear": linear_parts, "llmopt.linear_quantized": quantized_parts}
_ALONG = frozenset({"llmopt.pointwise", "getitem", "to", "float", "contiguous", "clone"})


@dataclass(frozen=True)
class Comparison:
    """A distance between a wanted result [..., features] and another; 0 where they are equal."""

    name: str
    distance: Callable[[Tensor, Tensor], float]

    def __call__(self, wanted: Tensor, got: Tensor) -> float:
        found = self.distance(wanted, got)
        return found if math.isfinite(found) else WORST


def half_squared_error(wanted: Tensor, got: Tensor) -> float:
    """Half of Σ (got − wanted)² / Σ wanted²; 0 where both are all zero."""
    error = torch.zeros(2, dtype=torch.float64)
    rows = (t.reshape(-1, t.shape[-1]).split(POSITIONS_AT_ONCE) for t in (wanted, got))
    for a, b in zip(*rows, strict=True):
        error[0] += (b.double() - a.double()).square().sum()
        error[1] += a.double().square().sum()
    return float(error[0] / error[1] / 2) if error[0] != 0 else 0.0


LOGITS = Comparison("KL", divergence)
STATES = Comparison("error²/2", half_squared_error)


def compared_result(results: Any) -> Tensor:
    """Of a model's results the float one with most features, the first of several. Raises ValueError where there is none."""
    return _with_features(_leaves(results)[compared_index(results)])


def compared_index(results: Any) -> int:
    """Which leaf of the results `compared_result` is."""
    if reason := why_incomparable(results):
        raise ValueError(f"llmopt: 'auto' compares results, and {reason}")
    leaves = _leaves(results)
    floats = [i for i, t in enumerate(leaves) if _is_comparable(t)]
    return max(floats, key=lambda i: leaves[i].shape[-1])


def why_incomparable(results: Any) -> str:
    """Why no result can be compared; "" when one can."""
    floats = [t for t in _leaves(results) if _is_comparable(t)]
    if not floats:
        return "there is no float tensor with a dimension among them"
    return "" if max(floats, key=lambda t: t.shape[-1]).numel() else "they have no elements"


def _is_comparable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 0


def comparison_of(graph: fx.Graph, index: int, features: int) -> Comparison:
    """How a graph's result, leaf `index` of its output, is compared: as logits where a linear gives more than one feature.

    On the way there may be a soft cap, views and conversions, but no norm, no residual and no activation.
    """
    node = _leaves(graph.output_node().args[0])[index]
    while isinstance(node, fx.Node) and kind(node) not in _PARTS:
        node = _only_input(node)
    if node is None or features < 2:
        return STATES
    p = _PARTS[kind(node)](node)
    is_last = p["residual"] is None and p["act"] == "none" and not p["gated"]
    return LOGITS if is_last else STATES


def _only_input(node: fx.Node) -> fx.Node | None:
    """The one tensor that a node changes element by element or looks at; None for any other node."""
    if kind(node) not in _ALONG and not is_view(node):
        return None
    if kind(node) == "llmopt.pointwise" and any(step[0] == "reduce" for step in _program(node)):
        return None
    inputs = [n for n in node.all_input_nodes if not is_weight(n)]
    return inputs[0] if len(inputs) == 1 else None


def _program(node: fx.Node) -> Sequence[tuple[Any, ...]]:
    program: Any = node.args[0]
    return program


def _leaves(results: Any) -> list[Any]:
    return pytree.tree_leaves(results)


def _with_features(t: Tensor) -> Tensor:
    """[positions, features] at least."""
    return t if t.dim() > 1 else t[None]
