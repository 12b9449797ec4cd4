"""rope: rotary position embedding (Su et al. 2021) of the first R of D dimensions.

half:         pairs (i, i + R/2), as Llama and GPT-NeoX store them
interleaved:  pairs (2i, 2i + 1), as GPT-J stores them
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmopt.ops.reference import outside_autocast

KINDS = ("none", "half", "interleaved")


def rotate(x: Tensor, kind: str) -> Tensor:
    """The second vector of each rotation: x [..., R] → [..., R]."""
    if kind == "half":
        a, b = x.chunk(2, dim=-1)
        return torch.cat((-b, a), dim=-1)
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


@outside_autocast
def rope(x: Tensor, cos: Tensor, sin: Tensor, kind: str) -> Tensor:
    """x [B,H,S,D]; cos, sin [B|1,1,S,R] with R ≤ D → [B,H,S,D] in x's dtype; computed in float32."""
    width = cos.shape[-1]
    turned = x[..., :width].float()
    turned = (turned * cos.float() + rotate(turned, kind) * sin.float()).to(x.dtype)
    return turned if width == x.shape[-1] else torch.cat((turned, x[..., width:]), dim=-1)


def _fake(x: Tensor, cos: Tensor, sin: Tensor, kind: str) -> Tensor:
    # Memory order [B,S,H,D], the order in which the projections write their heads.
    b, h, s, d = x.shape
    strides = (s * h * d, d, h * d, 1)
    return torch.empty_strided((b, h, s, d), strides, dtype=x.dtype, device=x.device)


rope.fake = _fake  # type: ignore[attr-defined]
