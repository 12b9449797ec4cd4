"""share: what is computed twice from the same values is computed once.

Models repeat work in every layer that does not depend on the layer: slices of the mask, tables of a rotation. Only what the graph
neither writes to nor returns is shared, so that nobody sees two results become one.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from llmopt.graph import fake, is_in_place, kind, replace, tensors_in
from llmopt.passes.simplify import PURE, is_returned
from llmopt.writes import mutated_storages


def run(graph: fx.Graph) -> None:
    written = mutated_storages(graph)
    first: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if not _may_share(node, written):
            continue
        key = (node.op, node.target, _frozen(node.args), _frozen(node.kwargs))
        earlier = first.setdefault(key, node)
        if earlier is not node and not (is_returned(node) or is_returned(earlier)):
            replace(node, earlier)


def _may_share(node: fx.Node, written: set[int]) -> bool:
    if node.op not in ("call_function", "call_method") or kind(node) not in PURE:
        return False
    if is_in_place(node) or kind(node) in ("linear", "dropout"):
        return False
    values = tensors_in([fake(n) for n in (node, *node.all_input_nodes)])
    return not any(v.untyped_storage()._cdata in written for v in values)


def _frozen(value: Any) -> Any:
    """Arguments as a key: equal only where type and value are."""
    if isinstance(value, fx.Node):
        return value
    if isinstance(value, (tuple, list)):
        return tuple(map(_frozen, value))
    if isinstance(value, dict):
        return tuple((k, _frozen(v)) for k, v in sorted(value.items()))
    if isinstance(value, slice):
        return ("slice", _frozen(value.start), _frozen(value.stop), _frozen(value.step))
    return type(value), repr(value)
