"""The forms kernels are checked and timed in: operands on a device, every kernel that takes them, what PyTorch has for it, the truth.

One row for each op and scheme, in sizes of a Llama of 8 billion parameters, or small ones for a rehearsal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from llmopt.kernels.attention import Scores
from llmopt.kernels.operands import Around
from llmopt.launch import AttentionProblem, Launch, LinearProblem, Problem, RowProblem
from llmopt.ops.linear_quantized import dequantized
from llmopt.quant.rounding import round_weight
from llmopt.quant.schemes import CodeForm
from llmopt.registry import candidates
from llmopt.types import Target
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """What the forms are cut from."""

    hidden: int
    wide: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    prompt: int
    cached: int


FULL = Sizes(4096, 14336, 32, 8, 128, 32000, 512, 4096)
SMALL = Sizes(128, 192, 2, 1, 64, 300, 24, 150)


@dataclass
class Work:
    """One problem with operands. `peers` are calls of PyTorch that do the same."""

    op: str
    problem: Problem
    operands: tuple[Any, ...]
    output: Tensor
    reference: Callable[[], Tensor]  # in float64
    peers: dict[str, Callable[[], Any]]
    flops: float
    bytes: float
    more: dict[str, Any] = field(default_factory=dict)
    compiled: Callable[..., Any] | None = None  # for torch.compile, with `inputs`
    inputs: tuple[Tensor, ...] = ()
    may_differ: int = 0  # of whole numbers: how far a tie may round the other way

    def kernels(self, target: Target) -> Iterator[tuple[str, Any, Launch]]:
        """(kernel, config, launch) of every kernel that takes the problem, its default config first."""
        for kernel, reason in candidates(self.op, self.problem, target):
            if not reason:
                for config in kernel.configs(self.problem, target):
                    launch = kernel.launch(
                        self.problem, config, target, *self.operands, **self.more
                    )
                    yield kernel.name, config, launch


Form = Callable[[Sizes, torch.device], Work]


def _random(device: torch.device, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=device) * scale).half()


def _size(*tensors: Tensor) -> float:
    return float(sum(t.numel() * t.element_size() for t in tensors))


def _linear(rows: Callable[[Sizes], int]) -> Form:
    def make(s: Sizes, device: torch.device) -> Work:
        m, n, k = rows(s), s.hidden, s.hidden
        x, w, r = _random(device, m, k), _random(device, n, k, scale=k**-0.5), _random(device, m, n)
        y = torch.empty_like(r)

        def plain(x: Tensor, w: Tensor, r: Tensor) -> Tensor:
            return F.linear(x, w) + r

        return Work(
            "linear", LinearProblem(m, n, k, "fp16"), (x, w, y, Around(residual=r)), y,
            lambda: x.double() @ w.double().T + r.double(), {"cuBLAS": lambda: torch.addmm(r, x, w.T)},
            2.0 * m * n * k, _size(x, w, r, y), compiled=plain, inputs=(x, w, r),
        )  # fmt: skip

    return make


def _gated(rows: Callable[[Sizes], int]) -> Form:
    def make(s: Sizes, device: torch.device) -> Work:
        m, n, k = rows(s), s.wide, s.hidden
        x = _random(device, m, k)
        gate, up = (_random(device, n, k, scale=k**-0.5) for _ in range(2))
        y = torch.empty(m, n, dtype=x.dtype, device=device)

        def plain(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
            return F.silu(F.linear(x, gate)) * F.linear(x, up)

        def truth() -> Tensor:
            return F.silu(x.double() @ gate.double().T) * (x.double() @ up.double().T)

        p = LinearProblem(m, n, k, "fp16", act="silu", gated=True)
        return Work(
            "linear", p, (x, gate, y, Around()), y, truth, {"cuBLAS + PyTorch": lambda: plain(x, gate, up)},
            4.0 * m * n * k, _size(x, gate, up, y), {"up": up}, plain, (x, gate, up),
        )  # fmt: skip

    return make


def _w8a8(rows: Callable[[Sizes], int]) -> Form:
    def make(s: Sizes, device: torch.device) -> Work:
        m, n, k = rows(s), s.hidden, s.hidden
        x = torch.randint(-127, 128, (m, k), device=device, dtype=torch.int8)
        w = torch.randint(-127, 128, (n, k), device=device, dtype=torch.int8)
        x_scale, w_scale = (torch.rand(r, 1, device=device) * 1e-2 for r in (m, n))
        y = torch.empty(m, n, dtype=torch.float16, device=device)
        # torch._int_mm takes more than 16 rows on a GPU.
        peers = {"torch._int_mm": lambda: torch._int_mm(x, w.T)} if m > 16 else {}

        def truth() -> Tensor:
            return (x.double() @ w.double().T) * x_scale.double() * w_scale.double().T

        return Work(
            "linear_quantized", LinearProblem(m, n, k, "fp16", "w8a8"), (x, x_scale, w, w_scale, y, Around()), y,
            truth, peers, 2.0 * m * n * k, _size(x, w, y),
        )  # fmt: skip

    return make


def _weight_only(bits: int, rows: Callable[[Sizes], int]) -> Form:
    def make(s: Sizes, device: torch.device) -> Work:
        m, n, k, group = rows(s), s.hidden, s.hidden, 64
        x, w = _random(device, m, k), _random(device, n, k, scale=k**-0.5)
        form = CodeForm(bits, group, symmetric=True)
        codes = round_weight(w, form)
        y = torch.empty(m, n, dtype=x.dtype, device=device)

        def truth() -> Tensor:
            whole = dequantized(codes.codes, codes.scales, codes.offsets, bits)
            return x.double() @ whole.double().T

        p = LinearProblem(m, n, k, "fp16", f"w{bits}a16", group)
        operands = (x, codes.codes, codes.scales, codes.offsets, y, Around())
        return Work(
            "linear_quantized", p, operands, y, truth, {"cuBLAS, fp16 weights": lambda: F.linear(x, w)},
            2.0 * m * n * k, _size(x, codes.codes, codes.scales, y),
        )  # fmt: skip

    return make


def _attention(queries: Callable[[Sizes], int], keys: Callable[[Sizes], int]) -> Form:
    def make(s: Sizes, device: torch.device) -> Work:
        q_len, kv_len = queries(s), keys(s)
        q = _random(device, 1, q_len, s.heads, s.head).transpose(1, 2)
        k, v = (_random(device, 1, kv_len, s.kv_heads, s.head).transpose(1, 2) for _ in range(2))
        o = torch.empty(1, q_len, s.heads, s.head, dtype=q.dtype, device=device).transpose(1, 2)
        causal = q_len > 1
        p = AttentionProblem(
            1, s.heads, s.kv_heads, q_len, kv_len, s.head, s.head, "fp16", "fp16", causal
        )
        scores = Scores(scale=s.head**-0.5, causal=causal, offset=kv_len - q_len)

        def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

        share = 0.5 if causal else 1.0
        return Work(
            "attention", p, (q, k, v, o, scores), o, lambda: plain(q.double(), k.double(), v.double()),
            {"SDPA": lambda: plain(q, k, v)}, 4.0 * share * s.heads * q_len * kv_len * s.head, _size(q, k, v, o),
        )  # fmt: skip

    return make


def _quantize(s: Sizes, device: torch.device) -> Work:
    x = _random(device, s.prompt, s.hidden)
    q = torch.empty(x.shape, dtype=torch.int8, device=device)
    scale = torch.empty(s.prompt, 1, device=device)

    def truth() -> Tensor:
        wide = x.float()
        return torch.round(wide / (wide.abs().amax(1, keepdim=True) / 127)).double()

    p = RowProblem(s.prompt, s.hidden, "fp16")
    return Work(
        "quantize_rows", p, (x, q, scale, Around()), q, truth, {"PyTorch": truth}, 0.0, _size(x, q), may_differ=1
    )  # fmt: skip


def _norm(s: Sizes, device: torch.device) -> Work:
    x, weight = _random(device, s.prompt, s.hidden), _random(device, s.hidden)
    y = torch.empty_like(x)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, 1e-5)

    p = RowProblem(s.prompt, s.hidden, "fp16")
    return Work(
        "norm", p, (x[:, None], weight, None, y, "rms", 1e-5), y, lambda: plain(x.double(), weight.double()),
        {"PyTorch": lambda: plain(x, weight)}, 0.0, _size(x, weight, y), compiled=plain, inputs=(x, weight),
    )  # fmt: skip


def _rope(s: Sizes, device: torch.device) -> Work:
    q = _random(device, 1, s.prompt, s.heads, s.head).transpose(1, 2)
    cos, sin = (_random(device, 1, 1, s.prompt, s.head) for _ in range(2))
    out = torch.empty(1, s.prompt, s.heads, s.head, dtype=q.dtype, device=device).transpose(1, 2)

    def plain(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = q.chunk(2, -1)
        return q * cos + torch.cat((-b, a), -1) * sin

    p = RowProblem(s.prompt, s.head, "fp16")
    return Work(
        "rope", p, (q, out, cos, sin, "half"), out, lambda: plain(q.double(), cos.double(), sin.double()),
        {"PyTorch": lambda: plain(q, cos, sin)}, 0.0, _size(q, out), compiled=plain, inputs=(q, cos, sin),
    )  # fmt: skip


def _swiglu(s: Sizes, device: torch.device) -> Work:
    x = _random(device, s.prompt, 2 * s.wide)
    y = torch.empty(s.prompt, s.wide, dtype=x.dtype, device=device)

    def plain(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    p = RowProblem(s.prompt, s.wide, "fp16")
    return Work(
        "swiglu", p, (x, y), y, lambda: plain(x.double()), {"PyTorch": lambda: plain(x)}, 0.0, _size(x, y),
        compiled=plain, inputs=(x,),
    )  # fmt: skip


def _softmax(s: Sizes, device: torch.device) -> Work:
    x = _random(device, s.prompt, s.vocabulary)
    y, p = torch.empty_like(x), RowProblem(s.prompt, s.vocabulary, "fp16")
    return Work(
        "softmax", p, (x, y), y, lambda: x.double().softmax(-1), {"PyTorch": lambda: x.softmax(-1)}, 0.0, _size(x, y)
    )  # fmt: skip


def _embedding(s: Sizes, device: torch.device) -> Work:
    table = _random(device, s.vocabulary, s.hidden)
    ids = torch.randint(0, s.vocabulary, (1, s.prompt), device=device)
    y, p = _random(device, s.prompt, s.hidden), RowProblem(s.prompt, s.hidden, "fp16")
    return Work(
        "embedding", p, (ids, table, y), y, lambda: table[ids[0]].double(),
        {"PyTorch": lambda: F.embedding(ids, table)}, 0.0, 2 * _size(y),
    )  # fmt: skip


def _cross_entropy(s: Sizes, device: torch.device) -> Work:
    x = _random(device, s.prompt, s.vocabulary)
    wanted = torch.randint(0, s.vocabulary, (s.prompt,), device=device)
    loss, p = torch.empty(s.prompt, device=device), RowProblem(s.prompt, s.vocabulary, "fp16")

    def plain(x: Tensor) -> Tensor:
        return F.cross_entropy(x, wanted, reduction="none")

    return Work(
        "cross_entropy", p, (x, wanted, loss), loss, lambda: plain(x.double()),
        {"PyTorch": lambda: plain(x.float())}, 0.0, _size(x),
    )  # fmt: skip


FORMS: dict[str, Form] = {
    "linear, 1 row": _linear(lambda s: 1),
    "linear, 16 rows": _linear(lambda s: 16),
    "linear, prompt": _linear(lambda s: s.prompt),
    "gate·up, 1 row": _gated(lambda s: 1),
    "gate·up, prompt": _gated(lambda s: s.prompt),
    "w8a8, 1 row": _w8a8(lambda s: 1),
    "w8a8, prompt": _w8a8(lambda s: s.prompt),
    "w8a16, 1 row": _weight_only(8, lambda s: 1),
    "w4a16, 1 row": _weight_only(4, lambda s: 1),
    "w4a16, prompt": _weight_only(4, lambda s: s.prompt),
    "attention, decode": _attention(lambda s: 1, lambda s: s.cached),
    "attention, prompt": _attention(lambda s: s.prompt, lambda s: s.prompt),
    "quantize": _quantize,
    "RMSNorm": _norm,
    "rotation": _rope,
    "SwiGLU": _swiglu,
    "softmax": _softmax,
    "embedding": _embedding,
    "cross entropy": _cross_entropy,
}
