"""Models to benchmark that no package carries, as `llmopt bench bench/models.py:bert_base`: architectures with seeded random weights."""

from __future__ import annotations

import torch
from transformers import BertConfig, BertModel, Qwen3MoeConfig, Qwen3MoeForCausalLM


def bert_base() -> BertModel:
    """BERT-base: 12 layers, hidden 768, 12 heads, FFN 3072."""
    torch.manual_seed(0)
    return BertModel(BertConfig())


def mixture() -> Qwen3MoeForCausalLM:
    """Six layers as wide as those of Granite-3.0-1B-A400M: hidden 1024, 16 heads, 8 of 32 experts of 512 for each token."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=49152,
        hidden_size=1024,
        intermediate_size=512,
        moe_intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        num_experts=32,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        tie_word_embeddings=True,
    )
    return Qwen3MoeForCausalLM(config)
