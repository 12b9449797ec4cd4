"""grouped_linear: rows in groups, one behind the other, each the input of a linear of its own, as tokens are of their experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from llmopt.ops.linear import DEFAULTS as LINEAR_DEFAULTS
from llmopt.ops.linear import arguments_of, linear
from llmopt.ops.linear_quantized import linear_quantized
from llmopt.ops.reference import outside_autocast


@outside_autocast
def grouped_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    ends: Tensor,
    biases: Sequence[Tensor | None] | None = None,
    act: str = "none",
    gated: bool = False,
    bits: int = 0,
    activations: str = "same",
    group: int = 0,
    symmetric: bool = True,
    scales: Sequence[Tensor] | None = None,
    offsets: Sequence[Tensor] | None = None,
) -> Tensor:
    """x [S,K], weights [E,N_i,K], ends [E] int32, biases [E,N_i] or None → [S,ΣN_i] (gated: [S,N]) in x's dtype.

    Rows [ends[e - 1], ends[e]) go through ops.linear with weights, biases, act and gated of expert e; rows from the last end on are
    zeros. bits 8 or 4: ops.linear_quantized instead, whose codes are weights, with scales and offsets [E,N_i,K/group]; without
    scales they are float weights, which a kernel rounds when it packs them and which here stay as they are.
    """
    parts, begin = [], 0
    none = (None,) * len(weights)
    for expert, end in enumerate(ends.tolist()):
        own = [w[expert] for w in weights]
        own_biases, own_scales, own_offsets = (
            [None if t is None else t[expert] for t in tensors or none]
            for tensors in (biases, scales, offsets)
        )
        around: dict[str, Any] = {"biases": own_biases, "act": act, "gated": gated}
        rows = x[begin:end]
        if bits:
            form = (bits, activations, group, symmetric)
            parts.append(linear_quantized(rows, own, own_scales, own_offsets, *form, **around))
        else:
            parts.append(linear(rows, own, **around))
        begin = max(begin, end)
    parts.append(x.new_zeros((x.shape[0] - begin, parts[0].shape[1])))
    return torch.cat(parts)


def _fake(
    x: Tensor, weights: Sequence[Tensor], ends: Tensor, *_: Any, gated: bool = False, **__: Any
) -> Tensor:
    n = weights[0].shape[1] if gated else sum(w.shape[1] for w in weights)
    return torch.empty((x.shape[0], n), dtype=x.dtype, device=x.device)


grouped_linear.fake = _fake  # type: ignore[attr-defined]


# The arguments after which a node may leave something out.
DEFAULTS: dict[str, Any] = {
    "x": None,
    "weights": (),
    "ends": None,
    "biases": None,
    "act": "none",
    "gated": False,
    "bits": 0,
    "activations": "same",
    "group": 0,
    "symmetric": True,
    "scales": None,
    "offsets": None,
}


def parts(node: fx.Node) -> dict[str, Any]:
    """Every argument of an ops.grouped_linear node by name, and what else a linear has, which it has not."""
    return {**LINEAR_DEFAULTS, **arguments_of(node, DEFAULTS)}
