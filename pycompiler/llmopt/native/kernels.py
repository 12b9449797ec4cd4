"""Registrations of the C++ kernels: which FX nodes they take, best first, and why one does not."""

from __future__ import annotations

import torch
from torch import fx

from llmopt.graph import NOTE, fake, kind
from llmopt.native import attention, experts, linear, linear_quantized, matmul, pointwise, rows
from llmopt.native.operands import NativeKernel

KERNELS: dict[str, NativeKernel] = {
    **linear.KERNELS,
    **linear_quantized.KERNELS,
    **experts.KERNELS,
    **matmul.KERNELS,
    **attention.KERNELS,
    **rows.KERNELS,
    **pointwise.KERNELS,
}

_COMPUTED = (torch.float32, torch.float16, torch.bfloat16)  # floats that kernels compute in
_NOT_OF_EXPERTS = (
    "multiplies other than rows [S,K] by a module's float weights [E,K,N] of their dtype"
)
_NO_KERNEL = dict.fromkeys(
    ("grouped_mm", "_grouped_mm", "transformers.grouped_mm_fallback"), _NOT_OF_EXPERTS
)


def kernel_for(node: fx.Node) -> tuple[NativeKernel | None, str]:
    """The kernel that takes a node and "", or None and the reason."""
    kernel = KERNELS.get(kind(node)) if node.op in ("call_function", "call_method") else None
    if kernel is None:
        known = node.meta.get(NOTE) or _NO_KERNEL.get(kind(node))
        return None, known or f"no kernel for {kind(node)}{_of_dtype(node)}"
    reason = kernel.reject(node)
    return (None, reason) if reason else (kernel, "")


def _of_dtype(node: fx.Node) -> str:
    """In words, where the dtype alone is reason enough."""
    value = fake(node)
    if not isinstance(value, torch.Tensor) or value.dtype in _COMPUTED:
        return ""
    wide = value.dtype.is_floating_point or value.dtype.is_complex
    return f" in {str(value.dtype).removeprefix('torch.')}" if wide else ""
