"""attention_precision: marks attentions whose products may round what they multiply, and says where that is the default."""

from __future__ import annotations

from torch import fx

from llmopt.graph import argument, kind
from llmopt.ops.attention import APPENDS

_PRODUCTS = {"bf16": {"products": "bf16"}, "int8": {"qk": "int8"}, "exact": {}}


def run(graph: fx.Graph, attention: str) -> None:
    """attention: "exact", "bf16" (all products) or "int8" (queries and keys)."""
    for node in graph.nodes:
        if kind(node) in ("llmopt.attention", *APPENDS):
            node.kwargs = {**node.kwargs, **_PRODUCTS[attention]}


def rounds_activations(graph: fx.Graph) -> bool:
    """Whether any linear of the graph reads its inputs as 8 bits: then bf16 is the wider of both."""
    return any(
        kind(node) == "llmopt.linear_quantized" and argument(node, 5, "activations") == "int8"
        for node in graph.nodes
    )
