"""Weights of float32 that fewer bits hold as they are: checkpoints of 16 bits, and files of codes, that were read as float32.

When a graph is compiled, some rows of every weight say what might hold it. Packing looks at all of it (weights.py), and a weight that turns
out not to be held, or no longer, is packed as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from llmopt.graph import fake, kind, view_base
from llmopt.ops.grouped_linear import parts as grouped_parts
from llmopt.ops.linear import parts as linear_parts
from llmopt.parameters import is_buffer, is_weight
from llmopt.quant.rounding import exact_codes
from llmopt.quant.schemes import CodeForm

Form = CodeForm | torch.dtype

# Smallest first; the codes are those of GGUF's Q4_0, Q4_1 and Q8_0.
FORMS: tuple[Form, ...] = (
    CodeForm(4, 32, symmetric=True),
    CodeForm(4, 32, symmetric=False),
    CodeForm(8, 32, symmetric=True),
    torch.bfloat16,
    torch.float16,
)
# The arguments of ops that multiply with weights, by name.
_LINEARS = {"llmopt.linear": linear_parts, "llmopt.grouped_linear": grouped_parts}


@dataclass(frozen=True)
class Lossless:
    """The smallest form that seems to hold each of some weights; None for those that none holds."""

    forms: tuple[tuple[fx.Node, Form | None], ...] = ()

    def common(self, weights: Sequence[fx.Node]) -> Form | None:
        """The form of all of these weights; None where they differ in it, or have none."""
        known = dict(self.forms)
        forms = {known.get(w) for w in weights}
        return forms.pop() if len(forms) == 1 else None

    def of_inputs(self, inputs: Collection[fx.Node]) -> Lossless:
        """Of weights that are some of these, or views of them."""
        return Lossless(tuple((w, form) for w, form in self.forms if view_base(w) in inputs))

    def without(self, inputs: Collection[fx.Node]) -> Lossless:
        """The same, but weights that are these, or views of them, as they are."""
        return Lossless(
            tuple((w, None if view_base(w) in inputs else form) for w, form in self.forms)
        )

    def of(self, values: Mapping[fx.Node, Any]) -> Lossless:
        """The same for other values of the inputs."""
        return Lossless(tuple((w, _form_of(w, values[view_base(w)])) for w, _ in self.forms))


def is_held(weight: Tensor, stored: Tensor) -> bool:
    """Whether `stored`, of fewer bits, is the same finite numbers."""
    finite = bool(stored.sum(dtype=torch.float32).isfinite())
    return finite and torch.equal(stored.to(weight.dtype), weight)


def form_held(weight: Tensor) -> Form | None:
    """The smallest form that holds every element of a float32 weight [N,K]; None where there is none."""
    if weight.dtype != torch.float32 or not weight.any():
        return None  # zeros are held by everything, but are where training begins
    return next((form for form in FORMS if _holds(form, weight.detach())), None)


def look_at(gm: fx.GraphModule, inputs: Sequence[Any]) -> Lossless:
    """What seems to hold the float32 parameters that the linears of a graph multiply. inputs: what the graph is called with."""
    placeholders = (n for n in gm.graph.nodes if n.op == "placeholder")
    values = dict(zip(placeholders, inputs, strict=True))
    forms: dict[fx.Node, Form | None] = {}
    for node in gm.graph.nodes:
        if kind(node) not in _LINEARS or fake(node.args[0]).dtype != torch.float32:
            continue
        for weight in _LINEARS[kind(node)](node)["weights"]:
            if weight in forms or not _may_be_held(weight):
                continue
            base = view_base(weight)
            value = values[base] if base in values else getattr(gm, str(base.target))
            forms[weight] = _form_of(weight, value)
    return Lossless(tuple(forms.items()))


def _may_be_held(weight: fx.Node) -> bool:
    """Whether it is a float32 parameter of known sizes, or a view of one."""
    if not is_weight(weight) or is_buffer(weight) or fake(weight).dtype != torch.float32:
        return False
    return all(isinstance(s, int) for s in (*fake(weight).shape, *fake(weight).stride()))


def _form_of(weight: fx.Node, value: Any) -> Form | None:
    """The form that holds a few rows of a weight [N,K] or [E,N,K]. value: of what it is, or is a view of."""
    if type(value) not in (Tensor, torch.nn.Parameter) or value.device.type != "cpu":
        return None
    if value.dtype != torch.float32 or not value.numel():
        return None
    view = fake(weight)
    offset = (
        value.storage_offset() + view.storage_offset() - fake(view_base(weight)).storage_offset()
    )
    matrices = value.detach().as_strided(view.shape, view.stride(), offset)
    if matrices.dim() == 2:
        matrices = matrices[None]
    experts, n, _ = matrices.shape
    rows = experts * n
    picked = sorted({0, rows // 2, rows - 1})
    return form_held(torch.stack([matrices[row // n, row % n] for row in picked]))


def _holds(form: Form, rows: Tensor) -> bool:
    if isinstance(form, CodeForm):
        return exact_codes(rows, form) is not None
    return is_held(rows, rows.to(form))
