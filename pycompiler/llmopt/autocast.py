"""Autocast around a graph: its casts, which happen inside PyTorch's own operators, become nodes.

Under `torch.autocast("cpu", dtype)` linears and matrix products take their operands in that dtype, attention gives it, and
concatenation takes the widest of its operands; every other operator that has a kernel takes them as they come. What no kernel takes
runs in PyTorch, under the same autocast as before. Weights of linears stay as they are: a linear rounds its weights to the dtype of
its inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from llmopt.graph import FLOATS, argument, emit, fake, fake_mode_of, is_tensor, kind, storage
from llmopt.parameters import is_weight
from llmopt.writes import mutated_storages

# By kind: the arguments that are cast, by position and keyword, and those of them that a linear rounds itself if they are weights.
_OPERANDS = {
    "linear": ("input", "weight", "bias"),
    "addmm": ("input", "mat1", "mat2"),
    "matmul": ("input", "other"),
    "mm": ("input", "mat2"),
    "bmm": ("input", "mat2"),
    "baddbmm": ("input", "batch1", "batch2"),
}
_ROUNDED = {
    "linear": ("weight", "bias"),
    "addmm": ("input", "mat2"),
    "matmul": ("other",),
    "mm": ("mat2",),
}
_ATTENTION = ("query", "key", "value")
# Single calls that a pass writes out.
_WHOLE = ("multi_head_attention_forward", "_transformer_encoder_layer_fwd")


LEFT_TO_PYTORCH = "autocast is on: its casts happen inside PyTorch's own operators"


def is_on() -> bool:
    """Whether calls made now are under autocast."""
    return any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))


def write_casts(graph: fx.Graph) -> str:
    """Puts the casts of the autocast that surrounds the graph into it, or says why it has to run as in PyTorch; "" if it need not."""
    if torch.is_autocast_enabled("cuda"):
        return LEFT_TO_PYTORCH
    if any(kind(node) in _WHOLE for node in graph.nodes):
        return "autocast is on, and casts inside an attention layer that is one call"
    dtype, mode = torch.get_autocast_dtype("cpu"), fake_mode_of(graph)
    if mode is None:
        return ""
    written = mutated_storages(graph)
    casts: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
    for node in list(graph.nodes):
        if node.op not in ("call_function", "call_method") or not is_tensor(node):
            continue
        to, operands = _to_cast(node, dtype)
        for operand in operands:
            key = (operand, to)
            if key not in casts or storage(operand) in written:
                with graph.inserting_before(node):
                    casts[key] = emit(graph, mode, "to", key, like=node)
            node.replace_input_with(operand, casts[key])
    return ""


def _to_cast(node: fx.Node, dtype: torch.dtype) -> tuple[torch.dtype, list[fx.Node]]:
    """A dtype and the operands that a node takes in it. dtype: that of the products."""
    name = kind(node)
    if name == "cat" and fake(node).dtype in FLOATS:
        return fake(node).dtype, _others(node.all_input_nodes, fake(node).dtype)
    if fake(node).dtype != dtype:  # of float64, or of ints
        return dtype, []
    if name == "scaled_dot_product_attention":
        # Attention that rounds only its result reads caches as they are, and is nearer to the exact result.
        given = [argument(node, i, keyword) for i, keyword in enumerate(_ATTENTION)]
        wide = torch.float32 if _others(given, dtype) else dtype
        return wide, _others(given, wide)
    rounded = _ROUNDED.get(name, ())
    given = [
        argument(node, i, keyword)
        for i, keyword in enumerate(_OPERANDS.get(name, ()))
        if not (keyword in rounded and is_weight(argument(node, i, keyword)))
    ]
    return dtype, _others(given, dtype)


def _others(operands: Sequence[Any], dtype: torch.dtype) -> list[fx.Node]:
    """The float tensors among operands that have another dtype."""
    floats = [n for n in operands if is_tensor(n) and fake(n).dtype in FLOATS]
    return [n for n in dict.fromkeys(floats) if fake(n).dtype != dtype]
