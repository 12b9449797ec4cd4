"""activations: a chain of arithmetic on one tensor that equals a known activation → that activation by name.

GELU has a dozen spellings. Instead of listing them, the chain is evaluated on sample points in float64 and compared with each
activation there; agreement to 1e-6 from −12 to 12 (constants are written with 7-8 digits) and at both infinities identifies it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from llmopt.graph import (
    argument,
    binary_operands,
    emit,
    fake,
    fake_mode_of,
    getitem,
    is_tensor,
    kind,
    replace,
    same_shape,
    scalar,
)
from llmopt.ops.activation import activate
from llmopt.writes import Writes

_UNARY: dict[str, Callable[..., Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "erf": torch.erf,
    "relu": torch.relu,
    "square": torch.square,
    "neg": torch.neg,
    "exp": torch.exp,
}
_BINARY: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "mul": torch.mul,
    "sub": torch.sub,
    "div": torch.div,
    "pow": torch.pow,
}
_CANDIDATES = ("gelu_tanh", "gelu_erf", "quick_gelu", "silu", "relu2")
_LONGEST_CHAIN = 14


def run(graph: fx.Graph) -> None:
    mode, writes = fake_mode_of(graph), Writes(graph)
    for node in reversed(list(graph.nodes)):
        if kind(node) in ("mul", "square", "pow") and is_tensor(node) and node.users:
            _match(graph, mode, node, writes)
        elif kind(node) == "glu":
            _split_gate(graph, mode, node)


def _match(graph: fx.Graph, mode: Any, root: fx.Node, writes: Writes) -> None:
    found = _chain(root)
    if found is None:
        return
    chain, x = found
    if (
        len(chain) < 2
        or not same_shape(fake(x).shape, fake(root).shape)
        or fake(x).dtype != fake(root).dtype
    ):
        return
    name = _identify(chain, x)
    if name is None or writes.moves_reads(root, (x,)):
        return
    with graph.inserting_before(root):
        new = emit(graph, mode, named, (x, name), like=root)
    replace(root, new)


def _split_gate(graph: fx.Graph, mode: Any, node: fx.Node) -> None:
    """glu: the first half times sigmoid of the second."""
    with graph.inserting_before(node):
        halves = emit(
            graph, mode, "chunk", (node.args[0], 2, argument(node, 1, "dim", -1)), like=node
        )
        x, gate = (emit(graph, mode, getitem, (halves, i), like=node) for i in range(2))
        new = emit(
            graph, mode, "mul", (x, emit(graph, mode, "sigmoid", (gate,), like=node)), like=node
        )
    replace(node, new)


def named(x: Tensor, name: str) -> Tensor:
    """The activation called `name` (see ops.activation.NAMES) of x."""
    return activate(name, x)


def _chain(root: fx.Node) -> tuple[list[fx.Node], fx.Node] | None:
    """The arithmetic below root that depends on one tensor, in order, and that tensor."""
    members: set[fx.Node] = set()
    queue, leaves = [root], set()
    while queue:
        node = queue.pop()
        inside = kind(node) in _UNARY or kind(node) in _BINARY
        readers_inside = node is root or all(u in members for u in node.users)
        if not (inside and readers_inside and _plain(node)) or len(members) > _LONGEST_CHAIN:
            leaves.add(node)
            continue
        members.add(node)
        queue.extend(n for n in node.all_input_nodes if n not in members)
        leaves -= members
    leaves -= members
    if len(leaves) != 1 or not members:
        return None
    x = leaves.pop()
    return (sorted(members), x) if is_tensor(x) else None


def _plain(node: fx.Node) -> bool:
    if kind(node) in _UNARY:
        return len(node.args) == 1 and not node.kwargs
    pair = binary_operands(node)
    return pair is not None and all(isinstance(p, fx.Node) or scalar(p) is not None for p in pair)


def _identify(chain: list[fx.Node], x: fx.Node) -> str | None:
    ends = torch.tensor([-torch.inf, torch.inf], dtype=torch.float64)
    points = torch.cat((torch.linspace(-12.0, 12.0, 97, dtype=torch.float64), ends))
    values: dict[Any, Any] = {x: points}
    for node in chain:
        rule = _UNARY.get(kind(node)) or _BINARY[kind(node)]
        operands = node.args[:1] if kind(node) in _UNARY else binary_operands(node)
        operands = [values[o] if isinstance(o, fx.Node) else o for o in operands or ()]
        if not any(isinstance(o, Tensor) for o in operands):
            return None
        operands = [
            o if isinstance(o, Tensor) else torch.tensor(float(o), dtype=torch.float64)
            for o in operands
        ]
        values[node] = rule(*operands)
    got = values[chain[-1]]
    for name in _CANDIDATES:
        if torch.allclose(got, activate(name, points), rtol=1e-6, atol=1e-6, equal_nan=True):
            return name
    return None


def activation_of(node: Any) -> str | None:
    """The name of the activation this node applies to its first argument, or None."""
    if not is_tensor(node) or node.op not in ("call_function", "call_method"):
        return None
    name = kind(node)
    if name == "gelu":
        approximate = node.kwargs.get("approximate", node.args[1] if len(node.args) > 1 else "none")
        return {"none": "gelu_erf", "tanh": "gelu_tanh"}.get(approximate)
    if name == "llmopt.named":
        return node.args[1]
    return name if name in ("relu", "silu", "sigmoid", "tanh") else None
