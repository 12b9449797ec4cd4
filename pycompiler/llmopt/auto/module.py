"""llmopt.quantize: a model → its quantised twin, with a scheme by name or with "auto", which decides per layer.

"auto" captures the model as one graph and decides as precision="auto" does; the choice is then measured on the twin itself, with
every calibration sample. A module's layer reads its activations in one way, so here decode and prefill share one scheme.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from llmopt import settings
from llmopt.auto.choose import GraphProblem, decide_for, problem_of
from llmopt.auto.comparison import Comparison, compared_result
from llmopt.auto.plans import Plan, Seconds
from llmopt.auto.timing import LayerClock
from llmopt.lossless import look_at
from llmopt.passes.pipeline import passes
from llmopt.passes.simplify import drop_idle_dropouts
from llmopt.quant import convert
from llmopt.quant.budget import DEFAULT_BUDGET, Decision, check_budget
from llmopt.quant.calibration import Sample, call, evaluating
from llmopt.quant.convert import Recipe
from llmopt.quant.experts import projections_of
from llmopt.quant.layers import linears_of, twin_of, uncompiled
from llmopt.quant.schemes import SCHEMES, Scheme
from llmopt.writes import separate_windows

log = logging.getLogger("llmopt")
Model = TypeVar("Model", bound=nn.Module)

AUTO = "auto"
DECISION = "llmopt_decision"  # the attribute of a twin that holds it


def quantize(
    model: Model,
    scheme: str | Scheme = "w8a8",
    calibration: Iterable[Sample] | Sample | str | None = None,
    *,
    group: int | str | None = None,
    symmetric: bool | None = None,
    algorithm: str | None = None,
    alpha: float | None = None,
    layers: Mapping[str, str | Scheme | None] | None = None,
    accuracy_budget: float | None = None,
) -> Model:
    """A quantised twin of the model; the model stays as it is, and parameters that are not quantised are shared.

    scheme: "w8a8", "w8a16", "w4a16", "w4a8", a Scheme, or "auto": for each layer the fastest of them such that the twin's result
        stays within accuracy_budget (0.01 by default) of the model's on the calibration samples: KL divergence of logits, half the
        squared relative error of other results. "auto" chooses all but calibration and accuracy_budget itself, and rounds plainly.
    calibration: sample inputs, each a tensor, a tuple of positional or a dict of keyword inputs; or "random": random tokens for a
        language model, which show where a model has its outliers, if not how a text would weigh them.
    group, symmetric: "channel", 32, 64, 128; True or False: change the scheme's defaults.
    algorithm: "round"; with calibration also "smoothquant", "awq", "gptq", "smoothquant+gptq", "awq+gptq". Default: "round"
        without calibration, with it "smoothquant" for w8a8 and "gptq" for the others.
    alpha: how much of the activations' range SmoothQuant moves into weights, 0 … 1; 0.5 by default.
    layers: name patterns → a scheme for these linears, or None to leave them; the first that matches counts. A language
        model's output head has 8 bits and activations as they are unless a pattern says otherwise.

    Raises ValueError for unknown names, an empty calibration, arguments that do not go together, a group that does not divide a layer's
    inputs, NaN or infinite weights (naming the layer), a model without linears, and with "auto" for a missing calibration, a budget
    that is no number ≥ 0, and a model that is not one graph.
    """
    if isinstance(scheme, str) and scheme not in (AUTO, *SCHEMES):
        raise ValueError(
            f"llmopt: scheme {scheme!r} does not exist; possible: {', '.join((*SCHEMES, AUTO))}"
        )
    if not isinstance(model, nn.Module):
        raise ValueError(f"llmopt: quantize takes a torch.nn.Module, not a {type(model).__name__}")
    if layers is not None and not isinstance(layers, Mapping):
        raise ValueError(
            f"llmopt: layers={layers!r} is no mapping of name patterns to schemes, or to None"
        )
    recipe = Recipe(scheme, group, symmetric, algorithm, alpha, layers)
    if scheme == AUTO:
        return _auto(model, recipe, calibration, accuracy_budget)
    if accuracy_budget is not None:
        raise ValueError(f"llmopt: accuracy_budget is for scheme 'auto', not for {scheme!r}")
    return convert.quantize(model, recipe, convert.samples_for(model, calibration))


def _auto(
    model: Model,
    recipe: Recipe,
    calibration: Iterable[Sample] | Sample | str | None,
    accuracy_budget: float | None,
) -> Model:
    if given := recipe.given():
        raise ValueError(f"llmopt: scheme 'auto' chooses {', '.join(given)} itself")
    samples = convert.samples_for(model, calibration)
    if samples is None:
        raise ValueError(
            "llmopt: scheme 'auto' measures accuracy on samples: give calibration=…, "
            "or calibration='random' for a language model"
        )
    budget = check_budget(DEFAULT_BUDGET if accuracy_budget is None else accuracy_budget)
    return _with_decision(uncompiled(model), samples, budget, LayerClock())


def _with_decision(
    model: Model, samples: Sequence[Sample], budget: float, seconds: Seconds
) -> Model:
    with evaluating(model):
        wanted = [compared_result(call(model, sample)) for sample in samples]
    with evaluating(model):  # twins begin with the buffers that the model began with
        decided = _decided(model, samples, wanted, budget, seconds)
    if decided is None:
        raise ValueError(f"llmopt: {type(model).__name__} holds no linear layer to quantise")
    decision, schemes = decided
    log.info("scheme 'auto': %s", decision.summary())
    if decision.note:
        log.warning("scheme 'auto': %s", decision.note)
    twin = _converted(model, schemes)
    setattr(twin, DECISION, decision)
    return twin


def _decided(
    model: nn.Module,
    samples: Sequence[Sample],
    wanted: Sequence[Tensor],
    budget: float,
    seconds: Seconds,
) -> tuple[Decision, dict[str, Scheme | None]] | None:
    """The decision and the schemes of linears by their names in the model."""
    found: list[tuple[Decision, dict[str, Scheme | None]]] = []

    def decide(problem: GraphProblem) -> None:
        linears = _linears_behind(model, problem)

        def schemes_of(chosen: Mapping[str, Scheme | None]) -> dict[str, Scheme | None]:
            return {n: scheme for layer, scheme in chosen.items() for n in linears[layer]}

        def check(chosen: Mapping[str, Scheme | None], comparison: Comparison) -> float:
            twin = _converted(model, schemes_of(chosen))
            return _mean(comparison, wanted, [compared_result(call(twin, s)) for s in samples])

        decision, plans = decide_for(problem, budget, seconds, mixed=False, check=check)
        found.append((decision, schemes_of(_one_scheme_each(plans))))

    _capture(model, samples[0], decide)
    return found[0] if found else None


def _one_scheme_each(plans: Mapping[str, Plan]) -> dict[str, Scheme | None]:
    return {layer: plan.coarsest for layer, plan in plans.items()}


def _capture(model: nn.Module, sample: Sample, decide: Callable[[GraphProblem], None]) -> None:
    """Gives `decide` the model's graph, with what surrounds linears joined to them."""

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        def before_rounding(_: fx.Graph) -> None:
            if (problem := problem_of(gm, inputs, look_at(gm, inputs))) is not None:
                decide(problem)

        drop_idle_dropouts(gm.graph)
        separate_windows(gm.graph)
        for _, run in passes(before_rounding, settings.disabled_passes()):
            run(gm.graph)
        gm.recompile()
        return gm

    compiled = torch.compile(twin_of(model), backend=backend, fullgraph=True)
    try:
        call(compiled, sample)  # type: ignore[arg-type]
    except torch._dynamo.exc.Unsupported as error:
        raise ValueError(
            f"llmopt: scheme 'auto' needs a model that Dynamo captures as one graph: {error}"
        ) from error


def _linears_behind(model: nn.Module, problem: GraphProblem) -> dict[str, list[str]]:
    """The model's linears, or projections of experts, behind each of the graph's layers."""
    by_weight: dict[int, list[str]] = {}
    for name, linear in linears_of(model).items():
        by_weight.setdefault(linear.weight.data_ptr(), []).append(name)  # type: ignore[operator]
    for name, projection in projections_of(model).items():
        by_weight.setdefault(projection.parameter.data_ptr(), []).append(name)
    return {
        layer: [name for t in tensors for name in by_weight.get(t.data_ptr(), ())]
        for layer, tensors in problem.weights.items()
    }


def _converted(model: Model, schemes: Mapping[str, Scheme | None]) -> Model:
    chosen = {name: scheme for name, scheme in schemes.items() if scheme is not None}
    if not chosen:
        return twin_of(model)
    layers: dict[str, str | Scheme | None] = dict(chosen)
    return convert.quantize(model, Recipe(layers={**layers, "*": None}))


def _mean(comparison: Comparison, wanted: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """Over all positions of all samples."""
    positions = [t.shape[:-1].numel() for t in wanted]
    found = sum(n * comparison(a, b) for n, a, b in zip(positions, wanted, got, strict=True))
    return found / sum(positions)
