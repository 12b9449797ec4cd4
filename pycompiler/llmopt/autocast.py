"""Autocast around a graph: its casts, which happen inside PyTorch's own operators, become nodes.

Under `torch.autocast("cpu", dtype)` linears, matrix products and attention take their operands in that dtype; every other operator
that has a kernel takes them as they come. What no kernel takes runs in PyTorch, under the same autocast as before. Weights of linears
stay as they are: a linear rounds its weights to the dtype of its inputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from llmopt.graph import FLOATS, emit, fake, fake_mode_of, is_tensor, is_weight, kind, storage
from llmopt.writes import mutated_storages

# By kind: the arguments that are cast, by position and keyword, and those of them that a linear rounds itself if they are weights.
_LINEAR = {"linear": ("input", "weight", "bias"), "addmm": ("input", "mat1", "mat2")}
_PRODUCT = {
    "matmul": ("input", "other"),
    "mm": ("input", "mat2"),
    "bmm": ("input", "mat2"),
    "baddbmm": ("input", "batch1", "batch2"),
    "scaled_dot_product_attention": ("query", "key", "value", "attn_mask"),
}
_OPERANDS = _LINEAR | _PRODUCT
_ROUNDED = {
    "linear": ("weight", "bias"),
    "addmm": ("input", "mat2"),
    "matmul": ("other",),
    "mm": ("mat2",),
}
# Single calls that a pass writes out.
_WHOLE = ("multi_head_attention_forward", "_transformer_encoder_layer_fwd")


OTHERS = "autocast is on: its casts happen inside PyTorch's own operators"


def is_on() -> bool:
    """Whether calls made now are under autocast."""
    return any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))


def write_casts(graph: fx.Graph) -> str:
    """Puts the casts of the autocast that surrounds the graph into it, or says why it has to run as in PyTorch; "" if it need not."""
    if torch.is_autocast_enabled("cuda"):
        return OTHERS
    if any(kind(node) in _WHOLE for node in graph.nodes):
        return "autocast is on, and casts inside an attention layer that is one call"
    dtype, mode = torch.get_autocast_dtype("cpu"), fake_mode_of(graph)
    if mode is None:
        return ""
    written = mutated_storages(graph)
    casts: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        for operand in _to_cast(node, dtype):
            if operand not in casts or storage(operand) in written:
                with graph.inserting_before(node):
                    casts[operand] = emit(graph, mode, "to", (operand, dtype), like=node)
            node.replace_input_with(operand, casts[operand])
    return ""


def _to_cast(node: fx.Node, dtype: torch.dtype) -> Iterator[fx.Node]:
    name = kind(node)
    if node.op not in ("call_function", "call_method") or name not in _OPERANDS:
        return
    if fake(node).dtype != dtype:  # of float64, or of ints
        return
    for position, keyword in enumerate(_OPERANDS[name]):
        operand = node.args[position] if position < len(node.args) else node.kwargs.get(keyword)
        if (
            not is_tensor(operand)
            or fake(operand).dtype not in FLOATS
            or fake(operand).dtype == dtype
        ):
            continue
        if not (keyword in _ROUNDED.get(name, ()) and is_weight(operand)):
            yield operand
