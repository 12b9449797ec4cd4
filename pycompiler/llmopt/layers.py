"""Marking the repeated layers of a model, so that Dynamo traces one of each kind and not every one.

Most of what `torch.compile` takes is Dynamo following each layer's Python, and it watches every attribute it met. PyTorch's own
`torch.compiler.nested_compile_region` follows and watches one layer of many, where a layer takes tensors and numbers and gives tensors;
a decoder layer also writes into the cache it is given. Marked here, it takes the two tensors of its part of the cache and gives back
the longer ones.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import zip_longest
from types import MethodType
from typing import Any

import torch
from torch import nn

from llmopt.messages import warn_once

_mark = torch.compiler.nested_compile_region
_CAN_REUSE = "max_reuse_entries" in inspect.signature(_mark).parameters
_INDEX = "llmopt_cache_index"  # attribute of a marked layer: which part of a cache is its own
_TENSOR = (torch.Tensor, torch.FloatTensor, "Tensor", "torch.Tensor", "torch.FloatTensor")


def mark_layers(model: nn.Module) -> int:
    """Marks every list of equal layers in `model`; returns how many layers that are, after a warning if there are none.

    To be called before the first call of a compiled model. A layer counts that stands in an `nn.ModuleList` of one class whose `forward`
    is annotated to return a tensor, where all are built alike, share nothing, and have neither hooks nor replaced methods inside. What a
    call of it cannot share is traced as before: in training mode, under `torch.export`, with other arguments than tensors, numbers,
    strings, None, tuples of tensors and a transformers `DynamicCache` without windows.

    What holds of marked layers: nobody changes them but their weights (attributes are watched in the first of a kind alone, hooks and
    parts in none), and Dynamo traces them without a graph break, or compiling fails. Changed weights are noticed in all.
    """
    if not _CAN_REUSE:
        warn_once(
            f"mark_layers does nothing: torch {torch.__version__} traces every layer, 2.13 can use a trace again"
        )
        return 0
    found = list(_layers(model))
    for layer in found:
        setattr(layer, _INDEX, _cache_index(layer))
        vars(layer)["forward"] = MethodType(forward, layer)
    if not found:
        name = type(model).__name__
        warn_once(
            f"mark_layers found no layers in {name}: no nn.ModuleList of one class whose forward is annotated `-> torch.Tensor`"
        )
    return len(found)


def _layers(module: nn.Module, root: nn.Module | None = None) -> Iterator[nn.Module]:
    """The outermost layers that can be marked."""
    root = root or module
    for child in module.children():
        if isinstance(child, nn.ModuleList) and len(child) > 1 and _are_equal(child, root):
            yield from child
        else:
            yield from _layers(child, root)


def _are_equal(layers: nn.ModuleList, root: nn.Module) -> bool:
    """True for layers of one class that are built alike, of parts and tensors that nothing else holds: one trace speaks for all of them."""
    if len({type(layer) for layer in layers}) > 1:
        return False
    if inspect.signature(type(layers[0]).forward).return_annotation not in _TENSOR:
        return False
    for part in layers.modules():
        if "forward" in vars(part) or part._forward_hooks or part._forward_pre_hooks:
            return False
    holders = Counter(id(thing) for _, thing in _things(root))
    return all(
        holders[id(thing)] == 1 and (name, type(thing)) == first
        for layer in layers
        for (name, thing), first in zip_longest(
            _things(layer), _kinds(layers[0]), fillvalue=("", None)
        )
    )


def _things(module: nn.Module) -> Iterator[tuple[str, object]]:
    """Every module, parameter and buffer by name, as often as it is held."""
    yield from module.named_modules(remove_duplicate=False)
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _kinds(module: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(thing)) for name, thing in _things(module)]


def _cache_index(layer: nn.Module) -> int:
    """What transformers calls layer_idx, where the parts of a layer agree on one; else -1."""
    indices = {vars(m).get("layer_idx") for m in layer.modules()} - {None}
    index = indices.pop() if len(indices) == 1 else None
    return index if isinstance(index, int) else -1


def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A marked layer's own: where Dynamo traces it and may use the trace again, a region; else the forward of its class.

    Its name is that of what it stands for. Pickle looks methods up by name: a model that was saved whole comes back without marks.
    """
    if self.training or not torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting():
        return type(self).forward(self, *args, **kwargs)
    if kwargs.get(
        "output_attentions"
    ):  # of which transformers warns inside, where Dynamo cannot leave a region
        return type(self).forward(self, *args, **kwargs)
    spec, leaves, own = "", [], None
    for name, value in [*enumerate(args), *kwargs.items()]:
        if value is None or isinstance(value, (torch.Tensor, bool, int, float, str)):
            spec += f"{name}:value,"
            leaves.append(value)
        elif isinstance(value, tuple) and all(isinstance(v, torch.Tensor) for v in value):
            spec += f"{name}:{len(value)},"
            leaves.extend(value)
        elif own is None and (own := _part_of(value, self)) is not None:
            spec += f"{name}:cache,"
        else:
            return type(self).forward(self, *args, **kwargs)
    if not _sizes_agree(leaves, own):
        return type(self).forward(self, *args, **kwargs)
    if own is None:
        return _region(self, spec, *leaves)
    past = (own.keys, own.values) if own.is_initialized else (None, None)
    result, keys, values = _region(self, spec, *past, *leaves)
    if not own.is_initialized:
        own.lazy_initialization(keys, values)
    own.keys, own.values = keys, values
    return result


def _sizes_agree(leaves: list[Any], own: Any) -> bool:
    """True where everything is of the batch and the lengths of the first tensor, the states [B, S, E], and of the cache.

    Dynamo must know so before a region begins: torch 2.13 fails to use one again in which it learnt that a size is another one.
    """
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if not tensors or tensors[0].dim() != 3:
        return False
    for i, t in enumerate(tensors):
        for other in tensors[:i]:
            if t is other:  # the trace would take them for one in every layer
                return False
    batch, length = tensors[0].shape[:2]
    total = length
    if own is not None and own.is_initialized:
        past = own.keys.shape[-2]
        if (
            own.keys.shape[0] != batch
            or own.values.shape[0] != batch
            or own.values.shape[-2] != past
        ):
            return False
        total = past + length
    for t in tensors[1:]:
        if t.dim() > 1 and t.shape[0] != 1 and t.shape[0] != batch:
            return False
        if t.dim() == 4:  # a mask [B, H, S, total]
            if t.shape[2] != length or t.shape[3] != total:
                return False
        elif t.dim() > 4 or t.dim() < 1 or t.shape[1 if t.dim() > 1 else 0] != length:
            return False  # rotary tables [B, S, D], positions [B, S] or [S]
    return True


def _part_of(cache: Any, layer: nn.Module) -> Any:
    """A layer's part of a cache whose tensors grow; None for any other value."""
    kinds = sys.modules.get("transformers.cache_utils")
    if kinds is None or type(cache) is not kinds.DynamicCache:
        return None
    index = getattr(layer, _INDEX)
    if not 0 <= index < len(cache.layers) or type(cache.layers[index]) is not kinds.DynamicLayer:
        return None
    return cache.layers[index]


class _Part:
    """What a region has in the place of a cache: one layer's part."""

    def __init__(self, keys: torch.Tensor | None, values: torch.Tensor | None) -> None:
        self.layer = sys.modules["transformers.cache_utils"].DynamicLayer()
        if keys is not None:
            self.layer.lazy_initialization(keys, values)
            self.layer.keys, self.layer.values = keys, values

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, _index: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layer.update(keys, values, *args, **kwargs)

    def get_seq_length(self, _index: int = 0) -> int:
        return self.layer.get_seq_length()


def _call(layer: nn.Module, spec: str, *leaves: Any) -> Any:
    """The forward of the layer's class with the arguments that `spec` names; with a cache also its part as it then is."""
    args, kwargs, rest, part = [], {}, list(leaves), None
    if ":cache," in spec:
        part = _Part(rest.pop(0), rest.pop(0))
    for entry in spec.split(",")[:-1]:
        name, kind = entry.split(":")
        value: Any
        if kind == "cache":
            value = part
        elif kind == "value":
            value = rest.pop(0)
        else:
            value = tuple(rest.pop(0) for _ in range(int(kind)))
        if name.isdigit():
            args.append(value)
        else:
            kwargs[name] = value
    result = type(layer).forward(layer, *args, **kwargs)
    return result if part is None else (result, part.layer.keys, part.layer.values)


_region = _mark(_call, max_reuse_entries=1 << 20) if _CAN_REUSE else _call
