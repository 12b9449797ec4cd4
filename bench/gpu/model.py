"""A Llama in plain PyTorch with random weights: what a session compiles end to end, and the MODEL that it tunes.

A cache is a list of (keys, values) [B, Hkv, S, D] per layer, grown by `torch.cat`, as most models' are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.gpu.forms.work import FULL, SMALL, Sizes
from bench.gpu.subject import Subject

Cache = list[tuple[Tensor, Tensor]]


class Layer(nn.Module):
    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.sizes = s
        kv = s.kv_heads * s.head
        self.norm, self.norm_mlp = nn.RMSNorm(s.hidden, 1e-5), nn.RMSNorm(s.hidden, 1e-5)
        self.q, self.o = (nn.Linear(s.hidden, s.hidden, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(s.hidden, kv, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(s.hidden, s.wide, bias=False) for _ in range(2))
        self.down = nn.Linear(s.wide, s.hidden, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        s, (b, length, _) = self.sizes, x.shape
        h = self.norm(x)
        q = _turned(self.q(h).view(b, length, s.heads, s.head).transpose(1, 2), cos, sin)
        k = _turned(self.k(h).view(b, length, s.kv_heads, s.head).transpose(1, 2), cos, sin)
        v = self.v(h).view(b, length, s.kv_heads, s.head).transpose(1, 2)
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=past is None, enable_gqa=True)
        x = x + self.o(o.transpose(1, 2).reshape(b, length, -1))
        h = self.norm_mlp(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h)), (k, v)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class Llama(nn.Module):
    """ids [B, S], the position of the first → logits of the last [B, vocabulary], the grown cache."""

    def __init__(self, s: Sizes, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(s.vocabulary, s.hidden)
        self.layers = nn.ModuleList(Layer(s) for _ in range(layers))
        self.norm, self.head = (
            nn.RMSNorm(s.hidden, 1e-5),
            nn.Linear(s.hidden, s.vocabulary, bias=False),
        )
        self.register_buffer(
            "turns", 1e4 ** -(torch.arange(0, s.head, 2) / s.head), persistent=False
        )

    def forward(
        self, ids: Tensor, positions: Tensor, cache: Cache | None = None
    ) -> tuple[Tensor, Cache]:
        angles = positions[:, None].float() * self.turns.float()
        angles = torch.cat((angles, angles), -1)
        x = self.embed(ids)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        grown = []
        for i, layer in enumerate(self.layers):
            x, kept = layer(x, cos, sin, None if cache is None else cache[i])
            grown.append(kept)
        return self.head(self.norm(x[:, -1])), grown


def llama(s: Sizes, layers: int, device: torch.device) -> Llama:
    """The model in fp16 on a device, with weights of the same size in every session."""
    torch.manual_seed(0)
    with torch.device(device):
        return Llama(s, layers).half().eval()


def prompt(s: Sizes, device: torch.device) -> dict[str, Tensor]:
    ids = torch.arange(s.prompt, device=device)
    return {"ids": ids[None] % s.vocabulary, "positions": ids}


def subject(s: Sizes, layers: int, device: torch.device) -> Subject:
    """Prefill and decoding of this model."""
    given = prompt(s, device)

    def start(run: Any) -> tuple[Tensor, Cache]:
        return run(**given)

    def step(run: Any, cache: Cache) -> tuple[Tensor, Cache]:
        length = cache[0][0].shape[2]
        ids = given["ids"][:, length % s.prompt][:, None]
        return run(ids, torch.full((1,), length, device=device), cache)

    return Subject(llama(s, layers, device), start, step)


def to_tune() -> tuple[Llama, dict[str, Tensor]]:
    """MODEL of `llmopt tune`: one layer has every shape."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return llama(FULL, 1, device), prompt(FULL, device)


def to_rehearse() -> tuple[Llama, dict[str, Tensor]]:
    """The same, small."""
    device = torch.device("cpu")
    return llama(SMALL, 1, device), prompt(SMALL, device)
