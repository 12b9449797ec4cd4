"""The CUDA C++ kernels on a GPU, against float64: a process of its own, so that compute-sanitizer can watch all of it.

Operands are those of the emulator's tests, moved to the GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from llmopt.native.cuda import Library, library

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from cuda_emulator.operands import W4A16, W8A8, Decode
from tolerance import assert_close

LINEAR_SIZES = ((1, 33, 100), (8, 9, 64), (40, 130, 320), (150, 200, 384))


def check(kernels: Library, device: torch.device) -> int:
    """How many problems were right; raises AssertionError at the first that is not."""
    done = 0
    for m, n, k in LINEAR_SIZES:
        _equal(kernels, W8A8(m, n, k), device, "silu")
        done += 1
    for m, group, has_offset in ((1, 32, True), (3, 64, False), (8, 128, True)):
        _equal(kernels, W4A16(m, 40, 2 * group, group, has_offset), device, "gelu_tanh")
        done += 1
    for splits, int8 in ((1, False), (3, False), (3, True)):
        problem = Decode(8, 2, 64, [5, 70], splits, int8)
        want = problem.want()
        _move(problem, device)
        for _ in range(2):  # the second finds the counters as the first left them
            kernels.launch(problem.record(), torch.cuda.current_stream(device).cuda_stream)
        assert_close(problem.o.cpu(), want)
        done += 1
    return done


def _equal(kernels: Library, problem: Any, device: torch.device, act: str) -> None:
    want = problem.want(act)
    _move(problem, device)
    kernels.launch(problem.record(act), torch.cuda.current_stream(device).cuda_stream)
    assert_close(problem.y.cpu(), want)


def _move(problem: Any, device: torch.device) -> None:
    """All operands, with what lies between rows and behind the last one."""
    for name, tensor in list(vars(problem).items()):
        if isinstance(tensor, torch.Tensor):
            flat = torch.zeros(
                tensor.shape[0] * tensor.stride(0), dtype=tensor.dtype, device=device
            )
            setattr(problem, name, flat.as_strided(tensor.size(), tensor.stride()).copy_(tensor))


def main() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    torch.zeros(1, device=device)
    count = check(library(), device)
    torch.cuda.synchronize(device)
    print(f"{count} problems were right")


if __name__ == "__main__":
    main()
