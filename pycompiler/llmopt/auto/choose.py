"""The decision for one graph: what each scheme costs at each linear, and the fastest choice inside the budget.

All schemes are tried on the inputs that the graph is compiled for. A layer's share of what a scheme costs the whole model is its
share of the relative errors that the scheme makes at the layers' outputs, squared: divergences are quadratic in small errors and
add up. The chosen mix is then measured as a whole.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from llmopt.auto.plans import (
    DECODE,
    PREFILL,
    Bucket,
    LayerShape,
    Plan,
    Seconds,
    bucket_of,
    candidates,
    schemes_tried,
)
from llmopt.auto.timing import layer_seconds
from llmopt.graph import FLOATS, fake, is_weight, kind, view_base, weight_name
from llmopt.ops.linear import parts
from llmopt.ops.linear_quantized import linear_quantized
from llmopt.quant.budget import DEFAULT_BUDGET, Choice, Decision, decide
from llmopt.quant.evaluate import divergence
from llmopt.quant.rounding import Codes, round_weight, why_not
from llmopt.quant.schemes import CodeForm, Scheme

WORST = 1e6  # stands for a divergence that is infinite or NaN

Layers = Mapping[str, Sequence[fx.Node]]  # by name; several where a linear runs more than once


@dataclass(frozen=True)
class Chosen:
    """The decision for a graph, and the schemes of those of its linears that do not stay exact."""

    decision: Decision
    schemes: Mapping[fx.Node, Scheme]


# By weight, so that every graph of a model reads the same packed weights.
_decided: Any = WeakTensorKeyDictionary()


def choose(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    budget: float = DEFAULT_BUDGET,
    seconds: Seconds = layer_seconds,
) -> Chosen | None:
    """Which of a graph's linears get which scheme; None when it has no linear with a float weight.

    inputs: what the graph is called with; the graph runs on copies, some ten times. Weights that were decided upon in another
    graph of their model, with the same budget, keep their plan.
    """
    layers = _layers(gm.graph)
    if not layers:
        return None
    values = [_number(i) if isinstance(i, torch.SymInt) else i for i in inputs]
    weights = {name: _tensors(gm, values, nodes[0]) for name, nodes in layers.items()}
    known = _known(weights, budget)
    if known is None:
        decision, plans = _decide(_Trial(gm, values, layers), budget, seconds)
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
    """The linears whose weights are floats, by their weights' names."""
    layers: defaultdict[str, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if kind(node) != "llmopt.linear":
            continue
        weights = parts(node)["weights"]
        if all(is_weight(w) and fake(w).dtype in FLOATS for w in weights):
            layers["+".join(weight_name(w).removesuffix(".weight") for w in weights)].append(node)
    return layers


def _number(size: Any) -> int:
    """A size at this call, without a guard on it; large when it is known only while the graph runs."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return PREFILL.m if hint is None else int(hint)


def _rows(node: fx.Node) -> int:
    return math.prod(_number(s) for s in fake(parts(node)["x"]).shape[:-1])


def _tensors(gm: fx.GraphModule, values: Sequence[Any], node: fx.Node) -> list[Tensor]:
    """The module's own tensors behind a linear's weights."""
    inputs = dict(zip((n for n in gm.graph.nodes if n.op == "placeholder"), values, strict=True))
    bases = [view_base(w) for w in parts(node)["weights"]]
    return [inputs[b] if b in inputs else getattr(gm, str(b.target)) for b in bases]


def _shape(node: fx.Node, m: int) -> LayerShape:
    p = parts(node)
    n, k = sum(fake(w).shape[0] for w in p["weights"]), fake(p["weights"][0]).shape[1]
    return LayerShape(m, n, k, fake(p["x"]).dtype, p["gated"])


def _buckets(graph: fx.Graph, layers: Layers) -> list[Bucket]:
    """Decode and prefill for a model with a growing cache; else what the inputs show."""
    if any(kind(node) == "llmopt.attention_append" for node in graph.nodes):
        return [DECODE, PREFILL]
    return [bucket_of(max(_rows(nodes[0]) for nodes in layers.values()))]


def _decide(trial: _Trial, budget: float, seconds: Seconds) -> tuple[Decision, dict[str, Plan]]:
    buckets = _buckets(trial.graph, trial.layers)
    divergences = trial.divergences()
    plans: dict[str, dict[str, Plan]] = {}
    measured = {}
    for name, nodes in trial.layers.items():
        found = list(
            candidates(
                [(bucket, _shape(nodes[0], bucket.m)) for bucket in buckets],
                lambda scheme, name=name: (name, scheme) in divergences,  # type: ignore[misc]
                lambda scheme, name=name: divergences[name, scheme],  # type: ignore[misc]
                seconds,
            )
        )
        plans[name] = {candidate.plan: plan for plan, candidate in found}
        measured[name] = [candidate for _, candidate in found]

    def check(choice: Choice) -> float:
        return trial.divergence({name: plans[name][plan].coarsest for name, plan in choice.items()})

    decision = replace(decide(measured, budget, check), impossible=tuple(trial.impossible))
    return decision, {name: plans[name][plan] for name, plan in decision.choice.items()}


class _Trial:
    """Runs a graph with some of its linears quantised, in plain PyTorch."""

    def __init__(self, gm: fx.GraphModule, values: Sequence[Any], layers: Layers) -> None:
        self.gm, self.graph, self.values, self.layers = gm, gm.graph, values, layers
        self.names = {node: name for name, nodes in layers.items() for node in nodes}
        self.codes: dict[tuple[str, CodeForm], list[Codes]] = {}
        self.impossible: list[tuple[str, str, str]] = []  # layer, scheme, why
        self.errors: defaultdict[tuple[str, Scheme], float] = defaultdict(float)
        with torch.no_grad():
            self.wanted = _logits(_Run(self, {}, watch=True).run(*self.copies()))

    def copies(self) -> list[Any]:
        """The inputs, so that what is changed in place is a copy; parameters are not changed."""
        return [
            v.clone() if isinstance(v, Tensor) and not isinstance(v, torch.nn.Parameter) else v
            for v in self.values
        ]

    def divergence(self, schemes: Mapping[str, Scheme | None]) -> float:
        """Of the logits, when these layers have these schemes."""
        with torch.no_grad():
            got = _logits(_Run(self, schemes, watch=False).run(*self.copies()))
        found = divergence(self.wanted, got)
        return found if math.isfinite(found) else WORST

    def divergences(self) -> dict[tuple[str, Scheme], float]:
        """Each layer's share of what each scheme costs the whole model, for those that it can have."""
        shares = {}
        for scheme in schemes_tried():
            errors = {name: e for (name, s), e in self.errors.items() if s == scheme}
            total = sum(errors.values())
            if not errors:
                continue
            whole = self.divergence(dict.fromkeys(errors, scheme))
            for name, error in errors.items():
                share = error / total if 0 < total < math.inf else 1 / len(errors)
                shares[name, scheme] = whole * share
        return shares

    def codes_of(self, name: str, weights: Sequence[Tensor], scheme: Scheme) -> list[Codes] | None:
        """A layer's weights as codes; None, noted with its reason, when they cannot have them."""
        form = CodeForm(scheme.bits, scheme.group, scheme.symmetric)
        if (name, form) not in self.codes:
            reason = next((r for w in weights if (r := why_not(w, form))), "")
            if reason:
                if (name, scheme.name, reason) not in self.impossible:
                    self.impossible.append((name, scheme.name, reason))
                return None
            self.codes[name, form] = [round_weight(w, form) for w in weights]
        return self.codes[name, form]


class _Run(fx.Interpreter):
    """One run of the graph; with `watch` every scheme's relative error at every linear is added up, with exact inputs."""

    def __init__(self, trial: _Trial, schemes: Mapping[str, Scheme | None], watch: bool) -> None:
        super().__init__(trial.gm)
        self.trial, self.schemes, self.watch = trial, schemes, watch

    def run_node(self, n: fx.Node) -> Any:
        name = self.trial.names.get(n)
        if name is None:
            return super().run_node(n)
        scheme = self.schemes.get(name)
        if scheme is not None:
            return self._quantized(n, name, scheme)
        y = super().run_node(n)
        if self.watch:
            for tried in schemes_tried():
                got = self._quantized(n, name, tried)
                if got is not None:
                    error = (got.double() - y.double()).square().sum()
                    self.trial.errors[name, tried] += float(error / y.double().square().sum())
        return y

    def _quantized(self, node: fx.Node, name: str, scheme: Scheme) -> Tensor | None:
        around: Any = dict(self.map_nodes_to_values(parts(node), node))
        x, weights = around.pop("x"), around.pop("weights")
        codes = self.trial.codes_of(name, weights, scheme)
        if codes is None:
            return None
        values, scales, offsets = zip(*codes, strict=True)
        return linear_quantized(
            x, values, scales, offsets, scheme.bits, scheme.activations, **around
        )


def _logits(results: Any) -> Tensor:
    """Of a graph's results the one with most features: logits, where there are any. Raises ValueError without a float result."""
    floats = [
        t
        for t in pytree.tree_leaves(results)
        if isinstance(t, Tensor) and t.is_floating_point() and t.dim() > 0
    ]
    if not floats:
        raise ValueError(
            "llmopt: precision='auto' compares results, and this graph returns no float"
        )
    best = max(floats, key=lambda t: t.shape[-1])
    return best if best.dim() > 1 else best[None]
