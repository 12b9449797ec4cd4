"""Two small modules that compile in a blink, for tests that are about calls and weights rather than models."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """A pre-norm transformer block: causal attention and a gelu feed-forward, with optional dropout."""

    def __init__(self, width: int = 48, heads: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 76), nn.Linear(76, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        attended = (
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        )
        x = x + self.drop(self.out(attended))
        return x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))


class Tied(nn.Module):
    """Embedding, block and a head that is the embedding."""

    def __init__(self, vocab: int = 50, width: int = 48) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.block = Block(width)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.embed(ids)))


def build(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """The module in eval mode, its parameters drawn wide enough that every one of them matters."""
    torch.manual_seed(seed)
    module = make().eval()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape) * (1.5 / p.shape[-1] ** 0.5 if p.dim() > 1 else 0.5))
    return module


def block_input(length: int = 7, batch: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, length, 48, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def continued(model: Callable[[torch.Tensor], torch.Tensor]) -> tuple[list[int], list[float]]:
    """Four tokens and Tied's likeliest twelve behind them, and the logits behind the last. Nothing sees the zeros that follow."""
    ids = torch.arange(16)[None]
    ids[:, 4:] = 0
    for i in range(4, 16):
        ids[0, i] = model(ids)[0, i - 1].argmax()
    return ids[0].tolist(), model(ids)[0, -1].tolist()
