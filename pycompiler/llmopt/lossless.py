"""Weights of float32 that fewer bits hold as they are: checkpoints of 16 bits, and files of codes, that were read as float32.

When a graph is compiled, some rows of every weight say what might hold it. Packing looks at all of it (weights.py), and a weight that turns
out not to be held, or no longer, is packed as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from llmopt.graph import fake, is_tensor, kind, view_base
from llmopt.ops.grouped_linear import parts as grouped_parts
from llmopt.ops.linear import parts as linear_parts
from llmopt.parameters import is_buffer, is_weight
from llmopt.quant.rounding import exact_codes
from llmopt.quant.schemes import CodeForm

# Smallest first; the codes are those of GGUF's Q4_0, Q4_1 and Q8_0.
FORMS: tuple[CodeForm | torch.dtype, ...] = (
    CodeForm(4, 32, symmetric=True),
    CodeForm(4, 32, symmetric=False),
    CodeForm(8, 32, symmetric=True),
    torch.bfloat16,
    torch.float16,
)
# The arguments of ops that multiply with weights, by name.
_LINEARS = {"llmopt.linear": linear_parts, "llmopt.grouped_linear": grouped_parts}
_ROWS = 3  # that are looked at while a graph is compiled


@dataclass(frozen=True)
class Lossless:
    """The smallest form that seems to hold each of a graph's weights; None for those that none holds."""

    forms: Mapping[fx.Node, CodeForm | torch.dtype | None] = field(default_factory=dict)

    def common(self, weights: Sequence[fx.Node]) -> CodeForm | torch.dtype | None:
        """The form of all of these weights; None where they differ in it, or have none."""
        forms = {self.forms.get(w) for w in weights}
        return forms.pop() if len(forms) == 1 else None

    def without(self, tensors: Collection[fx.Node]) -> Lossless:
        """The same without the weights that are these tensors or views of them."""
        return Lossless({w: f for w, f in self.forms.items() if view_base(w) not in tensors})


def is_held(weight: Tensor, stored: Tensor) -> bool:
    """Whether `stored`, of fewer bits, is the same finite numbers."""
    finite = bool(stored.sum(dtype=torch.float32).isfinite())
    return finite and torch.equal(stored.to(weight.dtype), weight)


def form_held(weight: Tensor) -> CodeForm | torch.dtype | None:
    """The smallest form that holds every element of a float32 weight [N,K]; None where there is none."""
    if weight.dtype != torch.float32 or not weight.any():
        return None  # zeros are held by everything, but are where training begins
    return next((form for form in FORMS if _holds(form, weight.detach())), None)


def look_at(gm: fx.GraphModule, inputs: Sequence[Any]) -> Lossless:
    """What seems to hold the float32 parameters that the linears of a graph multiply. inputs: what the graph is called with."""
    placeholders = (n for n in gm.graph.nodes if n.op == "placeholder")
    values = dict(zip(placeholders, inputs, strict=True))
    forms: dict[fx.Node, CodeForm | torch.dtype | None] = {}
    for node in gm.graph.nodes:
        if kind(node) not in _LINEARS or fake(node.args[0]).dtype != torch.float32:
            continue
        for weight in _LINEARS[kind(node)](node)["weights"]:
            if weight not in forms and (rows := _some_rows(gm, values, weight)) is not None:
                forms[weight] = form_held(rows)
    return Lossless(forms)


def _some_rows(gm: fx.GraphModule, values: Mapping[fx.Node, Any], weight: fx.Node) -> Tensor | None:
    """A few rows of a float32 parameter [N,K] or [E,N,K], or of a view of one; None for what is none."""
    if not is_tensor(weight) or not is_weight(weight) or is_buffer(weight):
        return None
    base, view = view_base(weight), fake(weight)
    tensor = values[base] if base in values else getattr(gm, str(base.target))
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.device.type != "cpu":
        return None
    if tensor.dtype != torch.float32 or view.dtype != torch.float32 or not tensor.numel():
        return None
    if any(not isinstance(s, int) for s in (*view.shape, *view.stride())):
        return None
    offset = tensor.storage_offset() + view.storage_offset() - fake(base).storage_offset()
    matrices = tensor.detach().as_strided(view.shape, view.stride(), offset)
    if matrices.dim() == 2:
        matrices = matrices[None]
    experts, n, _ = matrices.shape
    picked = torch.linspace(0, experts * n - 1, min(_ROWS, experts * n)).long()
    return matrices[picked // n, picked % n]


def _holds(form: CodeForm | torch.dtype, rows: Tensor) -> bool:
    if isinstance(form, CodeForm):
        return exact_codes(rows, form) is not None
    return is_held(rows, rows.to(form))
