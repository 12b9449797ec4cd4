"""The decision for one graph: what each scheme costs at each linear, and the fastest choice inside the budget.

Kernels are timed first, so that only schemes whose time could win are tried for accuracy; the chosen mix is measured as a whole.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.weak import WeakTensorKeyDictionary

from llmopt.auto.comparison import Comparison, why_incomparable
from llmopt.auto.plans import (
    DECODE,
    FORMS,
    PREFILL,
    Bucket,
    LayerShape,
    Plan,
    Seconds,
    TimedPlan,
    bucket_of,
    timed_plans,
    worth_trying,
)
from llmopt.auto.timing import LayerClock
from llmopt.auto.trial import PARTS, Layers, Trial
from llmopt.graph import FLOATS, fake, kind, map_fakes, view_base
from llmopt.lossless import Lossless
from llmopt.ops.attention import APPENDS
from llmopt.parameters import is_buffer, is_weight, weight_name
from llmopt.passes.quantize import chooses
from llmopt.quant.budget import DEFAULT_BUDGET, Choice, Decision, all_exact, decide
from llmopt.quant.rounding import why_not
from llmopt.quant.schemes import CodeForm, Scheme

# Schemes of layers, and how results are compared → the distance of the whole.
Check = Callable[[Mapping[str, Scheme | None], Comparison], float]


@dataclass(frozen=True)
class Chosen:
    """The decision for a graph, and the schemes of those of its linears that do not stay exact."""

    decision: Decision
    schemes: Mapping[fx.Node, Scheme]


@dataclass(frozen=True)
class GraphProblem:
    """A graph to decide upon: what it is called with, its linears, and the module's own tensors behind their weights."""

    gm: fx.GraphModule
    values: Sequence[Any]
    layers: Layers
    weights: Mapping[str, Sequence[Tensor]]
    lossless: Lossless


def problem_of(
    gm: fx.GraphModule, inputs: Sequence[Any], lossless: Lossless | None = None
) -> GraphProblem | None:
    """None for a graph without a linear that has a float weight. lossless: what its weights are packed in while they are exact."""
    layers = _layers(gm.graph)
    if not layers:
        return None
    values = [_number(i) if isinstance(i, torch.SymInt) else i for i in inputs]
    weights = {name: _tensors(gm, values, nodes[0]) for name, nodes in layers.items()}
    return GraphProblem(gm, values, layers, weights, lossless or Lossless())


# By weight, so that every graph of a model reads the same packed weights.
_decided: Any = WeakTensorKeyDictionary()


def choose(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    budget: float = DEFAULT_BUDGET,
    mode: str = "default",
    seconds: Seconds | None = None,
    lossless: Lossless | None = None,
) -> Chosen | None:
    """Which of a graph's linears get which scheme; None when it has no linear with a float weight.

    inputs: what the graph is called with; the graph runs on copies, a few times. Weights that were decided upon in another graph of
    their model, with the same budget, keep their plan. mode: of torch.compile, which decides what linears are tuned. seconds: how long
    layers take; measured by default. lossless: as for `problem_of`.
    """
    problem = problem_of(gm, inputs, lossless)
    if problem is None:
        return None
    layers, weights = problem.layers, problem.weights
    known = _known(weights, budget)
    results = map_fakes(gm.graph.output_node().args[0])
    if known is None and (reason := why_incomparable(results)):
        return Chosen(all_exact(layers, budget, f"results cannot be compared: {reason}"), {})
    if known is None:
        decision, plans = decide_for(problem, budget, seconds or LayerClock(mode))
        known = {name: (decision, plan) for name, plan in plans.items()}
        for name, tensors in weights.items():
            for tensor in tensors:
                _decided[tensor] = known[name]
    schemes = {
        node: scheme
        for name, nodes in layers.items()
        for node in nodes
        if (scheme := known[name][1].at(bucket_of(_rows(node)))) is not None
    }
    return Chosen(next(iter(known.values()))[0], schemes)


def _known(
    weights: Mapping[str, Sequence[Tensor]], budget: float
) -> dict[str, tuple[Decision, Plan]] | None:
    """What earlier graphs decided, when that covers every layer."""
    found = {}
    for name, tensors in weights.items():
        plans = [_decided.get(t) for t in tensors]
        if any(p is None or p is not plans[0] or p[0].budget != budget for p in plans):
            return None
        found[name] = plans[0]
    return found


def _layers(graph: fx.Graph) -> Layers:
    """The linears whose weights are floats, those of experts too, by their weights' names; but for those that choose experts."""
    layers: defaultdict[str, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if kind(node) not in PARTS or chooses(node):
            continue
        weights = PARTS[kind(node)](node)["weights"]
        if all(is_weight(w) and not is_buffer(w) and fake(w).dtype in FLOATS for w in weights):
            names = dict.fromkeys(weight_name(w).removesuffix(".weight") for w in weights)
            layers["+".join(names)].append(node)
    return layers


def _number(size: Any) -> int:
    """A size at this call, without a guard on it; large when it is known only while the graph runs."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return PREFILL.m if hint is None else int(hint)


def _rows(node: fx.Node) -> int:
    """Of one linear: of those of an expert as many as each has on average."""
    rows = math.prod(_number(s) for s in fake(PARTS[kind(node)](node)["x"]).shape[:-1])
    return -(-rows // _active(node, rows)) if _is_of_experts(node) else rows


def _is_of_experts(node: fx.Node) -> bool:
    return kind(node) == "llmopt.grouped_linear"


def _active(node: fx.Node, places: int) -> int:
    """How many experts have rows, when so many places are shared out evenly."""
    experts = fake(PARTS[kind(node)](node)["weights"][0]).shape[0]
    return max(1, min(experts, places))


def _places_of_a_token(node: fx.Node) -> int:
    """How many experts each token goes to; 1 where another than ours sorts them."""
    ends = PARTS[kind(node)](node)["ends"]
    source = ends.args[0] if kind(ends) == "getitem" else ends
    readers = (u for part in source.users for u in part.users)
    return next((u.args[2] for u in readers if kind(u) == "llmopt.gather_tokens"), 1)


def _tensors(gm: fx.GraphModule, values: Sequence[Any], node: fx.Node) -> list[Tensor]:
    """The module's own tensors behind a linear's weights."""
    inputs = dict(zip((n for n in gm.graph.nodes if n.op == "placeholder"), values, strict=True))
    bases = dict.fromkeys(view_base(w) for w in PARTS[kind(node)](node)["weights"])
    return [inputs[b] if b in inputs else getattr(gm, str(b.target)) for b in bases]


def _shape(node: fx.Node, m: int, lossless: Lossless) -> LayerShape:
    p = PARTS[kind(node)](node)
    n, k = sum(fake(w).shape[-2] for w in p["weights"]), fake(p["weights"][0]).shape[-1]
    experts = 1
    if _is_of_experts(node):
        places = m * _places_of_a_token(node)
        experts = _active(node, places)
        m = -(-places // experts)
    stored = lossless.common(p["weights"])
    return LayerShape(m, n, k, fake(p["x"]).dtype, p["gated"], experts, stored)


def _buckets(graph: fx.Graph, layers: Layers) -> list[Bucket]:
    """Decode and prefill for a model with a growing cache; else what the inputs show."""
    if any(kind(node) in APPENDS for node in graph.nodes):
        return [DECODE, PREFILL]
    return [bucket_of(max(_rows(nodes[0]) for nodes in layers.values()))]


def decide_for(
    problem: GraphProblem,
    budget: float,
    seconds: Seconds,
    mixed: bool = True,
    check: Check | None = None,
) -> tuple[Decision, dict[str, Plan]]:
    """The decision for a graph, and each layer's plan.

    mixed: whether a layer may treat activations in one way at decode and in another at prefill. check: measures a whole choice;
    by default the graph runs with it.
    """
    buckets = _buckets(problem.gm.graph, problem.layers)
    shape_of = functools.partial(_shape, lossless=problem.lossless)
    forms = {n: _forms(problem.weights[n], shape_of(a[0], 1).k) for n, a in problem.layers.items()}
    refused = [(n, scheme, why) for n, (_, no) in forms.items() for scheme, why in no]
    if not any(possible for possible, _ in forms.values()):
        name, _, why = refused[0]
        decision = all_exact(forms, budget, f"no scheme is possible: {name}: {why}")
        exact = Plan(tuple((bucket, None) for bucket in buckets))
        return replace(decision, impossible=tuple(refused)), dict.fromkeys(forms, exact)
    plans: dict[str, list[TimedPlan]] = {}
    for name, nodes in problem.layers.items():
        shapes = [(bucket, shape_of(nodes[0], bucket.m)) for bucket in buckets]
        plans[name], slow = worth_trying(timed_plans(shapes, forms[name][0], seconds, mixed))
        refused += [(name, timed.plan.name, why) for timed, why in slow]
    tried = {n: {s for p in own if (s := p.plan.coarsest)} for n, own in plans.items()}
    trial = Trial(problem.gm, problem.values, problem.layers, tried)
    shares = trial.divergences()
    by_name = {n: {p.plan.name: p.plan for p in own} for n, own in plans.items()}
    measured = {
        n: [p.costing(shares[n, s] if (s := p.plan.coarsest) else 0.0) for p in own]
        for n, own in plans.items()
    }

    def check_choice(choice: Choice) -> float:
        schemes = {name: by_name[name][plan].coarsest for name, plan in choice.items()}
        return check(schemes, trial.comparison) if check else trial.divergence(schemes)

    decision = replace(
        decide(measured, budget, check_choice),
        impossible=tuple(refused),
        measure=trial.comparison.name,
    )
    return decision, {name: by_name[name][plan] for name, plan in decision.choice.items()}


def _forms(weights: Sequence[Tensor], k: int) -> tuple[list[CodeForm], list[tuple[str, str]]]:
    """The forms of codes that weights can have; for the others their schemes and why not."""
    possible: list[CodeForm] = []
    refused = []
    for form in FORMS:
        reason = form.reject(k) or next((r for w in weights if (r := _not_finite(w))), "")
        if reason:
            refused += [(f"w{form.bits}a{bits}", reason) for bits in (16, 8)]
        else:
            possible.append(form)
    return possible, refused


def _not_finite(weight: Tensor) -> str:
    flat = weight.detach().reshape(1, -1)
    return why_not(flat, CodeForm(8, 0, symmetric=True))
