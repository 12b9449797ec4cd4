"""slide_: a full sliding-window cache drops its oldest positions for new ones, in place."""

from __future__ import annotations

from torch import Tensor

from llmopt.ops.reference import outside_autocast


@outside_autocast
def slide_(cache: Tensor, new: Tensor) -> Tensor:
    """cache [B,H,S,D] loses its first Sn positions and ends with new [B,H,Sn,D], Sn ≤ S, of the same dtype; returns cache."""
    moved = cache.roll(-new.shape[2], dims=2)
    moved[:, :, cache.shape[2] - new.shape[2] :] = new
    return cache.copy_(moved)


def _fake(cache: Tensor, new: Tensor) -> Tensor:
    return cache


slide_.fake = _fake  # type: ignore[attr-defined]
