"""quantize(): a model → the same model with QuantizedLinear for its linears, and QuantizedExperts for the weights of its experts."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TypeVar

from torch import nn

from llmopt.quant import flow, scaling
from llmopt.quant.calibration import Inputs, Sample, forms_of, observe, random_tokens, samples_of
from llmopt.quant.experts import Projection, counts_of, projections_of, put, rounded, routers_of
from llmopt.quant.gptq import gptq
from llmopt.quant.layers import (
    bias_of,
    changed_linears,
    is_linear,
    linears_of,
    output_heads,
    replace_modules,
    twin_of,
    untie,
    weight_of,
)
from llmopt.quant.module import Quantized, QuantizedLinear
from llmopt.quant.rounding import Codes, round_weight, why_not
from llmopt.quant.schemes import Scheme, of_head, scheme_of

log = logging.getLogger("llmopt")
Model = TypeVar("Model", bound=nn.Module)

ALGORITHMS = ("round", "smoothquant", "awq", "gptq", "smoothquant+gptq", "awq+gptq")
DEFAULT_ALPHA = 0.5
MOMENTS_AT_ONCE = 2**30  # bytes of second moments held at a time


@dataclass(frozen=True)
class Recipe:
    """How a model's linears are rounded, in the words of llmopt.quantize, which explains them; None: the default."""

    scheme: str | Scheme = "w8a8"
    group: int | str | None = None
    symmetric: bool | None = None
    algorithm: str | None = None
    alpha: float | None = None
    layers: Mapping[str, str | Scheme | None] | None = None

    def given(self) -> list[str]:
        """The names of what was asked for beside the scheme."""
        others = (f.name for f in fields(self) if f.name != "scheme")
        return [name for name in others if getattr(self, name) is not None]


def quantize(model: Model, recipe: Recipe, samples: list[Sample] | None = None) -> Model:
    """A quantised twin of the model; samples: what `recipe` is to be calibrated on.

    Raises ValueError for unknown names, a group that does not divide a layer's inputs, NaN or infinite weights (naming the layer), and
    a model without linears.
    """
    wanted = scheme_of(recipe.scheme, recipe.group, recipe.symmetric)
    scaler, rounder = _algorithm(recipe.algorithm, samples, wanted)
    alpha = _alpha(recipe.alpha, scaler)
    twin = twin_of(model)
    linears, experts = linears_of(twin), projections_of(twin)
    if changed := changed_linears(twin):
        log.warning("left as they are, because their forward or weight is not a linear's own, or plain attributes "
                    "hold them: %s", _some(changed))  # fmt: skip
    head = of_head(wanted, recipe.symmetric)
    schemes = _schemes(twin, {**linears, **experts}, wanted, head, recipe.layers or {})
    linears = {name: linear for name, linear in linears.items() if name in schemes}
    experts = {name: projection for name, projection in experts.items() if name in schemes}
    _check(linears, experts, schemes)
    if samples is not None and scaler != "none":
        _scale(twin, linears, schemes, samples, scaler, alpha)
    if samples is not None and rounder == "gptq":
        _gptq(twin, linears, schemes, samples)
    else:
        for name, linear in linears.items():
            _put(twin, linear, round_weight(weight_of(linear), schemes[name]), schemes[name])
    if experts and (scaler, rounder) != ("none", "round"):
        log.info("the weights of %d projections of experts are rounded plainly", len(experts))
    for name, projection in experts.items():
        put(projection.module, projection.name, rounded(projection, schemes[name]))
    untie(twin)
    return twin


def samples_for(
    model: nn.Module, calibration: Iterable[Sample] | Sample | str | None
) -> list[Sample] | None:
    """The samples that calibration stands for; None without calibration."""
    if calibration is None:
        return None
    if isinstance(calibration, str):
        if calibration != "random":
            raise ValueError(
                f"llmopt: calibration={calibration!r} does not exist; possible: sample inputs, 'random'"
            )
        return random_tokens(model)
    return samples_of(calibration)


def _algorithm(
    algorithm: str | None, samples: list[Sample] | None, scheme: Scheme
) -> tuple[str, str]:
    """How scales move ("none", "smoothquant", "awq") and how weights are rounded ("round", "gptq")."""
    if algorithm is None:
        if samples is None:
            return "none", "round"
        algorithm = "smoothquant" if scheme.name == "w8a8" else "gptq"
    if algorithm not in ALGORITHMS:
        raise ValueError(
            f"llmopt: algorithm {algorithm!r} does not exist; possible: {', '.join(ALGORITHMS)}"
        )
    if samples is None and algorithm != "round":
        raise ValueError(f"llmopt: {algorithm} needs calibration samples")
    parts = algorithm.split("+")
    scaler = next((p for p in parts if p in ("smoothquant", "awq")), "none")
    return scaler, "gptq" if "gptq" in parts else "round"


def _alpha(given: float | None, scaler: str) -> float:
    """How much of the activations' range SmoothQuant moves."""
    if given is None:
        return DEFAULT_ALPHA
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given <= 1:
        raise ValueError(f"llmopt: alpha={given!r} is not between 0 and 1")
    if scaler != "smoothquant":
        raise ValueError(f"llmopt: alpha={given} is for smoothquant, which was not asked for")
    return given


def _schemes(
    model: nn.Module,
    linears: Mapping[str, nn.Module | Projection],
    wanted: Scheme,
    head_scheme: Scheme,
    layers: Mapping[str, str | Scheme | None],
) -> dict[str, Scheme]:
    """The scheme of each linear, or projection of experts, that is to be quantised; of routers only where `layers` names them.

    head_scheme: that of the output head.
    """
    unused = set(layers)
    heads, routers = output_heads(model), routers_of(model, linears)
    schemes = {}
    for name, linear in linears.items():
        patterns = [p for p in layers if fnmatch.fnmatchcase(name, p)]
        unused -= set(patterns)
        if patterns:
            own = layers[patterns[0]]
            if own is not None:
                schemes[name] = scheme_of(own)
        elif name in routers:
            continue
        elif linear in heads:
            schemes[name] = head_scheme
        else:
            schemes[name] = wanted
    if unused:
        raise ValueError(
            f"llmopt: no linear is named {', '.join(map(repr, sorted(unused)))}; "
            f"the linears are {_some(linears)}"
        )
    if not linears:
        raise ValueError(_no_linear(model))
    if not schemes:
        raise ValueError(f"llmopt: layers leave every one of the {len(linears)} linears as it is")
    return schemes


def _no_linear(model: nn.Module) -> str:
    name = type(model).__name__
    if any(isinstance(m, Quantized) for m in model.modules()) and not isinstance(model, Quantized):
        return f"llmopt: all that could be quantised in {name} is quantised already"
    if is_linear(model) or isinstance(model, Quantized) or "" in counts_of(model):
        return (
            f"llmopt: {name} is the model itself, and quantize replaces layers inside a model: "
            "give it torch.nn.Sequential(model)"
        )
    return f"llmopt: {name} holds no linear layer to quantise"


def _check(
    linears: Mapping[str, nn.Module],
    experts: Mapping[str, Projection],
    schemes: Mapping[str, Scheme],
) -> None:
    """Before minutes of work: every layer can have its scheme."""
    for name in (*linears, *experts):
        weight = weight_of(linears[name]) if name in linears else experts[name].weight
        if reason := why_not(weight, schemes[name]):
            raise ValueError(
                f"llmopt: {name} cannot be quantised to {schemes[name]}: {reason}; "
                f"layers={{{name!r}: None}} leaves it as it is"
            )


def _scale(
    model: nn.Module,
    linears: dict[str, nn.Module],
    schemes: dict[str, Scheme],
    samples: list[Sample],
    scaler: str,
    alpha: float,
) -> None:
    feeds = flow.feeds_of(model, forms_of(samples), linears)
    modules = dict(model.named_modules())
    log.info("%s: %d of %d linears follow a layer that takes their scale", scaler,
             sum(len(f.targets) for f in feeds), len(linears))  # fmt: skip
    if not feeds:
        observe(model, samples, linears, moments=False)  # names a layer with bad inputs
        log.warning("%s moves nothing in %s: no layer in front of a linear feeds it alone; "
                    "gptq is an algorithm that needs none", scaler, type(model).__name__)  # fmt: skip
        return
    if scaler == "smoothquant":
        inputs = observe(model, samples, linears, moments=False)
        for feed in feeds:
            if all(name in inputs for name in feed.targets):
                scaling.smooth(feed, modules, inputs, alpha)
        return
    for chunk in _chunks({feed.targets[0]: linears[feed.targets[0]] for feed in feeds}):
        inputs = observe(model, samples, chunk, moments=True)
        for feed in feeds:
            if feed.targets[0] in inputs:
                same = dict.fromkeys(feed.targets, inputs[feed.targets[0]])
                scaling.activation_aware(feed, modules, same, schemes)


def _gptq(
    model: nn.Module,
    linears: dict[str, nn.Module],
    schemes: dict[str, Scheme],
    samples: list[Sample],
) -> None:
    """Rounds in the model's order, a chunk at a time: later chunks see inputs made by the linears rounded before them."""
    for chunk in _chunks(linears):
        inputs = observe(model, samples, chunk, moments=True)
        for name, linear in chunk.items():
            codes = _gptq_codes(name, linear, schemes[name], inputs.pop(name, None))
            _put(model, linear, codes, schemes[name])


def _gptq_codes(name: str, linear: nn.Module, scheme: Scheme, inputs: Inputs | None) -> Codes:
    if inputs is None or inputs.moments is None:
        log.warning(
            "%s is not reached by any calibration sample: its weights are rounded plainly", name
        )
        return round_weight(weight_of(linear), scheme)
    return gptq(weight_of(linear), inputs.moments, scheme)


def _chunks(linears: Mapping[str, nn.Module]) -> Iterator[dict[str, nn.Module]]:
    """The linears in order, as many at a time as their second moments have memory."""
    chunk: dict[str, nn.Module] = {}
    size = 0
    for name, linear in linears.items():
        need = 4 * weight_of(linear).shape[1] ** 2
        if chunk and size + need > MOMENTS_AT_ONCE:
            yield chunk
            chunk, size = {}, 0
        chunk[name] = linear
        size += need
    yield chunk


def _put(model: nn.Module, linear: nn.Module, codes: Codes, scheme: Scheme) -> None:
    quantized = QuantizedLinear(codes, bias_of(linear), scheme, weight_of(linear).dtype)
    quantized.train(linear.training)
    replace_modules(model, {linear: quantized})


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:5]) + (f" … ({len(listed)} in all)" if len(listed) > 5 else "")
