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
from llmopt.ops.reference import outside_autocast


@outside_autocast
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
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x [..., K], weights [N_i, K], biases [N_i] or None → [..., ΣN_i] (gated: [..., N]) in `dtype`, else in x's, to which weights and
    biases are rounded.

    residual has the shape of the result. Computed in float32, rounded once.
    """
    h = normed(x, norm_kind, norm_weight, norm_bias, norm_eps, norm_offset)
    parts = []
    for i, w in enumerate(weights):
        part = torch.nn.functional.linear(h, w.to(x.dtype).float()) * alpha
        bias = biases[i] if biases else None
        parts.append(part if bias is None else part + bias.to(x.dtype).float())
    y = activate(act, parts[0]) * parts[1] if gated else activate(act, torch.cat(parts, -1))
    if residual is not None:
        y = y + residual.float()
    return y.to(dtype or x.dtype)


NORM_ARGUMENTS = ("norm_kind", "norm_weight", "norm_bias", "norm_eps", "norm_offset")


def normed(
    x: Tensor,
    norm_kind: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 0.0,
    norm_offset: float = 0.0,
) -> Tensor:
    """x [..., K] in float32 behind the norm in front of a linear."""
    if norm_kind == "none":
        return x.float()
    return normalized(x, norm_kind, norm_weight, norm_bias, norm_eps, norm_offset)


def _fake(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Any = None,
    act: str = "none",
    gated: bool = False,
    dtype: torch.dtype | None = None,
    **_: Any,
) -> Tensor:
    n = weights[0].shape[0] if gated else sum(w.shape[0] for w in weights)
    return torch.empty((*x.shape[:-1], n), dtype=dtype or x.dtype, device=x.device)


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
    "dtype": None,
}


def parts(node: fx.Node) -> dict[str, Any]:
    """Every argument of an ops.linear node by name."""
    return arguments_of(node, DEFAULTS)


def given(arguments: dict[str, Any], *without: str) -> dict[str, Any]:
    """The keyword arguments a node needs: those that are not as in DEFAULTS, but none named in `without`."""
    return {
        name: value
        for name, value in arguments.items()
        if name not in without and value != DEFAULTS[name]
    }


def arguments_of(node: fx.Node, defaults: dict[str, Any]) -> dict[str, Any]:
    """A node's arguments by name; `defaults` names them in order."""
    return {
        name: node.args[i] if i < len(node.args) else node.kwargs.get(name, default)
        for i, (name, default) in enumerate(defaults.items())
    }
