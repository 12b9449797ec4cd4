"""Contexts inside a graph: autocast, vmap and the like, entered and left by nodes of their own.

What such a node switches on holds for every node up to its partner, so that neither may move nor become a kernel. A context that
changes nothing goes; any other becomes one call, which PyTorch runs as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from llmopt import autocast
from llmopt.graph import NOTE, allow_a_copy, fake, getitem, kind, storage
from llmopt.writes import written_by

# The node that enters a context: the one that leaves it, and what is so special inside.
_CONTEXTS = {
    "_enter_autocast": ("_exit_autocast", "autocast: its casts happen inside PyTorch's operators"),
    "_vmap_increment_nesting": ("_vmap_decrement_nesting", "vmap: its sizes are of one sample"),
    "_grad_increment_nesting": ("_grad_decrement_nesting", "a gradient is computed here"),
    "_jvp_increment_nesting": ("_jvp_decrement_nesting", "a derivative is computed here"),
    "_func_increment_nesting": ("_func_decrement_nesting", "torch.func.functionalize"),
    "_enter_inference_mode": ("_exit_inference_mode", "inference mode begins and ends here"),
}
_EXITS = frozenset(leave for leave, _ in _CONTEXTS.values())


def enclose(gm: fx.GraphModule) -> str:
    """Makes one call of every context, or says why the whole graph has to run as in PyTorch; "" if it need not."""
    if not torch.is_grad_enabled() and any(map(_enables_grad, gm.graph.nodes)):
        return "gradients are switched on inside the graph"
    if not _restores_grad_mode(gm.graph):
        return "gradients are switched on or off beyond the graph"
    _drop_what_changes_nothing(gm.graph)
    for number, nodes in enumerate(_outermost(gm.graph)):
        if kind(nodes[-1]) not in _EXITS:
            return f"{kind(nodes[0])} is not undone in the same graph"
        if _shares_memory(nodes):
            return f"memory from outside is written or handed on: {_CONTEXTS[kind(nodes[0])][1]}"
        _make_call(gm, nodes, f"context_{number}")
    return ""


def _enables_grad(node: fx.Node) -> bool:
    return kind(node) == "_set_grad_enabled" and node.args[0] is True


def _restores_grad_mode(graph: fx.Graph) -> bool:
    """Gradients are on or off behind the graph as they were in front of it."""
    modes = [node.args[0] for node in graph.nodes if kind(node) == "_set_grad_enabled"]
    return not modes or modes[-1] is torch.is_grad_enabled()


def _drop_what_changes_nothing(graph: fx.Graph) -> None:
    """Autocast that is switched off where it is off, and gradients where nothing needs any: not where one is computed."""
    enclosed = {node for nodes in _outermost(graph) for node in nodes}
    for node in list(graph.nodes):
        if kind(node) == "_enter_autocast" and _is_off(node):
            for leave in [u for u in node.users if kind(u) == "_exit_autocast"]:
                graph.erase_node(leave)
            graph.erase_node(node)
        elif kind(node) == "_set_grad_enabled" and node not in enclosed:
            graph.erase_node(node)


def _is_off(enter: fx.Node) -> bool:
    """True for autocast(enabled=False) that no autocast surrounds."""
    if autocast.is_on() or len(enter.args) < 3 or enter.args[2] is not False:
        return False
    return not any(
        kind(other) == "_enter_autocast"
        and other < enter
        and any(kind(u) == "_exit_autocast" and u > enter for u in other.users)
        for other in enter.graph.nodes
    )


def _outermost(graph: fx.Graph) -> list[list[fx.Node]]:
    """The nodes of every context that no other one surrounds, both ends included."""
    found: list[list[fx.Node]] = []
    depth = 0
    for node in graph.nodes:
        if kind(node) in _CONTEXTS:
            if depth == 0:
                found.append([])
            depth += 1
        if depth and node.op != "output":
            found[-1].append(node)
        depth -= kind(node) in _EXITS
    return found


def _inputs(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    inside = set(nodes)
    return list(dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in inside))


def _results(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    inside = set(nodes)
    return [node for node in nodes if any(user not in inside for user in node.users)]


def _shares_memory(nodes: Sequence[fx.Node]) -> bool:
    """True when a context writes into what it is given, or gives it back: nobody outside would see that."""
    outside = {storage(n) for n in _inputs(nodes)} - {None}
    touched = [*_results(nodes), *(w for node in nodes for w in written_by(node))]
    return any(storage(n) in outside for n in touched)


def _make_call(gm: fx.GraphModule, nodes: Sequence[fx.Node], name: str) -> None:
    inside, inputs, results = set(nodes), _inputs(nodes), _results(nodes)
    inner = fx.Graph()
    made = {n: inner.placeholder(n.name) for n in inputs}
    for node in nodes:
        made[node] = inner.node_copy(node, made.__getitem__)
        allow_a_copy(made[node])  # what comes in may lie in another order than was traced
    inner.output(tuple(made[r] for r in results))
    gm.add_submodule(name, fx.GraphModule(gm, inner))
    with gm.graph.inserting_after(nodes[-1]):
        call = gm.graph.call_module(name, tuple(inputs))
    call.meta = {k: v for k, v in nodes[0].meta.items() if k == "stack_trace"}
    call.meta |= {NOTE: _CONTEXTS[kind(nodes[0])][1], "example_value": tuple(map(fake, results))}
    last = call
    for i, result in enumerate(results):
        with gm.graph.inserting_after(last):
            last = gm.graph.call_function(getitem, (call, i))
        last.meta["example_value"] = fake(result)
        result.replace_all_uses_with(last, delete_user_cb=lambda user: user not in inside)
    for node in reversed(nodes):
        gm.graph.erase_node(node)
