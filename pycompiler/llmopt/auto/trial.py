"""Runs a graph with some of its linears quantised, in plain PyTorch, and tells what that does to its result (comparison.py).

A layer's share of what a scheme costs the whole model is its share of the relative errors that the scheme makes at the layers'
outputs, squared: divergences are quadratic in small errors and add up. Errors are estimated on some rows of each layer's exact
inputs, shares on some positions of the result; a whole choice is measured on all positions.
"""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from llmopt.auto.comparison import compared_index, compared_result, comparison_of
from llmopt.auto.plans import FORMS, readings_of
from llmopt.graph import kind
from llmopt.ops.grouped_linear import grouped_linear
from llmopt.ops.grouped_linear import parts as grouped_parts
from llmopt.ops.linear import parts as linear_parts
from llmopt.ops.linear_quantized import linear_quantized
from llmopt.quant.rounding import Codes, round_weight
from llmopt.quant.schemes import CodeForm, Scheme

log = logging.getLogger("llmopt")

ROWS = 64  # of a linear's inputs
POSITIONS = 512  # of the result

PARTS = {"llmopt.linear": linear_parts, "llmopt.grouped_linear": grouped_parts}  # what a layer is
OF_EXPERTS = ("ends", "biases", "act", "gated")  # of ops.grouped_linear, beside weights
Layers = Mapping[str, Sequence[fx.Node]]  # by name; several where a linear runs more than once


class Trial:
    """One graph on one set of inputs.

    tried: the schemes that may matter for each layer; only these are rounded to.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        values: Sequence[Any],
        layers: Layers,
        tried: Mapping[str, Collection[Scheme]],
    ) -> None:
        self.gm, self.values, self.tried = gm, values, tried
        self.names = {node: name for name, nodes in layers.items() for node in nodes}
        self.codes: dict[tuple[str, CodeForm], list[Codes]] = {}
        self.errors: defaultdict[tuple[str, Scheme], float] = defaultdict(float)
        self._start = time.monotonic()
        self._say(f"trying schemes at {len(layers)} layers")
        results = self._run({}, watch=True)
        self.wanted = compared_result(results)
        self.comparison = comparison_of(gm.graph, compared_index(results), self.wanted.shape[-1])

    def divergence(self, schemes: Mapping[str, Scheme | None]) -> float:
        """Of the whole result, when these layers have these schemes."""
        self._say("running the chosen mix as a whole")
        return self.comparison(self.wanted, compared_result(self._run(schemes)))

    def divergences(self) -> dict[tuple[str, Scheme], float]:
        """Each layer's share of what each scheme costs the whole model."""
        shares = {}
        some = _spread(self.wanted.shape[:-1].numel(), POSITIONS)
        for scheme in dict.fromkeys(s for _, s in self.errors):
            errors = {name: e for (name, s), e in self.errors.items() if s == scheme}
            self._say(f"running the model with {scheme.name} at {len(errors)} layers")
            got = compared_result(self._run(dict.fromkeys(errors, scheme)))
            whole = self.comparison(*(t.flatten(0, -2)[some] for t in (self.wanted, got)))
            total = sum(errors.values())
            for name, error in errors.items():
                share = error / total if 0 < total < math.inf else 1 / len(errors)
                shares[name, scheme] = whole * share
        return shares

    def codes_of(self, name: str, weights: Sequence[Tensor], form: CodeForm) -> list[Codes]:
        """A layer's weights as codes."""
        form = CodeForm(form.bits, form.group, form.symmetric)
        if (name, form) not in self.codes:
            self.codes[name, form] = [round_weight(w, form) for w in weights]
        return self.codes[name, form]

    def _run(self, schemes: Mapping[str, Scheme | None], watch: bool = False) -> Any:
        """The results; inputs that the graph changes in place are copies, parameters are not changed."""
        copies = [
            v.clone() if isinstance(v, Tensor) and not isinstance(v, torch.nn.Parameter) else v
            for v in self.values
        ]
        with torch.no_grad():
            return _Run(self, schemes, watch).run(*copies)

    def _say(self, what: str) -> None:
        log.info("auto: %s (%.0f s so far)", what, time.monotonic() - self._start)


class _Run(fx.Interpreter):
    """One run of the graph; with `watch` the relative errors of schemes at every linear are added up, with exact inputs."""

    def __init__(self, trial: Trial, schemes: Mapping[str, Scheme | None], watch: bool) -> None:
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
            self._add_errors(n, name, y)
        return y

    def _quantized(self, node: fx.Node, name: str, scheme: Scheme) -> Tensor:
        around: Any = dict(self.map_nodes_to_values(PARTS[kind(node)](node), node))
        x, weights = around.pop("x"), around.pop("weights")
        values, scales, offsets = zip(*self.trial.codes_of(name, weights, scheme), strict=True)
        if kind(node) == "llmopt.grouped_linear":
            own: dict[str, Any] = {name: around[name] for name in OF_EXPERTS}
            own |= {"bits": scheme.bits, "activations": scheme.activations, "scales": scales}
            starts = None if scheme.symmetric else offsets
            return grouped_linear(x, values, offsets=starts, **own)
        return linear_quantized(
            x, values, scales, offsets, scheme.bits, scheme.activations, **around
        )

    def _add_errors(self, node: fx.Node, name: str, y: Tensor) -> None:
        around: Any = dict(self.map_nodes_to_values(PARTS[kind(node)](node), node))
        some = _spread(y.shape[:-1].numel(), ROWS)
        x, weights = _rows(around.pop("x"))[some], around.pop("weights")
        is_of_experts = kind(node) == "llmopt.grouped_linear"
        if is_of_experts:
            around = {name: around[name] for name in OF_EXPERTS}
            ends = around["ends"].long()
            around["ends"] = (some < ends[:, None]).sum(1).int()  # rows stay in order
        elif around["residual"] is not None:
            around["residual"] = _rows(around["residual"])[some]
        want = _rows(y)[some].double()
        none = (None,) * len(weights)
        for form in FORMS:
            schemes = readings_of(form, self.trial.tried[name])
            if not schemes:
                continue
            rounded = [c.weight(form.bits) for c in self.trial.codes_of(name, weights, form)]
            group = form.group_of(x.shape[-1])
            for s in schemes:
                around |= {"bits": s.bits, "activations": s.activations}
                around |= {"group": group, "symmetric": s.symmetric}
                plain = (x, rounded) if is_of_experts else (x, rounded, none, none)
                got = (grouped_linear if is_of_experts else linear_quantized)(*plain, **around)
                error = (got.double() - want).square().sum()
                # Outputs that are all zero stay so under every scheme.
                self.trial.errors[name, s] += float(error / want.square().sum()) if error else 0.0


def _rows(t: Tensor) -> Tensor:
    """[rows, features]."""
    return t.reshape(-1, t.shape[-1])


def _spread(count: int, most: int) -> Tensor:
    """Up to `most` of `count` indices, evenly spread."""
    return torch.linspace(0, max(0, count - 1), min(count, most)).long()
