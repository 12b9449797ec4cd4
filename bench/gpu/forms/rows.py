"""Forms of what handles rows alone: norms, rotation and its tables, activations, copies, chains of pointwise operations."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from llmopt.kernels.operands import Around
from llmopt.launch import ChainProblem, RowProblem
from llmopt.ops.pointwise import pointwise
from llmopt.ops.rotary_table import rotary_table
from torch import Tensor

from bench.gpu.forms.work import Form, Sizes, Work, random, size

_EPS = 1e-5


def _quantize(s: Sizes, device: torch.device) -> Work:
    x = random(device, s.prompt, s.hidden)
    q = torch.empty(x.shape, dtype=torch.int8, device=device)
    scale = torch.empty(s.prompt, 1, device=device)

    def plain(x: Tensor) -> tuple[Tensor, Tensor]:
        wide = x.float()
        scale = wide.abs().amax(1, keepdim=True) / 127
        return torch.round(wide / scale).to(torch.int8), scale

    p = RowProblem(s.prompt, s.hidden, "fp16")
    return Work(
        "quantize_rows", p, (x, q, scale, Around()), q, lambda: plain(x)[0].double(), {"PyTorch": lambda: plain(x)},
        0.0, size(x, q, scale), compiled=plain, inputs=(x,), may_differ=1,
    )  # fmt: skip


def _norm(s: Sizes, device: torch.device) -> Work:
    x, weight = random(device, s.prompt, s.hidden), random(device, s.hidden)
    y = torch.empty_like(x)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, _EPS)

    p = RowProblem(s.prompt, s.hidden, "fp16")
    return Work(
        "norm", p, (x[:, None], weight, None, y, "rms", _EPS), y, lambda: plain(x.double(), weight.double()),
        {"PyTorch": lambda: plain(x, weight)}, 0.0, size(x, weight, y), compiled=plain, inputs=(x, weight),
    )  # fmt: skip


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def _rope(s: Sizes, device: torch.device) -> Work:
    q = random(device, 1, s.prompt, s.heads, s.head).transpose(1, 2)
    cos, sin = (random(device, 1, 1, s.prompt, s.head) for _ in range(2))
    out = torch.empty(1, s.prompt, s.heads, s.head, dtype=q.dtype, device=device).transpose(1, 2)
    p = RowProblem(s.prompt, s.head, "fp16")
    return Work(
        "rope", p, (q, out, cos, sin, "half"), out, lambda: _turned(q.double(), cos.double(), sin.double()),
        {"PyTorch": lambda: _turned(q, cos, sin)}, 0.0, size(q, cos, sin, out), compiled=_turned, inputs=(q, cos, sin),
    )  # fmt: skip


def _append(length: Callable[[Sizes], int]) -> Form:
    """What stands before attention: q and k rotated, k and v written behind a cache's keys."""

    def make(s: Sizes, device: torch.device) -> Work:
        n, kv = length(s), s.kv_heads
        q = random(device, 1, n, s.heads, s.head).transpose(1, 2)
        k, v = (random(device, 1, n, kv, s.head).transpose(1, 2) for _ in range(2))
        cos, sin = (random(device, 1, 1, n, s.head) for _ in range(2))
        # The new rows of all three, in one tensor.
        out = random(device, 1, n, s.heads + 2 * kv, s.head).transpose(1, 2)
        q_out, k_out, v_out = out.split((s.heads, kv, kv), 1)

        def plain(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            return torch.cat((_turned(q, cos, sin), _turned(k, cos, sin), v), 1)

        inputs, p = (q, k, v, cos, sin), RowProblem(n, s.head, "fp16")
        return Work(
            "rope", p, (q, q_out, cos, sin, "half", k, k_out, v, v_out), out, lambda: plain(*(x.double() for x in inputs)),
            {"PyTorch": lambda: plain(*inputs)}, 0.0, size(*inputs, out), compiled=plain, inputs=inputs,
        )  # fmt: skip

    return make


def _rotary_table(s: Sizes, device: torch.device) -> Work:
    half, n = s.head // 2, s.prompt
    frequencies = 1e4 ** -(torch.arange(half, device=device) / half)
    positions = torch.arange(n, device=device)[None, :, None]
    tables = torch.empty(2, 1, n, s.head, dtype=torch.float16, device=device)
    operands = (frequencies.expand(1, n, half), positions.expand(1, n, half), *tables.unbind())

    def plain(dtype: torch.dtype) -> Tensor:
        return torch.stack(rotary_table(frequencies, positions, 1.0, dtype))

    p = RowProblem(n, s.head, "fp16")
    return Work(
        "rotary_table", p, operands, tables, lambda: plain(torch.float64),
        {"PyTorch": lambda: plain(torch.float16)}, 0.0, size(frequencies, positions, tables),
    )  # fmt: skip


def _index_copy(s: Sizes, device: torch.device) -> Work:
    """New keys into a static cache."""
    cache = random(device, 1, s.kv_heads, s.cached, s.head)
    new = random(device, 1, s.prompt, s.kv_heads, s.head).transpose(1, 2)
    index = torch.arange(s.cached - s.prompt, s.cached, device=device)
    p = RowProblem(s.kv_heads * s.prompt, s.head, "fp16")
    return Work(
        "index_copy", p, (cache, index, new), cache, lambda: torch.zeros_like(cache).index_copy(2, index, new).double(),
        {"PyTorch": lambda: cache.index_copy_(2, index, new)}, 0.0, size(new, index, new),
    )  # fmt: skip


def _chain(program: tuple, rows: Callable[[Sizes], int]) -> Form:
    """A chain over rows x [M, K] and a vector w [K]."""

    def make(s: Sizes, device: torch.device) -> Work:
        m, k = rows(s), s.hidden
        x, w = random(device, m, k), random(device, k)
        y, results = torch.empty_like(x), (1 + len(program),)

        def plain(x: Tensor, w: Tensor) -> Tensor:
            return pointwise(program, results, (x.dtype,), x, w)[0]

        def truth() -> Tensor:
            return pointwise(program, results, (torch.float64,), x.float(), w.float())[0]

        p = ChainProblem(m, k, "fp16", 2, program, results)
        return Work(
            "pointwise", p, ((m, k), [x, w.expand(m, k)], [y]), y, truth, {"PyTorch": lambda: plain(x, w)},
            0.0, size(x, w, y), compiled=plain, inputs=(x, w),
        )  # fmt: skip

    return make


# Of values x, w: w · 30 · tanh(x / 30), and x · rsqrt(mean(x²)) · w.
_SOFTCAP = (("const", 30.0), ("binary", "div", 0, 2), ("unary", "tanh", 3), ("binary", "mul", 4, 2),
            ("binary", "mul", 5, 1))  # fmt: skip
_UNIT_ROWS = (("unary", "square", 0), ("reduce", "mean", 2), ("unary", "rsqrt", 3), ("binary", "mul", 0, 4),
              ("binary", "mul", 5, 1))  # fmt: skip


def _swiglu(s: Sizes, device: torch.device) -> Work:
    x = random(device, s.prompt, 2 * s.wide)
    y = torch.empty(s.prompt, s.wide, dtype=x.dtype, device=device)

    def plain(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    p = RowProblem(s.prompt, s.wide, "fp16")
    return Work(
        "swiglu", p, (x, y), y, lambda: plain(x.double()), {"PyTorch": lambda: plain(x)}, 0.0, size(x, y),
        compiled=plain, inputs=(x,),
    )  # fmt: skip


def _softmax(s: Sizes, device: torch.device) -> Work:
    x = random(device, s.prompt, s.vocabulary)
    y, p = torch.empty_like(x), RowProblem(s.prompt, s.vocabulary, "fp16")
    return Work(
        "softmax", p, (x, y), y, lambda: x.double().softmax(-1), {"PyTorch": lambda: x.softmax(-1)}, 0.0, size(x, y),
        compiled=lambda x: x.softmax(-1), inputs=(x,),
    )  # fmt: skip


def _embedding(s: Sizes, device: torch.device) -> Work:
    table = random(device, s.vocabulary, s.hidden)
    ids = torch.randint(0, s.vocabulary, (1, s.prompt), device=device)
    y, p = random(device, s.prompt, s.hidden), RowProblem(s.prompt, s.hidden, "fp16")
    return Work(
        "embedding", p, (ids, table, y), y, lambda: table[ids[0]].double(),
        {"PyTorch": lambda: F.embedding(ids, table)}, 0.0, 2 * size(y),
    )  # fmt: skip


def _cross_entropy(s: Sizes, device: torch.device) -> Work:
    x = random(device, s.prompt, s.vocabulary)
    wanted = torch.randint(0, s.vocabulary, (s.prompt,), device=device)
    loss, p = torch.empty(s.prompt, device=device), RowProblem(s.prompt, s.vocabulary, "fp16")

    def plain(x: Tensor) -> Tensor:
        return F.cross_entropy(x.float(), wanted, reduction="none")

    return Work(
        "cross_entropy", p, (x, wanted, loss), loss, lambda: F.cross_entropy(x.double(), wanted, reduction="none"),
        {"PyTorch": lambda: plain(x)}, 0.0, size(x), compiled=plain, inputs=(x,),
    )  # fmt: skip


ROWS: dict[str, Form] = {
    "quantize": _quantize,
    "RMSNorm": _norm,
    "rotation": _rope,
    "rotation and append, 1 row": _append(lambda s: 1),
    "rotation and append, prompt": _append(lambda s: s.prompt),
    "rotary table": _rotary_table,
    "index copy": _index_copy,
    "pointwise": _chain(_SOFTCAP, lambda s: s.prompt),
    "pointwise with a mean": _chain(_UNIT_ROWS, lambda s: s.prompt),
    "SwiGLU": _swiglu,
    "softmax": _softmax,
    "embedding": _embedding,
    "cross entropy": _cross_entropy,
}
