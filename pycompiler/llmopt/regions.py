"""Regions inside a graph: what `torch.compiler.nested_compile_region` marked, which Dynamo traced once and calls again and again.

Kernels reach across the border of a region, and each call has weights of its own: every call becomes its operations.
"""

from __future__ import annotations

from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only

from llmopt import inplace_views
from llmopt.graph import (
    compute_fake,
    fake,
    fake_mode_of,
    is_in_place,
    is_tensor,
    kind,
    storage,
    tensors_in,
    unreadable,
)
from llmopt.keywords import place_operands

_INVOKE = torch.ops.higher_order.invoke_subgraph


def inline(gm: fx.GraphModule) -> None:
    """Writes the operations of every region where it is called. Dynamo reads its results one by one."""
    calls = gm.graph.find_nodes(op="call_function", target=_INVOKE)
    for call in calls:
        body = gm.get_submodule(call.args[0].target)
        place_operands(body.graph)
        inplace_views.write_out(body.graph)  # what it refuses is refused once it stands in gm
        inline(body)
        _write_out(gm, call, body)
    if calls:
        gm.recompile()


def _write_out(gm: fx.GraphModule, call: fx.Node, body: fx.GraphModule) -> None:
    region, _name, *operands = call.args
    mode = fake_mode_of(gm.graph)
    inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
    made: dict[fx.Node, Any] = dict(zip(inputs, operands, strict=True))
    with gm.graph.inserting_before(call):
        for node in body.graph.nodes:
            if node in made or node.op == "output":
                continue
            if kind(node) == "item" and not is_tensor(made[node.args[0]]):
                # A number: the first call of a region takes it as a tensor, and torch 2.13 gives others the number itself.
                made[node] = made[node.args[0]]
                continue
            copy = made[node] = gm.graph.node_copy(node, made.__getitem__)
            if node.op == "get_attr":
                copy.target = f"{region.target}_{node.target}".replace(".", "_")
                setattr(gm, copy.target, attrgetter(node.target)(body))
            elif mode is not None:
                copy.meta["example_value"] = _value(mode, node, copy)
    (results,) = body.graph.output_node().args
    for user in list(call.users):
        user.replace_all_uses_with(fx.map_arg(results[user.args[1]], made.__getitem__))
        gm.graph.erase_node(user)
    gm.graph.erase_node(call)
    if not region.users:
        gm.graph.erase_node(region)


def _value(mode: FakeTensorMode, node: fx.Node, copy: fx.Node) -> Any:
    """The example value of a copy: the body's is that of one call, whose memory no other call shares."""
    given = {storage(n) for n in node.all_input_nodes}
    if (
        is_in_place(node)
        or unreadable(node)
        or any(t.untyped_storage()._cdata in given for t in tensors_in(fake(node)))
    ):
        return compute_fake(mode, copy.target, copy.args, copy.kwargs)
    return tree_map_only(torch.Tensor, partial(_alike, mode), fake(node))


def _alike(mode: FakeTensorMode, x: torch.Tensor) -> torch.Tensor:
    """As large, with memory of its own: a tenth of the time of computing it again, or of `empty_strided` in the mode."""
    elements = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    return FakeTensor(mode, elements, x.device)
