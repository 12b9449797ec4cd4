"""linear: y = act(alpha · n(x) Wᵀ + bias) [· up] + residual, with one or several weights side by side.

n is an optional norm of x. Several weights give their outputs concatenated along the last dimension; with gated=True there are
exactly two, gate and up, and y = act(gate) · up (SwiGLU and its relatives, Shazeer 2020).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from llmopt.ops.activation import activate
from llmopt.ops.norm import normalized


def linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    act: str = "none",
    gated: bool = False,
    residual: Tensor | None = None,
    alpha: float = 1.0,
    norm_kind: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 0.0,
    norm_offset: float = 0.0,
) -> Tensor:
    """x [..., K], weights [N_i, K], biases [N_i] or None → [..., ΣN_i] (gated: [..., N]) in x's dtype.

    residual has the shape of the result. Computed in float32, rounded once.
    """
    h = (
        x.float()
        if norm_kind == "none"
        else normalized(x, norm_kind, norm_weight, norm_bias, norm_eps, norm_offset)
    )
    parts = []
    for i, w in enumerate(weights):
        part = torch.nn.functional.linear(h, w.float()) * alpha
        bias = biases[i] if biases else None
        parts.append(part if bias is None else part + bias.float())
    y = activate(act, parts[0]) * parts[1] if gated else activate(act, torch.cat(parts, -1))
    if residual is not None:
        y = y + residual.float()
    return y.to(x.dtype)


def _fake(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    act: str = "none",
    gated: bool = False,
    **_: Any,
) -> Tensor:
    n = weights[0].shape[0] if gated else sum(w.shape[0] for w in weights)
    return torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)


linear.fake = _fake  # type: ignore[attr-defined]


# The arguments after which a node may leave something out.
DEFAULTS: dict[str, Any] = {
    "x": None,
    "weights": (),
    "biases": None,
    "act": "none",
    "gated": False,
    "residual": None,
    "alpha": 1.0,
    "norm_kind": "none",
    "norm_weight": None,
    "norm_bias": None,
    "norm_eps": 0.0,
    "norm_offset": 0.0,
}


def parts(node: fx.Node) -> dict[str, Any]:
    """Every argument of an ops.linear node by name."""
    return {
        name: _argument(node, i, name, default)
        for i, (name, default) in enumerate(DEFAULTS.items())
    }


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
