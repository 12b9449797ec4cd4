"""rotary_table: cosine and sine of position · frequency for rotary position embedding (Su et al. 2021), both halves of a row alike."""

from __future__ import annotations

import torch
from torch import Tensor

from llmopt.ops.reference import outside_autocast


@outside_autocast
def rotary_table(
    frequencies: Tensor, positions: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """frequencies [...,R/2] float32 and positions [...,1] int64 or float32 → cos, sin [B,S,R] in dtype; both broadcast together.

    The angle is rounded to float32, cos and sin are multiplied by scale (YaRN's attention factor; 1 otherwise).
    """
    angle = frequencies.float() * positions.float()
    whole = torch.cat((angle, angle), -1)
    return (whole.cos() * scale).to(dtype), (whole.sin() * scale).to(dtype)


def _fake(
    frequencies: Tensor, positions: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    from torch._refs import _broadcast_shapes

    *front, half = _broadcast_shapes(frequencies.shape, positions.shape)
    size = (*front, 2 * half)
    return tuple(torch.empty(size, dtype=dtype, device=positions.device) for _ in range(2))  # type: ignore[return-value]


rotary_table.fake = _fake  # type: ignore[attr-defined]
