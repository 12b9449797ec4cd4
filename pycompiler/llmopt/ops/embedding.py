"""embedding: rows of a table chosen by integer ids."""

from __future__ import annotations

import torch
from torch import Tensor

from llmopt.ops.reference import outside_autocast


@outside_autocast
def embedding(ids: Tensor, table: Tensor, scale: float = 1.0) -> Tensor:
    """ids i64 [...], table [V,K] → [..., K] in the table's dtype, times scale.

    Raises IndexError for an id outside 0..V-1.
    """
    rows = torch.nn.functional.embedding(ids, table)
    return rows if scale == 1.0 else rows * scale


def _fake(ids: Tensor, table: Tensor, scale: float = 1.0) -> Tensor:
    return torch.empty((*ids.shape, table.shape[1]), dtype=table.dtype, device=table.device)


embedding.fake = _fake  # type: ignore[attr-defined]
