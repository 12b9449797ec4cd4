"""The functions by which C++ makes PyTorch's tensors and looks at them: DLPack's exchange interface, where a PyTorch offers it."""

from __future__ import annotations

from torch import Tensor

from llmopt import _C


def exchange_of(tensors: type) -> object | None:
    """None where a class of tensors has none, or others."""
    given = getattr(tensors, "__dlpack_c_exchange_api__", None)
    return given if _C.knows_exchange(given) else None


EXCHANGE = exchange_of(Tensor)
