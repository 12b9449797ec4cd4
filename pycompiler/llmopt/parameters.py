"""Which values of a graph are a module's parameters and buffers, and what those are called there."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import fx

from llmopt.graph import fake, is_tensor, view_base


def is_weight(node: Any) -> bool:
    """True for a module's parameter or buffer (or a view of one): a tensor that stays the same between calls."""
    if not is_tensor(node):
        return False
    base = view_base(node)
    if base.op == "get_attr":
        return True
    if base.op != "placeholder":
        return False
    if isinstance(fake(base), torch.nn.Parameter):
        return True
    name = _source(base)
    return "_parameters[" in name or "_buffers[" in name


def is_buffer(node: fx.Node) -> bool:
    """True for what is known to be a module's buffer (or a view of one), which is computed and not learnt: a Fourier basis, say."""
    return "_buffers[" in _source(view_base(node))


def weight_name(node: fx.Node) -> str:
    """A parameter's or buffer's name in its model, such as layers.0.q_proj.weight; the node's own where it is unknown."""
    parts = re.findall(r"\['([^']+)'\]", _source(view_base(node)))
    return ".".join(parts[1:]) or node.name  # the first part is the variable that holds the model


def _source(placeholder: fx.Node) -> str:
    """Where Dynamo found what a placeholder stands for, as an expression."""
    source = getattr(placeholder.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", "")
    return name() if callable(name) else name
