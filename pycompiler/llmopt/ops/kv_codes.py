"""Keys and values as signed bytes −127 … 127, with their float32 scales behind them or beside them.

Rows: [D + 4] int8, the codes and the four bytes of their scale. Arrays: codes [D] int8 and scales [1], each in a tensor of its own, so
that codes begin where a GPU loads 16 bytes at a time. One scale per token and head: the row's largest magnitude divided by 127; codes
are rounded with ties to even. A row with a NaN or an infinity has the scale NaN, so it stays visible. Both can be sliced, joined and
reordered like any tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_BYTES = 4


def quantize_rows(x: Tensor) -> Tensor:
    """x [..., D] float → [..., D + 4] int8, contiguous."""
    codes, scale = quantize_arrays(x)
    scale_bytes = scale.flatten().view(torch.int8).view(*x.shape[:-1], SCALE_BYTES)
    return torch.cat((codes, scale_bytes), -1)


def quantize_arrays(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., D] float → codes [..., D] int8, scales [..., 1] float32; contiguous."""
    values = x.float()
    scale = values.abs().amax(-1, keepdim=True) / 127
    # A row whose scale has no finite reciprocal counts as zero.
    usable = scale >= torch.finfo(torch.float32).tiny
    codes = (values * torch.where(usable, 1 / scale, 0.0)).round()
    is_number = codes.sum(-1, keepdim=True).isfinite()
    codes = torch.where(is_number, codes, 0.0).to(torch.int8)
    scale = torch.where(is_number, torch.where(usable, scale, 0.0), torch.nan)
    return codes.contiguous(), scale.contiguous()


def dequantize_rows(rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """rows [..., D + 4] int8 → [..., D] in dtype."""
    codes, scale = rows[..., :-SCALE_BYTES], rows[..., -SCALE_BYTES:]
    aligned = scale.clone(memory_format=torch.contiguous_format)
    return (codes.float() * aligned.view(torch.float32)).to(dtype)


def dequantize_arrays(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """codes [..., D] int8, scales [..., 1] float32 → [..., D] in dtype."""
    return (codes.float() * scales).to(dtype)
