"""The work a phase cannot avoid: flops of its matrix products, bytes of weights and KV read.

Counted on the eager model, so it is a property of the model and not of the system that runs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from llmopt.benchmark.phases import Phase, inputs_of, last_logits_only
from llmopt.models import LoadedModel


@dataclass(frozen=True)
class Work:
    """Of one pass of a phase's timed part."""

    flops: float
    num_bytes: float

    def seconds(self, fma_flops: float, read_bytes: float) -> float:
        """The least time on a machine of these rates (per second): the roofline."""
        return max(self.flops / fma_flops, self.num_bytes / read_bytes)


def work_of(loaded: LoadedModel, phase: Phase) -> Work | None:
    """Counts on one eager call of the phase; None where part of the weights stays unread (MoE)."""
    config = getattr(loaded.model, "config", None)
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts")):
        return None
    weights = weight_bytes(loaded.model)
    with torch.inference_mode():
        if loaded.kind != "causal":
            return Work(float(_flops(loaded.model, inputs_of(loaded, phase), 1.0)), weights)
        seen = phase.tokens
        live = (seen + 1) / (2 * seen)  # of the square of scores, what a causal mask leaves
        prompt = inputs_of(loaded, phase)
        if not phase.new:
            return Work(_flops(loaded.model, prompt, live), weights)
        cache = loaded.model(**prompt, use_cache=True).past_key_values
        kv_per_token = _cache_bytes(cache) / seen
        one = {"input_ids": prompt["input_ids"][:, :1], "past_key_values": cache}
        flops = _flops(loaded.model, one, 1.0) * phase.new
        kv_bytes = kv_per_token * sum(range(seen + 1, seen + phase.new + 1))
        return Work(flops, weights * phase.new + kv_bytes)


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of the weights a call reads: all but embedding tables, of which it reads a few rows."""
    tables: dict[int, int] = {}
    others: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            rows = tables if isinstance(module, torch.nn.Embedding) else others
            rows[id(parameter)] = parameter.numel() * parameter.element_size()
    return sum(others.values())  # a table tied to the output layer is among the others, too


def _flops(model: torch.nn.Module, inputs: dict[str, Any], live: float) -> float:
    """Flops of one call; of attention's only the live part counts."""
    sdpa = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={sdpa: _sdpa_flops})
    with counter:
        model(**inputs, **last_logits_only(model))
    counts = counter.get_flop_counts()["Global"]
    attention = sum(counts.get(op, 0) for op in (sdpa, torch.ops.aten.bmm))
    return sum(counts.values()) - attention * (1.0 - live)


def _sdpa_flops(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    """q [B,H,Sq,D], k [B,Hkv,Skv,D], v [B,Hkv,Skv,Dv], given as shapes: both products."""
    batch, heads, sq, d = q
    return 2 * batch * heads * sq * k[2] * (d + v[3])


def _cache_bytes(cache: Any) -> int:
    return sum(t.numel() * t.element_size() for la in cache.layers for t in (la.keys, la.values))
