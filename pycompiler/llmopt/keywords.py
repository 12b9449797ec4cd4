"""Operands passed by keyword, as in F.linear(input=x, weight=w), stand where passes look for them: by position."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from inspect import Parameter

from torch import fx
from torch.fx.operator_schemas import get_signature_for_torch_op


def place_operands(graph: fx.Graph) -> None:
    """Makes positional, in every call of a function, the required arguments that come next by keyword."""
    for node in graph.nodes:
        if node.op != "call_function" or not node.kwargs:
            continue
        names = _missing(node.target, len(node.args), frozenset(node.kwargs))
        node.args = (*node.args, *(node.kwargs[n] for n in names))
        node.kwargs = {n: v for n, v in node.kwargs.items() if n not in names}


@functools.cache
def _missing(function: Callable, given: int, keywords: frozenset[str]) -> tuple[str, ...]:
    """The required parameters behind `given` positional arguments that are keywords, up to the first that is not."""
    for signature in _signatures(function):
        parameters = list(signature.parameters.values())
        if given > len(parameters) or not keywords <= signature.parameters.keys():
            continue
        names: list[str] = []
        for parameter in parameters[given:]:
            by_place = parameter.kind is Parameter.POSITIONAL_OR_KEYWORD
            if (
                not by_place
                or parameter.default is not Parameter.empty
                or parameter.name not in keywords
            ):
                break
            names.append(parameter.name)
        needed = {p.name for p in parameters[given:] if p.default is Parameter.empty}
        if needed <= keywords:
            return tuple(names)
    return ()


def _signatures(function: Callable) -> list[inspect.Signature]:
    """Of PyTorch's builtin functions those of their overloads; none where nobody knows them."""
    known = get_signature_for_torch_op(function)
    if known is not None:
        return list(known)
    try:
        return [inspect.signature(function)]
    except (TypeError, ValueError):
        return []
