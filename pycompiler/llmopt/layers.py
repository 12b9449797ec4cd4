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
# Layers that differ have a trace each, of which torch allows eight.
_REUSE: dict[str, Any] = {"max_reuse_entries": 1 << 20} if _CAN_REUSE else {}
# An attribute of a marked layer: which part of a cache is its own, or None.
_INDEX = "llmopt_cache_index"
_TENSOR = (torch.Tensor, torch.FloatTensor, "Tensor", "torch.Tensor", "torch.FloatTensor")


def mark_layers(model: nn.Module) -> int:
    """Marks every list of equal layers in `model`; returns how many layers that are, after a warning if there are none.

    To be called before the first call of a compiled model. A layer counts that stands in an `nn.ModuleList` of one class whose `forward`
    is annotated to return a tensor, where all are built alike, share nothing, and have neither hooks nor a replaced forward inside. What
    a call of it cannot share is traced as before: in training mode, under `torch.export`, with other arguments than tensors, numbers,
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
    if any(_is_changed(part, part is layer) for layer in layers for part in layer.modules()):
        return False
    holders = Counter(id(thing) for _, thing in _things(root))
    return all(
        holders[id(thing)] == 1 and (name, type(thing)) == first
        for layer in layers
        for (name, thing), first in zip_longest(
            _things(layer), _kinds(layers[0]), fillvalue=("", None)
        )
    )


def _is_changed(part: nn.Module, outermost: bool) -> bool:
    """True where a call does other things than the class says. A layer's own hooks run outside of its region."""
    hooks = part._forward_hooks or part._forward_pre_hooks
    return "forward" in vars(part) or bool(hooks and not outermost)


def _things(module: nn.Module) -> Iterator[tuple[str, object]]:
    """Every module, parameter and buffer by name, as often as it is held."""
    yield from module.named_modules(remove_duplicate=False)
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _kinds(module: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(thing)) for name, thing in _things(module)]


def _cache_index(layer: nn.Module) -> int | None:
    """What transformers calls layer_idx, where the parts of a layer agree on one."""
    indices = {vars(m).get("layer_idx") for m in layer.modules()} - {None}
    return indices.pop() if len(indices) == 1 else None


def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A marked layer's own: where Dynamo traces it and may use the trace again, a region; else the forward of its class.

    Its name is that of what it stands for. Pickle looks methods up by name: a model that was saved whole comes back without marks.
    """
    if self.training or not torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting():
        return type(self).forward(self, *args, **kwargs)
    # transformers warns of attentions inside a layer: a graph break.
    if kwargs.get("output_attentions"):
        return type(self).forward(self, *args, **kwargs)
    # A region's arguments are tensors, numbers and strings, so that the names of the others are one string.
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
    past = (own.keys, own.values) if own is not None and own.is_initialized else ()
    if not _sizes_agree([v for v in leaves if isinstance(v, torch.Tensor)], past):
        return type(self).forward(self, *args, **kwargs)
    if own is None:
        return _region(self, spec, *leaves)
    result, keys, values = _region(self, spec, *leaves, *(past or (None, None)))
    _fill(own, keys, values)
    return result


def _sizes_agree(tensors: list[torch.Tensor], past: tuple[torch.Tensor, ...]) -> bool:
    """True where all differ and are of the batch and the lengths of the first, the states [B, S, E], and of the keys and values so far.

    Dynamo must know so before a region begins: torch 2.13 fails to use one again in which it learnt that a size is another one, and
    takes what was one tensor in the first call for one in all.
    """
    if not tensors or tensors[0].dim() != 3:
        return False
    every = [*tensors, *past]
    for i, t in enumerate(every):
        for other in every[:i]:
            if t is other:
                return False
    batch, length = tensors[0].shape[:2]
    before = past[0].shape[-2] if past else 0
    for t in past:
        if t.shape[0] != batch or t.shape[-2] != before:
            return False
    for t in tensors[1:]:
        if t.dim() > 1 and t.shape[0] != 1 and t.shape[0] != batch:
            return False
        if t.dim() == 4:  # a mask [B, H, S, before + S]
            if t.shape[2] != length or t.shape[3] != before + length:
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
    if index is None or index >= len(cache.layers):
        return None
    part = cache.layers[index]
    return part if type(part) is kinds.DynamicLayer else None


def _fill(part: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
    if not part.is_initialized:
        part.lazy_initialization(keys, values)
    part.keys, part.values = keys, values


class _Part:
    """What a region has in the place of a cache: one layer's part."""

    def __init__(self, keys: torch.Tensor | None, values: torch.Tensor | None) -> None:
        self.layer = sys.modules["transformers.cache_utils"].DynamicLayer()
        if keys is not None and values is not None:
            _fill(self.layer, keys, values)

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, _index: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layer.update(keys, values, *args, **kwargs)

    def get_seq_length(self, _index: int = 0) -> int:
        return self.layer.get_seq_length()


def _call(layer: nn.Module, spec: str, *leaves: Any) -> Any:
    """The forward of the layer's class with the arguments that `spec` names. A part of a cache comes last, and goes out as it then is."""
    args, kwargs, rest, part = [], {}, list(leaves), None
    for entry in spec.split(",")[:-1]:
        name, kind = entry.split(":")
        value: Any
        if kind == "cache":
            value = part = _Part(*leaves[-2:])
        elif kind == "value":
            value = rest.pop(0)
        else:
            value = tuple(rest.pop(0) for _ in range(int(kind)))
        if name.isdigit():
            args.append(value)
        else:
            kwargs[name] = value
    result = type(layer).forward(layer, *args, **kwargs)
    for leaf in leaves:
        if result is leaf:  # a layer that was skipped: what leaves a region is no input of it
            result = result.clone()
    return result if part is None else (result, part.layer.keys, part.layer.values)


_region = _mark(_call, **_REUSE)
