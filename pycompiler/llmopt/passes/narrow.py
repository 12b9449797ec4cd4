"""narrow: results of quantised linears that only readers see which round them anyway are kept in bf16, half the bytes of f32.

Such readers are linears that round their inputs to 8 bits, and attentions whose products may be of bf16 numbers and whose result is read by
such linears alone.
"""

from __future__ import annotations

import torch
from torch import fx

from llmopt.graph import (
    fake,
    is_empty,
    is_tensor,
    is_view,
    kind,
    numel,
    refresh,
    storage,
    view_base,
)
from llmopt.ops.linear_quantized import parts
from llmopt.sizes import size_hint
from llmopt.writes import mutated_storages

_LINEAR, _ATTENTION = "llmopt.linear_quantized", "llmopt.attention"
_LEAST_ROWS = 64  # when compiled: fewer take no time to read and write
_COPIES = frozenset({"reshape", "contiguous", "flatten"})


def run(graph: fx.Graph) -> None:
    written = mutated_storages(graph)
    linears = {n for n in graph.nodes if _may_be_narrow(n, written)}
    attentions = {n for n in graph.nodes if kind(n) == _ATTENTION and _is_free(n)}
    before = -1
    while before != len(linears) + len(attentions):  # what was excluded may exclude others
        before = len(linears) + len(attentions)
        linears = {n for n in linears if _only_rounded(n, attentions)}
        attentions = {n for n in attentions if all(s in linears for s in _sources(n))}
    in_bf16 = linears | attentions
    for node in linears:
        node.kwargs = {**node.kwargs, "dtype": torch.bfloat16}
    changed = sorted(linears)
    for node in graph.nodes:
        if kind(node) == _LINEAR and node not in linears and _source(node.args[0]) in in_bf16:
            node.kwargs = {**node.kwargs, "dtype": fake(node).dtype}
            changed.append(node)
    refresh(changed)


def _may_be_narrow(node: fx.Node, written: set[int]) -> bool:
    return (
        kind(node) == _LINEAR
        and fake(node).dtype == torch.float32
        and parts(node)["residual"] is None
        and not is_empty(fake(node))
        and size_hint(numel(fake(node)) // fake(node).shape[-1]) >= _LEAST_ROWS
        and storage(node) not in written
    )


def _is_free(node: fx.Node) -> bool:
    """An attention that may round what it multiplies, and whose result only linears see that round it."""
    if node.kwargs.get("products") != "bf16" or fake(node).dtype != torch.float32:
        return False
    return all(fake(n).dtype == torch.float32 for n in node.args[:3]) and _only_rounded(node, ())


def _sources(attention: fx.Node) -> list[fx.Node]:
    return [_source(n) for n in attention.args[:3]]


def _source(node: fx.Node) -> fx.Node:
    """Where a value comes from, through views and copies."""
    while (base := view_base(node)) is not node or kind(node) in _COPIES:
        node = base if base is not node else node.args[0]
    return node


def _only_rounded(node: fx.Node, attentions: set[fx.Node] | tuple[()]) -> bool:
    """True when nobody sees more of a value than bf16 holds."""

    def rounds(user: fx.Node) -> bool:
        if is_tensor(user) and (is_view(user) or kind(user) in _COPIES):
            return fake(user).dtype == torch.float32 and _only_rounded(user, attentions)
        if kind(user) == _ATTENTION:
            return user in attentions and node not in user.args[3:]
        if kind(user) != _LINEAR:
            return False
        p = parts(user)
        others = [v for name, v in p.items() if name != "x"]
        rounded = p["x"] is node and p["activations"] == "int8" and p["norm_kind"] == "none"
        return rounded and node not in others

    return bool(node.users) and all(map(rounds, node.users))
