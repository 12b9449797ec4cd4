"""What kernel tests share: every tier of this build, and torch's own team kept small."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
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
