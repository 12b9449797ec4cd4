"""Methods that change the shape of a tensor in place, such as `h.unsqueeze_(0)`, become views, which stand for the tensor from there on.

Dynamo's example value of a tensor is one object under all its names, and has the last shape: each name gets the one back that it had.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from llmopt.graph import compute_fake, fake, fake_mode_of, kind, tensors_in

_VIEWS = frozenset({"as_strided_", "squeeze_", "swapaxes_", "swapdims_", "t_", "transpose_", "unsqueeze_"})  # fmt: skip


def write_out(graph: fx.Graph) -> str:
    """Writes such methods as views, or says why the whole graph has to run as in PyTorch; "" if it need not."""
    if any(kind(node) == "set_" for node in graph.nodes):
        return "set_ gives a tensor other memory"
    shaped = {id(fake(n.all_input_nodes[0])) for n in graph.nodes if kind(n) in _VIEWS}
    if not shaped:
        return ""
    for node in graph.nodes:
        is_call = node.op in ("call_function", "call_method")
        if not is_call and any(id(t) in shaped for t in tensors_in(fake(node))):
            return "the shape of a tensor that this graph did not make is changed in place"
    _write_views(graph, shaped)
    return ""


def _write_views(graph: fx.Graph, shaped: set[int]) -> None:
    """shaped: the ids of Dynamo's example values of the tensors whose shape changes."""
    mode = fake_mode_of(graph)
    assert mode is not None, "a tensor whose shape changes has an example value"
    traced = {node: fake(node) for node in graph.nodes}
    views: dict[int, fx.Node] = {}  # what stands for a tensor
    values: dict[int, Tensor] = {}  # its example value here

    def now(node: fx.Node) -> fx.Node:
        return views.get(id(traced[node]), node)

    def shape_now(tensor: Tensor) -> Tensor:
        return values.get(id(tensor), tensor)

    for node in graph.nodes:
        node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), now)
        value = traced[node]
        mine = [t for t in tensors_in(value) if id(t) in shaped]
        if not mine:
            continue
        if kind(node) in _VIEWS:
            node.op, node.target = "call_method", kind(node).removesuffix("_")
            del node.meta["llmopt_kind"]
            views[id(value)] = node
            values[id(value)] = compute_fake(mode, node.target, node.args, node.kwargs)
        elif any(id(t) not in values for t in mine):
            anew = tensors_in(compute_fake(mode, node.target, node.args, node.kwargs))
            made = zip(tensors_in(value), anew, strict=True)
            with mode, torch.no_grad():
                values |= {id(t): _window(t, new) for t, new in made if id(t) in shaped}
        node.meta["example_value"] = tree_map_only(Tensor, shape_now, value)


def _window(tensor: Tensor, other: Tensor) -> Tensor:
    """On a tensor's memory, shaped as another one."""
    return tensor.as_strided(other.shape, other.stride(), other.storage_offset())
