"""What a system's speed costs: its outputs beside those of the model in fp32, on text that comes with Python.

Causal models are driven through the same `step` as in the timed phases (a prompt at once, then one token a step), so that what
is compared is what was timed: KL divergence and agreement on the best token. Encoders are compared by the cosine of their
embeddings, the mean of the first output's states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llmopt.benchmark.phases import NEW_TOKENS, Phase, Runner, token_ids
from llmopt.models import LoadedModel
from llmopt.models.text import documentation
from llmopt.quant.evaluate import compare_embeddings, divergence

WINDOWS = 8  # texts of a causal model
BATCHES = 8  # of an encoder, each of the first phase's size
CHARACTERS_PER_TOKEN = 8  # more than any tokenizer leaves of this text


@dataclass(frozen=True)
class Accuracy:
    """One system beside the model in fp32; causal models have the first two, encoders the others."""

    samples: int  # positions, or texts
    divergence: float | None = None  # KL(fp32 ‖ system) in nats, the mean
    top1: float | None = None  # share of positions with the same best token
    mean_cosine: float | None = None
    lowest_cosine: float | None = None


def outputs(runner: Runner, loaded: LoadedModel, phases: Sequence[Phase]) -> np.ndarray | None:
    """Logits [positions, V] or embeddings [texts, features] in fp32; None for a module with inputs of its own."""
    if loaded.kind == "call":
        return None
    if loaded.kind == "causal":
        return _logits(runner, loaded, phases)
    return _embeddings(runner, loaded, phases[0])


def compare(kind: str, wanted: np.ndarray, got: np.ndarray) -> Accuracy:
    """Outputs of a system beside those wanted."""
    a, b = torch.from_numpy(wanted), torch.from_numpy(got)
    if kind == "causal":
        same = (a.argmax(-1) == b.argmax(-1)).double().mean()
        return Accuracy(len(a), divergence=divergence(a, b), top1=float(same))
    found = compare_embeddings(a, b)
    return Accuracy(found.texts, mean_cosine=found.mean_cosine, lowest_cosine=found.lowest_cosine)


def _logits(runner: Runner, loaded: LoadedModel, phases: Sequence[Phase]) -> np.ndarray:
    prompt = next((phase.tokens for phase in phases if phase.new), phases[0].tokens)
    rows = []
    for ids in _text_ids(loaded, WINDOWS, prompt + NEW_TOKENS):
        logits, cache = runner.step(ids[None, :prompt], None)
        rows.append(logits)
        for token in ids[prompt:]:
            logits, cache = runner.step(token.view(1, 1), cache)
            rows.append(logits)
    return torch.cat(rows).float().numpy()


def _embeddings(runner: Runner, loaded: LoadedModel, phase: Phase) -> np.ndarray:
    ids = _text_ids(loaded, BATCHES * phase.batch, phase.tokens)
    rows = []
    for part in ids.split(phase.batch):
        states = runner.call({"input_ids": part, "attention_mask": torch.ones_like(part)})
        rows.append(states.float().mean(1))
    return torch.cat(rows).numpy()


def calibration_ids(loaded: LoadedModel, windows: int, length: int) -> torch.Tensor:
    """Token ids [windows, length] of the end of the text, which nothing is measured on."""
    return _text_ids(loaded, windows, length, at_end=True)


def _text_ids(loaded: LoadedModel, windows: int, length: int, at_end: bool = False) -> torch.Tensor:
    """Token ids [windows, length] of the text; seeded random ones for a model without a tokenizer."""
    tokenizer: Any = loaded.tokenizer
    if tokenizer is None:
        return token_ids(loaded, windows, length)
    wanted = windows * length
    content = documentation().content
    characters = wanted * CHARACTERS_PER_TOKEN
    content = content[-characters:] if at_end else content[:characters]
    ids = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < wanted:  # the same text again
        ids = ids * -(-wanted // len(ids))
    return torch.tensor(ids[:wanted]).view(windows, length)
