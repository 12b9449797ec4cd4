"""Running launches: on the GPU their tensors are on, or through triton's interpreter on CPU tensors (TRITON_INTERPRET=1)."""

from __future__ import annotations

from typing import Any

import torch

from llmopt.launch import Descriptor, Launch


def is_interpreting() -> bool:
    """True when kernels run in triton's interpreter: decided by TRITON_INTERPRET when triton was imported."""
    import triton
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(triton.language.cdiv, InterpretedFunction)


class GpuMissing(RuntimeError):
    """Kernels for a GPU were to run where they cannot; the message says what is missing."""


def check_runnable(device: torch.device) -> None:
    """Raises GpuMissing when kernels cannot run on tensors of a device in this process."""
    if device.type != "cpu" or is_interpreting():
        return
    what = f"llmopt: kernels for a GPU cannot run on tensors of {device}"
    if torch.cuda.is_available():
        raise GpuMissing(f'{what}: move the model and its inputs to the GPU, model.to("cuda")')
    raise GpuMissing(
        f"{what}: this process has no GPU. Without a GPU a plan can be printed (LLMOPT_DEBUG=2), cross-compiled "
        "(llmopt build), and run in triton's interpreter, which is slow and for tests (TRITON_INTERPRET=1 when Python starts)"
    )


def run(launch: Launch) -> None:
    """Runs one launch. Raises GpuMissing when its tensors are not where it can run."""
    check_runnable(next(t.device for t in map(_tensor, launch.arguments.values()) if t is not None))
    arguments = {name: _given(value) for name, value in launch.arguments.items()}
    launch.function[launch.grid](
        **arguments,
        **launch.constants,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
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
