"""matmul: products of activations, matrix by matrix over a batch; linears whose weight is computed are such products too."""

from __future__ import annotations

import torch
from torch import Tensor

from llmopt.ops.reference import outside_autocast


@outside_autocast
def matmul(x: Tensor, y: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., M, K], y [..., K, N], bias [N] of one float dtype → [..., M, N] in it, contiguous; leading dimensions broadcast.

    The first factor's rows have to be dense for a kernel.
    """
    product = torch.matmul(x, y).contiguous()
    return product if bias is None else product + bias


def _fake(x: Tensor, y: Tensor, bias: Tensor | None = None) -> Tensor:
    batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    return torch.empty((*batch, x.shape[-2], y.shape[-1]), dtype=x.dtype, device=x.device)


matmul.fake = _fake  # type: ignore[attr-defined]
