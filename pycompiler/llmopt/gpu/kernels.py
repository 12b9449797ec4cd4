"""Which FX nodes run as GPU launches; the counterpart of native/kernels.py."""

from __future__ import annotations

from torch import fx

from llmopt.gpu import attentions, linears, pointwise, rows
from llmopt.graph import kind
from llmopt.native import cuda_kernels  # noqa: F401  (registers what is built)
from llmopt.native.operands import NativeKernel

KERNELS: dict[str, NativeKernel] = {
    **linears.KERNELS,
    **attentions.KERNELS,
    **rows.KERNELS,
    **pointwise.KERNELS,
}


def kernel_for(node: fx.Node) -> tuple[NativeKernel | None, str]:
    """The kernel that takes a node and "", or None and the reason."""
    kernel = KERNELS.get(kind(node)) if node.op in ("call_function", "call_method") else None
    if kernel is None:
        return None, f"no GPU kernel for {kind(node)}"
    reason = kernel.reject(node)
    return (None, reason) if reason else (kernel, "")
