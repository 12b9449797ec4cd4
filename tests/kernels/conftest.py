"""What kernel tests share: every tier of this build, torch's own team kept small, the emulated GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cuda_emulator.emulator import Emulator, build
from llmopt import _C


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """References are small: torch's own team would only cost time. Kernels are given their thread count."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=_C.tiers())
def tier(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def emulated_gpu() -> Emulator:
    """The shipped CUDA kernels, compiled for the host."""
    return Emulator(build())


@pytest.fixture
def emulator(emulated_gpu: Emulator) -> Emulator:
    """The device as sm_80 with 4 multiprocessors, its threads in the order of seed 0."""
    emulated_gpu.device()
    emulated_gpu.seed(0)
    return emulated_gpu
