"""What Dynamo does before each call for what a module holds, done in one go.

Dynamo walks a tree of guards for every attribute that it read from the modules, and its bytecode then loads each weight by its path:
together half a millisecond for a decoder of thirty layers. Here those guards become facts that C++ looks up (`module_facts.py`), one
guard stands for all of them, and the graph is given the module itself, whose weights are known from that guard. What holds, holds as
before: when an attribute, a part or a weight's form changes, the guard fails and Dynamo compiles again; another weight of the same form
is taken as it comes.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._dynamo import config, symbolic_convert
from torch._dynamo.source import LocalSource
from torch._dynamo.variables.builder import GraphArg
from torch._guards import Guard, GuardsSet, Source, TracingContext

from llmopt import _C
from llmopt.graph import fake
from llmopt.messages import log
from llmopt.module_facts import FactBuilder
from llmopt.sizes import expression


class _Kind(NamedTuple):
    """What Dynamo compares of a tensor besides its dtype, size and stride."""

    cls: type
    requires_grad: bool
    keys: str

    @classmethod
    def of(cls, tensor: Tensor) -> _Kind:
        return cls(type(tensor), tensor.requires_grad, str(torch._C._dispatch_keys(tensor)))


class _Held(NamedTuple):
    """The tensors of one module."""

    tensors: tuple[weakref.ref[Tensor], ...]
    memory: _C.Prefetch  # where the facts are looked up
    module: weakref.ref  # forgets all this when it goes


class HeldWeights:
    """Which weights a module holds, for a graph that was compiled for one like it. Refers to no graph: Dynamo's guards own it."""

    def __init__(self, facts: _C.ModuleFacts, kinds: list[_Kind]) -> None:
        self._facts, self._kinds = facts, kinds
        self._held: dict[int, _Held] = {}
        self._asked = threading.local()

    def holds(self, module: object) -> bool:
        """Whether a module holds what the graph was compiled for: the guard."""
        held = self._held.get(id(module))
        known = held is not None and self._facts.hold(module, held.tensors)
        found = known or self._look(module)
        if found:
            self._asked.module = id(module)
        return found

    def of(self, module: nn.Module) -> _Held:
        """What the guard has just found, or what would be found now where nobody asked it."""
        if getattr(self._asked, "module", 0) != id(module) and not self.holds(module):
            raise RuntimeError(
                f"{type(module).__name__} is not what it was when it was compiled, and no guard was asked"
            )
        self._asked.module = 0
        return self._held[id(module)]

    def modules(self) -> int:
        """How many are known that still exist."""
        return len(self._held)

    def _look(self, module: object) -> bool:
        """Remembers a module's tensors, if the facts hold and they are of the kinds that were compiled for."""
        tensors = self._facts.tensors(module) if isinstance(module, nn.Module) else None
        if tensors is None or list(map(_Kind.of, tensors)) != self._kinds:
            return False
        held, number = self._held, id(module)
        forget = weakref.ref(module, lambda _: held.pop(number, None))
        memory = _C.Prefetch(*(self._facts.memory(module) or ((), ())))
        held[number] = _Held(tuple(map(weakref.ref, tensors)), memory, forget)
        return True


class ModuleCall:
    """A compiled graph for Dynamo: called with a module and those inputs that it does not hold."""

    def __init__(self, call: Callable, weights: HeldWeights, places: list[int]) -> None:
        """places: of each of the graph's inputs its place among a module's weights, or, from -1 down, among the others."""
        self._call, self._weights = call, weights
        self._order = _C.ArgumentOrder(places)

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        held = self._weights.of(module)
        arguments = self._order.all(held.tensors, given)
        while arguments is None:  # another thread has changed the module since
            held = self._weights.of(module)
            arguments = self._order.all(held.tensors, given)
        result = self._call(*arguments)
        held.memory.fetch()  # the weights have pushed it out of the caches
        return result


def take_over(call: Callable, gm: fx.GraphModule) -> Callable:
    """What Dynamo is to call in the place of `call`, a compiled graph with the inputs of `gm`; `call` itself where nothing is gained.

    To be called at the end of a backend.
    """
    output = _output_of(gm)
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    held_by = Counter(r for n in inputs if isinstance(fake(n), Tensor) and (r := _root(_source(n))))
    if output is None or not held_by:
        return call
    source = held_by.most_common(1)[0][0]
    module = output.local_scope.get(source.local_name)
    if not isinstance(module, nn.Module):
        return call
    builder = FactBuilder(module, source)
    ours = [n for n in inputs if _is_fixed(n) and builder.add_tensor(_source(n), _example(n))]
    if not ours:
        return call
    guards = output.tracing_context.guards_context.dynamo_guards
    covered = builder.cover(guards)
    tensors = builder.tensors()
    place_of = {id(t): i for i, t in enumerate(tensors)}
    given = [n for n in inputs if n not in set(ours)]
    places = [-1 - given.index(n) if n in given else place_of[id(_example(n))] for n in inputs]
    weights = HeldWeights(builder.build(), list(map(_Kind.of, tensors)))
    if not weights.holds(module):
        return call
    kept = GuardsSet()
    for guard in guards:
        if guard not in covered:
            kept.add(guard)
    kept.add(Guard(source, _guard_for(weights)))
    output.tracing_context.guards_context.dynamo_guards = kept
    output.graph = _inputs_only(source, module, given)
    log.debug("%d guards, %d inputs are looked up in %s", len(covered), len(ours), source.name)
    return ModuleCall(call, weights, places)


def _output_of(gm: fx.GraphModule) -> Any:
    """Dynamo's record of the graph that it compiles now; None without Dynamo, and where its guards are written to files."""
    context = TracingContext.try_get()
    translator = getattr(symbolic_convert.tls, "current_tx", None)
    if context is None or translator is None or config.caching_precompile:
        return None
    output = translator.output
    ours = output.tracing_context is context and output.graph is gm.graph
    return output if ours and not output.export and output.package is None else None


def _root(source: Source | None) -> LocalSource | None:
    while source is not None and not isinstance(source, LocalSource):
        source = getattr(source, "base", None)
    return source


def _source(node: fx.Node) -> Source | None:
    return getattr(node.meta.get("grapharg"), "source", None)


def _example(node: fx.Node) -> Any:
    return node.meta["grapharg"].example


def _is_fixed(node: fx.Node) -> bool:
    """True for a tensor whose sizes are no symbols."""
    value = fake(node)
    if not isinstance(value, Tensor):
        return False
    return all(isinstance(expression(n), int) for n in (*value.shape, *value.stride()))


def _guard_for(weights: HeldWeights) -> Callable:
    def MODULE_FACTS(builder: Any, guard: Guard) -> None:
        text = f"{guard.name} holds what it held when the graph was compiled"
        builder.get_guard_manager(guard).add_lambda_guard(weights.holds, [text], guard.user_stack)

    return MODULE_FACTS


def _inputs_only(source: LocalSource, module: nn.Module, given: list[fx.Node]) -> fx.Graph:
    """What Dynamo reads the arguments of a call from: the module, and the inputs that it does not hold."""
    graph = fx.Graph()
    first = graph.placeholder("module")
    first.meta["grapharg"] = GraphArg(source, module, False, None, is_tensor=False)
    for node in given:
        graph.placeholder(node.name).meta["grapharg"] = node.meta["grapharg"]
    graph.output(())
    return graph
