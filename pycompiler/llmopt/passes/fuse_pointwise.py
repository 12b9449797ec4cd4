"""fuse_pointwise: chains of elementwise float arithmetic that no other op took → ops.pointwise, one pass over memory each.

A chain grows from its last node towards its inputs while every value inside has the chain's shape (or is a row reduction of it)
and no reader outside. Values that others read as well are results of the chain.
"""

from __future__ import annotations

from math import isfinite
from typing import Any

import torch
from torch import fx

from llmopt import ops
from llmopt.casts import FLOAT_CASTS, is_float_cast, rounds
from llmopt.graph import (
    FLOATS,
    NOTE,
    argument,
    binary_operands,
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
    scalar,
    storage,
    view_base,
)
from llmopt.ops.pointwise import BINARY, UNARY
from llmopt.passes.activations import activation_of
from llmopt.writes import Writes, mutated_storages

_LARGEST = 24  # operations in one chain
_MAX_INPUTS = 8
# Names of the least and the largest number that these give.
_LIMITS = {"clamp": ("min", "max"), "clip": ("min", "max"), "hardtanh": ("min_val", "max_val")}
_ONE_LIMIT = {"clamp_min": "min", "clamp_max": "max"}
_REDUCTIONS = ("mean", "sum")
_ROUND = {torch.float16: "round_f16", torch.bfloat16: "round_bf16"}


def run(graph: fx.Graph) -> None:
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


def _takes(node: fx.Node, written: set[int]) -> bool:
    """True for an elementwise float node (or a reduction of the last dimension) the op can express."""
    if node.op not in ("call_function", "call_method") or not is_tensor(node) or is_in_place(node):
        return False
    value = fake(node)
    if value.dtype not in FLOATS or value.dim() == 0 or value.dim() > 5:
        return False
    if storage(node) in written:
        return False
    inputs = [fake(n) for n in node.all_input_nodes]
    if not all(isinstance(i, torch.Tensor) and i.dtype in FLOATS for i in inputs):
        return False
    name = kind(node)
    if activation_of(node) is not None:
        return True
    if name in FLOAT_CASTS:
        return value.dtype != fake(node.args[0]).dtype and "memory_format" not in node.kwargs
    if name in _REDUCTIONS:
        return _is_of_rows(node)
    if name == "pow":
        return scalar(argument(node, 1, "exponent")) == 2.0
    if name in UNARY and len(node.args) == 1 and not node.kwargs:
        return True
    if _limits(node) is not None or _slope(node) is not None:
        return True
    pair = binary_operands(node) if name in BINARY else None
    return pair is not None and all(is_tensor(p) or scalar(p) is not None for p in pair)


def _limits(node: fx.Node) -> tuple[float | None, float | None] | None:
    """The least and the largest number that a clamp by constants gives; None for anything else."""
    name = kind(node)
    if name == "relu6":
        return 0.0, 6.0
    if name in _ONE_LIMIT:
        number = scalar(argument(node, 1, _ONE_LIMIT[name]))
        if number is None or _is_refused(node, number):
            return None
        return (number, None) if name == "clamp_min" else (None, number)
    if name not in _LIMITS:
        return None
    default = (-1.0, 1.0) if name == "hardtanh" else (None, None)
    given = [argument(node, 1 + i, n, default[i]) for i, n in enumerate(_LIMITS[name])]
    limits = [None if g is None else scalar(g) for g in given]
    if any(x is not None and _is_refused(node, x) for x in limits):
        return None
    if any(g is not None and x is None for g, x in zip(given, limits, strict=True)):
        return None
    return limits[0], limits[1]


def _is_refused(node: fx.Node, number: float) -> bool:
    """PyTorch takes no number that the dtype cannot hold."""
    return isfinite(number) and abs(number) > torch.finfo(fake(node).dtype).max


def _slope(node: fx.Node) -> float | None:
    """Of negative numbers, for leaky_relu."""
    if kind(node) != "leaky_relu":
        return None
    slope = scalar(argument(node, 1, "negative_slope", 0.01))
    return None if slope is None or not isfinite(slope) or _is_refused(node, slope) else slope


def _is_of_rows(node: fx.Node) -> bool:
    dim = argument(node, 1, "dim")
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    last = fake(node.args[0]).dim() - 1
    return (
        dim in (-1, last)
        and bool(argument(node, 2, "keepdim", False))
        and argument(node, 3, "dtype") is None
    )


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
        if any(u not in members for u in node.users):
            continue
        members.add(node)
        frontier = sorted({*frontier, *node.all_input_nodes} - members, reverse=True)
    return members


def _reduces_inside(node: fx.Node, shape: Any) -> bool:
    """A reduced value joins only when it comes from rows of the chain's own shape."""
    while kind(node) not in _REDUCTIONS:
        inner = [n for n in node.all_input_nodes if is_tensor(n) and fake(n).dim() == len(shape)]
        if len(inner) != 1 or not is_one(fake(inner[0]).shape[-1]):
            return False
        node = inner[0]
    return same_shape(fake(node.args[0]).shape, shape)


def _worthwhile(members: set[fx.Node]) -> bool:
    """One kernel instead of several passes over memory, or instead of a way out of C++ and back for one operation."""
    inputs = [_uncopied(n) for m in members for n in m.all_input_nodes if is_tensor(n)]
    fed = any(map(_is_ours, inputs))
    if all(map(is_float_cast, members)):
        readers = [u for m in members for u in m.users if u not in members]
        return fed and all(map(_reaches_ours, readers))
    return fed or len(members) >= 2


def _is_ours(node: fx.Node) -> bool:
    source = node.args[0] if kind(node) == "getitem" else node
    return isinstance(source, fx.Node) and kind(source).startswith("llmopt.")


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
    encoder = _Encoder(root, inputs)
    for node in order:
        encoder.add(node)
    with graph.inserting_before(root):
        results = (encoder.number[root],)
        args = (tuple(encoder.program), results, (fake(root).dtype,), *inputs)
        whole = emit(graph, mode, ops.pointwise, args, like=root)
        new = emit(graph, mode, getitem, (whole, 0), like=root)
    users = list(root.users)
    root.replace_all_uses_with(new)
    for node in reversed(order):
        graph.erase_node(node)
    refresh(users)


class _Encoder:
    """Numbers values and writes the instructions of a chain, whose last node is the root."""

    def __init__(self, root: fx.Node, inputs: list[fx.Node]) -> None:
        self._root = root
        self.program: list[tuple] = []
        self.number: dict[fx.Node, int] = {n: i for i, n in enumerate(inputs)}
        self._inputs = len(inputs)

    def _append(self, *instruction: Any) -> int:
        self.program.append(instruction)
        return self._inputs + len(self.program) - 1

    def _value(self, operand: Any) -> int:
        if isinstance(operand, fx.Node):
            return self.number[operand]
        return self._append("const", float(operand))

    def _clamped(self, x: int, low: float | None, high: float | None) -> int:
        if low is not None:
            x = self._append("binary", "maximum", x, self._value(low))
        return x if high is None else self._append("binary", "minimum", x, self._value(high))

    def add(self, node: fx.Node) -> None:
        name, act = kind(node), activation_of(node)
        if act is not None:
            self.number[node] = self._append("unary", act, self._value(node.args[0]))
        elif is_float_cast(node):
            x = self._value(node.args[0])
            if rounds(node) and node is not self._root:  # storing the root's value rounds it
                x = self._append("unary", _ROUND[fake(node).dtype], x)
            self.number[node] = x
        elif name in _REDUCTIONS:
            self.number[node] = self._append("reduce", name, self._value(node.args[0]))
        elif name == "pow":
            self.number[node] = self._append("unary", "square", self._value(node.args[0]))
        elif name in UNARY:
            self.number[node] = self._append("unary", name, self._value(node.args[0]))
        elif (limits := _limits(node)) is not None:
            self.number[node] = self._clamped(self._value(node.args[0]), *limits)
        elif (slope := _slope(node)) is not None:
            x = self._value(node.args[0])
            below = self._append("binary", "mul", self._clamped(x, None, 0.0), self._value(slope))
            self.number[node] = self._append("binary", "add", self._clamped(x, 0.0, None), below)
        else:
            a, b = binary_operands(node)  # type: ignore[misc]
            self.number[node] = self._append("binary", name, self._value(a), self._value(b))
