"""What Dynamo does before each call for what a module holds, done in one go.

Dynamo walks a tree of guards for every attribute that it read from the modules, and its bytecode then loads each weight by its path:
together half a millisecond for a decoder of thirty layers. Here those guards become facts that C++ looks up (`module_facts.py`), one
guard stands for all of them, and the graph is given the module itself, whose weights are known from that guard. What holds, holds as
before: when an attribute, a part or a weight's form changes, the guard fails and Dynamo compiles again; another weight of the same form
is taken as it comes.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._dynamo import config, convert_frame, eval_frame, symbolic_convert
from torch._dynamo.source import LocalSource
from torch._dynamo.variables.builder import GraphArg
from torch._guards import Guard, GuardsSet, Source, TracingContext

from llmopt import _C
from llmopt.graph import fake
from llmopt.messages import log
from llmopt.module_facts import FactBuilder
from llmopt.sizes import expression

_OLDEST = "2.13"  # PyTorch whose Dynamo keeps guards and reads arguments as this file has it


class _Held(NamedTuple):
    """What is known of one module."""

    weights: tuple[weakref.ref[Tensor], ...]
    memory: _C.Prefetch  # where the facts are looked up
    module: weakref.ref  # forgets all this when it goes


class HeldWeights:
    """Which weights a module holds, for a graph that was compiled for one like it. Refers to no graph: Dynamo's guards own it."""

    def __init__(self, facts: _C.ModuleFacts, keys: list[str]) -> None:
        """keys: by which PyTorch dispatches on each weight."""
        self._facts, self._keys = facts, keys
        self._known: dict[int, _Held] = {}  # by a module's id
        # .module: the id of the one that the guard has just found as it was
        self._asked = threading.local()

    def holds(self, module: object) -> bool:
        """Whether a module holds what the graph was compiled for: the guard."""
        held = self._known.get(id(module))
        known = held is not None and self._facts.hold(module, held.weights)
        found = known or self._look_closely(module)
        if found:
            self._asked.module = id(module)
        return found

    def take(self, module: nn.Module) -> _Held:
        """What the guard has just found, or what is found now where nobody asked it. Once for each time that the guard was asked."""
        asked = getattr(self._asked, "module", 0) == id(module) and not _skips_guards()
        if not asked and not self.holds(module):
            raise RuntimeError(
                f"{type(module).__name__} is not what it was when it was compiled, and no guard was asked"
            )
        self._asked.module = 0
        return self._known[id(module)]

    def modules(self) -> int:
        """How many are known that still exist."""
        return len(self._known)

    def _look_closely(self, module: object) -> bool:
        """Remembers the weights of a module of which all facts hold."""
        weights = self._facts.tensors(module) if isinstance(module, nn.Module) else None
        if weights is None or _keys_of(weights) != self._keys:
            return False
        known, number = self._known, id(module)
        forget = weakref.ref(module, lambda _: known.pop(number, None))
        memory = _C.Prefetch(*(self._facts.memory(module) or ((), ())))
        known[number] = _Held(tuple(map(weakref.ref, weights)), memory, forget)
        return True


class ModuleCall:
    """A compiled graph for Dynamo: called with a module and those inputs that it does not hold."""

    def __init__(self, call: Callable, weights: HeldWeights, places: list[int]) -> None:
        """places: of each of the graph's inputs its place among a module's weights, or, from -1 down, among the others."""
        self._call, self._weights = call, weights
        self._order = _C.ArgumentOrder(places)

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        held = self._weights.take(module)
        arguments = self._order.all(held.weights, given)
        while arguments is None:  # another thread has changed the module since
            held = self._weights.take(module)
            arguments = self._order.all(held.weights, given)
        result = self._call(*arguments)
        held.memory.fetch()  # the weights have pushed it out of the caches
        return result


def take_over(call: Callable, gm: fx.GraphModule) -> Callable:
    """What Dynamo is to call in the place of `call`, a compiled graph with the inputs of `gm`; `call` itself where nothing is gained.

    To be called at the end of a backend.
    """
    output = _output_of(gm)
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    source = None if output is None else _holder(inputs, output.local_scope)
    if source is None:
        return call
    module = output.local_scope[source.local_name]
    builder = FactBuilder(module, source)
    held = [n for n in inputs if _is_fixed(n) and builder.add_parameter(_source(n), _example(n))]
    if not held:
        return call
    covered = builder.cover(output.guards)
    weights = HeldWeights(builder.build(), _keys_of(builder.tensors()))
    if not weights.holds(module):
        return call
    place_of = {id(t): i for i, t in enumerate(builder.tensors())}
    given = [n for n in inputs if n not in set(held)]
    places = [-1 - given.index(n) if n in given else place_of[id(_example(n))] for n in inputs]
    _replace_guards(output, covered, Guard(source, _guard_for(weights)))
    output.graph = _arguments_only(source, module, given)
    for node in inputs:
        del node.meta["grapharg"]  # as Dynamo does in a graph that it is through with
    log.debug("%d guards, %d inputs are looked up in %s", len(covered), len(held), source.name)
    return ModuleCall(call, weights, places)


def _output_of(gm: fx.GraphModule) -> Any:
    """Dynamo's record of the graph that it compiles now. None without Dynamo or with an older one, and where guards are chosen by others,
    written to files or skipped: what is covered would be missing there."""
    if torch.__version__ < _OLDEST:
        return None
    context = TracingContext.try_get()
    translator = getattr(symbolic_convert.tls, "current_tx", None)
    if context is None or translator is None or _chooses_guards():
        return None
    output = translator.output
    ours = output.tracing_context is context and output.graph is gm.graph
    elsewhere = output.export or output.package is not None or output.shape_env.specializations
    return output if ours and not elsewhere else None


def _chooses_guards() -> bool:
    """Whether not all guards are asked, or others than usual."""
    if config.caching_precompile or config.use_recursive_dict_tags_for_guards:
        return True
    if not config.skip_no_tensor_aliasing_guards_on_parameters:
        return True
    frame = inspect.currentframe()
    while frame is not None:  # Dynamo does not tell backends of `guard_filter_fn`
        if frame.f_globals.get("__name__") == convert_frame.__name__:
            hooks = frame.f_locals.get("hooks")
            if getattr(hooks, "guard_filter_fn", None) is not None:
                return True
        frame = frame.f_back
    return False


def _skips_guards() -> bool:
    """`torch.compiler.set_stance(skip_guard_eval_unsafe=True)`"""
    return eval_frame._stance.skip_guard_eval_unsafe


def _keys_of(tensors: Iterable[Tensor]) -> list[str]:
    return [str(torch._C._dispatch_keys(t)) for t in tensors]


def _holder(inputs: Iterable[fx.Node], variables: dict[str, Any]) -> LocalSource | None:
    """The local variable whose module holds most inputs."""
    roots = [r for n in inputs if (r := _root(_source(n))) is not None]
    modules = [r for r in roots if isinstance(variables.get(r.local_name), nn.Module)]
    return Counter(modules).most_common(1)[0][0] if modules else None


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
        text = f"{guard.name} holds what it held when the graph was compiled (LLMOPT_DISABLE=guards tells which attribute does not)"
        builder.get_guard_manager(guard).add_lambda_guard(weights.holds, [text], guard.user_stack)

    return MODULE_FACTS


def _replace_guards(output: Any, covered: Collection[Guard], by: Guard) -> None:
    kept = GuardsSet()
    for guard in output.guards:
        if guard not in covered:
            kept.add(guard)
    kept.add(by)
    output.tracing_context.guards_context.dynamo_guards = kept


def _arguments_only(source: LocalSource, module: nn.Module, given: list[fx.Node]) -> fx.Graph:
    """The graph in which Dynamo finds what to call with: the module, and the inputs that it does not hold."""
    graph = fx.Graph()
    first = graph.placeholder("module")
    first.meta["grapharg"] = GraphArg(source, module, False, None, is_tensor=False)
    for node in given:
        graph.placeholder(node.name).meta["grapharg"] = node.meta["grapharg"]
    graph.output(())
    return graph
