"""attention_precision: queries and keys of every attention are multiplied as signed bytes, where that was asked for."""

from __future__ import annotations

from torch import fx

from llmopt.graph import kind
from llmopt.ops.attention import APPENDS


def run(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if kind(node) in ("llmopt.attention", *APPENDS):
            node.kwargs = {**node.kwargs, "qk": "int8"}
