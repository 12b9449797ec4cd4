"""The table of architectures: one row each, with the few sizes that differ from the common ones.

The sizes are chosen to hurt: three heads, and widths that are no multiple of a vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

VOCAB = 131


@dataclass(frozen=True)
class Row:
    """One architecture: classes by name, what differs from the common sizes, and the field that must matter."""

    name: str
    model: str  # a class of transformers
    config: str  # its configuration class
    kind: str  # causal, encoder, seq2seq, vision, speech, whisper or dual
    sizes: Mapping[str, Any]
    attn: str = "sdpa"
    rare: bool = False  # close to another row: only tried with --slow
    segments: int = (
        1  # native segments of the forward: more where something in its middle runs in PyTorch
    )
    matters: Mapping[str, Any] = field(
        default_factory=dict
    )  # other values that must change the output

    def __str__(self) -> str:
        return self.name


LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 76,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
ONE = {
    "num_hidden_layers": 1
}  # where a second layer would say nothing new: tracing time is what a case costs
WIDE = LLAMA | {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}
MHA = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 3,
    "n_positions": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 76,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 80,
    "pad_token_id": 0,
}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 40, "num_experts": 5}
ROPE_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
ROPE_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
VIT = {
    "hidden_size": 48,
    "intermediate_size": 76,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 30,
    "patch_size": 6,
}
T5 = {
    "vocab_size": VOCAB,
    "d_model": 48,
    "d_kv": 12,
    "d_ff": 76,
    "num_layers": 2,
    "num_heads": 3,
    "pad_token_id": 0,
    "eos_token_id": None,
    "decoder_start_token_id": 0,
    "tie_word_embeddings": False,
}
BART = {
    "vocab_size": VOCAB,
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 76,
    "decoder_ffn_dim": 76,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "forced_eos_token_id": None,
    "decoder_start_token_id": 1,
    "tie_word_embeddings": False,
}
WHISPER = BART | {
    "num_mel_bins": 20,
    "max_source_positions": 25,
    "max_target_positions": 64,
    "begin_suppress_tokens": None,
}
WAV2VEC2 = {
    "vocab_size": 32,
    "hidden_size": 48,
    "intermediate_size": 76,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
CLIP_TEXT = {**BERT, "max_position_embeddings": 40, "bos_token_id": 1, "eos_token_id": 2}


def _causal(name: str, stem: str, sizes: Mapping[str, Any], **more: Any) -> Row:
    config = more.pop("config", f"{stem}Config")
    model = more.pop("model", f"{stem}ForCausalLM")
    return Row(name, model, config, "causal", sizes, **more)


CAUSAL = (
    _causal("llama", "Llama", LLAMA | {"head_dim": 16}, matters={"rope_theta": 100.0}),
    _causal(
        "llama-bias-llama3-rope",
        "Llama",
        LLAMA | ONE | {"attention_bias": True, "mlp_bias": True, "rope_parameters": ROPE_LLAMA3},
    ),
    _causal(
        "llama-yarn-tied",
        "Llama",
        WIDE | ONE | {"tie_word_embeddings": True, "rope_parameters": ROPE_YARN},
    ),
    _causal("llama-eager", "Llama", WIDE, attn="eager", rare=True),
    _causal(
        "mistral-window", "Mistral", WIDE | {"sliding_window": 6}, matters={"sliding_window": None}
    ),
    _causal("qwen2", "Qwen2", LLAMA | ONE),
    _causal("qwen3", "Qwen3", WIDE),
    _causal(
        "gemma",
        "Gemma",
        WIDE | ONE | {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": False},
    ),
    _causal(
        "gemma2",
        "Gemma2",
        WIDE
        | {
            "sliding_window": 6,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "tie_word_embeddings": False,
        },
        attn="eager",
        matters={
            "attn_logit_softcapping": None,
            "sliding_window": 500,
            "final_logit_softcapping": 1.0,
        },
    ),
    _causal(
        "gemma3",
        "Gemma3",
        WIDE
        | {
            "tie_word_embeddings": False,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        config="Gemma3TextConfig",
    ),
    _causal("phi3", "Phi3", LLAMA | ONE | {"partial_rotary_factor": 1.0}),
    _causal("phi", "Phi", MHA | {"partial_rotary_factor": 0.5}),
    _causal("gpt2", "GPT2", GPT2, model="GPT2LMHeadModel"),
    _causal("gpt-neox", "GPTNeoX", MHA | {"rotary_pct": 0.25, "use_parallel_residual": True}),
    _causal("gptj", "GPTJ", GPT2 | {"rotary_dim": 8}, attn="eager"),
    _causal(
        "gpt-neo-local",
        "GPTNeo",
        {
            "vocab_size": VOCAB,
            "hidden_size": 48,
            "num_layers": 2,
            "num_heads": 3,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 6,
            "max_position_embeddings": 128,
            "pad_token_id": 0,
            "eos_token_id": None,
        },
        attn="eager",
        rare=True,
    ),
    _causal("gpt-bigcode", "GPTBigCode", GPT2 | {"multi_query": True}, rare=True),
    _causal("codegen", "CodeGen", GPT2 | {"rotary_dim": 8, "n_head": 4}, attn="eager", rare=True),
    _causal(
        "opt",
        "OPT",
        {
            "vocab_size": VOCAB,
            "hidden_size": 48,
            "ffn_dim": 76,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "max_position_embeddings": 512,
            "word_embed_proj_dim": 48,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": None,
        },
    ),
    _causal(
        "bloom",
        "Bloom",
        {
            "vocab_size": VOCAB,
            "hidden_size": 48,
            "n_layer": 2,
            "n_head": 3,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": None,
        },
        attn="eager",
    ),
    _causal(
        "mpt",
        "Mpt",
        {
            "vocab_size": VOCAB,
            "d_model": 48,
            "n_layers": 2,
            "n_heads": 3,
            "max_seq_len": 128,
            "expansion_ratio": 2,
            "pad_token_id": 0,
            "eos_token_id": None,
        },
        attn="eager",
        rare=True,
    ),
    _causal(
        "falcon",
        "Falcon",
        MHA | ONE | {"multi_query": True, "new_decoder_architecture": False, "alibi": False},
    ),
    _causal(
        "falcon-alibi",
        "Falcon",
        MHA | ONE | {"alibi": True, "multi_query": False, "parallel_attn": False},
        rare=True,
    ),
    _causal(
        "stablelm",
        "StableLm",
        LLAMA | ONE | {"partial_rotary_factor": 0.25, "use_qkv_bias": True},
        rare=True,
    ),
    _causal("cohere", "Cohere", LLAMA | ONE | {"logit_scale": 0.25}),
    _causal(
        "cohere2",
        "Cohere2",
        WIDE | {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    _causal("olmo2", "Olmo2", LLAMA, rare=True),
    _causal(
        "granite",
        "Granite",
        LLAMA
        | ONE
        | {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.3,
            "logits_scaling": 2.0,
        },
    ),
    _causal("smollm3-nope", "SmolLM3", WIDE | {"no_rope_layers": [1, 0]}),
    _causal("starcoder2", "Starcoder2", LLAMA | ONE | {"sliding_window": 6}, rare=True),
    _causal("nemotron", "Nemotron", LLAMA | ONE, rare=True),
    _causal("glm4", "Glm4", WIDE | ONE | {"partial_rotary_factor": 0.5}),
    _causal(
        "mixtral",
        "Mixtral",
        LLAMA | {"num_local_experts": 5, "num_experts_per_tok": 2},
    ),
    _causal("qwen3-moe", "Qwen3Moe", WIDE | ONE | MOE),
    _causal(
        "gpt-oss-sinks",
        "GptOss",
        WIDE
        | {
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        attn="eager",
    ),
    _causal(
        "deepseek-v3",
        "DeepseekV3",
        LLAMA
        | ONE
        | {
            "num_key_value_heads": 3,
            "q_lora_rank": 20,
            "kv_lora_rank": 12,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 10,
            "v_head_dim": 14,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "first_k_dense_replace": 0,
        },
    ),
    _causal(
        "lfm2-conv",
        "Lfm2",
        LLAMA | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        segments=2,
    ),
)
ENCODERS = (
    Row("bert", "BertModel", "BertConfig", "encoder", BERT),
    Row("bert-eager-mlm", "BertForMaskedLM", "BertConfig", "encoder", BERT, attn="eager"),
    Row(
        "roberta",
        "RobertaForSequenceClassification",
        "RobertaConfig",
        "encoder",
        BERT | ONE | {"num_labels": 3},
    ),
    Row(
        "distilbert",
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        "encoder",
        {"vocab_size": VOCAB, "dim": 48, "hidden_dim": 76, "n_layers": 1, "n_heads": 3},
    ),
    Row(
        "modernbert",
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        "encoder",
        BERT
        | {
            "local_attention": 6,
            "global_attn_every_n_layers": 2,
            "num_attention_heads": 4,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        matters={"local_attention": 400},
    ),
    Row("albert", "AlbertModel", "AlbertConfig", "encoder", BERT | {"embedding_size": 20}),
    Row(
        "electra",
        "ElectraForTokenClassification",
        "ElectraConfig",
        "encoder",
        BERT | {"embedding_size": 20},
        rare=True,
    ),
    Row("mpnet", "MPNetModel", "MPNetConfig", "encoder", BERT | ONE, attn="eager"),
    Row(
        "deberta-v2",
        "DebertaV2Model",
        "DebertaV2Config",
        "encoder",
        BERT | ONE | {"relative_attention": True, "pos_att_type": "p2c|c2p", "position_buckets": 8},
        attn="eager",
        segments=2,
    ),
)
SEQ2SEQ = (
    Row("t5", "T5ForConditionalGeneration", "T5Config", "seq2seq", T5),
    Row(
        "flan-t5",
        "T5ForConditionalGeneration",
        "T5Config",
        "seq2seq",
        T5 | {"feed_forward_proj": "gated-gelu", "num_layers": 1},
    ),
    Row("bart", "BartForConditionalGeneration", "BartConfig", "seq2seq", BART, rare=True),
    Row(
        "marian",
        "MarianMTModel",
        "MarianConfig",
        "seq2seq",
        BART | {"encoder_layers": 1, "decoder_layers": 1},
    ),
    Row("whisper", "WhisperForConditionalGeneration", "WhisperConfig", "whisper", WHISPER),
)
OTHERS = (
    Row("vit", "ViTForImageClassification", "ViTConfig", "vision", VIT),
    Row("dinov2", "Dinov2Model", "Dinov2Config", "vision", VIT | {"mlp_ratio": 2}, rare=True),
    Row(
        "swin",
        "SwinModel",
        "SwinConfig",
        "vision",
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 24,
            "depths": [1, 1],
            "num_heads": [3, 6],
            "window_size": 4,
        },
    ),
    Row(
        "clip",
        "CLIPModel",
        "CLIPConfig",
        "dual",
        {"text_config": CLIP_TEXT, "vision_config": VIT},
        segments=2,
    ),
    Row(
        "siglip",
        "SiglipModel",
        "SiglipConfig",
        "dual",
        {"text_config": CLIP_TEXT, "vision_config": VIT},
    ),
    Row("wav2vec2", "Wav2Vec2ForCTC", "Wav2Vec2Config", "speech", WAV2VEC2, segments=2),
)
ROWS = CAUSAL + ENCODERS + SEQ2SEQ + OTHERS


# One of each kind of attention, position and block: these run at every length and in half precision.
CORE = (
    "llama",
    "mistral-window",
    "qwen3",
    "gemma2",
    "phi",
    "gpt2",
    "gptj",
    "opt",
    "bloom",
    "mixtral",
    "bert",
    "modernbert",
    "t5",
    "whisper",
    "vit",
    "clip",
)
