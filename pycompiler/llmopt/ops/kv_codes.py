"""Keys and values as signed bytes: a row [D + 4] int8 is D codes −127 … 127, then the four bytes of their float32 scale.

One scale per token and head: the row's largest magnitude divided by 127; codes are rounded with ties to even. A row with a NaN or an
infinity has the scale NaN, so it stays visible. Rows can be sliced, joined and reordered like any tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_BYTES = 4


def quantize_rows(x: Tensor) -> Tensor:
    """x [..., D] float → [..., D + 4] int8, contiguous."""
    values = x.float()
    scale = values.abs().amax(-1, keepdim=True) / 127
    # A row whose scale has no finite reciprocal counts as zero.
    usable = scale >= torch.finfo(torch.float32).tiny
    codes = (values * torch.where(usable, 1 / scale, 0.0)).round()
    is_number = codes.sum(-1, keepdim=True).isfinite()
    codes = torch.where(is_number, codes, 0.0).to(torch.int8)
    scale = torch.where(is_number, torch.where(usable, scale, 0.0), torch.nan)
    scale_bytes = scale.flatten().view(torch.int8).view(*x.shape[:-1], SCALE_BYTES)
    return torch.cat((codes, scale_bytes), -1)


def dequantize_rows(rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """rows [..., D + 4] int8 → [..., D] in dtype."""
    codes, scale = rows[..., :-SCALE_BYTES], rows[..., -SCALE_BYTES:]
    aligned = scale.clone(memory_format=torch.contiguous_format)
    return (codes.float() * aligned.view(torch.float32)).to(dtype)
