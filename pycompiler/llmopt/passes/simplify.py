"""simplify: removes what computes nothing — no-op casts and copies, dropout outside training, factors of one — and turns a shifted arange
into one arange, so that later passes see one form."""

from __future__ import annotations

import operator

import torch
from torch import fx

from llmopt.casts import FLOAT_CASTS
from llmopt.effects import is_idle_dropout
from llmopt.graph import (
    PLAIN_ARANGE,
    argument,
    binary_operands,
    emit,
    fake,
    getitem,
    is_dense,
    is_empty,
    is_in_place,
    is_tensor,
    is_view,
    kind,
    replace,
    same_shape,
    scalar,
    storage,
)
from llmopt.writes import mutated_storages

_CASTS = FLOAT_CASTS | {"double"}
_SAME_LAYOUT_VIEWS = frozenset(
    {"view", "reshape", "expand", "flatten", "squeeze", "detach", "getitem", "expand_as", "alias"}
)
# Unused nodes of these kinds may go: they neither write nor check anything.
PURE = frozenset(
    [
        "_log_api_usage_once",
        "add",
        "sub",
        "mul",
        "div",
        "neg",
        "pow",
        "rsqrt",
        "sqrt",
        "mean",
        "sum",
        "max",
        "amax",
        "view",
        "reshape",
        "transpose",
        "permute",
        "unsqueeze",
        "squeeze",
        "expand",
        "flatten",
        "getitem",
        "to",
        "float",
        "half",
        "bfloat16",
        "long",
        "int",
        "bool",
        "type_as",
        "clone",
        "contiguous",
        "arange",
        "numel",
        "size",
        "dim",
        "sym_sum",
        "sym_size",
        "le",
        "lt",
        "ge",
        "gt",
        "eq",
        "ne",
        "and_",
        "or_",
        "cat",
        "stack",
        "chunk",
        "split",
        "sort",
        "argsort",
        "topk",
        "histc",
        "cumsum",
        "unbind",
        "repeat_interleave",
        "matmul",
        "bmm",
        "baddbmm",
        "softmax",
        "silu",
        "gelu",
        "relu",
        "tanh",
        "sigmoid",
        "cos",
        "sin",
        "exp",
        "new_ones",
        "zeros",
        "ones",
        "full",
        "tensor",
        "ones_like",
        "zeros_like",
        "where",
        "masked_fill",
        "linear",
        "embedding",
        "layer_norm",
        "rms_norm",
        "sym_int",
        "sym_float",
        "invert",
        "__and__",
        "__or__",
        "floordiv",
        "mod",
        "floor",
        "t",
        "narrow",
        "select",
        "expand_as",
        "getattr_shape",
        "getattr_dtype",
        "getattr_device",
        "is_contiguous",
        "dropout",
    ]
)


def run(graph: fx.Graph) -> None:
    written = mutated_storages(graph)
    for node in list(graph.nodes):
        if node.op not in ("call_function", "call_method"):
            continue
        _drop_empty_pieces(node)
        if _slice_for_list(graph, node, written) or _shift_arange(graph, node, written):
            continue
        target = _identity_of(node, written)
        if target is not None:
            replace(node, target)
    erase_unused(graph)


def drop_idle_dropouts(graph: fx.Graph) -> None:
    """What these give is what they were given, which their example values do not say."""
    for node in [n for n in graph.nodes if is_idle_dropout(n)]:
        source = argument(node, 0, "input")
        if is_tensor(source):
            replace(node, source)


def erase_unused(graph: fx.Graph) -> None:
    """Removes nodes nobody reads, from the back, when they are known to have no effect."""
    for node in reversed(list(graph.nodes)):
        if _is_unused(node):
            graph.erase_node(node)


def erase_unread(*nodes: fx.Node) -> None:
    """The same for these nodes, and for what only they read."""
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if not node._erased and _is_unused(node):
            waiting += node.all_input_nodes
            node.graph.erase_node(node)


def _is_unused(node: fx.Node) -> bool:
    if node.users or node.op not in ("call_function", "call_method") or is_in_place(node):
        return False
    return kind(node) in PURE or kind(node).startswith("llmopt.") or is_view(node)


def _identity_of(node: fx.Node, written: set[int]) -> fx.Node | None:
    """The input this node returns unchanged, or whose values it copies where nobody can tell a copy from the input; or None."""
    source = node.args[0] if node.args else None
    if not (is_tensor(source) and is_tensor(node)) or is_in_place(node):
        return None
    name, before, after = kind(node), fake(source), fake(node)
    if before.dtype != after.dtype or before.device != after.device:
        return None
    if not same_shape(before.shape, after.shape):
        return None
    if name in _CASTS:
        plain = (
            node.kwargs.get("copy") is not True
            and "memory_format" not in node.kwargs
            and len(node.args) < 4
        )
        return source if plain else None
    if name == "contiguous":
        return source if is_dense(before) and "memory_format" not in node.kwargs else None
    if name in _SAME_LAYOUT_VIEWS:
        unchanged = storage(node) == storage(source) and same_shape(before.stride(), after.stride())
        return source if unchanged else None
    if name in ("mul", "div"):
        other = argument(node, 1, "other")
        plain = scalar(other) == 1.0 and "rounding_mode" not in node.kwargs
        return source if plain and not copy_matters(node, source, written) else None
    return None


def _drop_empty_pieces(node: fx.Node) -> None:
    """A vector without elements, as which a cache begins, may be joined to anything and adds nothing."""
    pieces = argument(node, 0, "tensors") if kind(node) == "cat" and is_tensor(node) else None
    if not isinstance(pieces, (list, tuple)) or fake(node).dim() == 1:
        return
    some = [p for p in pieces if not (is_tensor(p) and fake(p).dim() == 1 and is_empty(fake(p)))]
    if some and len(some) < len(pieces) and all(fake(p).dtype == fake(node).dtype for p in some):
        node.args, node.kwargs = (some, argument(node, 1, "dim", 0)), {}


def _slice_for_list(graph: fx.Graph, node: fx.Node, written: set[int]) -> bool:
    """x[..., [i], :] copies what x[..., i:i+1, :] is a view of: the same values where nobody can tell a copy from a view."""
    if kind(node) != "getitem" or not is_tensor(node) or not isinstance(node.args[1], tuple):
        return False
    source, index = node.args
    lists = [i for i in index if isinstance(i, list)]
    others = [i for i in index if not isinstance(i, (list, slice)) and i is not Ellipsis]
    if len(lists) != 1 or others or len(lists[0]) != 1 or type(lists[0][0]) is not int:
        return False  # a list of a bool is a mask
    if copy_matters(node, source, written):
        return False
    i = lists[0][0]
    at = next(n for n, part in enumerate(index) if isinstance(part, list))
    behind = len(index) - at if Ellipsis in index[:at] else fake(source).dim() - at
    size = fake(source).shape[-behind]
    if isinstance(size, int) and not -size <= i < size:
        return False  # PyTorch says so
    window = slice(i, i + 1 if i != -1 else None)
    with graph.inserting_before(node):
        place = tuple(window if isinstance(k, list) else k for k in index)
        new = emit(graph, fake(source).fake_mode, getitem, (source, place), like=node)
    replace(node, new)
    return True


def _shift_arange(graph: fx.Graph, node: fx.Node, written: set[int]) -> bool:
    """arange(n) + s, as positions behind a cache are counted, becomes arange(s, s + n)."""
    operands = binary_operands(node) if kind(node) == "add" and is_tensor(node) else None
    counter, shift = operands or (None, None)
    if not isinstance(counter, fx.Node) or kind(counter) != "arange" or len(counter.args) != 1:
        return False
    if counter.kwargs.keys() - PLAIN_ARANGE or storage(counter) in written:
        return False
    size = fake(shift) if isinstance(shift, fx.Node) else shift
    if not isinstance(size, (int, torch.SymInt)) or isinstance(size, bool):
        return False
    value = fake(node)
    if value.dtype != torch.int64 or fake(counter).dtype != torch.int64:
        return False
    with graph.inserting_before(node):
        end = counter.args[0]
        if isinstance(shift, int) and isinstance(end, int):
            end += shift
        elif shift != 0:
            end = emit(graph, value.fake_mode, operator.add, (shift, end), like=node)
        new = emit(
            graph, value.fake_mode, torch.arange, (shift, end), dict(counter.kwargs), like=node
        )
    replace(node, new)
    return True


def copy_matters(copy: fx.Node, source: fx.Node, written: set[int]) -> bool:
    """True when a copy may not become its source: one of them is edited in place, or the caller of the graph gets the copy."""
    return storage(source) in written or storage(copy) in written or is_returned(copy)


def _passes_on(user: fx.Node, node: fx.Node) -> bool:
    """Whether a user gives on memory of the node: as a window on it, or as one of the node's several results."""
    picks = kind(user) == "getitem" and not is_tensor(node)
    return picks or is_view(user) or is_in_place(user) or not is_tensor(user)


def is_returned(node: fx.Node) -> bool:
    """True when the graph gives the value, or a window on it, to its caller."""
    return any(
        user.op == "output" or (_passes_on(user, node) and is_returned(user)) for user in node.users
    )
