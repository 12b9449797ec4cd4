"""Activations an op may apply to its result. Numbers: the contract with Activation in csrc/cpu/vec_math.h."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NONE, RELU, SILU, GELU_ERF, GELU_TANH, SIGMOID, TANH, QUICK_GELU, RELU2 = range(9)

NAMES = ("none", "relu", "silu", "gelu_erf", "gelu_tanh", "sigmoid", "tanh", "quick_gelu", "relu2")
CODES = {name: code for code, name in enumerate(NAMES)}


def activate(name: str, x: Tensor) -> Tensor:
    """x with the named activation applied; raises KeyError for a name that is not in NAMES."""
    return {
        "none": lambda: x,
        "relu": lambda: torch.relu(x),
        "silu": lambda: F.silu(x),
        "gelu_erf": lambda: F.gelu(x),
        "gelu_tanh": lambda: F.gelu(x, approximate="tanh"),
        "sigmoid": lambda: torch.sigmoid(x),
        "tanh": lambda: torch.tanh(x),
        "quick_gelu": lambda: x * torch.sigmoid(1.702 * x),
        "relu2": lambda: torch.relu(x).square(),
    }[name]()
