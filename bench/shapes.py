"""The shapes that matter, by the model they come from: the only place benchmark sizes are written.

SmolLM2-135M (hidden 576, 9 heads, 3 KV heads, FFN 1536), all-MiniLM-L6-v2 (384, 12 heads, 1536),
bert-base (768, 12 heads, 3072), Llama-3.2-1B (2048, 32 heads, 8 KV heads, 8192), Granite-3.0-1B-A400M (1024, 8 of 32 experts of 512),
OLMoE-1B-7B (2048, 8 of 64 experts of 1024).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Linear:
    """y [m, n or n/2] = x [m, k] @ w [n, k]ᵀ; gated: w holds gate and up, y = silu(gate) * up."""

    name: str
    m: int
    n: int
    k: int
    gated: bool = False

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k

    def num_bytes(self, itemsize: int) -> int:
        """Weights, read once."""
        return self.n * self.k * itemsize

    def __str__(self) -> str:
        return f"{self.name}-{self.m}x{self.n}x{self.k}"


@dataclass(frozen=True)
class Experts:
    """tokens go to `top` of `experts` each, in their places; an expert's rows times its own weight [n, k], as in Linear."""

    name: str
    tokens: int
    top: int
    experts: int
    n: int
    k: int
    gated: bool = False

    @property
    def flops(self) -> int:
        return 2 * self.tokens * self.top * self.n * self.k

    def num_bytes(self, itemsize: int, chosen: int) -> int:
        """Weights of the experts that have rows, read once."""
        return chosen * self.n * self.k * itemsize

    def __str__(self) -> str:
        return f"{self.name}-{self.tokens}x{self.top}of{self.experts}-{self.n}x{self.k}"


@dataclass(frozen=True)
class Attention:
    """q [batch, heads, queries, dim] against keys; causal: the queries are the last of the keys."""

    name: str
    batch: int
    heads: int
    kv_heads: int
    dim: int
    queries: int
    keys: int
    causal: bool = True
    slots: int = 0  # of a static cache with a mask, of which `keys` are live; 0: no mask
    by_position: bool = (
        False  # caches in memory order [S,B,H,D], as growing caches lie, instead of [B,H,S,D]
    )

    @property
    def flops(self) -> int:
        """Both products, live scores only."""
        scores = self.queries * self.keys
        if self.causal:
            scores -= self.queries * (self.queries - 1) // 2
        return 4 * self.batch * self.heads * scores * self.dim

    def num_bytes(self, itemsize: int) -> int:
        """Live keys and values, read once for all heads of their group."""
        return 2 * self.batch * self.kv_heads * self.keys * self.dim * itemsize

    def __str__(self) -> str:
        slots = f"-of{self.slots}" if self.slots else ""
        order = "-by-position" if self.by_position else ""
        return f"{self.name}-{self.queries}x{self.keys}{slots}-d{self.dim}{order}"


@dataclass(frozen=True)
class Rows:
    """x [rows, width], read once and written once."""

    name: str
    rows: int
    width: int

    def num_bytes(self, tensors: int, itemsize: int) -> int:
        return tensors * self.rows * self.width * itemsize

    def __str__(self) -> str:
        return f"{self.name}-{self.rows}x{self.width}"


@dataclass(frozen=True)
class Gather:
    """Rows of a table [vocab, width] by token."""

    name: str
    tokens: int
    vocab: int
    width: int

    def __str__(self) -> str:
        return f"{self.name}-{self.tokens}of{self.vocab}x{self.width}"


DECODE_LINEARS = (
    Linear("smollm2-qkv", 1, 960, 576),
    Linear("smollm2-gate-up", 1, 3072, 576, gated=True),
    Linear("smollm2-down", 1, 576, 1536),
    Linear("smollm2-head", 1, 49152, 576),
    Linear("llama1b-gate-up", 1, 16384, 2048, gated=True),
    Linear("llama1b-down", 4, 2048, 8192),
)
PREFILL_LINEARS = (
    Linear("smollm2-qkv", 512, 960, 576),
    Linear("smollm2-gate-up", 512, 3072, 576, gated=True),
    Linear("smollm2-down", 512, 576, 1536),
    Linear("minilm-ffn", 128, 1536, 384),
    Linear("minilm-ffn", 1024, 1536, 384),
    Linear("bert-ffn", 128, 3072, 768),
    Linear("llama1b-down", 128, 2048, 8192),
)
SMALL_BATCH_LINEARS = tuple(Linear("llama1b-up", m, 8192, 2048) for m in (4, 8, 16, 32, 64))
PREFILL_ATTENTION = (
    Attention("smollm2", 1, 9, 3, 64, 512, 512),
    Attention("eight-heads", 1, 8, 8, 64, 1024, 1024),
    Attention("eight-heads", 1, 8, 8, 128, 1024, 1024),
    Attention("minilm", 8, 12, 12, 32, 128, 128, causal=False),
    Attention("bert", 8, 12, 12, 64, 128, 128, causal=False),
)
DECODE_ATTENTION = (
    Attention("smollm2", 1, 9, 3, 64, 1, 160),
    Attention("smollm2", 1, 9, 3, 64, 1, 4096),
    Attention("smollm2", 1, 9, 3, 64, 1, 4096, by_position=True),
    Attention("llama1b", 1, 32, 8, 64, 1, 4096),
    Attention("llama1b", 1, 32, 8, 64, 1, 4096, by_position=True),
    Attention("static-cache", 1, 9, 3, 64, 1, 300, causal=False, slots=512),
    Attention("static-cache", 1, 9, 3, 64, 1, 300, causal=False, slots=8192),
)
INT8_KV_ATTENTION = tuple(
    Attention(name, 1, heads, kv_heads, dim, 1, 4096, by_position=order)
    for name, heads, kv_heads, dim in (
        ("smollm2", 9, 3, 64),
        ("llama1b", 32, 8, 64),
        ("one-to-one", 8, 8, 64),
        ("eight-to-one", 32, 4, 128),
    )
    for order in (False, True)
)
ROWS = (
    Rows("smollm2", 1, 576),
    Rows("smollm2", 512, 576),
    Rows("minilm", 1024, 384),
    Rows("llama1b", 2048, 8192),  # 64 MiB in fp32: from memory
)
GATHERS = (Gather("smollm2", 1, 49152, 576), Gather("smollm2", 512, 49152, 576))

EXPERTS = [
    experts
    for tokens in (1, 8, 512)
    for experts in (
        Experts("granite-gate-up", tokens, 8, 32, 1024, 1024, gated=True),
        Experts("granite-down", tokens, 8, 32, 1024, 512),
        Experts("olmoe-gate-up", tokens, 8, 64, 2048, 2048, gated=True),
    )
]
