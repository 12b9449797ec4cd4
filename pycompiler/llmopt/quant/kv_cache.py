"""KVCache: a transformers cache whose keys and values are signed bytes with one scale per token and head.

Runs in eager, where attention gets the values that the bytes stand for; compiled, attention reads the bytes themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    from transformers.cache_utils import (
        Cache,
        DummyLayer,
        DynamicCache,
        DynamicLayer,
        DynamicSlidingWindowLayer,
    )
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "llmopt.KVCache needs transformers >= 5: it is one of its caches"
    ) from error

from llmopt.ops.kv_codes import SCALE_BYTES, dequantize_rows, quantize_rows

DTYPES = ("int8",)


@torch.library.custom_op("llmopt::quantize_kv", mutates_args=())
def quantize_kv(x: Tensor) -> Tensor:
    """ops.kv_codes.quantize_rows, kept as one node by Dynamo."""
    return quantize_rows(x)


@quantize_kv.register_fake
def _fake_codes(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] + SCALE_BYTES), dtype=torch.int8)


@torch.library.custom_op("llmopt::dequantize_kv", mutates_args=())
def dequantize_kv(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """ops.kv_codes.dequantize_rows, kept as one node by Dynamo."""
    return dequantize_rows(rows, dtype)


@dequantize_kv.register_fake
def _fake_values(rows: Tensor, dtype: torch.dtype) -> Tensor:
    return rows.new_empty((*rows.shape[:-1], rows.shape[-1] - SCALE_BYTES), dtype=dtype)


class _Int8Rows:
    """What makes a layer of a dynamic cache hold rows of bytes. Cropping, reordering and repeating work on rows as they are."""

    keys: Tensor | None
    values: Tensor | None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)  # type: ignore[misc]
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = self.keys.to(torch.int8), self.values.to(torch.int8)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends [B,Hkv,Sn,·]; returns all keys and values [B,Hkv,S,·] in the dtype of the new ones."""
        keys, values = super().update(  # type: ignore[misc]
            quantize_kv(key_states), quantize_kv(value_states), *args, **kwargs
        )
        return dequantize_kv(keys, key_states.dtype), dequantize_kv(values, value_states.dtype)


class Int8Layer(_Int8Rows, DynamicLayer):
    """All positions."""


class Int8SlidingWindowLayer(_Int8Rows, DynamicSlidingWindowLayer):
    """The last `sliding_window` positions."""


class KVCache(Cache):
    """A growing cache of 8-bit keys and values: `model.generate(..., past_key_values=llmopt.KVCache(model))`.

    model: a causal language model of transformers, compiled or not, or its config. dtype: "int8".
    `layers[i].keys` and `.values` are rows of bytes [B,Hkv,S,D+4] int8 (ops/kv_codes.py); `dequantized(i)` gives what they stand for.
    Raises TypeError for a model without a config, ValueError for another dtype and for layers whose cache is not keys and values.
    """

    def __init__(self, model: Any, dtype: str = "int8") -> None:
        if dtype not in DTYPES:
            raise ValueError(
                f"llmopt: KVCache of {dtype!r} does not exist; possible: {', '.join(DTYPES)}"
            )
        config = getattr(model, "config", model)
        if not hasattr(config, "get_text_config"):
            raise TypeError(
                f"llmopt: KVCache takes a transformers model or its config, not {type(model).__name__}"
            )
        layers = [_with_codes(layer) for layer in DynamicCache(config=config).layers]
        super().__init__(layers=layers)

    def dequantized(self, layer: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Keys and values [B,Hkv,S,D] of a layer that holds some."""
        held = self.layers[layer]
        if not held.is_initialized:
            raise ValueError(f"llmopt: layer {layer} of this cache is empty")
        return dequantize_rows(held.keys, dtype), dequantize_rows(held.values, dtype)


def _with_codes(layer: Any) -> Any:
    if type(layer) is DynamicLayer:
        return Int8Layer()
    if type(layer) is DynamicSlidingWindowLayer:
        return Int8SlidingWindowLayer(layer.sliding_window)
    if type(layer) is DummyLayer:  # reads another layer's cache
        return layer
    raise ValueError(
        f"llmopt: KVCache has no form of {type(layer).__name__}; full and sliding-window attention are possible"
    )
