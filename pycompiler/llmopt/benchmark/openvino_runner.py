"""OpenVINO as a peer: the model exported by torch.export, converted, run on its CPU plugin.

A causal model keeps its KV cache as state inside (a stateful model, as optimum-intel exports them): a step takes token ids and
gives logits. In 8 bits: causal models by weight compression, which the plugin runs with activations rounded on the fly; others by
NNCF's post-training quantisation, calibrated on the end of the text that comes with Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from llmopt.benchmark.accuracy import calibration_ids
from llmopt.benchmark.flat_cache import FlatCache, encoder_example, example
from llmopt.benchmark.phases import Phase, inputs_of
from llmopt.models import LoadedModel, ModelError

PRECISIONS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
CALIBRATION_BATCHES = 8


def build(loaded: LoadedModel, phases: Sequence[Phase]) -> CausalRunner | CallRunner:
    """The model in its own dtype. Left alone, the plugin computes in bf16 and caches in 8 bits where that is faster."""
    name = PRECISIONS[next(loaded.model.parameters()).dtype]
    model = _converted(loaded, phases)
    return _runner(loaded, model, {"INFERENCE_PRECISION_HINT": name, "KV_CACHE_PRECISION": name})


def build_int8(loaded: LoadedModel, phases: Sequence[Phase]) -> CausalRunner | CallRunner:
    """The model in 8 bits, everything else as the plugin chooses."""
    import nncf

    if next(loaded.model.parameters()).dtype != torch.float32:
        raise ModelError("NNCF quantises models in fp32: use --dtype fp32")
    model = _converted(loaded, phases)
    if loaded.kind == "causal":
        return _runner(loaded, nncf.compress_weights(model), {})
    samples = nncf.Dataset(_samples(loaded, phases[0]))
    return _runner(loaded, nncf.quantize(model, samples, model_type=nncf.ModelType.TRANSFORMER), {})


class CallRunner:
    """Keyword tensors in, the first output out."""

    def __init__(self, compiled: Any) -> None:
        self._request = compiled.create_infer_request()

    def step(self, ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        raise ModelError("this model was exported without a cache")

    def call(self, inputs: dict[str, Any]) -> torch.Tensor:
        feed = {name: value.numpy() for name, value in inputs.items()}
        self._request.infer(feed, share_inputs=True)
        return torch.from_numpy(self._request.get_output_tensor(0).data.copy())


class CausalRunner:
    """Token ids in, the last logits out; `cache` is the number of tokens seen, the tensors are the request's state."""

    def __init__(self, compiled: Any) -> None:
        self._request = compiled.create_infer_request()
        self._seen = 0

    def step(self, ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        if cache is None:
            self._request.reset_state()
            self._seen = 0
        elif cache != self._seen:
            raise ModelError("the state has gone on: a step must follow the last one")
        feed = {"input_ids": ids.numpy(), "beam_idx": np.zeros(1, np.int32)}
        self._request.infer(feed, share_inputs=True)
        self._seen += ids.shape[1]
        return torch.from_numpy(self._request.get_output_tensor(0).data.copy()), self._seen

    def call(self, inputs: dict[str, Any]) -> torch.Tensor:
        raise ModelError("a causal model is run by step")


def _runner(loaded: LoadedModel, model: Any, options: dict[str, str]) -> CausalRunner | CallRunner:
    import openvino

    threads = str(torch.get_num_threads())
    chosen = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", **options}
    compiled = openvino.Core().compile_model(model, "CPU", chosen)
    return CausalRunner(compiled) if loaded.kind == "causal" else CallRunner(compiled)


def _converted(loaded: LoadedModel, phases: Sequence[Phase]) -> Any:
    if loaded.kind == "causal":
        inputs, dynamic = example(loaded)
        model = _convert(FlatCache(loaded.model).eval(), inputs, dynamic)
        _, heads, _, dim = inputs["past"][0].shape
        _make_stateful(model, heads, dim)
        return model
    if loaded.kind == "encoder":
        return _convert(loaded.model, *encoder_example(loaded))
    return _convert(loaded.model, inputs_of(loaded, phases[0]), None)


def _convert(module: torch.nn.Module, inputs: dict[str, Any], dynamic: Any) -> Any:
    import openvino

    with torch.no_grad():
        exported = torch.export.export(module, (), inputs, dynamic_shapes=dynamic, strict=False)
        return openvino.convert_model(exported)


def _make_stateful(model: Any, heads: int, dim: int) -> None:
    """Turns the cache's inputs and outputs into state. The gather by beam is what the plugin's fused attention looks for."""
    from openvino import PartialShape, Type, opset13
    from openvino._offline_transformations import apply_make_stateful_transformation

    beam = opset13.parameter([-1], dtype=Type.i32, name="beam_idx")
    beam.output(0).get_tensor().set_names({"beam_idx"})
    pairs = {}
    for i, (past, present) in enumerate(zip(model.inputs[1:], model.outputs[1:], strict=True)):
        names = f"past.{i}", f"present.{i}"
        past.get_tensor().set_names({names[0]})
        present.get_tensor().set_names({names[1]})
        past.get_node().set_partial_shape(PartialShape([-1, heads, -1, dim]))
        consumers = past.get_target_inputs()
        chosen = opset13.gather(past.get_node(), beam, opset13.constant(0))
        for consumer in consumers:
            consumer.replace_source_output(chosen.output(0))
        pairs[names[0]] = names[1]
    model.add_parameters([beam])
    model.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(model, pairs)
    _begin_empty(model, heads, dim)


def _begin_empty(model: Any, heads: int, dim: int) -> None:
    """The state before the first step: no positions, for as many sequences as come in."""
    from openvino import opset13

    batch = opset13.gather(
        opset13.shape_of(model.input("input_ids")), opset13.constant([0]), opset13.constant(0)
    )
    for node in model.get_ops():
        if node.get_type_name() != "ReadValue":
            continue
        rest = opset13.constant(np.array([heads, 0, dim]))
        zero = opset13.constant(0.0, dtype=node.get_output_element_type(0))
        node.set_arguments([opset13.broadcast(zero, opset13.concat([batch, rest], 0))])
    model.validate_nodes_and_infer_types()


def _samples(loaded: LoadedModel, phase: Phase) -> list[dict[str, Any]]:
    if loaded.kind == "call":
        return [{name: value.numpy() for name, value in inputs_of(loaded, phase).items()}]
    ids = calibration_ids(loaded, CALIBRATION_BATCHES * phase.batch, phase.tokens)
    return [
        {"input_ids": part.numpy(), "attention_mask": torch.ones_like(part).numpy()}
        for part in ids.split(phase.batch)
    ]
