"""llama.cpp as a peer, through llama-cpp-python: the GGUF file that a model's package carries, rewritten in another type.

Only steps of one sequence from its start; the KV cache is llama.cpp's own, in fp16.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmopt.benchmark.phases import Phase
from llmopt.models import LoadedModel, ModelError, smollm2

FILE_TYPES = {"Q8_0": 7, "Q4_0": 2, "F16": 1}  # LLAMA_FTYPE_MOSTLY_… in llama.h
CONTEXT = 1024  # positions; every phase fits


def build(loaded: LoadedModel, phases: Sequence[Phase], file_type: str) -> LlamaCppRunner:
    """The model with its matrices in this type of FILE_TYPES."""
    if loaded.name != "smollm2" or loaded.tokenizer is None:
        raise ModelError("llama.cpp runs GGUF files: of our models, only smollm2 comes as one")
    with tempfile.TemporaryDirectory(prefix="llmopt-gguf-") as folder:
        path = Path(folder) / "model.gguf"
        requantize(smollm2.gguf_file(), path, file_type)
        return LlamaCppRunner(path)  # without mmap: the file is not needed any more


def requantize(source: Path, wanted: Path, file_type: str) -> None:
    """Writes a GGUF file with its matrices in another type, by llama.cpp's own quantiser."""
    import llama_cpp

    _be_quiet()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[file_type]
    params.nthread = torch.get_num_threads()
    params.allow_requantize = True
    failed = llama_cpp.llama_model_quantize(
        str(source).encode(), str(wanted).encode(), ctypes.byref(params)
    )
    if failed:
        raise ModelError(f"llama.cpp could not write {source.name} as {file_type}")


class LlamaCppRunner:
    """Token ids in, the last logits out; `cache` is the number of tokens seen."""

    def __init__(self, path: Path) -> None:
        import llama_cpp

        _be_quiet()
        threads = torch.get_num_threads()
        options = llama_cpp.llama_model_default_params()
        options.use_mmap = False
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self._model:
            raise ModelError(f"llama.cpp could not load {path.name}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = CONTEXT, CONTEXT, CONTEXT // 2
        params.n_threads, params.n_threads_batch = threads, threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise ModelError("llama.cpp could not make a context")
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._seen = 0

    def step(self, ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        import llama_cpp

        if len(ids) != 1:
            raise ModelError(f"llama.cpp runs one sequence here, not {len(ids)}")
        if cache is None:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
            self._seen = 0
        elif cache != self._seen:
            raise ModelError("llama.cpp's cache has gone on: a step must follow the last one")
        tokens = ids.to(torch.int32).numpy().reshape(-1)
        if self._seen + len(tokens) > CONTEXT:
            raise ModelError(f"the context has {CONTEXT} positions")
        address = tokens.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token))
        batch = llama_cpp.llama_batch_get_one(address, len(tokens))
        status = llama_cpp.llama_decode(self._context, batch)
        if status:
            raise ModelError(f"llama_decode returned {status}")
        self._seen += len(tokens)
        last = llama_cpp.llama_get_logits_ith(self._context, -1)
        logits = np.ctypeslib.as_array(last, shape=(self._vocab,)).copy()
        return torch.from_numpy(logits)[None], self._seen

    def call(self, inputs: dict[str, Any]) -> torch.Tensor:
        raise ModelError("a causal model is run by step")


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _ignore(level: int, text: bytes, data: int) -> None:
    """llama.cpp says all it does; what fails is in its return values."""


def _be_quiet() -> None:
    import llama_cpp

    llama_cpp.llama_log_set(_ignore, ctypes.c_void_p(0))
