"""A model with random weights and its two kinds of calls, as end_to_end.py compares and times them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Run = Callable[..., Any]  # the model, or what was compiled of it


@dataclass(frozen=True)
class Subject:
    """start(run): a prompt with a new cache → results and the cache. step(run, cache): one token more; None where nothing is decoded.

    Tokens depend on nothing but their position, so that all systems see the same.
    """

    model: nn.Module
    start: Callable[[Run], tuple[Tensor, Any]]
    step: Callable[[Run, Any], tuple[Tensor, Any]] | None = None
