"""ONNX Runtime as a peer: the model exported once through torch.onnx, run on its CPU provider.

A causal model is exported with its KV cache as inputs and outputs (two tensors a layer), the usual
form of such graphs; the cache lives in ONNX Runtime's own arrays between steps. In 8 bits the exported file goes through
`quantize_dynamic`: weights per channel, activations per tensor.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llmopt.benchmark.flat_cache import FlatCache, empty_cache, encoder_example, example
from llmopt.benchmark.phases import Phase, inputs_of
from llmopt.models import LoadedModel, ModelError


def build(loaded: LoadedModel, phases: Sequence[Phase]) -> CausalRunner | CallRunner:
    """Exports the model and opens a session with as many threads as torch has."""
    dtype = next(loaded.model.parameters()).dtype
    if dtype == torch.bfloat16:
        raise ModelError("ONNX Runtime's CPU kernels do not cover bf16: use fp32 or fp16")
    return _build(loaded, phases, in_8_bits=False)


def build_int8(loaded: LoadedModel, phases: Sequence[Phase]) -> CausalRunner | CallRunner:
    """The same with quantised matrix products; they are quantised from fp32."""
    if next(loaded.model.parameters()).dtype != torch.float32:
        raise ModelError("ONNX Runtime quantises models in fp32: use --dtype fp32")
    return _build(loaded, phases, in_8_bits=True)


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


def _build(
    loaded: LoadedModel, phases: Sequence[Phase], in_8_bits: bool
) -> CausalRunner | CallRunner:
    if loaded.kind == "causal":
        session = _session(FlatCache(loaded.model).eval(), *example(loaded), in_8_bits)
        return CausalRunner(session, empty_cache(loaded.model, 0)[0])
    if loaded.kind == "encoder":
        return CallRunner(_session(loaded.model, *encoder_example(loaded), in_8_bits))
    return CallRunner(_session(loaded.model, inputs_of(loaded, phases[0]), None, in_8_bits))


def _session(model: torch.nn.Module, inputs: dict[str, Any], dynamic: Any, in_8_bits: bool) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="llmopt-onnx-") as folder, torch.no_grad():
        path = str(Path(folder) / "model.onnx")
        torch.onnx.export(
            model, (), path, kwargs=inputs, dynamic_shapes=dynamic, dynamo=True, verbose=False
        )
        if in_8_bits:
            path = _quantized(path)
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _quantized(path: str) -> str:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantized = path.replace(".onnx", ".int8.onnx")
    quantize_dynamic(path, quantized, per_channel=True, weight_type=QuantType.QInt8)
    return quantized
