"""Numbers that a model holds and Dynamo hands over as symbols become constants.

With `dynamic=True`, and where a number had another value before (two models of one class with different eps), Dynamo passes floats
such as a norm's eps or `math.pi` as scalar tensors and reads them with `item`. Which kernels fit depends on them. A symbol that is
read as a number gets a guard: with another value Dynamo compiles again.
"""

from __future__ import annotations

import torch
from torch import fx
from torch._dynamo.source import AttrSource, LocalSource
from torch._guards import CompileContext, GuardSource, Source

from llmopt.graph import fake, kind

_VALUES = 4  # of one number that get graphs of their own; what changes more often stays a symbol
_Values = dict[Source, set[float]]
_seen: dict[int, _Values] = {}  # by Dynamo's number of the function that is compiled


def fix_numbers(graph: fx.Graph) -> None:
    """Puts numbers in the place of symbols: floats that modules, other objects, closures or globals hold, ints that are 0 or 1,
    and what is computed from them. Arguments of the call stay symbols, their defaults too: Dynamo does not tell which is which."""
    seen = _values_of_this_function()
    for node in list(graph.nodes):
        value = fake(node)
        if not isinstance(value, (torch.SymFloat, torch.SymInt)):
            continue
        if kind(node) == "item" and _is_steady(node.args[0], value, seen):
            float(value)
        elif node.op == "placeholder" and value.node.has_hint() and value.node.hint in (0, 1):
            int(value)  # as a size; Dynamo makes a symbol of `logits_to_keep=0`
        number = value.node.expr
        if number.is_number:
            _put(int(number) if isinstance(value, torch.SymInt) else float(number), node)


def _values_of_this_function() -> _Values:
    """Those that numbers had when the function was compiled before; none after `torch._dynamo.reset()`, or without Dynamo."""
    compilation = CompileContext.current_compile_id()
    if compilation is None or compilation.frame_id is None:
        return {}
    if not compilation.frame_compile_id:
        _seen[compilation.frame_id] = {}
    return _seen.setdefault(compilation.frame_id, {})


def _is_steady(tensor: fx.Node, value: torch.SymFloat | torch.SymInt, seen: _Values) -> bool:
    """True for what no caller passes, and what has had few values so far."""
    argument = tensor.meta.get("grapharg")
    if argument is None or not value.node.has_hint():
        return False
    source = argument.source
    held = isinstance(source, AttrSource) or (
        isinstance(source, LocalSource) and source.is_derefed_cell_contents
    )
    if source.guard_source is GuardSource.LOCAL and not held:
        return False  # an argument of the call, or an element of one
    values = seen.setdefault(source, set())
    if len(values) < _VALUES:
        values.add(float(value.node.hint))
    return float(value.node.hint) in values


def _put(number: int | float, node: fx.Node) -> None:
    for user in list(node.users):
        user.args, user.kwargs = (
            fx.node.map_arg(given, lambda n: number if n is node else n)
            for given in (user.args, user.kwargs)
        )
    if node.op != "placeholder":
        node.graph.erase_node(node)
