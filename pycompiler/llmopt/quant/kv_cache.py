"""KVCache: a transformers cache whose keys and values are signed bytes with one scale per token and head.

Scales are behind their codes, as CPUs read them, or in tensors of their own, as GPUs do. Runs in eager, where attention gets the
values that the bytes stand for; compiled, attention reads the bytes themselves.
"""

from __future__ import annotations

import copy
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

from llmopt.ops.kv_codes import (
    SCALE_BYTES,
    dequantize_arrays,
    dequantize_rows,
    quantize_arrays,
    quantize_rows,
)

DTYPES = ("int8",)
LAYOUTS = ("rows", "arrays")


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


@torch.library.custom_op("llmopt::quantize_kv_arrays", mutates_args=())
def quantize_kv_arrays(x: Tensor) -> tuple[Tensor, Tensor]:
    """ops.kv_codes.quantize_arrays, kept as one node by Dynamo."""
    return quantize_arrays(x)


@quantize_kv_arrays.register_fake
def _fake_arrays(x: Tensor) -> tuple[Tensor, Tensor]:
    codes = x.new_empty(x.shape, dtype=torch.int8)
    return codes, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@torch.library.custom_op("llmopt::dequantize_kv_arrays", mutates_args=())
def dequantize_kv_arrays(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """ops.kv_codes.dequantize_arrays, kept as one node by Dynamo."""
    return dequantize_arrays(codes, scales, dtype)


@dequantize_kv_arrays.register_fake
def _fake_widened(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


class _Int8:
    """What makes a layer of a dynamic cache hold signed bytes."""

    keys: Tensor | None
    values: Tensor | None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)  # type: ignore[misc]
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = self.keys.to(torch.int8), self.values.to(torch.int8)


class _Int8Rows(_Int8):
    """Rows of bytes. Cropping, reordering and repeating work on rows as they are."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends [B,Hkv,Sn,·]; returns all keys and values [B,Hkv,S,·] in the dtype of the new ones."""
        keys, values = super().update(  # type: ignore[misc]
            quantize_kv(key_states), quantize_kv(value_states), *args, **kwargs
        )
        return dequantize_kv(keys, key_states.dtype), dequantize_kv(values, value_states.dtype)

    def dequantized(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return dequantize_rows(self.keys, dtype), dequantize_rows(self.values, dtype)


class _Int8Arrays(_Int8):
    """Codes, and a second layer of the kind, `scales`, that has the same done to it."""

    def __init__(self, scales: Any, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.scales = scales

    def __copy__(self) -> Any:
        """A layer that goes on by itself, over the tensors of this one."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__, scales=copy.copy(self.scales))
        return twin

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.scales.lazy_initialization(key_states.float(), value_states.float())

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As _Int8Rows.update."""
        k_codes, k_scales = quantize_kv_arrays(key_states)
        v_codes, v_scales = quantize_kv_arrays(value_states)
        keys, values = super().update(k_codes, v_codes, *args, **kwargs)  # type: ignore[misc]
        k_scales, v_scales = self.scales.update(k_scales, v_scales, *args, **kwargs)
        wide_keys = dequantize_kv_arrays(keys, k_scales, key_states.dtype)
        return wide_keys, dequantize_kv_arrays(values, v_scales, value_states.dtype)

    def dequantized(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        keys = dequantize_arrays(self.keys, self.scales.keys, dtype)
        return keys, dequantize_arrays(self.values, self.scales.values, dtype)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)  # type: ignore[misc]
        self.scales.crop(tokens_to_remove)

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.scales.reset()

    def offload(self) -> None:
        super().offload()  # type: ignore[misc]
        self.scales.offload()

    def prefetch(self) -> None:
        super().prefetch()  # type: ignore[misc]
        self.scales.prefetch()

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.scales.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self.scales.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.scales.batch_select_indices(indices)


class Int8Layer(_Int8Rows, DynamicLayer):
    """All positions."""


class Int8SlidingWindowLayer(_Int8Rows, DynamicSlidingWindowLayer):
    """The last `sliding_window` positions."""


class Int8ArraysLayer(_Int8Arrays, DynamicLayer):
    """All positions."""


class Int8ArraysSlidingWindowLayer(_Int8Arrays, DynamicSlidingWindowLayer):
    """The last `sliding_window` positions."""

    def activate_past_recording(self) -> None:
        super().activate_past_recording()
        self.scales.activate_past_recording()


class KVCache(Cache):
    """A growing cache of 8-bit keys and values: `model.generate(..., past_key_values=llmopt.KVCache(model))`.

    model: a causal language model of transformers, compiled or not, or its config. dtype: "int8".
    layout: "rows", for CPUs: `layers[i].keys` and `.values` are rows of bytes [B,Hkv,S,D+4] int8 (ops/kv_codes.py). "arrays", for GPUs:
    they are codes [B,Hkv,S,D], and `layers[i].scales` has theirs [B,Hkv,S,1]. By default where the model is decides.
    `dequantized(i)` gives what both stand for.
    Raises TypeError for a model without a config, ValueError for another dtype or layout and for layers whose cache is not keys and values.
    """

    def __init__(self, model: Any, dtype: str = "int8", layout: str | None = None) -> None:
        if dtype not in DTYPES:
            raise ValueError(
                f"llmopt: KVCache of {dtype!r} does not exist; possible: {', '.join(DTYPES)}"
            )
        if layout not in (None, *LAYOUTS):
            raise ValueError(
                f"llmopt: KVCache has no layout {layout!r}; possible: {', '.join(LAYOUTS)}"
            )
        config = getattr(model, "config", model)
        if not hasattr(config, "get_text_config"):
            raise TypeError(
                f"llmopt: KVCache takes a transformers model or its config, not {type(model).__name__}"
            )
        arrays = (layout or layout_for(model)) == "arrays"
        layers = [_with_codes(layer, arrays) for layer in DynamicCache(config=config).layers]
        super().__init__(layers=layers)

    def dequantized(self, layer: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Keys and values [B,Hkv,S,D] of a layer that holds some."""
        held = self.layers[layer]
        if not held.is_initialized:
            raise ValueError(f"llmopt: layer {layer} of this cache is empty")
        return held.dequantized(dtype)


def layout_for(model: Any) -> str:
    """What the kernels of the device a model is on read; a config is on none, and gets rows."""
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else iter(())
    weight = next(parameters, None)
    return "rows" if weight is None or weight.device.type == "cpu" else "arrays"


def _with_codes(layer: Any, arrays: bool) -> Any:
    if type(layer) is DynamicLayer:
        return Int8ArraysLayer(layer) if arrays else Int8Layer()
    if type(layer) is DynamicSlidingWindowLayer:
        window = layer.sliding_window
        return (
            Int8ArraysSlidingWindowLayer(layer, window)
            if arrays
            else Int8SlidingWindowLayer(window)
        )
    if type(layer) is DummyLayer:  # reads another layer's cache
        return layer
    raise ValueError(
        f"llmopt: KVCache has no form of {type(layer).__name__}; full and sliding-window attention are possible"
    )
