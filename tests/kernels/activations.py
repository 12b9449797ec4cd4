"""What an activation of float64 numbers is, to their last bits: the reference of every kernel that applies one.

torch's own gelu is none: its 1 + erf(x) and 1 + tanh(x) are exactly 0 far below zero, where the value is tiny but there.
"""

from __future__ import annotations

import math

import torch
from llmopt.ops.activation import CODES


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """x/2 (1 + tanh u) is x * sigmoid(2u), which does not cancel."""
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


EXACT = {
    "none": lambda x: x,
    "relu": torch.relu,
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu_erf": lambda x: x * 0.5 * torch.special.erfc(-x / math.sqrt(2)),
    "gelu_tanh": gelu_tanh,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu2": lambda x: torch.relu(x).square(),
}
ACTIVATIONS = {CODES[name]: function for name, function in EXACT.items()}  # as kernels take them
