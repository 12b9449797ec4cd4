"""Who is measured: llmopt and its peers. A system is one row: how to build it, and what it needs.

A builder turns a loaded model into a `Runner`. Adding a peer is one row and one builder.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llmopt.benchmark.phases import Phase, Runner, last_logits_only
from llmopt.models import LoadedModel, ModelError
from llmopt.options import PRECISIONS


@dataclass(frozen=True)
class System:
    """One row of the comparison."""

    name: str
    compiles: bool  # has a compile or export time worth a row
    missing: Callable[[], str]  # "" or what is missing and how to install it
    build: Callable[[LoadedModel, Sequence[Phase]], Runner]


@dataclass
class ModuleRunner:
    """A module, compiled or not, called as transformers' `generate()` calls it."""

    module: Callable[..., Any]
    keep: dict[str, int]

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


def _llmopt(precision: str) -> Callable[[LoadedModel, Sequence[Phase]], Runner]:
    def build(loaded: LoadedModel, phases: Sequence[Phase]) -> Runner:
        chosen: dict[str, Any] = {"precision": precision}
        return _module_runner(loaded, torch.compile(loaded.model, backend="llmopt", options=chosen))

    return build


def _inductor(loaded: LoadedModel, phases: Sequence[Phase]) -> Runner:
    import torch._inductor.config

    torch._inductor.config.force_disable_caches = True  # compile time is reported cold
    return _module_runner(loaded, torch.compile(loaded.model))


def _inductor_freezing(loaded: LoadedModel, phases: Sequence[Phase]) -> Runner:
    import torch._inductor.config

    torch._inductor.config.freezing = True
    return _inductor(loaded, phases)


def _onnxruntime(loaded: LoadedModel, phases: Sequence[Phase]) -> Runner:
    from llmopt.benchmark import onnx_runner

    return onnx_runner.build(loaded, phases)


def _nothing() -> str:
    return ""


def _no_compiler() -> str:
    if shutil.which("g++") or shutil.which("clang++"):
        return ""
    return "Inductor compiles C++ at run time: install g++ or clang++"


def _no_onnx() -> str:
    needed = [m for m in ("onnx", "onnxruntime", "onnxscript") if not importlib.util.find_spec(m)]
    return f"pip install {' '.join(needed)}" if needed else ""


SYSTEMS = {
    row.name: row
    for row in (
        System("llmopt", True, _nothing, _llmopt("exact")),
        *(
            System(f"llmopt-{precision}", True, _nothing, _llmopt(precision))
            for precision in PRECISIONS
            if precision != "exact"
        ),
        System("eager", False, _nothing, _eager),
        System("inductor", True, _no_compiler, _inductor),
        System("inductor-freezing", True, _no_compiler, _inductor_freezing),
        System("onnxruntime", True, _no_onnx, _onnxruntime),
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
