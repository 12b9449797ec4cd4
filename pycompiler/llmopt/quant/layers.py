"""The linears of a model: which modules they are, their weight as [N, K], and putting others in their place."""

from __future__ import annotations

import copy
import functools
import inspect
from collections import deque
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from llmopt.quant.module import Quantized

Model = TypeVar("Model", bound=nn.Module)


def is_linear(module: nn.Module) -> bool:
    """nn.Linear itself (subclasses may read their weight otherwise) and Hugging Face's Conv1D, with a weight of its own."""
    return _is_linear_class(module) and not _is_changed(module)


def _is_linear_class(module: nn.Module) -> bool:
    return type(module) is nn.Linear or is_conv1d(module)


def _is_changed(module: nn.Module) -> bool:
    """Whether somebody gave a module another forward, or has its weight computed (pruning, weight norm)."""
    return "forward" in vars(module) or module._parameters.get("weight") is None


def changed_linears(model: nn.Module) -> list[str]:
    """The names of linears that do something else than their class says, or that plain attributes hold too, and are left as they are."""
    held = held_by_attributes(model)
    linears = [(name, m) for name, m in model.named_modules() if _is_linear_class(m)]
    return [name for name, m in linears if _is_changed(m) or m in held]


def held_by_attributes(model: nn.Module) -> set[nn.Module]:
    """The linears that a module of the model refers to by something else than a child: in a list, a dictionary, by one of its methods."""
    found: set[nn.Module] = set()
    seen: set[int] = set()
    children = set(model.modules())
    for module in children:
        waiting = [v for name, v in vars(module).items() if name not in _REGISTERED]
        while waiting:
            value = waiting.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, nn.Module):
                inside = [value] if value in children else value.modules()
                found.update(m for m in inside if _is_linear_class(m))
            elif isinstance(value, dict):
                waiting += value.values()
            elif isinstance(value, (list, tuple, set, frozenset, deque)):
                waiting += value
            elif isinstance(value, functools.partial):
                waiting += (value.func, value.args, value.keywords)
            elif inspect.ismethod(value):
                waiting.append(value.__self__)
    return found


_REGISTERED = ("_modules", "_parameters", "_buffers")


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear, whose weight is [K, N]."""
    cls = type(module)
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"


def linears_of(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear inside a model by its first name, in the model's order.

    Left out are parts of nn.MultiheadAttention, which reads weights, and what plain attributes hold too: there nothing else can be put in
    their place.
    """
    held = held_by_attributes(model)
    inside = tuple(
        f"{name}." for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)
    )
    return {
        name: module
        for name, module in model.named_modules()
        if name and is_linear(module) and not name.startswith(inside) and module not in held
    }


def weight_of(linear: nn.Module) -> Tensor:
    """The weight as [N, K]; a view, detached."""
    weight: Tensor = linear.weight.detach()  # type: ignore[operator]
    return weight.T if is_conv1d(linear) else weight


def bias_of(linear: nn.Module) -> Tensor | None:
    return None if linear.bias is None else linear.bias.detach()  # type: ignore[operator]


def set_weight(linear: nn.Module, weight: Tensor) -> None:
    """Gives a linear the weight [N, K] of its own: who shared the old one keeps it."""
    old: Tensor = linear.weight  # type: ignore[assignment]
    own = (weight.T if is_conv1d(linear) else weight).to(old.dtype).contiguous()
    linear.weight = nn.Parameter(own, requires_grad=old.requires_grad)


_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip


def replace_modules(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Puts each replacement wherever the module stands, under all of its names, with the hooks around its forward."""
    for old, new in replacements.items():
        for name in _HOOKS:  # the same dictionary: who has a hook's handle removes it there
            setattr(new, name, getattr(old, name))
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children leaves out second names
            if child is not None and child in replacements:
                setattr(parent, name, replacements[child])


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that gives a language model's logits, when the model says which one that is."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    return head if isinstance(head, nn.Module) else None


def output_heads(model: nn.Module) -> list[nn.Module]:
    """The linears that give a language model's logits: the one that the model says does, else those that look like it.

    These share their weight with an embedding; or else they are the last, alone or one behind the other, that have an output for each row
    and an input for each column of the embedding with the most rows, which has more of them than columns.
    """
    named = output_head(model)
    if named is not None and is_linear(named):
        return [named]
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    linears = [*linears_of(model).values()]
    shared = [x for x in linears if any(x.weight is t.weight for t in tables)]
    if shared or not tables:
        return shared
    rows, width = max((t.num_embeddings, t.embedding_dim) for t in tables)
    runs = groupby(linears, lambda x: tuple(weight_of(x).shape) == (rows, width))
    fitting = [list(run) for fits, run in runs if fits]
    return fitting[-1] if fitting and rows > width else []


def text_config_of(model: nn.Module) -> Any:
    """The config of a Hugging Face model, or of the part of it that reads text; None for other modules."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def twin_of(model: Model) -> Model:
    """A copy of the modules whose weights and codes lie in the same memory: what is replaced, cast or written by forward in it stays
    in the original.

    Its parameters are its own over that memory, because `to` changes them in place; its other buffers are copies. A compiled module
    gives a twin of what was compiled.
    """
    shared: dict[int, Any] = {id(p): _parameter_over(p) for p in model.parameters()}
    written = {id(b): b for b in buffers_of(model)}
    shared.update((id(b), b) for b in model.buffers() if id(b) not in written)
    # What is computed, such as weights by pruning, has a history, which no copy may have.
    shared.update((id(b), b.detach().clone()) for b in written.values() if not b.is_leaf)
    for module in model.modules():
        values = (v for v in vars(module).values() if isinstance(v, Tensor) and not v.is_leaf)
        shared.update((id(v), v.detach()) for v in values)
    return copy.deepcopy(uncompiled(model), shared)


def buffers_of(model: nn.Module) -> list[Tensor]:
    """The buffers that a forward may write, caches for instance: all but codes, and what is no memory of elements of its own (sparse,
    nested, expanded, meta)."""
    modules = [m for m in model.modules() if not isinstance(m, Quantized)]
    return [buffer for m in modules for buffer in m.buffers(recurse=False) if _is_written(buffer)]


def _is_written(buffer: Tensor) -> bool:
    if (
        buffer.layout is not torch.strided
        or buffer.is_nested
        or buffer.is_meta
        or buffer.is_quantized
    ):
        return False
    return all(n <= 1 or step for n, step in zip(buffer.shape, buffer.stride(), strict=True))


def uncompiled(model: Model) -> Model:
    """The module itself, where torch.compile(module) gave another one around it."""
    return getattr(model, "_orig_mod", model)


def _parameter_over(parameter: nn.Parameter) -> nn.Parameter:
    own = nn.Parameter(parameter.detach(), parameter.requires_grad)
    vars(own).update(vars(parameter))
    return own


def untie(model: nn.Module) -> None:
    """Tells a Hugging Face model whose head has no weight of its own now not to tie it to the embedding.

    Its config still says that they are one: some forwards (T5's kin) scale by it.
    """
    head = output_head(model)
    if head is None or is_linear(head) or not hasattr(model, "all_tied_weights_keys"):
        return
    own: Any = model
    names = tuple(f"{name}." for name, module in model.named_modules() if module is head)
    ties = {to: of for to, of in own.all_tied_weights_keys.items() if not to.startswith(names)}
    own.all_tied_weights_keys, own._tied_weights_keys = ties, dict(ties)
