"""experts: the products of a mixture of experts and what sorts tokens for them → ops.grouped_linear and the ops of llmopt.ops.experts.

transformers sorts the places of all tokens by expert, multiplies each expert's rows by its own weights (`grouped_mm`), weighs the
results, puts them back in order and adds up those of each token. What stands around a product joins it: an expert's bias, act(gate)·up,
an activation. On GPUs PyTorch's own grouped_mm stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from llmopt import ops
from llmopt.casts import is_float_cast
from llmopt.graph import (
    CASTS,
    FLOATS,
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
    same_size,
    sole_user,
    unreadable,
    view_base,
)
from llmopt.ops.grouped_linear import DEFAULTS, parts
from llmopt.parameters import is_weight
from llmopt.passes.activations import activation_of
from llmopt.passes.fuse_linear import half_of
from llmopt.passes.simplify import erase_unread
from llmopt.writes import Writes

PRODUCTS = ("grouped_mm", "_grouped_mm", "transformers.grouped_mm_fallback")
_FLATTENED = ("reshape", "view", "flatten", "ravel")
# In these dtypes ids stay what they are.
_COUNTED = (torch.float32, torch.float64, torch.int32, torch.int64)
ORDER, ENDS, SORTED, INVERSE = range(4)  # what ops.sort_by_expert gives


def run(graph: fx.Graph) -> None:
    if not any(kind(n) in PRODUCTS and _runs_here(n) for n in graph.nodes):
        return
    edit = _Edit(graph, fake_mode_of(graph), Writes(graph))
    for name, rule in (
        ("softmax", _softmax),
        ("sort", _sort),
        ("getitem", _gather),
        *((name, _product) for name in PRODUCTS),
        ("add", _bias),
        ("mul", _gate_times_up),
    ):
        for node in [n for n in graph.nodes if kind(n) == name]:
            rule(edit, node)
    for node in list(graph.nodes):
        _activation(edit, node)
    for node in [n for n in graph.nodes if kind(n) == "sum"]:
        _combine(edit, node)


def _runs_here(node: fx.Node) -> bool:
    return is_tensor(node) and fake(node).device.type == "cpu"


@dataclass(frozen=True)
class _Edit:
    """The graph as rules change it."""

    graph: fx.Graph
    mode: Any
    writes: Writes

    def emit(
        self, target: Any, args: tuple, like: fx.Node, kwargs: dict[str, Any] | None = None
    ) -> fx.Node:
        return emit(self.graph, self.mode, target, args, kwargs, like)


def _part(node: Any, of: str, index: int) -> fx.Node | None:
    """The node whose part `index` this is, where it is one of an op with that name."""
    is_part = isinstance(node, fx.Node) and kind(node) == "getitem" and node.args[1] == index
    source = node.args[0] if is_part else None
    return source if isinstance(source, fx.Node) and kind(source) == of else None


def _softmax(edit: _Edit, node: fx.Node) -> None:
    """Of numbers that are widened first: it may widen them itself."""
    wide = node.args[0] if len(node.args) in (1, 2) else None
    if not is_float_cast(wide) or sole_user(wide) != node or node.kwargs.get("dtype"):
        return
    x = wide.args[0]
    if fake(wide).dtype == torch.float32 and not edit.writes.moves_reads(node, (x,)):
        with edit.graph.inserting_before(node):
            kwargs = {"dim": argument(node, 1, "dim"), "dtype": torch.float32}
            new = edit.emit(torch.softmax, (x,), node, kwargs)
        replace(node, new)
        edit.graph.erase_node(wide)


# ---- sorting


def _sort(edit: _Edit, node: fx.Node) -> None:
    """Places sorted by expert, where each expert's end, and the way back."""
    ids = argument(node, 0, "input")
    plain = argument(node, 1, "dim", -1) in (-1, 0) and not argument(node, 2, "descending", False)
    if not is_tensor(ids) or fake(ids).dim() != 1 or not plain:
        return
    if fake(ids).dtype not in (torch.int64, torch.int32) or fake(ids).device.type != "cpu":
        return
    sorted_ids, order = (_sole_part(node, i) for i in range(2))
    if sorted_ids is None or order is None:
        return
    found = _counted(sorted_ids)
    if found is None or edit.writes.moves_reads(found[0], (ids,)):
        return
    ends, experts = found
    counts, inverses = ends.args[0], list(_inverses(edit, order))
    allowed = {write for _, write in inverses if write is not None}
    if edit.writes.into((sorted_ids, order, ends, *(n for n, _ in inverses))) - allowed:
        return
    with edit.graph.inserting_before(node):
        new = edit.emit(ops.sort_by_expert, (ids, experts), node)
        made = [edit.emit(getitem, (new, i), node) for i in range(4)]
    replace(ends, made[ENDS])
    for inverse, write in inverses:
        if write is not None:
            edit.graph.erase_node(write)
        replace(inverse, made[INVERSE])
    replace(sorted_ids, made[SORTED])
    replace(order, made[ORDER])
    erase_unread(counts, node, *made)


def _sole_part(node: fx.Node, index: int) -> fx.Node | None:
    found = [u for u in node.users if kind(u) == "getitem" and u.args[1] == index]
    return found[0] if len(found) == 1 else None


def _counted(sorted_ids: fx.Node) -> tuple[fx.Node, int] | None:
    """The running sum of how many ids name each expert, and the number of experts."""
    casts = [u for u in sorted_ids.users if is_tensor(u) and kind(u) in (*CASTS, "to")]
    for cast in (sorted_ids, *casts):
        if fake(cast).dtype not in _COUNTED:
            continue
        for histogram in cast.users:
            if kind(histogram) != "histc" or len(histogram.users) != 1:
                continue
            experts, least, most = (
                argument(histogram, i, name, default)
                for i, name, default in ((1, "bins", 100), (2, "min", 0), (3, "max", 0))
            )
            total = sole_user(histogram)
            if total is None or kind(total) != "cumsum" or fake(total).dtype != torch.int32:
                continue
            if isinstance(experts, int) and (least, most) == (0, experts - 1) and experts > 1:
                return total, experts
    return None


def _inverses(edit: _Edit, order: fx.Node) -> Iterator[tuple[fx.Node, fx.Node | None]]:
    """The inverses of a permutation, and what writes each: x = empty_like(order); x[order] = arange(S), or argsort(order)."""
    for user in list(order.users):
        if kind(user) == "argsort" and len(user.args) == 1 and not user.kwargs:
            yield user, None
        if kind(user) != "empty_like" or len(user.args) != 1 or user.kwargs:
            continue
        writes = [u for u in user.users if kind(u) == "setitem_"]
        if len(writes) != 1 or writes[0].args[:2] != (user, order):
            continue
        counted = writes[0].args[2]
        if not is_tensor(counted) or kind(counted) != "arange" or len(counted.args) != 1:
            continue
        whole = same_shape(fake(counted).shape, fake(order).shape)
        whole = whole and not edit.writes.into((counted,))
        if whole and fake(counted).dtype == torch.int64 and min(user.users) is writes[0]:
            yield user, writes[0]


def _gather(edit: _Edit, node: fx.Node) -> None:
    """x[order // k], the rows of the tokens of all places."""
    x, index = node.args
    if not (is_tensor(x) and is_tensor(index) and fake(x).dim() == 2):
        return
    division = binary_operands(index) if kind(index) == "floordiv" else None
    source = None if division is None else _part(division[0], "llmopt.sort_by_expert", ORDER)
    if source is None or division is None or not isinstance(division[1], int) or division[1] < 1:
        return
    order, k = division
    if fake(x).dtype not in FLOATS or edit.writes.moves_reads(node, (x, order)):
        return
    if not same_size(fake(order).shape[0], fake(x).shape[0] * k):
        return
    with edit.graph.inserting_before(node):
        new = edit.emit(ops.gather_tokens, (x, order, k), node)
    replace(node, new)
    erase_unread(index)


# ---- products


def _product(edit: _Edit, node: fx.Node) -> None:
    x, weight, ends = (_operand(node, i) for i in range(3))
    bias, alone = argument(node, 3, "bias"), len(node.args) <= 4
    if bias is not None or not alone or not all(map(is_tensor, (x, weight, ends))):
        return
    if not _runs_here(node):
        return
    if fake(x).dim() != 2 or fake(weight).dim() != 3 or fake(ends).dtype != torch.int32:
        return
    dtypes = {fake(n).dtype for n in (x, weight, node)}
    if len(dtypes) > 1 or not dtypes <= set(FLOATS) or any(map(unreadable, (x, weight))):
        return
    if is_weight(weight):
        tensors, form = (weight,), None
    elif (form := _codes_of(weight)) is not None:
        tensors = view_base(weight).all_input_nodes
    if not (is_weight(weight) or form) or edit.writes.moves_reads(node, (x, *tensors, ends)):
        return
    with edit.graph.inserting_before(node):
        if form is None:
            turned = edit.emit("transpose", (weight, -2, -1), node)
            new = edit.emit(ops.grouped_linear, (x, (turned,), ends), node)
        else:
            codes = form.pop("codes")
            new = edit.emit(ops.grouped_linear, (x, (codes,), ends), node, form)
    replace(node, new)
    erase_unread(weight)


def _codes_of(weight: fx.Node) -> dict[str, Any] | None:
    """Codes, and what an ops.grouped_linear says about them, of a weight [E,K,N] that a llmopt.QuantizedExperts gives."""
    base = view_base(weight)
    if kind(base) != "llmopt.expert_weights":
        return None
    value, before = fake(weight), fake(base)
    if not same_shape(value.mT.shape, before.shape) or value.mT.stride() != before.stride():
        return None
    codes, scales, offsets, bits, activations = base.args[:5]
    tensors = [t for t in (codes, scales, offsets) if t is not None]
    if not all(map(is_weight, tensors)):
        return None
    form = {"codes": codes, "bits": bits, "activations": activations, "scales": (scales,)}
    return form if offsets is None else {**form, "offsets": (offsets,)}


# What PyTorch and transformers call the operands of a product.
_NAMES = (("mat_a", "self", "input"), ("mat_b", "mat2", "weight"), ("offs",))


def _operand(node: fx.Node, place: int) -> Any:
    by_name = (node.kwargs[n] for n in _NAMES[place] if node.kwargs.get(n) is not None)
    return node.args[place] if len(node.args) > place else next(by_name, None)


def _is_plain(node: Any) -> bool:
    """An ops.grouped_linear with nothing fused behind it yet, of one weight."""
    if not is_tensor(node) or kind(node) != "llmopt.grouped_linear":
        return False
    p = parts(node)
    return p["act"] == "none" and not p["gated"] and len(p["weights"]) == 1


def _rebuild(edit: _Edit, old: fx.Node, linear: fx.Node, *others: fx.Node, **changes: Any) -> None:
    """Replaces `old`, which reads `linear` and `others`, by the linear with some arguments changed, unless that moves a read across a
    write."""
    p = {**parts(linear), **changes}
    optional = (t for name in ("biases", "scales", "offsets") for t in p[name] or ())
    operands = (p["x"], p["ends"], *p["weights"], *optional, *others)
    if edit.writes.moves_reads(old, operands):
        return
    first = ("x", "weights", "ends")
    kwargs = {n: p[n] for n, usual in DEFAULTS.items() if n not in first and p[n] != usual}
    read = old.all_input_nodes
    with edit.graph.inserting_before(old):
        args = (p["x"], p["weights"], p["ends"])
        new = edit.emit(ops.grouped_linear, args, linear, kwargs)
    replace(old, new)
    erase_unread(*read)


def _bias(edit: _Edit, node: fx.Node) -> None:
    """Each row's own bias, picked by the sorted ids that the product's ends come from."""
    pair = binary_operands(node)
    for linear, picked in () if pair is None else (pair, pair[::-1]):
        if not _is_plain(linear) or sole_user(linear) is not node or not is_tensor(picked):
            continue
        p = parts(linear)
        if p["biases"] or kind(picked) != "getitem" or not is_weight(picked.args[0]):
            continue
        table, index = picked.args
        source = _part(index, "llmopt.sort_by_expert", SORTED)
        if source is None or _part(p["ends"], "llmopt.sort_by_expert", ENDS) is not source:
            continue
        same = same_shape(fake(table).shape, fake(p["weights"][0]).shape[:2])
        if same and fake(table).dtype == fake(linear).dtype:
            _rebuild(edit, node, linear, index, biases=(table,))
            return


def _gate_times_up(edit: _Edit, node: fx.Node) -> None:
    """act(gate) · up, the halves of one product."""
    pair = binary_operands(node)
    for activated, up in () if pair is None else (pair, pair[::-1]):
        act = activation_of(activated) if is_tensor(activated) and is_tensor(up) else None
        if act is None or sole_user(activated) is not node or sole_user(up) is not node:
            continue
        halves = [h for n in (activated.args[0], up) if (h := half_of(n)) is not None]
        if len(halves) != 2 or halves[0][0] is not halves[1][0] or halves[0][1] == halves[1][1]:
            continue
        linear = halves[0][0]
        if not _is_plain(linear):
            continue
        p, n = parts(linear), fake(linear).shape[1] // 2
        cuts = [(slice(None), slice(n * half, n * half + n)) for _, half in halves]
        with edit.graph.inserting_before(linear):
            both = {
                name: tuple(edit.emit(getitem, (t, cut), linear) for t in p[name] for cut in cuts)
                for name in ("weights", "biases", "scales", "offsets")
                if p[name]
            }
        _rebuild(edit, node, linear, **both, act=act, gated=True)
        return


def _activation(edit: _Edit, node: fx.Node) -> None:
    act = activation_of(node)
    linear: Any = None if act is None else node.args[0]
    if _is_plain(linear) and sole_user(linear) == node:
        _rebuild(edit, node, linear, act=act)


# ---- the way back


def _combine(edit: _Edit, node: fx.Node) -> None:
    """The sum over each token's places of their rows times their weights, back in the order of the tokens."""
    dim = argument(node, 1, "dim")
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    rows = node.args[0]
    if dim not in (1, -2) or argument(node, 2, "keepdim", False) or not is_tensor(rows):
        return
    if (
        argument(node, 3, "dtype") is not None
        or fake(rows).dim() != 3
        or kind(rows) not in _FLATTENED
    ):
        return
    picked = rows.args[0]
    if not is_tensor(picked) or kind(picked) != "getitem" or fake(picked).dim() != 2:
        return
    weighted, inverse = picked.args
    source = _part(inverse, "llmopt.sort_by_expert", INVERSE)
    found = None if source is None else _weighted(weighted, source)
    if found is None or not _chained(weighted, picked, rows, node):
        return
    x, weights, order = found
    tokens, k, width = fake(rows).shape
    if not same_shape(fake(weights).shape, (tokens, k)) or not same_size(width, fake(x).shape[1]):
        return
    last = _cast_after(node)
    if edit.writes.moves_reads(last, (x, inverse, weights, order)):
        return
    with edit.graph.inserting_before(last):
        args = (x, inverse, weights, fake(last).dtype)
        new = edit.emit(ops.combine_experts, args, node)
    read = last.all_input_nodes
    replace(last, new)
    erase_unread(*read)


def _chained(*nodes: fx.Node) -> bool:
    """Whether each but the last is read by the next one only."""
    return all(sole_user(a) is b for a, b in pairwise(nodes))


def _cast_after(node: fx.Node) -> fx.Node:
    user = sole_user(node)
    return user if user is not None and is_float_cast(user) and user.args[0] is node else node


def _weighted(node: Any, source: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """x [S,H], weights [T,k] and order of x · weights.reshape(-1)[order][:, None]."""
    pair = binary_operands(node) if is_tensor(node) and kind(node) == "mul" else None
    for x, column in () if pair is None else (pair, pair[::-1]):
        if not (is_tensor(x) and is_tensor(column)) or fake(x).dim() != 2:
            continue
        if kind(column) != "unsqueeze" or argument(column, 1, "dim") not in (-1, 1):
            continue
        picked = column.args[0]
        if kind(picked) != "getitem":
            continue
        flat, order = picked.args
        if _part(order, "llmopt.sort_by_expert", ORDER) is not source:
            continue
        if is_tensor(flat) and kind(flat) in _FLATTENED and fake(flat).dim() == 1:
            weights = flat.args[0]
            if fake(weights).dim() == 2 and {fake(n).dtype for n in (x, weights)} <= set(FLOATS):
                return x, weights, order
    return None
