"""What an op computes by itself, in the dtypes that its arguments say."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")


def outside_autocast(op: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function in its own dtypes where autocast surrounds the call: what that casts in a graph are nodes of the graph already."""

    @functools.wraps(op)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not torch.is_autocast_enabled("cpu"):
            return op(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return op(*args, **kwargs)

    return run
