"""The work a phase cannot avoid, and the least time a system needs for it: the roof of its numbers.

`Work` is counted on the eager model, so it is a property of the model. `Form` says how one system stores and multiplies a
model's linears; `least_seconds` puts both beside the rates of a probe.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from llmopt.benchmark.phases import Phase, inputs_of, last_logits_only
from llmopt.lossless import form_held
from llmopt.models import LoadedModel
from llmopt.native.linear_quantized import PLANES
from llmopt.native.probe import Probe
from llmopt.quant.experts import counts_of
from llmopt.quant.layers import linears_of, output_head, text_config_of, weight_of
from llmopt.quant.module import Quantized
from llmopt.quant.schemes import CodeForm, Scheme, of_head

DTYPE_NAMES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Form:
    """How a system keeps a linear's weights, the cache, and what it multiplies; None: as the model has them."""

    multiplies: str | None = None  # as `Probe.linear_peak` takes it
    products: int = 1  # of that dtype that one product is made of
    weight_bytes: float | None = None  # of one weight, with its share of scales and offsets
    head_bytes: float | None = None  # of one weight of a language model's output head
    kv_bytes: float | None = None  # of one number in the cache
    attention: str | None = None  # what attention multiplies, as `multiplies`


EXACT = Form()


def form_of(scheme: Scheme, channel: int = 1024) -> Form:
    """What our kernels do under a scheme. channel: inputs that share a scale where it is one per output channel."""
    products = PLANES[scheme.activations]
    return Form(
        f"s{scheme.bits}",
        products,
        _code_bytes(scheme, channel),
        _code_bytes(of_head(scheme), channel),
        attention="bf16" if scheme.activations == "int8" else None,
    )


def _code_bytes(scheme: CodeForm, channel: int) -> float:
    """Of one weight: its code, and its share of a scale (and an offset), of 4 bytes beside 8 bits and of 2 beside 4."""
    numbers = 1 if scheme.symmetric else 2
    return scheme.bits / 8 + numbers * (4 if scheme.bits == 8 else 2) / scheme.group_of(channel)


def form_stored(model: torch.nn.Module) -> Form:
    """Our form of a model that keeps its precision: its own, but for weights of float32 that fewer bits hold as they are."""
    head = output_head(model)
    weights = {m: weight_of(m) for m in linears_of(model).values()}
    forms = {m: form_held(weight) for m, weight in weights.items()}
    if not any(forms.values()):
        return EXACT

    def mean_bytes(of_head: bool) -> float | None:
        own = {m: weight for m, weight in weights.items() if (m is head) == of_head}
        size = sum(w.numel() * _stored_bytes(forms[m] or w.dtype) for m, w in own.items())
        return size / sum(w.numel() for w in own.values()) if own else None

    counts = Counter[Any]()
    for m, weight in weights.items():
        counts[forms[m]] += weight.numel()
    usual = counts.most_common(1)[0][0]
    multiplies, products = None, 1
    if isinstance(usual, CodeForm):
        multiplies, products = f"s{usual.bits}", PLANES["same"]
    elif usual is not None:
        multiplies = f"f32·{DTYPE_NAMES[usual]}"
    return Form(multiplies, products, mean_bytes(False), mean_bytes(True))


def _stored_bytes(form: CodeForm | torch.dtype) -> float:
    return float(form.itemsize) if isinstance(form, torch.dtype) else _code_bytes(form, form.group)


@dataclass(frozen=True)
class Work:
    """Of one pass of a phase's timed part."""

    dtype: str  # the model's: "f32", "f16" or "bf16"
    linear_flops: float
    attention_flops: float
    weights: float  # numbers read: weights of linears but the head's,
    head_weights: float  # those of the head,
    kv: float  # keys and values,
    others: float  # and all other parameters but embedding tables

    def num_bytes(self, form: Form = EXACT) -> float:
        """Read in a form."""
        own = {"f32": 4.0}.get(self.dtype, 2.0)
        weight = own if form.weight_bytes is None else form.weight_bytes
        head = weight if form.head_bytes is None else form.head_bytes
        kv = own if form.kv_bytes is None else form.kv_bytes
        return self.weights * weight + self.head_weights * head + self.kv * kv + self.others * own

    def read_bytes(self, form: Form, phase: Phase) -> float:
        """Read in a form by each call of the model, the same at the next."""
        return self.num_bytes(form) / (phase.new or 1)

    def least_seconds(self, form: Form, probe: Probe) -> float:
        """The least time on a machine of these rates: the roofline."""
        own = probe.linear_peak(self.dtype)
        peak = own
        if form.multiplies is not None:
            peak = probe.linear_peak(form.multiplies, form.products, instead=self.dtype)
        attention = own if form.attention is None else probe.linear_peak(form.attention)
        compute = self.linear_flops / peak + self.attention_flops / attention
        return max(compute, self.num_bytes(form) / probe.read_bytes)


# What configs call the number of experts, also of models that hold each expert as a module of its own.
_COUNTS_OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def work_of(loaded: LoadedModel, phase: Phase) -> Work | None:
    """Counts on one eager call of the phase; None where it would be wrong: part of the weights stays unread (MoE), a model
    that is quantised already, a dtype that no probe multiplies."""
    config = text_config_of(loaded.model)
    if any(getattr(config, name, None) for name in _COUNTS_OF_EXPERTS):
        return None
    if counts_of(loaded.model):
        return None
    dtype = DTYPE_NAMES.get(next((p.dtype for p in loaded.model.parameters()), torch.float64))
    if dtype is None or any(isinstance(m, Quantized) for m in loaded.model.modules()):
        return None
    body, head, others = _parameters(loaded.model)
    with torch.inference_mode():
        if loaded.kind != "causal":
            linear, attention = _flops(loaded.model, inputs_of(loaded, phase))
            return Work(dtype, linear, attention, body, head, 0.0, others)
        seen = phase.tokens
        prompt = inputs_of(loaded, phase)
        if not phase.new:
            live = (seen + 1) / (2 * seen)  # of the square of scores, what a causal mask leaves
            linear, attention = _flops(loaded.model, prompt)
            return Work(dtype, linear, attention * live, body, head, 0.0, others)
        cache = loaded.model(**prompt, use_cache=True).past_key_values
        kv_per_token = sum(t.numel() for la in cache.layers for t in (la.keys, la.values)) / seen
        one = {"input_ids": prompt["input_ids"][:, :1], "past_key_values": cache}
        counts = (*_flops(loaded.model, one), body, head)
    linear, attention, body, head = (phase.new * count for count in counts)
    kv = kv_per_token * sum(range(seen + 1, seen + phase.new + 1))
    return Work(dtype, linear, attention, body, head, kv, others * phase.new)


def _parameters(model: torch.nn.Module) -> tuple[float, float, float]:
    """Weights of linears, of the output head, and other parameters that a call reads, each tensor once.

    Of embedding tables a call reads a few rows; a table tied to the head is the head's.
    """
    last = output_head(model)
    counted: dict[int, tuple[int, int]] = {}
    kinds = {id(m): 0 for m in linears_of(model).values()}
    if last is not None:
        kinds[id(last)] = 1
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            kind = kinds.get(id(module), 2) if name == "weight" else 2
            counted[id(parameter)] = (kind, parameter.numel())
    return tuple(float(sum(n for k, n in counted.values() if k == kind)) for kind in range(3))  # type: ignore[return-value]


def _flops(model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[float, float]:
    """Flops of one call: of linears, and of attention with all of its scores."""
    sdpa = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={sdpa: _sdpa_flops})
    with counter:
        model(**inputs, **last_logits_only(model))
    counts = counter.get_flop_counts()["Global"]
    attention = sum(counts.get(op, 0) for op in (sdpa, torch.ops.aten.bmm))
    return float(sum(counts.values()) - attention), float(attention)


def _sdpa_flops(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    """q [B,H,Sq,D], k [B,Hkv,Skv,D], v [B,Hkv,Skv,Dv], given as shapes: both products."""
    batch, heads, sq, d = q
    return 2 * batch * heads * sq * k[2] * (d + v[3])
