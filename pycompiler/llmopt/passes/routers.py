"""routers: the choice of experts from the best groups of them (DeepSeek-V3 and what follows it) → ops.limit_groups.

Models write a mask of groups with zeros_like and scatter_, spread it over the experts of each group, and fill the others' scores. The
topk that then chooses experts stays what it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from llmopt import ops
from llmopt.graph import (
    argument,
    emit,
    expression,
    fake,
    fake_mode_of,
    is_tensor,
    is_view,
    kind,
    own_value,
    readers,
    replace,
    same_shape,
    scalar,
    sole_user,
)
from llmopt.passes.simplify import erase_unread
from llmopt.writes import Writes, written_by

_RESHAPES = ("view", "reshape", "unflatten", "contiguous", "clone", "flatten")
_LAST = (-1, 2)  # of [T, groups, experts of one]


def run(graph: fx.Graph) -> None:
    if not any(kind(n) == "scatter_" for n in graph.nodes):
        return
    mode, writes = fake_mode_of(graph), Writes(graph)
    for node in [n for n in graph.nodes if kind(n) == "masked_fill"]:
        _match(graph, mode, node, writes)


def _match(graph: fx.Graph, mode: Any, node: fx.Node, writes: Writes) -> None:
    scores, dropped = node.args[0], argument(node, 1, "mask")
    fill, chain = scalar(argument(node, 2, "value")), _kept(dropped)
    if fill is None or not chain or not is_tensor(scores) or fake(scores).dtype != torch.float32:
        return
    spread = chain[-1]
    write, chosen = _group_mask(chain, writes) or (None, None)
    values, kept = _topk_part(chosen, 1) or (None, 0)
    grouped, best = _counted(values) or (None, 0)
    if write is None or values is None or grouped is None:
        return
    if kind(grouped) not in _RESHAPES or grouped.args[0] is not scores or fake(grouped).dim() != 3:
        return
    tokens, groups, each = fake(grouped).shape
    whole = (tokens, groups * each)
    fits = all(same_shape(fake(n).shape, whole) for n in (scores, spread, node))
    if not fits or not same_shape(fake(values).shape, (tokens, groups)) or best > each:
        return
    if not same_shape(fake(write.args[0]).shape, (tokens, groups)):
        return
    # Nobody else reads, and so nobody writes, what is not made any more; nor does anybody write what the op finds out by itself.
    alone = all(sole_user(n) is reader for n, reader in zip(chain, [node, *chain], strict=False))
    summed = values.args[:1] if kind(values) == "sum" else ()
    if not alone or writes.into((values, *summed, chosen)):
        return
    if writes.between((scores,), grouped, node):
        return
    with graph.inserting_before(node):
        args = (scores, groups, best, kept, fill)
        new = emit(graph, mode, ops.limit_groups, args, None, node, own_value(node))
    replace(node, new)
    erase_unread(dropped)
    written = write.all_input_nodes
    graph.erase_node(write)
    erase_unread(*written)


def _kept(dropped: Any) -> list[fx.Node]:
    """From `dropped` downwards: it, a cast to bool, and the mask [T, experts] of which it is the contrary. Nothing for another value."""
    if not is_tensor(dropped) or kind(dropped) not in ("invert", "logical_not", "bitwise_not"):
        return []
    chain = [dropped, dropped.args[0]]
    if is_tensor(chain[-1]) and kind(chain[-1]) in ("bool", "to"):
        chain.append(chain[-1].args[0])
    is_mask = is_tensor(chain[-1]) and fake(chain[-2]).dtype == torch.bool
    return chain if is_mask else []


def _group_mask(chain: list[fx.Node], writes: Writes) -> tuple[fx.Node, fx.Node] | None:
    """The write of ones into zeros [T, groups], and where it writes them, when the last of the chain repeats each group's for its experts.

    The chain grows by what is on the way.
    """
    while kind(chain[-1]) in _RESHAPES and is_tensor(chain[-1].args[0]):
        chain.append(chain[-1].args[0])
    expand = chain[-1]
    column: Any = expand.args[0] if kind(expand) == "expand" else None
    if (
        not is_tensor(column)
        or kind(column) != "unsqueeze"
        or argument(column, 1, "dim") not in _LAST
    ):
        return None
    mask: Any = column.args[0]
    if is_tensor(mask) and kind(mask) == "scatter_":
        mask = mask.args[0]
    if not is_tensor(mask) or fake(mask).dim() != 2:
        return None
    (write, *others) = writes.into((mask,)) or (None,)
    if write is None or others or kind(write) != "scatter_" or written_by(write) != [mask]:
        return None
    zeros = mask.args[0] if kind(mask) == "clone" else mask
    if not is_tensor(zeros) or kind(zeros) not in ("zeros_like", "new_zeros", "zeros"):
        return None
    dim, index, source = (
        argument(write, i, name) for i, name in enumerate(("dim", "index", "src"), 1)
    )
    ones = scalar(write.kwargs.get("value", source))
    if "reduce" in write.kwargs:
        return None
    chain.append(column)
    seen = [r for r in readers(mask) if r is not write]
    if ones != 1.0 or dim not in (1, -1) or not set(seen) <= set(chain):
        return None
    return (write, index) if all(write < r for r in seen if not is_view(r)) else None


def _topk_part(node: Any, part: int) -> tuple[fx.Node, int] | None:
    """What a topk over the last dimension looks at, and how many it takes, when a node is its values (0) or their places (1)."""
    if not isinstance(node, fx.Node) or kind(node) != "getitem" or node.args[1] != part:
        return None
    topk = node.args[0]
    if (
        not isinstance(topk, fx.Node)
        or kind(topk) != "topk"
        or not argument(topk, 3, "largest", True)
    ):
        return None
    x, k, dim = argument(topk, 0, "input"), argument(topk, 1, "k"), argument(topk, 2, "dim", -1)
    is_plain = (
        is_tensor(x) and isinstance(k, int) and isinstance(expression(fake(x).shape[-1]), int)
    )
    return (x, k) if is_plain and dim in (-1, fake(x).dim() - 1) else None


def _counted(values: Any) -> tuple[fx.Node, int] | None:
    """The scores [T, groups, experts of one] of which each group counts as its best ones together, and how many these are."""
    if not is_tensor(values):
        return None
    if kind(values) == "sum":
        plain = argument(values, 1, "dim") in (*_LAST, [-1], (-1,))
        plain = plain and not argument(values, 2, "keepdim", False)
        return (
            _topk_part(values.args[0], 0)
            if plain and argument(values, 3, "dtype") is None
            else None
        )
    largest = values.args[0] if kind(values) == "getitem" and values.args[1] == 0 else values
    if not isinstance(largest, fx.Node) or kind(largest) not in ("max", "amax"):
        return None
    plain = argument(largest, 1, "dim") in _LAST and not argument(largest, 2, "keepdim", False)
    return (largest.args[0], 1) if plain and is_tensor(largest.args[0]) else None
