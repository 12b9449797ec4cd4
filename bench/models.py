"""Models to benchmark that no package carries as they are, as `llmopt bench bench/models.py:bert_base`: most with seeded random weights."""

from __future__ import annotations

import torch
from llmopt.models import load
from transformers import (
    BertConfig,
    BertModel,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)


def bert_base() -> BertModel:
    """BERT-base: 12 layers, hidden 768, 12 heads, FFN 3072."""
    torch.manual_seed(0)
    return BertModel(BertConfig())


def smollm2_bf16() -> torch.nn.Module:
    """SmolLM2-135M-Instruct rounded to bf16, as checkpoints are: with `--dtype fp32` a float32 model whose weights have 16 bits."""
    return load("smollm2", torch.bfloat16).model


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


def latent() -> DeepseekV3ForCausalLM:
    """Six layers in DeepSeek-V3's way, of a quarter of its widths: latent attention of 16 heads, 8 of 32 experts from 4 of 8 groups."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=32768,
        hidden_size=1024,
        intermediate_size=2816,
        moe_intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=16,
        num_key_value_heads=16,
        q_lora_rank=384,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        n_routed_experts=32,
        n_group=8,
        topk_group=4,
        num_experts_per_tok=8,
        first_k_dense_replace=1,
        max_position_embeddings=1024,
    )
    return DeepseekV3ForCausalLM(config)
