"""Models of transformers with random weights: a Llama of 1.2 billion parameters, a Qwen3, BERT base; small ones for a rehearsal.

Raises ModuleNotFoundError on import where transformers is missing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)

from bench.gpu.subject import Run, Subject

_PROMPT, _ROOM = 512, 1024  # tokens of a prompt, slots of a static cache
_SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 120,
}  # fmt: skip
_LLAMA: dict[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 32000, "max_position_embeddings": 4096,
}  # fmt: skip
_QWEN3: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32000,
}  # fmt: skip


def llama(device: torch.device, full: bool, cache: str) -> Subject:
    config = LlamaConfig(**(_LLAMA if full else _SMALL))
    return _causal(LlamaForCausalLM, config, torch.float16, device, full, cache)


def qwen3(device: torch.device, full: bool, cache: str) -> Subject:
    """In bf16, which triton's interpreter adds and multiplies wrongly: a rehearsal has fp16."""
    config, dtype = (
        Qwen3Config(**(_QWEN3 if full else _SMALL)),
        torch.bfloat16 if full else torch.float16,
    )
    return _causal(Qwen3ForCausalLM, config, dtype, device, full, cache)


def bert(device: torch.device, full: bool) -> Subject:
    """A batch of 8 texts of 128 tokens, one of them padded."""
    batch, length = (8, 128) if full else (2, 20)
    small = {name: _SMALL[name] for name in list(_SMALL)[:4]}
    config = BertConfig(**({} if full else small))
    model = _made(BertModel, config, torch.float16, device)
    ids = torch.arange(batch * length, device=device).view(batch, length) % config.vocab_size
    mask = torch.ones_like(ids)
    mask[1, length // 2 :] = 0
    live = mask.bool()

    def start(run: Run) -> tuple[Tensor, None]:
        return run(ids, attention_mask=mask).last_hidden_state[live], None

    return Subject(model, start)


def _causal(
    kind: type[PreTrainedModel], config: Any, dtype: torch.dtype, device: torch.device, full: bool, cache: str
) -> Subject:  # fmt: skip
    """cache: "dynamic", which grows, or "static"."""
    model = _made(kind, config, dtype, device)
    length, room = (_PROMPT, _ROOM) if full else (12, 40)
    ids = torch.arange(room, device=device)[None] * 7 % config.vocab_size

    static = None
    if (
        cache == "static"
    ):  # made beforehand and reset, as generate() does: CUDA graphs need its addresses
        static = StaticCache(config=config, max_cache_len=room)
        static.early_initialization(1, config.num_key_value_heads, config.head_dim, dtype, device)

    def start(run: Run) -> tuple[Tensor, tuple[Any, int]]:
        if static is not None:
            static.reset()
        kept = DynamicCache(config=config) if static is None else static
        out = run(ids[:, :length], past_key_values=kept, logits_to_keep=1)
        return out.logits[:, -1], (kept, length)

    def step(run: Run, given: tuple[Any, int]) -> tuple[Tensor, tuple[Any, int]]:
        kept, at = given
        out = run(ids[:, at : at + 1], past_key_values=kept)
        return out.logits[:, -1], (kept, at + 1)

    return Subject(model, start, step)


def _made(
    kind: type[PreTrainedModel], config: Any, dtype: torch.dtype, device: torch.device
) -> Any:
    """Weights are made where they stay: on the host that takes longer than all the rest."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return kind(config).eval()
    finally:
        torch.set_default_dtype(before)
