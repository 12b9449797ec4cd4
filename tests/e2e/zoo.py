"""Builds and feeds the small models of `architectures`, with random weights that hide nothing.

They are drawn so large that a wrong mask, rotation or norm changes the result far beyond any
tolerance: with the library's own initialisation (0.02) attention is almost uniform.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers

from tests.e2e.architectures import ROWS, VOCAB, Row


def row(name: str) -> Row:
    """The row of that name."""
    return next(r for r in ROWS if r.name == name)


def make(r: Row | str, dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: Any) -> Any:
    """The model in eval mode. The same row and seed give the same weights, first drawn in fp32."""
    r = row(r) if isinstance(r, str) else r
    config = getattr(transformers, r.config)(**{**r.sizes, **sizes})
    config._attn_implementation = r.attn
    torch.manual_seed(seed)
    model = getattr(transformers, r.model)(config).eval()
    randomize(model, seed)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = 0
        model.generation_config.eos_token_id = None
    return model.to(dtype)


def pair(
    r: Row | str, backend: str, dtype: torch.dtype = torch.float32, **sizes: Any
) -> tuple[Any, Any]:
    """The model in eager mode and its twin, compiled in place as `generate` calls the module."""
    eager = make(r, dtype, **sizes)
    compiled = copy.deepcopy(eager)
    compiled.compile(backend=backend)
    return eager, compiled


def after_first_call(compiled: Any, look: Callable[[Any], None]) -> None:
    """What a module compiled in place gives is shown to `look` once, before anything is called again."""
    call = compiled._compiled_call_impl

    def first(*args: Any, **kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        compiled._compiled_call_impl = call
        look(output)
        return output

    compiled._compiled_call_impl = first


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights that keep activations near one and attention peaked; norms and biases move a fifth."""
    gen = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=gen)
            if p.dim() >= 2:
                p.copy_(noise * (1.5 / p[0].numel() ** 0.5))
            else:
                p.add_(0.2 * noise)


def inputs(r: Row | str, length: int, batch: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """Example keyword inputs; for images the length sets the batch, for sounds the duration."""
    r = row(r) if isinstance(r, str) else r
    gen = torch.Generator().manual_seed(1000 * length + batch + seed)
    ids = torch.randint(3, VOCAB, (batch, length), generator=gen)
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    start = torch.randint(3, VOCAB, (batch, max(1, length // 2)), generator=gen)
    pixels = torch.randn(batch, 3, 30, 30, generator=gen)
    if r.kind == "vision":
        side = r.sizes["image_size"]
        return {"pixel_values": torch.randn(max(1, length // 4), 3, side, side, generator=gen)}
    if r.kind == "speech":
        return {"input_values": torch.randn(batch, 200 + 40 * length, generator=gen)}
    if r.kind == "whisper":
        return {
            "input_features": torch.randn(batch, 20, 50, generator=gen),
            "decoder_input_ids": start,
        }
    if r.kind == "dual":
        ids[:, -1] = 2  # the text tower pools at its end-of-text token
        return {**text, "pixel_values": pixels}
    if r.kind == "seq2seq":
        return {**text, "decoder_input_ids": start}
    return text
