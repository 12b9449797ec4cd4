"""Tokens on their way to the experts of a mixture and back (Shazeer et al. 2017): each of T tokens has k places, S = T · k in all.

Place i is that of token i // k. Experts lie one behind the other in the sorted order, each with the places that chose it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def limit_groups(scores: Tensor, groups: int, best: int, kept: int, fill: float) -> Tensor:
    """scores [T,E] float32: those of experts outside of each token's `kept` best groups are `fill` (DeepSeek-AI 2024).

    A group is E / groups experts in a row, and counts as the sum of its `best` largest scores.
    """
    grouped = scores.unflatten(1, (groups, -1))
    chosen = grouped.topk(best).values.sum(-1).topk(kept).indices
    outside = torch.ones(scores.shape[0], groups, dtype=torch.bool, device=scores.device)
    outside = outside.scatter(1, chosen, False)
    return grouped.masked_fill(outside[..., None], fill).flatten(1)


def _fake_limit(scores: Tensor, *_settings: float) -> Tensor:
    return torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)


limit_groups.fake = _fake_limit  # type: ignore[attr-defined]


def sort_by_expert(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids [S] int64 or int32: the expert of each place → order [S] int64, ends [E] int32, ids in that order [S], inverse [S] int64.

    Expert e has order[ends[e - 1] : ends[e]], as they came; order[inverse[i]] is i. Ids that name no expert come last and count for none.
    """
    known = torch.where((ids >= 0) & (ids < experts), ids, experts)
    in_order, order = torch.sort(known, stable=True)
    each = torch.arange(experts, device=ids.device, dtype=ids.dtype)
    ends = torch.searchsorted(in_order, each, right=True, out_int32=True)
    return order, ends, ids[order], torch.argsort(order)


def _fake_sort(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def places(dtype: torch.dtype) -> Tensor:
        return torch.empty(ids.shape, dtype=dtype, device=ids.device)

    ends = torch.empty((experts,), dtype=torch.int32, device=ids.device)
    return places(torch.int64), ends, places(ids.dtype), places(torch.int64)


sort_by_expert.fake = _fake_sort  # type: ignore[attr-defined]


def gather_tokens(x: Tensor, order: Tensor, k: int) -> Tensor:
    """x [T,H], order [S] int64 of places → the rows of their tokens, x[order // k], [S,H]."""
    return x[torch.div(order, k, rounding_mode="floor")]


def _fake_gather(x: Tensor, order: Tensor, k: int) -> Tensor:
    return torch.empty((order.shape[0], x.shape[1]), dtype=x.dtype, device=x.device)


gather_tokens.fake = _fake_gather  # type: ignore[attr-defined]


def combine_experts(x: Tensor, inverse: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """x [S,H] in the order of experts, inverse [S] int64, weights [T,k] → each token's weighted sum of its k rows, [T,H] in dtype.

    Computed in float32, rounded once.
    """
    rows = x[inverse].float().unflatten(0, weights.shape)
    return (rows * weights.float()[..., None]).sum(1).to(dtype)


def _fake_combine(x: Tensor, inverse: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty((weights.shape[0], x.shape[1]), dtype=dtype, device=x.device)


combine_experts.fake = _fake_combine  # type: ignore[attr-defined]
