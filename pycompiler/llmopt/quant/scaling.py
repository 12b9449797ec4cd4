"""SmoothQuant and AWQ: a scale per input channel moves from activations into weights, and into the layer before.

SmoothQuant (Xiao et al. 2022, arXiv 2211.10438) divides activations by s_j = max|X_j|^α / max|W_j|^(1−α), so that no channel
dwarfs the others when tokens are rounded. AWQ (Lin et al. 2023, arXiv 2306.00978) multiplies the weights of channels with large
activations by s_j = mean|X_j|^α, so that rounding the weight costs these less, with the α that loses least on the samples.
Both need a layer in front that takes 1/s (see flow.py); linears without one stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from llmopt.quant import flow
from llmopt.quant.calibration import Inputs
from llmopt.quant.flow import Feed
from llmopt.quant.layers import weight_of
from llmopt.quant.rounding import round_weight
from llmopt.quant.schemes import Scheme

SMALLEST = 1e-5  # a channel never seen to be larger counts as this large
AWQ_STEPS = 10  # α = 0, 1/10 … 9/10


def smooth(
    feed: Feed,
    modules: Mapping[str, nn.Module],
    inputs: Mapping[str, Inputs],
    alpha: float,
) -> None:
    """SmoothQuant of the linears one layer feeds, in place; updates what is known of their inputs."""
    weights = [weight_of(modules[name]).float() for name in feed.targets]
    w_peak = torch.stack([w.abs().amax(0) for w in weights]).amax(0).clamp(min=SMALLEST)
    x_peak = inputs[feed.targets[0]].peak.clamp(min=SMALLEST)
    _move(feed, modules, inputs, x_peak**alpha / w_peak ** (1 - alpha))


def activation_aware(
    feed: Feed,
    modules: Mapping[str, nn.Module],
    inputs: Mapping[str, Inputs],
    schemes: Mapping[str, Scheme],
) -> float:
    """AWQ of the linears one layer feeds, in place; needs second moments. Returns the α that was best (0: no change)."""
    known = inputs[feed.targets[0]]
    mean = known.mean.clamp(min=SMALLEST)
    weights = {name: weight_of(modules[name]).float() for name in feed.targets}
    best, best_alpha, best_scale = float("inf"), 0.0, torch.ones_like(mean)
    for step in range(AWQ_STEPS):
        alpha = step / AWQ_STEPS
        s = mean**alpha
        s = s / (s.amax() * s.amin()).sqrt()
        loss = sum(_loss(w, s, known, schemes[name]) for name, w in weights.items())
        if loss < best:
            best, best_alpha, best_scale = loss, alpha, s
    if best_alpha > 0:
        _move(feed, modules, inputs, best_scale)
    return best_alpha


def _loss(weight: Tensor, s: Tensor, inputs: Inputs, scheme: Scheme) -> float:
    """Σ ‖(round(W s) / s − W) x‖² over the samples."""
    if inputs.moments is None:
        raise ValueError("AWQ needs second moments of the inputs")
    difference = round_weight(weight * s, scheme).weight(scheme.bits) / s - weight
    return float(((difference @ inputs.moments) * difference).sum())


def _move(
    feed: Feed, modules: Mapping[str, nn.Module], inputs: Mapping[str, Inputs], s: Tensor
) -> None:
    flow.apply(feed, modules, s)
    for name in feed.targets:
        known = inputs[name]
        known.peak = known.peak / s
        known.total = known.total / s
        if known.moments is not None:
            known.moments = known.moments / s / s[:, None]
