"""ONNX Runtime as a peer: the model exported once through torch.onnx, run on its CPU provider.

A causal model is exported with its KV cache as inputs and outputs (two tensors a layer), the usual
form of such graphs; the cache lives in ONNX Runtime's own arrays between steps.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llmopt.benchmark.phases import Phase, inputs_of, token_ids
from llmopt.models import LoadedModel, ModelError


def build(loaded: LoadedModel, phases: Sequence[Phase]) -> CausalRunner | CallRunner:
    """Exports the model and opens a session with as many threads as torch has."""
    dtype = next(loaded.model.parameters()).dtype
    if dtype == torch.bfloat16:
        raise ModelError("ONNX Runtime's CPU kernels do not cover bf16: use fp32 or fp16")
    if loaded.kind == "causal":
        return _build_causal(loaded, dtype)
    return _build_call(loaded, phases)


class CallRunner:
    """Keyword tensors in, the first output out."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def step(self, ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        raise ModelError("this model was exported without a cache")

    def call(self, inputs: dict[str, Any]) -> torch.Tensor:
        feed = {name: value.numpy() for name, value in inputs.items()}
        return torch.from_numpy(self._session.run(None, feed)[0])


class CausalRunner:
    """Token ids and the cache's tensors in, logits and the longer cache out."""

    def __init__(self, session: Any, empty: torch.Tensor) -> None:
        self._session = session
        self._cache_names = [i.name for i in session.get_inputs() if i.name.startswith("past")]
        self._empty = empty.numpy()  # [B, Hkv, 0, D]

    def step(self, ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        past = cache or [self._empty] * len(self._cache_names)
        feed = dict(zip(self._cache_names, past, strict=True))
        logits, *present = self._session.run(None, {"input_ids": ids.numpy(), **feed})
        return torch.from_numpy(logits), present

    def call(self, inputs: dict[str, Any]) -> torch.Tensor:
        raise ModelError("a causal model is run by step")


class _FlatCache(torch.nn.Module):
    """The model with its cache as a flat list of tensors, key and value of each layer in turn."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, past: list[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        out = self.model(
            input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        flat = [t for layer in out.past_key_values.layers for t in (layer.keys, layer.values)]
        return (out.logits[:, -1], *flat)


def _build_causal(loaded: LoadedModel, dtype: torch.dtype) -> CausalRunner:
    config: Any = loaded.model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (1, config.num_key_value_heads, 7, head_dim)
    past = [torch.zeros(shape, dtype=dtype) for _ in range(2 * config.num_hidden_layers)]
    length, seen = torch.export.Dim("length", min=1), torch.export.Dim("seen", min=0)
    session = _export(
        _FlatCache(loaded.model).eval(),
        {"input_ids": token_ids(loaded, 1, 5), "past": past},
        {"input_ids": {1: length}, "past": [{2: seen} for _ in past]},
    )
    return CausalRunner(session, torch.zeros((1, shape[1], 0, head_dim), dtype=dtype))


def _build_call(loaded: LoadedModel, phases: Sequence[Phase]) -> CallRunner:
    inputs = inputs_of(loaded, phases[0])
    dynamic = None
    if loaded.kind == "encoder":
        batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=1)
        # sizes that differ from 1 and from each other, so that the exporter keeps them apart
        ids = token_ids(loaded, 2, 24)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        dynamic = {name: {0: batch, 1: length} for name in inputs}
    return CallRunner(_export(loaded.model, inputs, dynamic))


def _export(model: torch.nn.Module, inputs: dict[str, Any], dynamic: Any) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="llmopt-onnx-") as folder, torch.no_grad():
        path = str(Path(folder) / "model.onnx")
        torch.onnx.export(
            model, (), path, kwargs=inputs, dynamic_shapes=dynamic, dynamo=True, verbose=False
        )
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
