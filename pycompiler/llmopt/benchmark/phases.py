"""What is measured: a phase is one kind of call at one size, with the work it cannot avoid.

A causal model is driven by a plain loop over `step(ids, cache)` rather than `generate()`, so that
the Python around the model is the same few lines for every system. Tokens are seeded random ids:
time does not depend on which they are.
"""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from llmopt.models import LoadedModel, ModelError

PREFILL_TOKENS = 512
PROMPT_TOKENS = 128
_SPECIAL_TOKENS = 100  # at the beginning of most vocabularies
NEW_TOKENS = 64
WARM_TOKENS = 8  # decoded before a call that is looked at: shared caches keep more of the weights from the third on
STATIC_TOKENS = 300  # live in a static cache
STATIC_SLOTS = (512, 8192)
ENCODER_SIZES = ("8x128", "1x128")


class Runner(Protocol):
    """A system's compiled model."""

    def step(self, ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        """Causal models: ids [B, S] and the cache so far → the last logits [B, V], cache."""

    def call(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Other models: keyword inputs → the first output tensor."""


@dataclass(frozen=True)
class Phase:
    """One row of the table for each system."""

    name: str  # "prefill", "first-token", "decode", "8x128", "call"
    unit: str  # "tokens/s" or "ms"
    batch: int = 1
    tokens: int = 0  # prompt length, or tokens per sequence of an encoder
    new: int = 0  # tokens generated in the timed part
    slots: int = 0  # of a static cache; 0: the cache that the system makes itself

    @property
    def higher_is_better(self) -> bool:
        return self.unit == "tokens/s"

    def value(self, seconds: float) -> float:
        """Seconds of one pass in the phase's unit."""
        if self.unit == "ms":
            return seconds * 1e3
        return self.batch * (self.new or self.tokens) / seconds

    def describe(self) -> str:
        """The row's title."""
        if self.name == "prefill":
            return f"prefill of {self.tokens} tokens"
        if self.name == "first-token":
            return f"first token after {self.tokens}"
        if self.new:
            place = f" in a static cache of {self.slots:,}" if self.slots else ""
            return f"decode of {self.new} after {self.tokens}{place}"
        if self.name == "call":
            return "one call"
        return f"batch {self.batch} of {self.tokens} tokens"


CAUSAL = (
    Phase("prefill", "tokens/s", tokens=PREFILL_TOKENS),
    Phase("first-token", "ms", tokens=PROMPT_TOKENS),
    Phase("decode", "tokens/s", tokens=PROMPT_TOKENS, new=NEW_TOKENS),
)
# Only on request: systems that bring their own cache have none of these.
STATIC = tuple(
    Phase(f"static-{slots}", "tokens/s", tokens=STATIC_TOKENS, new=NEW_TOKENS, slots=slots)
    for slots in STATIC_SLOTS
)


def phases_of(kind: str, names: Sequence[str] = ()) -> tuple[Phase, ...]:
    """A kind of model's phases: the usual ones, or those named; ModelError names what exists."""
    if kind == "causal":
        rows = {phase.name: phase for phase in (*CAUSAL, *STATIC)}
        unknown = [name for name in names if name not in rows]
        if unknown:
            raise ModelError(f"unknown phase {unknown[0]!r}: a causal model has {', '.join(rows)}")
        return tuple(rows[name] for name in names) or CAUSAL
    if kind == "encoder":
        return tuple(_encode(name) for name in names or ENCODER_SIZES)
    if list(names) not in ([], ["call"]):
        raise ModelError(f"unknown phase {names[0]!r}: a module with its own inputs has call")
    return (Phase("call", "ms"),)


def _encode(name: str) -> Phase:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name)
    if match is None:
        raise ModelError(f"unknown phase {name!r}: an encoder's are batch x tokens, such as 8x128")
    return Phase(name, "ms", batch=int(match[1]), tokens=int(match[2]))


def token_ids(loaded: LoadedModel, batch: int, tokens: int) -> torch.Tensor:
    """Seeded random ids [batch, tokens]; the first ids, often special tokens, are left out of a vocabulary that has others.

    Raises ModelError for more tokens than an encoder has positions.
    """
    config: Any = loaded.model.config
    most = getattr(config, "max_position_embeddings", None)
    if loaded.kind == "encoder" and most is not None and tokens > most:
        raise ModelError(f"{tokens} tokens: this encoder has {most} positions; --phase {batch}x{most} is possible")  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    first = first_token(loaded)
    return torch.randint(first, config.vocab_size, (batch, tokens), generator=generator)


def first_token(loaded: LoadedModel) -> int:
    """The first id that is used: 100, or 0 of a small vocabulary."""
    config: Any = loaded.model.config
    return _SPECIAL_TOKENS if config.vocab_size > _SPECIAL_TOKENS else 0


def inputs_of(loaded: LoadedModel, phase: Phase) -> dict[str, Any]:
    """The keyword inputs of one call of the model in a phase."""
    if loaded.kind == "call":
        return dict(loaded.example)
    ids = token_ids(loaded, phase.batch, phase.tokens)
    if loaded.kind == "causal":
        return {"input_ids": ids}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def last_logits_only(model: torch.nn.Module) -> dict[str, int]:
    """The keyword by which `generate()` asks for the last token's logits only, where it exists."""
    knows = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if knows else {}


def call_inputs(compiled: Any, loaded: Any, phase: Any) -> dict[str, Any]:
    """The keyword inputs of one call of a compiled model; a decode call comes with a cache of the prompt and of some tokens."""
    inputs = inputs_of(loaded, phase)
    if loaded.kind != "causal":
        return inputs
    keywords = {"use_cache": True, **last_logits_only(loaded.model)}
    if not phase.new:
        return {**inputs, **keywords}
    cache = compiled(**inputs, **keywords).past_key_values
    token = inputs["input_ids"][:, :1]
    for _ in range(WARM_TOKENS):
        cache = compiled(input_ids=token, past_key_values=cache, **keywords).past_key_values
    return {"input_ids": token, "past_key_values": cache, **keywords}


def run_once(runner: Runner, loaded: LoadedModel, phase: Phase) -> float:
    """One pass of a phase; returns the seconds of its timed part."""
    if loaded.kind != "causal":
        inputs = inputs_of(loaded, phase)
        start = time.perf_counter()
        runner.call(inputs)
        return time.perf_counter() - start
    ids = inputs_of(loaded, phase)["input_ids"]
    given = _static_cache(runner, loaded, phase) if phase.slots else None
    start = time.perf_counter()
    logits, cache = runner.step(ids, given)
    token = logits.argmax(-1, keepdim=True)
    if not phase.new:
        return time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(phase.new):
        logits, cache = runner.step(token, cache)
        token = logits.argmax(-1, keepdim=True)
    return time.perf_counter() - start


def _static_cache(runner: Runner, loaded: LoadedModel, phase: Phase) -> Any:
    """An empty cache of the phase's slots; ModelError for a system that keeps keys and values in its own way."""
    from transformers.cache_utils import StaticCache

    if not getattr(runner, "takes_caches", False):
        raise ModelError(f"{phase.name} needs a system that takes the model's own caches")
    return StaticCache(config=loaded.model.config, max_cache_len=phase.slots)


def sample(runner: Runner, loaded: LoadedModel, phase: Phase) -> torch.Tensor:
    """The output of one call in fp32, to compare systems by."""
    if loaded.kind != "causal":
        return runner.call(inputs_of(loaded, phase)).float()
    logits, cache = runner.step(inputs_of(loaded, phase)["input_ids"], None)
    after, _ = runner.step(
        torch.full_like(logits[:, :1], first_token(loaded), dtype=torch.int64), cache
    )
    return torch.stack([logits, after]).float()
