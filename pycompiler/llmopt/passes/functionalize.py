"""functionalize: arithmetic in place on what the graph itself made (x += y, relu(x, inplace=True)) becomes plain arithmetic.

From each write on, the new value stands for the tensor under all of its names. Memory of which a window is read across a write, or into
which something else writes, stays as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch._ops import OpOverload, OpOverloadPacket

from llmopt.graph import (
    compute_fake,
    fake,
    fake_mode_of,
    is_dense,
    is_tensor,
    is_view,
    kind,
    refresh,
    same_shape,
    tensors_in,
)
from llmopt.passes.simplify import is_returned
from llmopt.writes import writers_by_storage, written_by

# Without the underscore.
_ARITHMETIC = frozenset(
    [
        "abs", "add", "celu", "clamp", "clamp_max", "clamp_min", "clip", "cos", "div", "elu", "erf", "exp", "hardsigmoid", "hardswish",
        "hardtanh", "leaky_relu", "log", "masked_fill", "mish", "mul", "neg", "pow", "reciprocal", "relu", "relu6", "rsqrt", "selu",
        "sigmoid", "silu", "sin", "sqrt", "square", "sub", "tanh",
    ]
)  # fmt: skip


def run(graph: fx.Graph) -> None:
    mode = fake_mode_of(graph)
    sharers = _nodes_by_storage(graph)
    found = []  # rewriting one gives nodes other example values, by which the others are known
    for place, writes in writers_by_storage(graph).items():
        names = [n for n in sharers.get(place, ()) if n in writes or not _is_window(n)]
        if not _is_own(names, writes) or not _windows_close(sharers[place], place, writes):
            continue
        if not is_dense(fake(names[0])) and any(map(is_returned, names)):
            continue  # what computes it elsewhere may lay it out in another way
        plain = [_plain(mode, names[0], w) for w in writes]
        if all(p is not None for p in plain):
            found.append((names[0], list(zip(writes, plain, strict=True))))
    for made, targets in found:
        _rewrite(mode, made, targets)


def _nodes_by_storage(graph: fx.Graph) -> dict[int, list[fx.Node]]:
    """The nodes whose value is memory, or whose values, such as the parts of a chunk, have some of it."""
    found: dict[int, dict[fx.Node, None]] = {}
    for node in graph.nodes:
        for tensor in tensors_in(fake(node)):
            found.setdefault(tensor.untyped_storage()._cdata, {})[node] = None
    return {place: list(nodes) for place, nodes in found.items()}


def _is_window(node: fx.Node) -> bool:
    """True but for memory of its own: what an operation made, alone or as one of several results (topk's values)."""
    picks = kind(node) == "getitem" and is_tensor(node.args[0])
    return not is_tensor(node) or is_view(node) or picks


def _is_own(names: list[fx.Node], writes: list[fx.Node]) -> bool:
    """True for memory that an operation made, and which is written as a whole and by nothing but arithmetic.

    names: the tensor itself, first as it was made, then as each write returns it.
    """
    if names[1:] != writes or names[0].op not in ("call_function", "call_method"):
        return False
    return all(
        kind(w).removesuffix("_") in _ARITHMETIC
        and tuple(written_by(w)) == w.args[:1]
        and w.args[0] in names
        for w in writes
    )


def _windows_close(sharers: list[fx.Node], place: int, writes: list[fx.Node]) -> bool:
    """Whether nobody reads through a window that was there before a write once that is done."""
    for window in sharers:
        if window in writes or not _is_window(window):
            continue
        following = next((w for w in writes if w > window), None)
        if following is None:
            continue
        waiting = [window]
        while waiting:
            for user in waiting.pop().users:
                if user > following:
                    return False
                shares = any(t.untyped_storage()._cdata == place for t in tensors_in(fake(user)))
                if shares and _is_window(user):
                    waiting.append(user)
    return True


def _plain(mode: Any, made: fx.Node, write: fx.Node) -> Callable | str | None:
    """What computes the written value elsewhere, if that has the dtype and the layout of the memory."""
    target = _without_writing(write)
    if target is None:
        return None
    before, value = fake(made), compute_fake(mode, target, write.args, _told(write))
    fits = value.dtype == before.dtype and value.device == before.device
    fits = fits and same_shape(value.shape, before.shape)
    return target if fits and same_shape(value.stride(), before.stride()) else None


def _without_writing(write: fx.Node) -> Callable | str | None:
    """The operation that gives what this one writes, and takes the same arguments but for `inplace`; None where none is known."""
    name = kind(write).removesuffix("_")
    if write.kwargs.get("inplace") is True:
        return write.target
    if write.op == "call_method":
        return name
    if isinstance(write.target, (OpOverload, OpOverloadPacket)):
        return getattr(torch.ops.aten, name, None)
    if write.target is getattr(operator, f"i{name}", getattr(operator, f"itrue{name}", None)):
        return getattr(torch, name, None)
    for owner in (torch, torch._C._nn, F):
        if getattr(owner, f"{name}_", None) is write.target:
            return getattr(owner, name, None)
    return None


def _told(write: fx.Node) -> dict[str, Any]:
    return {k: v for k, v in write.kwargs.items() if k != "inplace"}


def _rewrite(mode: Any, made: fx.Node, writes: list[tuple[fx.Node, Any]]) -> None:
    names = [made]
    for write, target in writes:
        now = names[-1]
        arguments = (write.args, _told(write))
        write.args, write.kwargs = fx.map_arg(arguments, lambda n: now if n in names else n)  # noqa: B023
        write.op = "call_method" if isinstance(target, str) else "call_function"
        write.target = target
        write.meta.pop("llmopt_kind", None)
        write.meta["example_value"] = compute_fake(mode, target, write.args, write.kwargs)
        for name in names:
            for user in [u for u in name.users if u > write]:
                user.replace_input_with(name, write)
        names.append(write)
    refresh([user for name in names for user in name.users])
