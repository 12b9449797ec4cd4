"""A decoder as people write it by hand, for `llmopt bench bench/by_hand.py:decode` and `:prompt`: seeded random weights.

Rotations by complex numbers, keys and values assigned into buffers, attention spelled out with a mask that is made in the forward.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LAYERS, WIDTH, HEADS, GROUPS, INNER, WORDS, SLOTS = 12, 768, 12, 4, 2048, 32000, 1024
SIZE = WIDTH // HEADS


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        return wide.type_as(x) * self.weight


def rotated(x: Tensor, turns: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    turned = pairs * turns.view(1, x.shape[1], 1, SIZE // 2)
    return torch.view_as_real(turned).flatten(3).type_as(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wo = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.wk, self.wv = (nn.Linear(WIDTH, GROUPS * SIZE, bias=False) for _ in range(2))
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(1, SLOTS, GROUPS, SIZE), persistent=False)

    def forward(self, x: Tensor, start: int, turns: Tensor, mask: Tensor | None) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (w(x).view(batch, length, -1, SIZE) for w in (self.wq, self.wk, self.wv))
        q, k = rotated(q, turns), rotated(k, turns)
        end = start + length
        self.keys[:batch, start:end] = k
        self.values[:batch, start:end] = v
        k, v = (
            t[:batch, :end].repeat_interleave(HEADS // GROUPS, 2) for t in (self.keys, self.values)
        )
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        scores = torch.matmul(q, k.transpose(2, 3)) / SIZE**0.5
        scores = scores if mask is None else scores + mask
        weights = F.softmax(scores.float(), dim=-1).type_as(q)
        return self.wo((weights @ v).transpose(1, 2).reshape(batch, length, -1))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm, self.norm_inner = Attention(), Norm(), Norm()
        self.w1, self.w3 = (nn.Linear(WIDTH, INNER, bias=False) for _ in range(2))
        self.w2 = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: Tensor, start: int, turns: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.norm(x), start, turns, mask)
        h = self.norm_inner(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.output = Norm(), nn.Linear(WIDTH, WORDS, bias=False)
        steps = 1e4 ** (-torch.arange(0, SIZE, 2) / SIZE)
        angles = torch.outer(torch.arange(SLOTS).float(), steps)
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles), False)

    def forward(self, tokens: Tensor, start: int) -> Tensor:
        length = tokens.shape[1]
        x, turns, mask = self.words(tokens), self.turns[start : start + length], None
        if length > 1:
            mask = torch.full((length, length), -torch.inf).triu(1)
            mask = torch.hstack((torch.zeros(length, start), mask)).type_as(x)
        for layer in self.layers:
            x = layer(x, start, turns, mask)
        return self.output(self.norm(x[:, -1:]))


def _decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder().eval()


def decode() -> tuple[Decoder, dict[str, object]]:
    """One token after 300."""
    return _decoder(), {"tokens": torch.ones(1, 1, dtype=torch.long), "start": 300}


def prompt() -> tuple[Decoder, dict[str, object]]:
    """512 tokens."""
    return _decoder(), {"tokens": torch.arange(512)[None], "start": 0}
