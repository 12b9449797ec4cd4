"""fuse_linear: what stands around a linear joins it.

In this order: act(gate)·up pairs, activations, projections of one input side by side, scalar factors, residual additions, and the
norm in front. A row slice behind a norm moves in front of it first, so that a norm of one row is not computed for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from llmopt import ops
from llmopt.graph import (
    argument,
    binary_operands,
    emit,
    fake,
    fake_mode_of,
    getitem,
    is_tensor,
    kind,
    own_value,
    replace,
    replace_all,
    same_shape,
    same_size,
    scalar,
    sole_user,
)
from llmopt.ops.linear import DEFAULTS, given, parts
from llmopt.passes.activations import activation_of
from llmopt.passes.quantize import form_of
from llmopt.passes.simplify import erase_unused
from llmopt.writes import Writes


def run(graph: fx.Graph) -> None:
    edit = _Edit(graph, fake_mode_of(graph), Writes(graph))
    _each(edit, "getitem", _slice_before_norm)
    _each(edit, "mul", _gate_times_up)
    _activations(edit)
    _side_by_side(edit)
    _each(edit, "mul", _scaled)
    _each(edit, "add", _residual)
    _norm_in_front(edit)
    erase_unused(graph)


@dataclass(frozen=True)
class _Edit:
    """The graph as rules change it."""

    graph: fx.Graph
    mode: Any
    writes: Writes

    def linear(self, old: fx.Node, like: fx.Node, arguments: dict[str, Any]) -> bool:
        """Puts a linear in the place of `old`; False, and nothing changed, where that would move a read across a write."""
        p = {**DEFAULTS, **arguments}
        x, weights, biases = p["x"], p["weights"], p["biases"]
        vectors = (p["norm_weight"], p["norm_bias"])
        operands = (x, *weights, *(biases or ()), p["residual"], *vectors)
        if self.writes.moves_reads(old, operands):
            return False
        kwargs = given(p, "x", "weights", "biases")
        with self.graph.inserting_before(old):
            args = (x, weights, biases)
            new = emit(self.graph, self.mode, ops.linear, args, kwargs, like, own_value(old))
        replace(old, new)
        return True


def _each(edit: _Edit, name: str, rule: Callable[[_Edit, fx.Node], None]) -> None:
    for node in list(edit.graph.nodes):
        if node.op in ("call_function", "call_method") and kind(node) == name and is_tensor(node):
            rule(edit, node)


def _is_plain(node: Any) -> bool:
    """An ops.linear node with nothing fused behind it yet."""
    if not is_tensor(node) or kind(node) != "llmopt.linear":
        return False
    p = parts(node)
    return p["act"] == "none" and not p["gated"] and p["residual"] is None and p["alpha"] == 1.0


def _rebuild(edit: _Edit, old: fx.Node, linear: fx.Node, **changes: Any) -> bool:
    """Replaces `old` by the linear with some arguments changed, if it may be; `linear` goes when nobody else reads it."""
    done = edit.linear(old, linear, {**parts(linear), **changes})
    if done and linear is not old and not linear.users:
        edit.graph.erase_node(linear)
    return done


def _slice_before_norm(edit: _Edit, node: fx.Node) -> None:
    norm, index = node.args
    if not is_tensor(norm) or kind(norm) != "llmopt.norm" or sole_user(norm) != node:
        return
    index = index if isinstance(index, tuple) else (index,)
    if Ellipsis in index or not all(isinstance(i, slice) for i in index):
        return
    if len(index) == fake(norm).dim() and index[-1] != slice(None):
        return
    x = norm.args[0]
    if edit.writes.moves_reads(node, norm.all_input_nodes):
        return
    with edit.graph.inserting_before(node):
        sliced = emit(edit.graph, edit.mode, getitem, (x, node.args[1]), like=node)
        new = emit(
            edit.graph, edit.mode, ops.norm, (sliced, *norm.args[1:]), dict(norm.kwargs), like=norm
        )
    replace(node, new)
    edit.graph.erase_node(norm)


def _gate_times_up(edit: _Edit, node: fx.Node) -> None:
    pair = binary_operands(node)
    if pair is None or not all(is_tensor(p) for p in pair):
        return
    for activated, up in (pair, pair[::-1]):
        act = activation_of(activated)
        if act is None or sole_user(activated) is not node or sole_user(up) is not node:
            continue
        gate = activated.args[0]
        if (
            _is_plain(gate)
            and _is_plain(up)
            and sole_user(gate) is activated
            and _gate_two_linears(edit, node, gate, up, act)
        ):
            edit.graph.erase_node(activated)
            edit.graph.erase_node(gate)
            edit.graph.erase_node(up)
            return
        if _gate_one_linear(edit, node, gate, up, act):
            return


def _gate_two_linears(edit: _Edit, node: fx.Node, gate: fx.Node, up: fx.Node, act: str) -> bool:
    g, u = parts(gate), parts(up)
    if g["x"] is not u["x"] or len(g["weights"]) != 1 or len(u["weights"]) != 1:
        return False
    if not same_shape(fake(gate).shape, fake(up).shape):
        return False
    if form_of(g["weights"][0]) != form_of(u["weights"][0]):
        return False
    biases = (*(g["biases"] or (None,)), *(u["biases"] or (None,)))
    both = {"x": g["x"], "weights": (*g["weights"], *u["weights"]), "biases": biases}
    return edit.linear(node, gate, {**both, "act": act, "gated": True})


def _gate_one_linear(edit: _Edit, node: fx.Node, gate: Any, up: Any, act: str) -> bool:
    """Phi-3's form: one projection gives gate and up, cut in two halves."""
    halves = [half for n in (gate, up) if (half := half_of(n)) is not None]
    if len(halves) != 2 or halves[0][0] is not halves[1][0] or {h[1] for h in halves} != {0, 1}:
        return False
    linear = halves[0][0]
    if not _is_plain(linear) or len(parts(linear)["weights"]) != 1:
        return False
    p = parts(linear)
    weight, bias = p["weights"][0], (p["biases"] or (None,))[0]
    if form_of(weight) is not None:
        return False
    n = fake(weight).shape[0] // 2
    rows = (slice(0, n), slice(n, 2 * n))
    with edit.graph.inserting_before(linear):
        order = [halves[0][1], halves[1][1]]
        weights = tuple(
            emit(edit.graph, edit.mode, getitem, (weight, rows[i]), like=linear) for i in order
        )
        biases = tuple(
            None
            if bias is None
            else emit(edit.graph, edit.mode, getitem, (bias, rows[i]), like=linear)
            for i in order
        )
    both = {"x": p["x"], "weights": weights, "biases": biases}
    return edit.linear(node, linear, {**both, "act": act, "gated": True})


def half_of(node: Any) -> tuple[fx.Node, int] | None:
    """(linear, 0 or 1) when node is linear.chunk(2, -1)[i] and both halves have one reader."""
    if (
        not is_tensor(node)
        or kind(node) != "getitem"
        or node.args[1] not in (0, 1)
        or sole_user(node) is None
    ):
        return None
    chunk = node.args[0]
    if kind(chunk) != "chunk" or len(chunk.users) != 2 or argument(chunk, 1, "chunks") != 2:
        return None
    dim = argument(chunk, 2, "dim", 0)
    linear = chunk.args[0]
    if dim not in (-1, fake(linear).dim() - 1) or sole_user(linear) is not chunk:
        return None
    width = fake(linear).shape[-1]
    return (linear, node.args[1]) if isinstance(width, int) and width % 2 == 0 else None


def _activations(edit: _Edit) -> None:
    for node in list(edit.graph.nodes):
        act = activation_of(node)
        if act is not None and _is_plain(node.args[0]) and sole_user(node.args[0]) == node:
            _rebuild(edit, node, node.args[0], act=act)


def _side_by_side(edit: _Edit) -> None:
    """Plain linears of one input become one linear, its result cut into theirs."""
    groups: dict[tuple[Any, ...], list[fx.Node]] = {}
    for node in edit.graph.nodes:
        if _is_plain(node):
            forms = {form_of(w) for w in parts(node)["weights"]}
            if len(forms) == 1:
                groups.setdefault((parts(node)["x"], forms.pop()), []).append(node)
    for (x, _), group in groups.items():
        if len(group) > 1:
            _join(edit, x, group)


def _join(edit: _Edit, x: fx.Node, group: list[fx.Node]) -> None:
    weights = tuple(w for n in group for w in parts(n)["weights"])
    biases = tuple(
        b for n in group for b in (parts(n)["biases"] or (None,) * len(parts(n)["weights"]))
    )
    first = group[0]
    if any(u.op == "output" for n in group for u in n.users):
        return  # a window on a wider row is not what the caller gets from PyTorch
    if edit.writes.between((x, *weights, *(b for b in biases if b is not None)), first, group[-1]):
        return
    late = [w for w in (*weights, *biases) if isinstance(w, fx.Node) and first < w]
    for node in late:  # views of weights (a transposed Conv1D) stand next to their linear
        if node.all_input_nodes and all(
            n.op in ("placeholder", "get_attr") for n in node.all_input_nodes
        ):
            first.prepend(node)
        else:
            return
    with edit.graph.inserting_before(first):
        joined = emit(edit.graph, edit.mode, ops.linear, (x, weights, biases), like=first)
        start = 0
        pieces = []
        for node in group:
            width = fake(node).shape[-1]
            index = (Ellipsis, slice(start, start + width))
            pieces.append(emit(edit.graph, edit.mode, getitem, (joined, index), like=node))
            start += width
    replace_all(list(zip(group, pieces, strict=True)))


def _scaled(edit: _Edit, node: fx.Node) -> None:
    pair = binary_operands(node)
    if pair is None:
        return
    linear, factor = pair if is_tensor(pair[0]) else pair[::-1]
    value = scalar(factor)
    if value is None or not _is_plain(linear) or sole_user(linear) is not node:
        return
    if fake(node).dtype == fake(linear).dtype and not any(parts(linear)["biases"] or ()):
        _rebuild(edit, node, linear, alpha=value)


def _residual(edit: _Edit, node: fx.Node) -> None:
    pair = binary_operands(node)
    if pair is None or not all(is_tensor(p) for p in pair) or pair[0] is pair[1]:
        return
    # The later linear takes the earlier value: that one is complete when the linear runs.
    for linear, other in sorted((pair, pair[::-1]), key=lambda p: p[0], reverse=True):
        if (
            kind(linear) != "llmopt.linear"
            or sole_user(linear) is not node
            or parts(linear)["residual"] is not None
        ):
            continue
        same = fake(other).dtype == fake(linear).dtype and same_shape(
            fake(other).shape, fake(linear).shape
        )
        if same and fake(node).dtype == fake(linear).dtype:
            _rebuild(edit, node, linear, residual=other)
            return


def _norm_in_front(edit: _Edit) -> None:
    """A norm read by at most two linears is computed by them while they load their input."""
    for norm in list(edit.graph.nodes):
        if kind(norm) != "llmopt.norm" or not 0 < len(norm.users) <= 2:
            continue
        users = list(norm.users)
        x, weight, bias, name, eps, offset = norm.args[:6]
        readers_fit = all(
            kind(u) == "llmopt.linear"
            and parts(u)["x"] is norm
            and parts(u)["norm_kind"] == "none"
            and parts(u)["residual"] is not norm
            for u in users
        )
        if (
            not readers_fit
            or fake(x).dtype != fake(norm).dtype
            or not same_size(fake(x).shape[-1], fake(norm).shape[-1])
        ):
            continue
        for user in users:
            changes = {
                "norm_kind": name,
                "norm_weight": weight,
                "norm_bias": bias,
                "norm_eps": eps,
                "norm_offset": offset,
            }
            _rebuild(edit, user, user, x=x, **changes)
        if not norm.users:
            edit.graph.erase_node(norm)
