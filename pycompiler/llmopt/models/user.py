"""The user's own models: a function in a Python file, or a folder written by `save_pretrained`."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmopt.models.errors import ModelError, sentence

if TYPE_CHECKING:
    from llmopt.models import LoadedModel


def from_function(spec: str, dtype: torch.dtype) -> LoadedModel:
    """`path.py:function` → the module it returns, or (module, example keyword inputs)."""
    from llmopt.models import LoadedModel

    path_text, _, name = spec.rpartition(":")
    function = _function(Path(path_text), name, spec)
    try:
        made = function()
    except Exception as error:
        raise ModelError(f"{spec}: the function failed: {sentence(error)}") from error
    model, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, torch.nn.Module) or not isinstance(example, Mapping | None):
        raise ModelError(
            f"{spec} returned {_described(made)}: expected a torch.nn.Module or "
            "(module, dict of keyword inputs)"
        )
    model = model.to(dtype)
    if example is None:
        return LoadedModel(spec, model, _kind(model, spec))
    return LoadedModel(
        spec, model, "call", example={k: _cast(v, dtype) for k, v in example.items()}
    )


def from_folder(folder: Path, dtype: torch.dtype, random_weights: bool) -> LoadedModel:
    """A folder written by `save_pretrained` or `save_quantized`, with its tokenizer when it holds one."""
    import transformers

    from llmopt.models import LoadedModel
    from llmopt.quant.storage import MANIFEST

    if (folder / MANIFEST).is_file() and not random_weights:
        return _quantized(folder, dtype)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise ModelError(
            f"{folder} holds no config.json: expected a folder written by save_pretrained"
        )
    try:
        names = json.loads(config_file.read_text()).get("architectures") or ["AutoModel"]
        cls = getattr(transformers, names[0], None)
        if cls is None:
            raise ModelError(
                f"{config_file}: transformers {transformers.__version__} has no class {names[0]!r}"
            )
        if random_weights:
            torch.manual_seed(0)
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            model = cls(config).to(dtype)
        else:
            model = cls.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except ModelError:
        raise
    # transformers, safetensors and json each raise their own kinds for a missing or truncated file
    except Exception as error:
        raise ModelError(f"cannot load {folder}: {sentence(error)}") from error
    return LoadedModel(folder.name, model, _kind(model, str(folder)), _tokenizer(folder))


def _quantized(folder: Path, dtype: torch.dtype) -> LoadedModel:
    from llmopt.models import LoadedModel
    from llmopt.quant.storage import StorageError, load_quantized

    try:
        model = load_quantized(folder).to(dtype)
    except StorageError as error:
        raise ModelError(f"cannot load {folder}: {sentence(error)}") from error
    return LoadedModel(folder.name, model, _kind(model, str(folder)), _tokenizer(folder))


def _tokenizer(folder: Path) -> Any:
    import transformers

    if not any(
        (folder / name).exists()
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
    ):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ModelError(f"cannot load the tokenizer in {folder}: {sentence(error)}") from error


def _function(path: Path, name: str, spec: str) -> Any:
    if not path.is_file():
        raise ModelError(f"{spec}: there is no file {path}")
    module_spec = importlib.util.spec_from_file_location(f"llmopt_user_model_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise ModelError(f"{spec}: {path} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = (
        module  # so that classes defined there can be found again (pickle, dataclasses)
    )
    sys.path.insert(
        0, str(path.parent.resolve())
    )  # its neighbours are importable, as when it is run
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise ModelError(
            f"{spec}: {path} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    finally:
        sys.path.pop(0)
    function = getattr(module, name, None)
    if not callable(function):
        public = sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
        raise ModelError(
            f"{spec}: {path} has no function {name!r}; it has {', '.join(public) or 'none'}"
        )
    return function


def _kind(model: Any, spec: str) -> str:
    """What inputs the model takes, from what Hugging Face models say of themselves."""
    config = getattr(model, "config", None)
    if (
        getattr(model, "main_input_name", None) != "input_ids"
        or config is None
        or config.is_encoder_decoder
    ):
        raise ModelError(
            f"{spec}: no example inputs are known for a {type(model).__name__}: give "
            "path.py:function, with a function that returns (module, dict of keyword inputs)"
        )
    return "causal" if model.can_generate() else "encoder"


def _cast(value: Any, dtype: torch.dtype) -> Any:
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.to(dtype) if is_float else value


def _described(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of ({', '.join(type(v).__name__ for v in value)})"
    return f"a {type(value).__name__}"
