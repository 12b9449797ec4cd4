"""A quantised model as a folder: tensors in safetensors, and a manifest that says what they are.

    llmopt_quant.json          format version, model class, a Hugging Face model's configs, each quantised layer's scheme and
                               sizes, the tensors file with its size and checksum, tensors that are one and the same
    model-<checksum>.safetensors

The manifest is replaced last and atomically, so a folder always holds one whole model: the new one or the one before.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmopt.files import publish
from llmopt.quant.experts import projections_of, put
from llmopt.quant.layers import replace_modules, twin_of, uncompiled, untie
from llmopt.quant.module import Quantized, QuantizedExperts, QuantizedLinear
from llmopt.quant.schemes import GROUPS, Scheme

MANIFEST = "llmopt_quant.json"
FORMAT = 2  # raise it when a reader of the old one would get it wrong


class StorageError(ValueError):
    """A folder that does not hold the quantised model asked for; says what is wrong with it."""


def save_quantized(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Writes a model made by llmopt.quantize into a folder (made if missing), replacing the quantised model in it.

    Raises ValueError when the model has no quantised layer, OSError when the folder cannot be written.
    """
    from safetensors.torch import save_file

    model = uncompiled(model)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Quantized)}
    if not layers:
        raise ValueError(
            f"llmopt: {type(model).__name__} has no quantised layer: call llmopt.quantize first"
        )
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    before = _manifest_or_none(path)
    tensors, same = _tensors(model)
    with tempfile.TemporaryDirectory(prefix=".llmopt.", dir=path) as partial:
        written = Path(partial) / "tensors"
        save_file(tensors, written, metadata={"format": "pt"})
        checksum = _checksum(written)
        name = f"model-{checksum[:16]}.safetensors"
        manifest = {
            "format": FORMAT,
            "model": _class_name(model),
            "configs": _configs(model),
            "layers": {name: _layer_facts(layer) for name, layer in layers.items()},
            "tensors": {"file": name, "bytes": written.stat().st_size, "checksum": checksum},
            "same": same,
        }
        (Path(partial) / "manifest").write_text(json.dumps(manifest, indent=1))
        publish(written, path / name)
        publish(Path(partial) / "manifest", path / MANIFEST)
    if before is not None and before != name:
        (path / before).unlink(missing_ok=True)


def load_quantized(
    folder: str | os.PathLike[str],
    model: Callable[[], nn.Module] | nn.Module | Any = None,
) -> nn.Module:
    """The model that save_quantized wrote, in eval mode, with the same tensors.

    model: a function that returns the unquantised architecture (its weights do not matter), such a module (it stays as it is),
    or a Hugging Face config. None: a Hugging Face model described by the folder's own config.json.

    Raises StorageError for a missing, truncated or changed file, another model's files, and a newer format.
    """
    path = Path(folder)
    manifest = _manifest(path)
    skeleton = _skeleton(path, manifest, model)
    if _class_name(skeleton) != manifest["model"]:
        raise StorageError(
            f"{path} holds a quantised {manifest['model']}, not a {_class_name(skeleton)}"
        )
    tensors = _read(path, manifest)
    _insert(path, skeleton, manifest["layers"])
    _assign(path, skeleton, tensors)
    if left := _without_values(skeleton):
        raise StorageError(
            f"{path}: {left} of the model given is on the meta device and no parameter or buffer: make it with values"
        )
    untie(skeleton)
    return skeleton.eval()


def _class_name(model: nn.Module) -> str:
    return type(model).__name__


def _layer_facts(layer: Quantized) -> dict[str, Any]:
    *experts, n, _ = layer.codes.shape
    facts = {
        "n": n,
        "k": layer.codes.shape[-1] * 8 // layer.scheme.bits,
        "dtype": str(layer.dtype).removeprefix("torch."),
        "scheme": dataclasses.asdict(layer.scheme),
    }
    if isinstance(layer, QuantizedExperts):
        return {**facts, "experts": experts[0], "transposed": layer.transposed}
    bias = layer.bias if isinstance(layer, QuantizedLinear) else None
    return {**facts, "bias": None if bias is None else str(bias.dtype).removeprefix("torch.")}


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every parameter and buffer (those that a state_dict leaves out too), and name → name of the one it is the same as."""
    first: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    named: list[tuple[str, Tensor]] = [*model.named_parameters(remove_duplicate=False)]
    named += model.named_buffers(remove_duplicate=False)
    for name, tensor in named:
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in first:
            same[name] = first[key]
            continue
        first[key] = name
        data = tensor.detach().contiguous()
        is_part = data.untyped_storage().nbytes() != data.numel() * data.element_size()
        tensors[name] = data.clone() if is_part else data  # safetensors takes no views
    return tensors, same


def _configs(model: nn.Module) -> dict[str, Any]:
    """What a Hugging Face model is made from: attribute → class and values."""
    found = {}
    for name in ("config", "generation_config"):
        config: Any = getattr(model, name, None)
        if hasattr(config, "to_json_string"):
            values = json.loads(config.to_json_string(use_diff=False))
            found[name] = {"class": type(config).__name__, "values": values}
    return found


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.blake2b(digest_size=16)
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _manifest_or_none(path: Path) -> str | None:
    """The tensors file of the model that is in the folder already."""
    try:
        return str(_manifest(path)["tensors"]["file"])
    except StorageError:
        return None


def _manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise StorageError(
            f"{path} holds no {MANIFEST}: expected a folder written by llmopt.save_quantized"
        ) from error
    except (OSError, ValueError) as error:
        raise StorageError(f"{file} cannot be read ({error}): save the model again") from error
    if wrong := _fault(manifest):
        raise StorageError(f"{file} {wrong}")
    return manifest


def _fault(manifest: Any) -> str:
    """What is wrong with a manifest; "" when nothing is."""
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if not isinstance(version, int):
        return "is not a manifest of llmopt.save_quantized"
    if version > FORMAT:
        return f"has format {version}, and this llmopt reads {FORMAT}: install a newer llmopt"
    if version < FORMAT:
        return f"has format {version}, and this llmopt reads {FORMAT}: quantise the model again"
    kinds: dict[str, type] = {
        "model": str,
        "configs": dict,
        "layers": dict,
        "tensors": dict,
        "same": dict,
    }
    if missing := [key for key in kinds if key not in manifest]:
        return f"lacks {', '.join(missing)}: save the model again"
    if wrong := [key for key, kind in kinds.items() if not isinstance(manifest[key], kind)]:
        return f"has values of the wrong kind for {', '.join(wrong)}: save the model again"
    facts = manifest["tensors"]
    kinds = {"file": str, "bytes": int, "checksum": str}
    if wrong := [key for key, kind in kinds.items() if not isinstance(facts.get(key), kind)]:
        return f"does not say the {', '.join(wrong)} of its tensors: save the model again"
    if not all(isinstance(name, str) for name in manifest["same"].values()):
        return "names no tensors under same: save the model again"
    return ""


def _skeleton(path: Path, manifest: dict[str, Any], model: Any) -> nn.Module:
    if isinstance(model, nn.Module):
        return twin_of(model)
    if callable(model):
        made = model()
        if not isinstance(made, nn.Module):
            raise TypeError(f"llmopt: the model function returned a {type(made).__name__}")
        return made
    return _from_config(path, manifest, model)


def _from_config(path: Path, manifest: dict[str, Any], config: Any) -> nn.Module:
    """A Hugging Face model without values; with values where a model keeps tensors that are no parameters and buffers."""
    configs = {name: _config(path, facts) for name, facts in manifest["configs"].items()}
    config = config or configs.get("config")
    if config is None:
        raise StorageError(
            f"{path} holds no config: give load_quantized a function that makes the model"
        )
    cls = _of_transformers(path, manifest["model"])
    with torch.device("meta"):
        made: nn.Module = cls(config)
    buffers = {id(b) for b in made.buffers()}
    if _without_values(made, but=buffers | {id(p) for p in made.parameters()}):
        made = cls(config)
    if "generation_config" in configs and hasattr(made, "generation_config"):
        made.generation_config = configs["generation_config"]
    return made


def _config(path: Path, facts: Any) -> Any:
    try:
        return _of_transformers(path, facts["class"]).from_dict(_with_floats(facts["values"]))
    except StorageError:
        raise
    except Exception as error:  # whatever a config class raises
        raise StorageError(f"{path / MANIFEST}: a config is described wrongly ({error})") from error


def _with_floats(value: Any) -> Any:
    """The values of a config, in whose JSON transformers writes a float that JSON has not as {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _with_floats(item) for key, item in value.items()}
    return [_with_floats(item) for item in value] if isinstance(value, list) else value


def _of_transformers(path: Path, name: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise StorageError(
            f"{path}: give a function that makes the model (transformers is not installed)"
        ) from error
    cls = getattr(transformers, name, None)
    if cls is None:
        raise StorageError(
            f"{path} needs a {name}, which transformers {transformers.__version__} does not have"
        )
    return cls


def _without_values(model: nn.Module, but: Collection[int] = ()) -> str:
    """The name of a tensor of the model that is on the meta device, of those whose id is not in `but`; "" for none."""
    for prefix, module in model.named_modules():
        held = {**vars(module), **module._parameters, **module._buffers}
        for name, value in held.items():
            if isinstance(value, Tensor) and value.is_meta and id(value) not in but:
                return f"{prefix}.{name}".lstrip(".")
    return ""


def _read(path: Path, manifest: dict[str, Any]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    facts = manifest["tensors"]
    file = path / Path(facts["file"]).name
    if not file.is_file():
        raise StorageError(f"{path} lacks {file.name}, which its {MANIFEST} names")
    size = file.stat().st_size
    if size != facts["bytes"]:
        raise StorageError(f"{file} has {size} bytes instead of {facts['bytes']}: copy it again")
    if _checksum(file) != facts["checksum"]:
        raise StorageError(f"{file} does not have the bytes that were written: copy it again")
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise StorageError(f"{file} cannot be read ({error})") from error
    for name, origin in manifest["same"].items():
        if origin not in tensors:
            raise StorageError(f"{path / MANIFEST}: {name} is {origin}, which {file.name} lacks")
        tensors[name] = tensors[origin]
    return tensors


def _insert(path: Path, model: nn.Module, layers: dict[str, Any]) -> None:
    modules, experts = dict(model.named_modules()), projections_of(model)
    for name, facts in layers.items():
        is_experts = isinstance(facts, dict) and "experts" in facts
        if name not in (experts if is_experts else modules):
            raise StorageError(f"{path} is of another model: this one has no layer {name}")
        try:
            layer = _empty_layer(facts)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise StorageError(
                f"{path / MANIFEST}: {name} is described wrongly ({error})"
            ) from error
        if isinstance(layer, QuantizedExperts):
            put(experts[name].module, experts[name].name, layer)
        else:
            replace_modules(model, {modules[name]: layer})


def _empty_layer(facts: dict[str, Any]) -> Quantized:
    """A layer without values. Raises what wrong facts raise."""
    scheme = Scheme(**facts["scheme"])
    if scheme.bits not in (4, 8) or scheme.group not in GROUPS:
        raise ValueError(f"bits {scheme.bits} in groups of {scheme.group}")
    if scheme.activations not in ("same", "int8"):
        raise ValueError(f"activations {scheme.activations!r}")
    if reason := scheme.reject(facts["k"]):
        raise ValueError(reason)
    dtype = getattr(torch, facts["dtype"])
    if "experts" in facts:
        sizes = (facts["experts"], facts["n"], facts["k"], bool(facts["transposed"]))
        with torch.device("meta"):
            return QuantizedExperts.empty(*sizes, scheme, dtype)
    bias = None if facts["bias"] is None else getattr(torch, facts["bias"])
    with torch.device("meta"):
        return QuantizedLinear.empty(facts["n"], facts["k"], scheme, bias, dtype)


def _assign(path: Path, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Gives every parameter and buffer its tensor, as it is."""
    places = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    expected = {**places, **buffers}
    for words, names in (
        ("lacks", expected.keys() - tensors.keys()),
        ("has, and the model has not,", tensors.keys() - expected.keys()),
    ):
        if names:
            raise StorageError(f"{path} is of another model: it {words} {_some(names)}")
    wrong = [n for n, t in tensors.items() if t.shape != expected[n].shape]
    if wrong:
        name = min(wrong)
        raise StorageError(
            f"{path} is of another model: {name} is {tuple(tensors[name].shape)} there and "
            f"{tuple(expected[name].shape)} here"
        )
    # get_submodule would ask experts for their weights
    modules = dict(model.named_modules(remove_duplicate=False))
    shared: dict[int, nn.Parameter] = {}
    for name, tensor in tensors.items():
        parent, _, leaf = name.rpartition(".")
        module = modules[parent]
        if name in buffers:
            module._buffers[leaf] = tensor
        else:
            known = nn.Parameter(tensor, places[name].requires_grad)
            module._parameters[leaf] = shared.setdefault(id(tensor), known)


def _some(names: Any) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" … ({len(listed)} in all)" if len(listed) > 3 else "")
