"""How near one model is to another on a text: perplexity, divergence of the predictions, agreement on the best token.

Models are compared on the same windows of tokens, each read from its start, with logits in float32. Divergence is the mean
Kullback-Leibler divergence KL(reference ‖ model) over positions, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

POSITIONS_AT_ONCE = 512  # of logits widened to float32


@dataclass(frozen=True)
class Agreement:
    """A causal model beside its reference."""

    tokens: int  # predicted
    perplexity: float
    perplexity_change: float  # relative to the reference
    divergence: float  # mean KL(reference ‖ model)
    top1: float  # share of positions where both predict the same token


@dataclass(frozen=True)
class Similarity:
    """An embedding model beside its reference."""

    texts: int
    mean_cosine: float
    lowest_cosine: float


def windows_of(ids: Tensor, length: int, limit: int | None = None) -> Tensor:
    """ids [T] → [windows, length] of the first `limit` tokens, without the rest that fills no window.

    Raises ValueError when there is not one window.
    """
    count = (ids.numel() if limit is None else min(limit, ids.numel())) // length
    if length < 2 or count < 1:
        usable = ids.numel() if limit is None else min(limit, ids.numel())
        raise ValueError(f"llmopt: {usable} tokens hold no window of {length}")
    return ids[: count * length].view(count, length)


def compare_causal(
    reference: Callable[..., Any],
    models: Mapping[str, Callable[..., Any]],
    windows: Tensor,
    batch: int = 4,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, Agreement]:
    """Each model beside the reference on windows [count, length]; "reference" is in the result too.

    Models are called with input_ids [batch, length] and use_cache=False and return an object with .logits; one that has a cache of
    its own takes both and does as it likes. on_batch: called after each model's batch.
    """
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in ("reference", *models)}
    with torch.inference_mode():
        for part in windows.split(batch):
            wanted = _logits(reference, part)
            next_ids = part[:, 1:].reshape(-1)
            sums["reference"] += _sums(wanted, wanted, next_ids)
            on_batch()
            for name, model in models.items():
                sums[name] += _sums(wanted, _logits(model, part), next_ids)
                on_batch()
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    base = float(sums["reference"][0]) / tokens
    return {
        name: Agreement(
            tokens,
            math.exp(float(total[0]) / tokens),
            math.expm1(float(total[0]) / tokens - base),
            float(total[1]) / tokens,
            float(total[2]) / tokens,
        )
        for name, total in sums.items()
    }


def compare_embeddings(wanted: Tensor, got: Tensor) -> Similarity:
    """wanted and got [texts, features] → the cosines between their rows."""
    cosine = torch.nn.functional.cosine_similarity(wanted.double(), got.double(), dim=-1)
    return Similarity(len(cosine), float(cosine.mean()), float(cosine.min()))


def divergence(wanted: Tensor, got: Tensor) -> float:
    """Mean KL(wanted ‖ got) of logits [..., V] over all positions, in nats."""
    pairs = zip(*(_pieces(t.flatten(0, -2)) for t in (wanted, got)), strict=True)
    total = sum(float(_divergence(_log_softmax(a), _log_softmax(b)).sum()) for a, b in pairs)
    return max(0.0, total) / math.prod(wanted.shape[:-1])  # of equal rows rounding may leave less


def _logits(model: Callable[..., Any], ids: Tensor) -> Tensor:
    """Predictions of the tokens after the first, [batch · (length − 1), V]."""
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[:, :-1].flatten(0, 1)


def _sums(wanted: Tensor, got: Tensor, next_ids: Tensor) -> Tensor:
    """Σ negative log likelihood, Σ divergence, Σ same best token."""
    total = torch.zeros(3, dtype=torch.float64)
    for a, b, ids in zip(_pieces(wanted), _pieces(got), _pieces(next_ids), strict=True):
        log_b = _log_softmax(b)
        total[0] -= log_b.gather(1, ids[:, None]).double().sum()
        total[1] += _divergence(_log_softmax(a), log_b).sum()
        total[2] += (a.argmax(-1) == b.argmax(-1)).sum()
    return total


def _pieces(rows: Tensor) -> Sequence[Tensor]:
    return rows.split(POSITIONS_AT_ONCE)


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), -1)


def _divergence(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL per row in float64: a mean of small differences. What the reference excludes (logits of −∞) adds nothing."""
    p = log_a.exp()
    return torch.where(p > 0, p * (log_a - log_b), 0).sum(-1, dtype=torch.float64)
