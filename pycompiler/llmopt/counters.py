"""Counters in a GPU's memory by which blocks that share work find out which of them is the last."""

from __future__ import annotations

import torch

MOST_TILES = 1 << 16  # that may be split among blocks: their counters are allocated once
_COUNTERS: dict[tuple[torch.device, int], torch.Tensor] = {}


def counters(device: torch.device, tiles: int) -> torch.Tensor:
    """Zeros that every launch leaves as zeros, for the device's current stream: launches of other streams have their own.

    They are never replaced, since CUDA graphs keep their address. Raises ValueError where there are more tiles than counters.
    """
    if tiles > MOST_TILES:
        raise ValueError(f"{tiles} tiles are split, at most {MOST_TILES} can be")
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = device, stream
    found = _COUNTERS.get(key)
    if found is None:
        found = _COUNTERS.setdefault(key, torch.zeros(MOST_TILES, dtype=torch.int32, device=device))
    return found
