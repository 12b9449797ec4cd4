"""Triton kernels: one file = one family, its tiles beside it. Importing a family imports triton; this file does not.

`load()` registers every family. Each family's `launches` takes tensors and gives `Launch` records: the same code plans (on meta
tensors), cross-compiles and runs. Every kernel converts to fp32 right after a load.
"""

from __future__ import annotations

import importlib

FAMILIES = (
    "linear",
    "linear_gemv",
    "linear_tma",
    "linear_w8a8",
    "linear_weight_only",
    "linear_codes_gemv",
    "quantize",
    "attention",
    "attention_decode",
    "round_keys",
    "norm",
    "rope",
    "rotary_table",
    "index_copy",
    "swiglu",
    "softmax",
    "embedding",
    "cross_entropy",
    "pointwise",
)


def load() -> None:
    """Registers every family; raises ImportError that says how to get triton."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        raise ImportError(
            "llmopt: kernels for GPUs need triton: pip install 'llmopt[triton]'"
        ) from error
    for family in FAMILIES:
        importlib.import_module(f"llmopt.kernels.{family}")
