"""Adding calls to a graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from llmopt.graph import emit


@dataclass(frozen=True)
class Calls:
    """Adds calls where the graph is being added to. like: the node that they stand for, whose place in the source is theirs."""

    graph: fx.Graph
    mode: Any
    like: fx.Node

    def __call__(self, target: Callable | str, *args: Any, **kwargs: Any) -> fx.Node:
        return emit(self.graph, self.mode, target, args, kwargs, self.like)
