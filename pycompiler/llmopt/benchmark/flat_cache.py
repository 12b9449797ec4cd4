"""A causal model as exporters want it: its KV cache as tensors among the inputs and outputs, two a layer."""

from __future__ import annotations

from typing import Any

import torch

from llmopt.benchmark.phases import token_ids
from llmopt.models import LoadedModel


class FlatCache(torch.nn.Module):
    """The model with its cache as a flat list of tensors, key and value of each layer in turn."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, past: list[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        cache = DynamicCache()
        for keys, values in zip(past[::2], past[1::2], strict=True):
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = (
                keys,
                values,
            )  # update() would append them to an empty tensor of rank 1
            cache.layers.append(layer)
        out = self.model(
            input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        flat = [t for la in out.past_key_values.layers for t in (la.keys, la.values)]
        return (out.logits[:, -1], *flat)


def empty_cache(model: torch.nn.Module, seen: int) -> list[torch.Tensor]:
    """Zeros for `seen` positions of one sequence: [1, Hkv, seen, D] for each key and value."""
    config: Any = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dtype = next(model.parameters()).dtype
    shape = (1, kv_heads, seen, head_dim)
    return [torch.zeros(shape, dtype=dtype) for _ in range(2 * config.num_hidden_layers)]


def example(loaded: LoadedModel) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs of `FlatCache` to export by, and which of their sizes may change."""
    length, seen = torch.export.Dim("length", min=1), torch.export.Dim("seen", min=0)
    past = empty_cache(loaded.model, 7)
    inputs = {"input_ids": token_ids(loaded, 1, 5), "past": past}
    return inputs, {"input_ids": {1: length}, "past": [{2: seen} for _ in past]}


def encoder_example(loaded: LoadedModel) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same for an encoder; sizes that differ from 1 and from each other, so that the exporter keeps them apart."""
    longest = getattr(loaded.model.config, "max_position_embeddings", None)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=longest)
    ids = token_ids(loaded, 2, 24)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs, {name: {0: batch, 1: length} for name in inputs}
