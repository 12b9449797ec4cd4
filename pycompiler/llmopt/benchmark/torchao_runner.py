"""torchao as a peer: every linear quantised by `quantize_`, then compiled by Inductor with frozen weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from llmopt.benchmark.phases import Phase
from llmopt.models import LoadedModel


def w8a8(loaded: LoadedModel, phases: Sequence[Phase]) -> Callable[..., Any]:
    """Weights int8 per channel, activations int8 per token."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return _compiled(loaded.model, Int8DynamicActivationInt8WeightConfig())


def w8a16(loaded: LoadedModel, phases: Sequence[Phase]) -> Callable[..., Any]:
    """Weights int8 per channel, activations as they are."""
    from torchao.quantization import Int8WeightOnlyConfig

    return _compiled(loaded.model, Int8WeightOnlyConfig())


def _compiled(model: torch.nn.Module, config: Any) -> Callable[..., Any]:
    import torch._inductor.config
    from torchao.quantization import quantize_

    torch._inductor.config.force_disable_caches = True  # compile time is reported cold
    torch._inductor.config.freezing = True
    with torch.inference_mode(False), torch.no_grad():  # parameters made there cannot be compiled
        quantize_(model, config)
    return torch.compile(model)
