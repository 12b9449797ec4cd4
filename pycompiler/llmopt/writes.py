"""What a graph writes in place, and whether a rule may read memory earlier or later than the model did."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from llmopt.graph import argument, is_in_place, is_view, schemas, storage


def written_by(node: fx.Node) -> list[fx.Node]:
    """The inputs that a node writes into: what its signature says, else `out` or what stands first."""
    if not is_in_place(node):
        return []
    written: list[Any] = []
    for schema in schemas(node.target):
        for i, a in enumerate(schema.arguments):
            if a.alias_info is not None and a.alias_info.is_write:
                written.append(argument(node, i, a.name))
    if not written:
        out = node.kwargs.get("out")
        first = node.args[0] if node.args else node.kwargs.get("input")
        written = [first if out is None else out]
    found: list[fx.Node] = []
    fx.node.map_arg(written, found.append)
    return found


def writers_of(graph: fx.Graph, value: fx.Node) -> list[fx.Node]:
    """The nodes that write into a value's memory."""
    place = storage(value)
    return [node for node in graph.nodes if any(storage(n) == place for n in written_by(node))]


def mutated_storages(graph: fx.Graph) -> set[int]:
    """Memory that some node writes into."""
    written = {storage(n) for node in graph.nodes for n in written_by(node)}
    return {s for s in written if s is not None}


class Writes:
    """The nodes of a graph that write memory in place: what a rule asks before it reads memory earlier or later than the model did."""

    def __init__(self, graph: fx.Graph) -> None:
        self._writers = [node for node in graph.nodes if is_in_place(node)]

    def between(self, values: Iterable[fx.Node], first: fx.Node, last: fx.Node) -> bool:
        """True when memory of one of the values is written after `first` and before `last`."""
        if not self._writers:
            return False
        places = {storage(v) for v in values} - {None}
        return any(
            first < w < last and any(storage(n) in places for n in written_by(w))
            for w in self._writers
        )

    def moves_reads(self, last: fx.Node, inputs: Iterable[Any]) -> bool:
        """True when computing `last` from `inputs` at once, where `last` stands, would see another content of some memory than the
        nodes on the way from the inputs to `last` saw."""
        if not self._writers:
            return False
        given = {n for n in inputs if isinstance(n, fx.Node)}
        inside, waiting = {last}, [last]
        while waiting:
            node = waiting.pop()
            for n in node.all_input_nodes:
                read_at = node if n in given else n
                if not (is_view(node) and n in given) and self.between((n,), read_at, last):
                    return True
                if n not in given and n not in inside:
                    inside.add(n)
                    waiting.append(n)
        return False
