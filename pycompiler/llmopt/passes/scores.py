"""Reading a spelled-out attention: from softmax's input back to the product q kᵀ, and all that happens to the scores on the way.

Models write it with matmul, bmm or baddbmm, on [B,H,S,D] or with batch and heads flattened, and mask by adding, filling or choosing.
Some take each row's largest score off first, which softmax does anyway, and some append a sink, one score more without a value.
`read_scores` finds the parts without changing the graph; `bias_of` writes down the one additive mask they amount to.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isinf
from typing import Any

import torch
from torch import fx

from llmopt.casts import is_float_cast
from llmopt.graph import (
    FLOATS,
    argument,
    binary_operands,
    emit,
    expression,
    fake,
    is_one,
    is_tensor,
    kind,
    same_shape,
    same_size,
    scalar,
    sole_user,
)

RESHAPES = ("view", "reshape", "flatten", "unflatten")
_PRODUCTS = ("matmul", "bmm", "baddbmm")
_ON_SCORES = (*RESHAPES, "mul", "div", "add", "tanh", "masked_fill")
# A filled score that added to any other gives itself, so that a row of nothing but fills stays uniform, as in PyTorch.
_LEAST = torch.finfo(torch.float32).min
_ANY_BIAS = -1e30  # fills below it swallow every bias


@dataclass(frozen=True)
class Change:
    """One thing that happens to scores: they are multiplied, capped, given a bias, or replaced where they do not count.

    what: "scale", "softcap", "temperature" (by which whole heads are multiplied or divided), "bias", "fill" (number where condition) or
    "keep" (number where not condition).
    in_f16: what is added to, whose least number swallows every score; attention computes in float32.
    """

    what: str
    number: float = 1.0  # of scale and softcap; factor of a bias; power of a temperature, 1 or -1; what replaces a score
    tensor: Any = None  # the bias, the temperature, or the condition
    in_f16: bool = False


@dataclass(frozen=True)
class Scores:
    """softmax's input: q [B,H,Sq,D], kᵀ's source k [B,Hkv,Skv,D], and what happens to q kᵀ, first change first."""

    q: fx.Node
    k: fx.Node
    k_is_transposed: bool  # k is [B,Hkv,D,Skv] and must be turned first
    scale: float
    softcap: float
    changes: tuple[Change, ...]  # biases and masks, with the scales between them
    temperatures: tuple[Change, ...] = ()  # in front of softcap and changes
    sinks: fx.Node | None = None  # [B,H,Sq,1]


def read_scores(softmax: fx.Node) -> Scores | None:
    """The parts of the scores that softmax reads, or None when something is not understood."""
    node, readers = _unshifted(softmax)
    node, readers, sinks = _without_sinks(node, readers)
    changes: list[Change] = []
    chain: list[fx.Node] = []  # everything between softmax and the product, which is the last
    current = _alone(node, chain, readers)
    while current is not None and kind(current) not in _PRODUCTS:
        found = _changed(current)
        if found is None:
            return None
        source, change = found
        changes += [change] if change is not None else []
        current = _alone(source, chain)
    if current is None:
        return None
    scores = _parts(current, changes[::-1])
    if scores is None or not all(_framed(fake(n).shape, scores) for n in chain):
        return None
    return replace(scores, sinks=sinks) if _fills_stay(scores.changes) else None


def _unshifted(softmax: fx.Node) -> tuple[Any, int]:
    """softmax's input, or what it is before each row's largest value is taken off, and how many readers that has."""
    node = softmax.args[0]
    if not is_tensor(node) or kind(node) != "sub" or sole_user(node) is None:
        return node, 1
    pair = binary_operands(node)
    if pair is None:
        return node, 1
    x, largest = pair
    if not is_tensor(x) or not is_tensor(largest) or sole_user(largest) is None:
        return node, 1
    if kind(largest) == "getitem" and largest.args[1] == 0:
        largest = largest.args[0]
    dim, keepdim = argument(largest, 1, "dim"), argument(largest, 2, "keepdim", False)
    of_rows = kind(largest) in ("max", "amax") and dim in (-1, fake(x).dim() - 1) and keepdim
    if not of_rows or argument(largest, 0, "input") is not x or sole_user(largest) is None:
        return node, 1
    return x, 2


def _without_sinks(node: Any, readers: int) -> tuple[Any, int, fx.Node | None]:
    """The scores in front of a sink appended to each row, how many readers these have, and the sinks."""
    whole = node
    while is_float_cast(whole) and len(whole.users) == readers:
        whole, readers = whole.args[0], 1
    if not is_tensor(whole) or kind(whole) != "cat" or len(whole.users) != readers:
        return node, readers, None
    parts, dims = argument(whole, 0, "tensors"), fake(whole).dim()
    if len(parts) != 2 or dims != 4 or argument(whole, 1, "dim", 0) not in (-1, 3):
        return node, readers, None
    scores, sinks = parts
    is_sink = is_one(fake(sinks).shape[3]) and fake(sinks).dtype in FLOATS
    return (scores, 1, sinks) if is_sink else (node, readers, None)


def _framed(shape: Any, scores: Scores) -> bool:
    """True for [B,H,Sq,Skv] and [B·H,Sq,Skv]: nothing on the way splits heads otherwise or broadcasts scores to more."""
    batch, heads, queries = fake(scores.q).shape[:3]
    keys = fake(scores.k).shape[3 if scores.k_is_transposed else 2]
    front = (batch, heads) if len(shape) == 4 else (batch * heads,)
    return same_shape(shape, (*front, queries, keys))


def _fills_stay(changes: tuple[Change, ...]) -> bool:
    """True when a filled score is still one that does not count after what follows; a bias may reach an f16 fill of −65504."""
    for i, change in enumerate(changes):
        if change.what not in ("fill", "keep"):
            continue
        later = changes[i + 1 :]
        if any(c.what == "scale" and not 0 < c.number <= 1 for c in later):
            return False
        if change.number > _ANY_BIAS and any(c.what == "bias" for c in later):
            return False
    return True


def _parts(product: fx.Node, changes: list[Change]) -> Scores | None:
    first = 0
    if kind(product) == "baddbmm":  # beta · bias + alpha · q kᵀ
        first = 1
        beta, alpha = (scalar(product.kwargs.get(name, 1)) for name in ("beta", "alpha"))
        bias = argument(product, 0, "input")
        if beta is None or not alpha or not is_tensor(bias):
            return None
        added = [Change("bias", beta, bias)] if beta else []
        changes = [Change("scale", alpha), *added, *changes]
    q = argument(product, first, f"batch{first}" if first else "input")
    k = argument(product, first + 1, "batch2" if first else "mat2")
    if not (is_tensor(q) and is_tensor(k)):
        return None
    (q, q_factor), (k, k_factor) = _unscaled(q), _unscaled(k)
    k, is_transposed = _turned_back(k)
    q_heads, k_heads = four_dims(widened(q)), four_dims(widened(k))
    if q_heads is None or k_heads is None:
        return None
    scale, softcap, rest = q_factor * k_factor, 0.0, list(changes)
    temperatures = []
    while rest and rest[0].what in ("scale", "softcap", "temperature"):
        change = rest.pop(0)
        if softcap:
            return None
        if change.what == "scale":
            scale *= change.number
        elif change.what == "temperature":
            temperatures.append(change)
        else:
            softcap = change.number
    if any(c.what in ("softcap", "temperature") for c in rest) or (
        softcap and any(c.what == "scale" for c in rest)
    ):
        return None
    if temperatures and (softcap or fake(product).dtype != fake(q_heads).dtype):
        return None  # infinity times q is no number, and what is capped would be; what is wider keeps more of q
    if not all(_suits(t, q_heads) for t in temperatures):
        return None
    return Scores(q_heads, k_heads, is_transposed, scale, softcap, tuple(rest), tuple(temperatures))


def _suits(temperature: Change, q: fx.Node) -> bool:
    """Whether q can be multiplied instead of the scores."""
    value = fake(temperature.tensor)
    is_one_a_head = value.dim() <= 4 and all(map(is_one, value.shape[-2:]))
    # Products with q in float16 could be too large where scores are not.
    is_wide = fake(q).dtype != torch.float16
    return is_one_a_head and is_wide and value.dtype == fake(q).dtype


def _alone(node: Any, chain: list[fx.Node], readers: int = 1) -> fx.Node | None:
    """The node under casts and reshapes of the leading dimensions, when each link has no other reader; links join the chain.

    readers: of the first.
    """
    while is_tensor(node) and len(node.users) == readers:
        chain.append(node)
        readers = 1
        if not is_float_cast(node) and not (kind(node) in RESHAPES and keeps_last_two(node)):
            return node
        node = node.args[0]
    return None


def keeps_last_two(node: fx.Node) -> bool:
    """A reshape that only splits or joins batch and heads."""
    before, after = fake(node.args[0]).shape, fake(node).shape
    if {len(before), len(after)} - {3, 4}:
        return False
    return same_shape(before[-2:], after[-2:])


def _changed(node: fx.Node) -> tuple[Any, Change | None] | None:
    """What `node` makes of the scores, and the scores before it."""
    name = kind(node)
    if name == "add":
        return _added(node)
    if name in ("mul", "div"):
        return _capped(node) or _scaled(node)
    if name == "masked_fill":
        condition, value = argument(node, 1, "mask"), argument(node, 2, "value")
        return _masked(node.args[0], "fill", condition, value)
    if name == "where" and len(node.args) == 3:
        condition, a, b = node.args
        if _leads_to_product(a):
            return _masked(a, "keep", condition, b)
        return _masked(b, "fill", condition, a)
    return None


def _added(node: fx.Node) -> tuple[Any, Change] | None:
    pair = binary_operands(node)
    if pair is None or not all(is_tensor(p) for p in pair):
        return None
    scores, bias = pair if _leads_to_product(pair[0]) else pair[::-1]
    if fake(bias).dtype not in FLOATS:
        return None
    return scores, Change("bias", tensor=bias, in_f16=fake(node).dtype == torch.float16)


def _scaled(node: fx.Node) -> tuple[Any, Change] | None:
    pair = binary_operands(node)
    if pair is None:
        return None
    scores, factor = pair if kind(node) == "div" or is_tensor(pair[0]) else pair[::-1]
    number = scalar(factor)
    if is_tensor(scores) and is_tensor(factor):
        return _tempered(node, scores, factor)
    if not number or not is_tensor(scores):
        return None
    return scores, Change("scale", number if kind(node) == "mul" else 1.0 / number)


def _tempered(node: fx.Node, scores: fx.Node, factor: fx.Node) -> tuple[Any, Change] | None:
    if kind(node) == "mul" and not _leads_to_product(scores):
        scores, factor = factor, scores
    if fake(node).dim() != 4 or fake(factor).dtype not in FLOATS:
        return None
    return scores, Change("temperature", 1.0 if kind(node) == "mul" else -1.0, factor)


def _capped(node: fx.Node) -> tuple[Any, Change] | None:
    """c · tanh(scores / c)."""
    pair = binary_operands(node)
    if pair is None or kind(node) != "mul":
        return None
    tanh, factor = pair if is_tensor(pair[0]) else pair[::-1]
    cap = scalar(factor)
    if not is_tensor(tanh) or kind(tanh) != "tanh":
        return None
    inner = tanh.args[0]
    quotient = binary_operands(inner) if is_tensor(inner) and kind(inner) == "div" else None
    if not cap or quotient is None or not is_tensor(quotient[0]) or scalar(quotient[1]) != cap:
        return None
    if not (sole_user(tanh) and sole_user(inner)):
        return None
    return quotient[0], Change("softcap", cap)


def _masked(scores: Any, what: str, condition: Any, value: Any) -> tuple[Any, Change] | None:
    if not (is_tensor(scores) and is_tensor(condition)) or fake(condition).dtype != torch.bool:
        return None
    number = _constant(value)
    if number is None or not number <= torch.finfo(torch.float16).min:
        return None  # a score that counts after softmax is no mask
    return scores, Change(what, number, condition)


def _constant(value: Any) -> float | None:
    """A number, also one that the graph wraps into a tensor without dimensions."""
    if is_tensor(value) and fake(value).dim() == 0 and kind(value) in ("tensor", "full"):
        value = value.args[-1]
    return scalar(value)


def _leads_to_product(node: Any) -> bool:
    """True for what looks like scores: arithmetic on one side of which lies a product."""
    while is_tensor(node) and kind(node) not in _PRODUCTS:
        if kind(node) == "where":
            return any(_leads_to_product(branch) for branch in node.args[1:])
        if not is_float_cast(node) and kind(node) not in _ON_SCORES:
            return False
        node = node.args[0]
    return is_tensor(node)


def _unscaled(node: fx.Node) -> tuple[fx.Node, float]:
    """q or k without a factor in front of the product, and the factor."""
    factor = 1.0
    while kind(node) in ("mul", "div") and (pair := binary_operands(node)) is not None:
        number = scalar(pair[1])
        if not number or not is_tensor(pair[0]):
            break
        factor *= number if kind(node) == "mul" else 1.0 / number
        node = pair[0]
    return node, factor


def widened(node: fx.Node) -> fx.Node:
    """The value under a cast from half precision to float32: attention computes in float32 anyway."""
    while is_float_cast(node) and fake(node).dtype == torch.float32:
        node = node.args[0]
    return node


def _turned_back(k: fx.Node) -> tuple[fx.Node, bool]:
    """(k, False) when the node is k with its last two dimensions exchanged, else (node, True)."""
    dims = fake(k).dim()
    last = {dims - 2, dims - 1}
    name = kind(k)
    if name in ("mT", "getattr_mT"):
        return k.args[0], False
    if name == "transpose" and {argument(k, i, f"dim{i - 1}") % dims for i in (1, 2)} == last:
        return k.args[0], False
    if name == "permute":
        order = k.args[1] if isinstance(k.args[1], (tuple, list)) else k.args[1:]
        swapped = [*range(dims - 2), dims - 1, dims - 2]
        if [d % dims for d in order] == swapped:
            return k.args[0], False
    return k, True


def four_dims(node: fx.Node) -> fx.Node | None:
    """The [B,H,S,D] value that a [B·H,S,D] one flattens; a value with four dimensions is itself."""
    if fake(node).dim() == 4:
        return node
    if fake(node).dim() != 3 or kind(node) not in RESHAPES or not is_tensor(node.args[0]):
        return None
    source = node.args[0]
    if fake(source).dim() != 4 or not same_shape(fake(source).shape[2:], fake(node).shape[1:]):
        return None
    return source


def bias_of(graph: fx.Graph, mode: Any, scores: Scores, like: fx.Node) -> tuple[Any, float]:
    """The additive mask (or None) that all changes amount to, written into the graph, and the whole scale."""
    heads = expression(fake(scores.q).shape[1])
    bias: Any = None
    scale = scores.scale
    for change in scores.changes:
        if change.what == "scale":
            scale *= change.number
            if bias is not None:
                bias = emit(graph, mode, torch.mul, (bias, change.number), like=like)
            continue
        operand = change.tensor
        if (
            fake(operand).dim() == 3
            and not is_one(fake(operand).shape[0])
            and _is_flat(scores, operand)
        ):
            operand = emit(graph, mode, "unflatten", (operand, 0, (-1, heads)), like=like)
        if change.what == "bias":
            if change.in_f16:
                operand = _as_swallowing(graph, mode, operand, like)
            if change.number != 1.0:
                operand = emit(graph, mode, torch.mul, (operand, change.number), like=like)
            bias = (
                operand
                if bias is None
                else emit(graph, mode, torch.add, (bias, operand), like=like)
            )
            continue
        kept = 0.0 if bias is None else _in_float32(graph, mode, bias, like)
        # The number itself where it swallows as well: a bias of the same dtype may hold it too.
        fill = change.number if isinf(change.number) or change.number <= _ANY_BIAS else _LEAST
        pair = (fill, kept) if change.what == "fill" else (kept, fill)
        bias = emit(graph, mode, torch.where, (operand, *pair), like=like)
    return bias, scale


def _as_swallowing(graph: fx.Graph, mode: Any, bias: fx.Node, like: fx.Node) -> fx.Node:
    """A bias in which float32's least number stands for that of float16."""
    least = torch.finfo(torch.float16).min
    lost = emit(graph, mode, torch.eq, (bias, least), like=like)
    return emit(
        graph, mode, torch.where, (lost, _LEAST, _in_float32(graph, mode, bias, like)), like=like
    )


def _in_float32(graph: fx.Graph, mode: Any, bias: fx.Node, like: fx.Node) -> fx.Node:
    return (
        bias
        if fake(bias).dtype == torch.float32
        else emit(graph, mode, "float", (bias,), like=like)
    )


def _is_flat(scores: Scores, operand: fx.Node) -> bool:
    """An operand [B·H, …] of flattened scores, as against [H, …], which broadcasts over the batch by itself."""
    batch, heads = fake(scores.q).shape[:2]
    return same_size(fake(operand).shape[0], batch * heads)
