"""Running launches: on the GPU their tensors are on, or through triton's interpreter on CPU tensors (TRITON_INTERPRET=1)."""

from __future__ import annotations

import functools
from typing import Any

import torch

from llmopt.launch import Descriptor, Launch

# What every kernel is compiled with, here and by compile.py: a pack's kernels are found only by equal options.
FP_FUSION = True  # multiply-adds in one instruction; triton's own default is about to change
COMPILER_OPTIONS = {"enable_fp_fusion": FP_FUSION}


@functools.cache
def is_interpreting() -> bool:
    """True when kernels run in triton's interpreter: decided by TRITON_INTERPRET when triton was imported."""
    import triton
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(triton.language.cdiv, InterpretedFunction)


class GpuMissing(RuntimeError):
    """Kernels for a GPU were to run where they cannot; the message says what is missing."""


class DoesNotFit(RuntimeError):
    """A kernel needs more of the GPU than there is; the message says what, and how much there is."""


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
    """Runs one launch. Raises GpuMissing when its tensors are not where it can run, DoesNotFit when the GPU is too small for it."""
    check_runnable(next(t.device for t in map(_tensor, launch.arguments.values()) if t is not None))
    arguments = {name: _given(value) for name, value in launch.arguments.items()}
    # Only what triton compiles takes them: neither interpreted functions nor those of other compilers do.
    options = COMPILER_OPTIONS if hasattr(launch.function, "device_caches") else {}
    try:
        launch.function[launch.grid](
            **arguments,
            **launch.constants,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            **options,
        )
    except Exception as error:
        if not is_out_of_resources(error):
            raise
        raise DoesNotFit(
            f"llmopt: {launch.kernel} with {launch.constants}, {launch.num_warps} warps and {launch.num_stages} stages "
            f"does not fit this GPU: {error}. A smaller tile or another kernel is possible; if it was tuned or imported, "
            "LLMOPT_TUNE=0 leaves it out"
        ) from error


def is_out_of_resources(error: Exception) -> bool:
    """Whether triton says that a kernel needs more of a GPU than there is."""
    from triton.runtime.errors import OutOfResources

    return isinstance(error, OutOfResources)


def _tensor(value: Any) -> torch.Tensor | None:
    if isinstance(value, Descriptor):
        return value.tensor
    return value if isinstance(value, torch.Tensor) else None


def _given(value: Any) -> Any:
    if not isinstance(value, Descriptor):
        return value
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(value.tensor, list(value.block))
