"""Running launches: on the GPU their tensors are on, or through triton's interpreter on CPU tensors (TRITON_INTERPRET=1)."""

from __future__ import annotations

from typing import Any

import torch

from llmopt.types import Descriptor, Launch


def is_interpreting() -> bool:
    """True when kernels run in triton's interpreter: decided by TRITON_INTERPRET when triton was imported."""
    import triton
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(triton.language.cdiv, InterpretedFunction)


def run(launch: Launch) -> None:
    """Runs one launch. Raises RuntimeError that says what is missing when its tensors are not where it can run."""
    device = next(a.device for a in map(_tensor, launch.arguments.values()) if a is not None)
    if device.type == "cpu" and not is_interpreting():
        raise RuntimeError(missing(device))
    arguments = {name: _given(value) for name, value in launch.arguments.items()}
    launch.function[launch.grid](
        **arguments,
        **launch.constants,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )


def missing(device: torch.device) -> str:
    """What a machine lacks to run kernels on tensors of this device."""
    gpu = "has no GPU" if not torch.cuda.is_available() else "keeps these tensors on the CPU"
    return (
        f"llmopt: kernels for a GPU cannot run on tensors of {device}: this process {gpu}. "
        "Move the model and its inputs to a GPU, or set TRITON_INTERPRET=1 before Python starts to run them in "
        "triton's interpreter (slow; for tests)"
    )


def _tensor(value: Any) -> torch.Tensor | None:
    if isinstance(value, Descriptor):
        return value.tensor
    return value if isinstance(value, torch.Tensor) else None


def _given(value: Any) -> Any:
    if not isinstance(value, Descriptor):
        return value
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(value.tensor, list(value.block))
