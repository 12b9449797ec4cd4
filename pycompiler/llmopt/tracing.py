"""What Dynamo is told about PyTorch's own layers, so that models of them are traced whole.

nn.TransformerEncoder and nn.TransformerDecoder look into a mask that comes without the hint `is_causal`, which Dynamo cannot follow: it
leaves the model to eager then, under every backend. The hint saves work and changes no number, so that a traced model goes without
it; kernels see from the mask which keys are live.
"""

from __future__ import annotations

from typing import Any

import torch._dynamo
from torch.nn.modules import transformer


def _is_told_causal(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
    """nn.modules.transformer._detect_is_causal_mask without the look into the mask."""
    return is_causal is True


def trace_layers_whole() -> None:
    """Once a process. Leaves Dynamo as it is where this PyTorch detects masks elsewhere, or somebody else has told it of that."""
    detect = getattr(transformer, "_detect_is_causal_mask", None)
    if detect is None:
        return
    substitute = torch._dynamo.substitute_in_graph(detect, skip_signature_check=True)
    try:
        substitute(_is_told_causal)
    except ValueError:  # somebody, or a later Dynamo itself, follows it in a way of their own
        return
