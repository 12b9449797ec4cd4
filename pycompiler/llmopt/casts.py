"""Casts from one of the kernels' float dtypes to another, and which of them lose something.

Kernels compute in float32 and round where they store, so a rule may leave out a cast between two such dtypes where one that came
before or comes behind it rounds as much. Casts to other dtypes (integers, float8) are operations of their own.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import fx

from llmopt.graph import FLOATS, fake, is_tensor, kind

FLOAT_CASTS = frozenset({"to", "float", "half", "bfloat16", "type_as"})  # that may be one


def is_float_cast(node: Any) -> TypeGuard[fx.Node]:
    """Whether a node casts one of the kernels' float dtypes to one of them."""
    if not is_tensor(node) or kind(node) not in FLOAT_CASTS:
        return False
    source = node.args[0] if node.args else None
    return is_tensor(source) and fake(source).dtype in FLOATS and fake(node).dtype in FLOATS


def rounds(node: fx.Node) -> bool:
    """Whether a cast between floats changes values: some have more digits, or are larger, than its dtype has."""
    before, after = fake(node.args[0]).dtype, fake(node).dtype
    return torch.promote_types(before, after) != after


def uncast(node: Any) -> Any:
    """The value below casts between floats."""
    while is_float_cast(node):
        node = node.args[0]
    return node


def unwidened(node: Any) -> Any:
    """The value below casts between floats that keep it as it is."""
    while is_float_cast(node) and not rounds(node):
        node = node.args[0]
    return node
