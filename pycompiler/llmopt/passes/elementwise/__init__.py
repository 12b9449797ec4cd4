"""What elementwise operations of PyTorch are in the instructions of ops.pointwise.

A rule for a name looks at the node once and answers with a function that writes the instructions into a `Chain`, or None: so a
chain never begins with a node that it cannot end.
"""

from __future__ import annotations

import torch
from torch import fx

from llmopt.graph import fake, kind
from llmopt.ops.pointwise import BINARY, UNARY
from llmopt.passes.activations import activation_of
from llmopt.passes.elementwise import arithmetic, functionals, rows
from llmopt.passes.elementwise.arithmetic import JUMPING, OF_TRUTHS, binary_rule
from llmopt.passes.elementwise.chain import TRUTHS, Chain, Rule, Spelling

__all__ = ["TRUTHS", "Chain", "Spelling", "jumps", "reads_rows", "reduces", "spelling"]

_RULES: dict[str, Rule] = {**arithmetic.RULES, **functionals.RULES, **rows.RULES}


def spelling(node: fx.Node) -> Spelling | None:
    """How a node is written into a chain that has numbers for its operands; None where ops.pointwise cannot express it."""
    act, name = activation_of(node), kind(node)
    if fake(node).dtype == torch.bool and name not in OF_TRUTHS:
        return None
    if act is not None:
        return lambda c: c.unary(act, c.value(node.args[0]))
    if name in _RULES:
        return _RULES[name](node)
    if name in UNARY and len(node.args) == 1 and not node.kwargs:
        return lambda c: c.unary(name, c.value(node.args[0]))
    return binary_rule(name)(node) if name in BINARY else None


def jumps(node: fx.Node) -> bool:
    """Whether the least change of an operand may change the result altogether: operands must be what PyTorch's are then, rounded."""
    return kind(node) in JUMPING


def reduces(node: fx.Node) -> bool:
    """Whether each row gives one number."""
    return kind(node) in rows.REDUCTIONS


def reads_rows(node: fx.Node) -> bool:
    """Whether what it gives depends on all of a row."""
    return kind(node) in rows.RULES
