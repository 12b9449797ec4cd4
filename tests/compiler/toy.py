"""A language model small enough to be benchmarked by tests."""

from __future__ import annotations

import torch
from llmopt.models import LoadedModel
from transformers import LlamaConfig, LlamaForCausalLM

HIDDEN, LAYERS, VOCAB = 32, 2, 128


def llama(tied: bool) -> LoadedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LoadedModel("toy", LlamaForCausalLM(config).eval(), "causal")
