"""Who is measured: llmopt and its peers. A system is one row: how to build it, what it needs, what it reads and multiplies.

A builder turns a loaded model into a `Runner`. Adding a peer is one row and one builder. A plain name is a peer's usual
form; what follows a hyphen is another one.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llmopt.benchmark.phases import Phase, Runner, last_logits_only
from llmopt.benchmark.work import EXACT, Form, form_of, form_stored
from llmopt.layers import mark_layers
from llmopt.models import LoadedModel, ModelError
from llmopt.quant.schemes import SCHEMES, scheme_of

Builder = Callable[[LoadedModel, Sequence[Phase]], Runner]


@dataclass(frozen=True)
class System:
    """One row of the comparison."""

    name: str
    compiles: bool  # has a compile or export time worth a row
    missing: Callable[[], str]  # "" or what is missing and how to install it
    build: Builder
    # Of its roof, or what finds it for a model; None: it differs from layer to layer.
    form: Form | Callable[[torch.nn.Module], Form] | None = EXACT

    @property
    def quantised(self) -> bool:
        return self.form not in (EXACT, form_stored)


@dataclass
class ModuleRunner:
    """A module, compiled or not, called as transformers' `generate()` calls it."""

    module: Callable[..., Any]
    keep: dict[str, int]
    takes_caches = True  # of transformers, made by the caller

    def step(self, ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        out = self.module(input_ids=ids, past_key_values=cache, use_cache=True, **self.keep)
        return out.logits[:, -1], out.past_key_values

    def call(self, inputs: dict[str, Any]) -> torch.Tensor:
        return first_tensor(self.module(**inputs))


def first_tensor(output: Any) -> torch.Tensor:
    """The first tensor of whatever a module returns."""
    if isinstance(output, torch.Tensor):
        return output
    values = output.values() if isinstance(output, dict) else output
    for value in values:
        if isinstance(value, torch.Tensor):
            return value
    raise ModelError(f"the model returned a {type(output).__name__} with no tensor to compare by")


def _module_runner(loaded: LoadedModel, module: Callable[..., Any]) -> ModuleRunner:
    return ModuleRunner(module, last_logits_only(loaded.model))


def _eager(loaded: LoadedModel, phases: Sequence[Phase]) -> Runner:
    return _module_runner(loaded, loaded.model)


def _llmopt(precision: str, **more: Any) -> Builder:
    def build(loaded: LoadedModel, phases: Sequence[Phase]) -> Runner:
        chosen: dict[str, Any] = {"precision": precision, **more}
        return _module_runner(loaded, torch.compile(loaded.model, backend="llmopt", options=chosen))

    return build


def _llmopt_marked(loaded: LoadedModel, phases: Sequence[Phase]) -> Runner:
    mark_layers(loaded.model)
    return _llmopt("exact")(loaded, phases)


def _inductor(loaded: LoadedModel, phases: Sequence[Phase]) -> Runner:
    import torch._inductor.config

    torch._inductor.config.force_disable_caches = True  # compile time is reported cold
    return _module_runner(loaded, torch.compile(loaded.model))


def _inductor_freezing(loaded: LoadedModel, phases: Sequence[Phase]) -> Runner:
    import torch._inductor.config

    torch._inductor.config.freezing = True
    return _inductor(loaded, phases)


def _in_file(module: str, function: str, *arguments: Any) -> Builder:
    """A builder of a file of its own, imported when it is wanted: it imports the peer."""

    def build(loaded: LoadedModel, phases: Sequence[Phase]) -> Runner:
        found: Any = getattr(importlib.import_module(f"llmopt.benchmark.{module}"), function)
        made = found(loaded, phases, *arguments)
        return made if hasattr(made, "step") else _module_runner(loaded, made)

    return build


def _nothing() -> str:
    return ""


def _no_compiler() -> str:
    if shutil.which("g++") or shutil.which("clang++"):
        return ""
    return "Inductor compiles C++ at run time: install g++ or clang++"


def _packages(**modules: str) -> Callable[[], str]:
    """module=package: "", or how to install the packages of the modules that are not there."""

    def missing() -> str:
        needed = [p for m, p in modules.items() if not importlib.util.find_spec(m)]
        return f"pip install {' '.join(needed)}" if needed else ""

    return missing


_no_onnx = _packages(onnx="onnx", onnxruntime="onnxruntime", onnxscript="onnxscript")
_no_openvino = _packages(openvino="openvino")
_no_nncf = _packages(openvino="openvino", nncf="nncf")
_no_torchao = _packages(torchao="torchao")


def _no_llama_cpp() -> str:
    missing = _packages(llama_cpp="llama-cpp-python", gguf="gguf")()
    return f"{missing} (it builds llama.cpp, some ten minutes)" if missing else ""


def _no_torchao_or_compiler() -> str:
    return _no_torchao() or _no_compiler()


INT8 = Form("s8", weight_bytes=1.0)  # a scale per channel is nothing beside it

SYSTEMS = {
    row.name: row
    for row in (
        System("llmopt", True, _nothing, _llmopt("exact"), form_stored),
        System("llmopt-same-storage", True, _nothing, _llmopt("exact", storage="same")),
        *(
            System(f"llmopt-{name}", True, _nothing, _llmopt(name), form_of(scheme))
            for name, scheme in SCHEMES.items()
        ),
        System(
            "llmopt-w8a8-channel",
            True,
            _nothing,
            _llmopt("w8a8", group="channel"),
            form_of(scheme_of("w8a8", "channel")),
        ),
        System("llmopt-marked", True, _nothing, _llmopt_marked, form_stored),
        System("llmopt-auto", True, _nothing, _llmopt("auto"), None),
        System("eager", False, _nothing, _eager),
        System("inductor", True, _no_compiler, _inductor),
        System("inductor-freezing", True, _no_compiler, _inductor_freezing),
        System("torchao", True, _no_torchao_or_compiler, _in_file("torchao_runner", "w8a8"), INT8),
        System(
            "torchao-w8a16",
            True,
            _no_torchao_or_compiler,
            _in_file("torchao_runner", "w8a16"),
            Form(weight_bytes=1.0),
        ),
        System("onnxruntime", True, _no_onnx, _in_file("onnx_runner", "build")),
        System("onnxruntime-int8", True, _no_onnx, _in_file("onnx_runner", "build_int8"), INT8),
        System("openvino", True, _no_openvino, _in_file("openvino_runner", "build")),
        System(
            "openvino-int8",
            True,
            _no_nncf,
            _in_file("openvino_runner", "build_int8"),
            Form("s8", weight_bytes=1.0, kv_bytes=1.0),
        ),
        # blocks of 32 codes and a scale in fp16; 576 inputs do not fill its larger blocks, so the head has 8 bits at least
        System(
            "llama.cpp",
            True,
            _no_llama_cpp,
            _in_file("llama_cpp_runner", "build", "Q8_0"),
            Form("s8", weight_bytes=34 / 32, kv_bytes=2.0),
        ),
        System(
            "llama.cpp-q4_0",
            True,
            _no_llama_cpp,
            _in_file("llama_cpp_runner", "build", "Q4_0"),
            Form("s8", weight_bytes=18 / 32, head_bytes=34 / 32, kv_bytes=2.0),
        ),
        System(
            "llama.cpp-f16",
            True,
            _no_llama_cpp,
            _in_file("llama_cpp_runner", "build", "F16"),
            Form("f16", weight_bytes=2.0, kv_bytes=2.0),
        ),
    )
}


def systems_of(names: Sequence[str]) -> tuple[System, ...]:
    """llmopt and the named peers; a ModelError for unknown names and for what is not installed."""
    rows = []
    for name in dict.fromkeys(("llmopt", *names)):
        if name not in SYSTEMS:
            raise ModelError(f"unknown system {name!r}: expected some of {', '.join(SYSTEMS)}")
        missing = SYSTEMS[name].missing()
        if missing:
            raise ModelError(f"{name} cannot run here: {missing}")
        rows.append(SYSTEMS[name])
    return tuple(rows)
