"""Operands passed by keyword, as in F.linear(input=x), stand where passes look for them: by position, or under PyTorch's own name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from inspect import Parameter
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.operator_schemas import get_signature_for_torch_op

from llmopt.effects import DROPOUTS
from llmopt.graph import schemas

# What PyTorch's builtin functions and methods take besides, as NumPy calls it.
_NUMPY_NAMES = {
    "axis": "dim",
    "keepdims": "keepdim",
    "a": "input",
    "x": "input",
    "x1": "input",
    "x2": "other",
}


class _Parameter(NamedTuple):
    name: str
    required: bool
    by_place: bool


_Form = tuple[_Parameter, ...]  # the parameters of one overload


def place_operands(graph: fx.Graph) -> None:
    """Makes positional, in every call, the required arguments that come next by keyword, and gives NumPy's names of others up."""
    for node in graph.nodes:
        if node.op == "call_function":
            _name_inplace(node)
        if node.op not in ("call_function", "call_method") or not node.kwargs:
            continue
        called = _Called(node)
        node.kwargs = {called.own_name(n): v for n, v in node.kwargs.items()}
        names = called.next_required(len(node.args), node.kwargs.keys())
        node.args = (*node.args, *(node.kwargs[n] for n in names))
        node.kwargs = {n: v for n, v in node.kwargs.items() if n not in names}


def _name_inplace(node: fx.Node) -> None:
    """`inplace` by position gets its name, by which all see what the function does; dropout without training does nothing in place."""
    if getattr(node.target, "__module__", "") != torch.nn.functional.__name__:
        return
    names = _names_of(node.target)
    node.meta.pop("llmopt_kind", None)
    if "inplace" in names and len(node.args) > names.index("inplace"):
        place = names.index("inplace")
        node.kwargs = {**node.kwargs, **dict(zip(names[place:], node.args[place:], strict=False))}
        node.args = node.args[:place]
    if node.target.__name__ in DROPOUTS and node.kwargs.get("inplace") is True:
        place = names.index("training")
        training = node.args[place] if len(node.args) > place else node.kwargs.get("training")
        if training is False:
            node.kwargs = {n: v for n, v in node.kwargs.items() if n != "inplace"}


@functools.cache
def _names_of(function: Callable) -> tuple[str, ...]:
    """Of a Python function's parameters; none where nobody knows them."""
    return tuple(p.name for form in _function_forms(function) for p in form)


class _Called:
    """What a node calls, and how that may be called."""

    def __init__(self, node: fx.Node) -> None:
        method = node.op == "call_method"
        self._forms = _method_forms(node.target) if method else _function_forms(node.target)
        self._builtin = method or inspect.isbuiltin(node.target)

    def own_name(self, name: str) -> str:
        """PyTorch's name of a keyword."""
        if not self._builtin or any(name == p.name for form in self._forms for p in form):
            return name
        return _NUMPY_NAMES.get(name, name)

    def next_required(self, given: int, keywords: Any) -> list[str]:
        """The required parameters behind `given` positional arguments that are keywords, up to the first that is not."""
        for form in self._forms:
            if given > len(form) or not keywords <= {p.name for p in form}:
                continue
            names: list[str] = []
            for parameter in form[given:]:
                if (
                    not (parameter.by_place and parameter.required)
                    or parameter.name not in keywords
                ):
                    break
                names.append(parameter.name)
            if {p.name for p in form[given:] if p.required} <= keywords:
                return names
        return []


@functools.cache
def _method_forms(name: str) -> list[_Form]:
    """Of a tensor's method: those of the operator of that name, whose first parameter is the tensor."""
    return list(map(_schema_form, torch._C._jit_get_schemas_for_operator(f"aten::{name}")))


def _function_forms(function: Callable) -> list[_Form]:
    """Of PyTorch's builtin functions those of their overloads; none where nobody knows them."""
    if inspect.isbuiltin(function):
        return _builtin_forms(function)
    if found := schemas(function):
        return list(map(_schema_form, found))
    try:
        return [_signature_form(inspect.signature(function, follow_wrapped=False))]
    except (TypeError, ValueError):
        return []


@functools.cache
def _builtin_forms(function: Callable) -> list[_Form]:
    return list(map(_signature_form, get_signature_for_torch_op(function) or ()))


def _schema_form(schema: torch.FunctionSchema) -> _Form:
    return tuple(
        _Parameter(a.name, not a.has_default_value(), not a.kwarg_only) for a in schema.arguments
    )


def _signature_form(signature: inspect.Signature) -> _Form:
    return tuple(
        _Parameter(
            p.name,
            p.default is Parameter.empty
            and p.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD),
            p.kind is Parameter.POSITIONAL_OR_KEYWORD,
        )
        for p in signature.parameters.values()
    )
