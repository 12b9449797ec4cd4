"""fuse_pointwise: chains of elementwise arithmetic and choices that no other op took → ops.pointwise, one pass over memory each.

A chain grows from its last node towards its inputs while every value inside has the chain's shape (or is a row reduction of it)
and no reader outside. Values that others read as well are results of the chain.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from llmopt import ops
from llmopt.casts import is_float_cast, rounds
from llmopt.graph import (
    NOTE,
    emit,
    fake,
    fake_mode_of,
    getitem,
    is_in_place,
    is_one,
    is_tensor,
    is_view,
    kind,
    refresh,
    same_shape,
    same_size,
    storage,
    view_base,
)
from llmopt.passes.elementwise import TRUTHS, Chain, jumps, reads_rows, reduces, spelling
from llmopt.writes import Writes, mutated_storages

_LARGEST = 24  # operations in one chain
_MAX_INPUTS = 10


def run(graph: fx.Graph) -> None:
    while _fuse(graph):  # what a chain feeds through views is worthwhile once it is one
        pass


def _fuse(graph: fx.Graph) -> bool:
    """Whether there was a chain to make, now made."""
    mode = fake_mode_of(graph)
    written, writes = mutated_storages(graph), Writes(graph)
    taken: set[fx.Node] = set()
    for node in reversed(list(graph.nodes)):
        if node in taken or not _takes(node, written):
            continue
        members = _grow(node, written)
        inputs = _inputs(members)
        if not _worthwhile(members):
            node.meta[NOTE] = "alone between operations that run in PyTorch"
        elif _spans(inputs, fake(node).shape) and not writes.moves_reads(node, inputs):
            taken |= members
            _rewrite(graph, mode, node, members, inputs)
    return bool(taken)


def _takes(node: fx.Node, written: set[int]) -> bool:
    """True for an elementwise node (or a reduction of the last dimension) of floats or bools that the op can express."""
    if node.op not in ("call_function", "call_method") or not is_tensor(node) or is_in_place(node):
        return False
    value = fake(node)
    if value.dtype not in TRUTHS or value.dim() == 0 or value.dim() > 5:
        return False
    if storage(node) in written:
        return False
    inputs = [fake(n) for n in node.all_input_nodes]
    if not all(isinstance(i, torch.Tensor) and i.dtype in TRUTHS for i in inputs):
        return False
    return spelling(node) is not None


def _fits(value: torch.Tensor, shape: Any) -> bool:
    """A value inside a chain has the chain's shape, or that shape with a last dimension of one (a reduced row)."""
    if same_shape(value.shape, shape):
        return True
    return (
        len(value.shape) == len(shape)
        and is_one(value.shape[-1])
        and same_shape(value.shape[:-1], shape[:-1])
    )


def _grow(root: fx.Node, written: set[int]) -> set[fx.Node]:
    shape = fake(root).shape
    members = {root}
    frontier = sorted(root.all_input_nodes, reverse=True)
    while frontier and len(members) < _LARGEST:
        node = frontier.pop(0)
        if node in members or not _takes(node, written) or not _fits(fake(node), shape):
            continue
        if (
            is_one(fake(node).shape[-1])
            and not is_one(shape[-1])
            and not _reduces_inside(node, shape)
        ):
            continue
        if any(u not in members for u in node.users) or _is_judged(node):
            continue
        members.add(node)
        frontier = sorted({*frontier, *node.all_input_nodes} - members, reverse=True)
    return members


def _is_judged(node: fx.Node) -> bool:
    """Whether what a reader gives jumps with the value, which has to be rounded as PyTorch's then; a cast that widens keeps it."""
    return any(
        jumps(u) or (is_float_cast(u) and not rounds(u) and _is_judged(u)) for u in node.users
    )


def _reduces_inside(node: fx.Node, shape: Any) -> bool:
    """A reduced value joins only when it comes from rows of the chain's own shape."""
    while not reduces(node):
        if reads_rows(node):
            return False
        inner = [n for n in node.all_input_nodes if is_tensor(n) and fake(n).dim() == len(shape)]
        if len(inner) != 1 or not is_one(fake(inner[0]).shape[-1]):
            return False
        node = inner[0]
    return same_shape(fake(node.args[0]).shape, shape)


def _worthwhile(members: set[fx.Node]) -> bool:
    """One kernel instead of several passes over memory, or instead of a way out of C++ and back for one operation."""
    inputs = [_uncopied(n) for m in members for n in m.all_input_nodes if is_tensor(n)]
    readers = [u for m in members for u in m.users if u not in members]
    fed = any(map(_is_ours, inputs))
    if all(map(is_float_cast, members)):
        return fed and all(map(_reaches_ours, readers))
    if not fed and any(fake(n).dtype == torch.bool for n in (*members, *inputs)):
        # A mask: PyTorch makes it in front of everything, unless nothing of it is PyTorch's.
        are_given = all(n.op in ("placeholder", "get_attr") for n in inputs if n not in members)
        return are_given and all(map(_reaches_ours, readers))
    return fed or len(members) >= 2


def _is_ours(node: fx.Node) -> bool:
    source = node.args[0] if kind(node) == "getitem" else node
    if not isinstance(source, fx.Node):
        return False
    if kind(source) == "cat":
        return any(_is_ours(_uncopied(n)) for n in source.all_input_nodes if is_tensor(n))
    return kind(source).startswith("llmopt.")


def _reaches_ours(node: fx.Node) -> bool:
    """True where ops of llmopt alone read a value, through views and concatenation."""
    return _is_ours(node) or (
        (is_view(node) or kind(node) in ("reshape", "cat")) and all(map(_reaches_ours, node.users))
    )


def _uncopied(node: fx.Node) -> fx.Node:
    """The node that computes a value, below views and plain copies."""
    node = view_base(node)
    while kind(node) in ("contiguous", "clone", "reshape") and is_tensor(node.args[0]):
        node = view_base(node.args[0])
    return node


def _inputs(members: set[fx.Node]) -> list[fx.Node]:
    """What a chain reads, each once, in the order of the readers."""
    return list(
        dict.fromkeys(n for m in sorted(members) for n in m.all_input_nodes if n not in members)
    )


def _spans(inputs: list[fx.Node], shape: Any) -> bool:
    """The op gives what its inputs broadcast to, so that must be the chain's shape: a chain of row means is narrower than its rows."""
    values = [fake(i) for i in inputs]
    return (
        len(inputs) <= _MAX_INPUTS
        and any(same_shape(v.shape, shape) for v in values)
        and all(_broadcasts(v.shape, shape) for v in values)
    )


def _broadcasts(shape: Any, to: Any) -> bool:
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(is_one(s) or same_size(s, t) for s, t in pairs)


def _rewrite(
    graph: fx.Graph, mode: Any, root: fx.Node, members: set[fx.Node], inputs: list[fx.Node]
) -> None:
    order = sorted(members)
    chain = Chain(root, inputs)
    for node in order:
        spell = spelling(node)
        assert spell is not None, node  # as when it was taken
        chain.number[node] = spell(chain)
    with graph.inserting_before(root):
        results = (chain.number[root],)
        args = (tuple(chain.program), results, (fake(root).dtype,), *inputs)
        whole = emit(graph, mode, ops.pointwise, args, like=root)
        new = emit(graph, mode, getitem, (whole, 0), like=root)
    users = list(root.users)
    root.replace_all_uses_with(new)
    for node in reversed(order):
        graph.erase_node(node)
    refresh(users)
