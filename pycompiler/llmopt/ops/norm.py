"""norm: RMSNorm and LayerNorm over the last dimension.

rms:    x / sqrt(mean(x²) + eps) · (offset + weight)        (Zhang & Sennrich 2019; offset 1 is Gemma's form)
layer:  (x − mean) / sqrt(var + eps) · (offset + weight) + bias        (Ba et al. 2016)
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmopt.ops.reference import outside_autocast

KINDS = ("none", "rms", "layer")


def normalized(
    x: Tensor, kind: str, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float
) -> Tensor:
    """The norm in float32; x [..., K], weight and bias [K] or None."""
    h = x.float()
    if kind == "layer":
        h = h - h.mean(-1, keepdim=True)
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        h = h * (weight.float() + offset)
    return h if bias is None else h + bias.float()


@outside_autocast
def norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    eps: float,
    offset: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x [..., K] → [..., K] in `dtype` (default: x's); kind "rms" or "layer"; computed in float32."""
    return normalized(x, kind, weight, bias, eps, offset).to(dtype or x.dtype)


def _fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    eps: float,
    offset: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)


norm.fake = _fake  # type: ignore[attr-defined]
