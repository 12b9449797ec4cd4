"""Forms of linears: fp16 weights, alone, gated and behind a norm; w8a8; codes of 8 and 4 bits."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from llmopt.kernels.operands import Around
from llmopt.launch import LinearProblem
from llmopt.ops.linear_quantized import dequantized
from torch import Tensor

from bench.gpu.forms.work import Form, Sizes, Work, random, random_codes, size

Rows = Callable[[Sizes], int]
_GROUP = 64


def _linear(rows: Rows) -> Form:
    def make(s: Sizes, device: torch.device) -> Work:
        m, n, k = rows(s), s.hidden, s.hidden
        x, w, r = random(device, m, k), random(device, n, k, scale=k**-0.5), random(device, m, n)
        y = torch.empty_like(r)

        def plain(x: Tensor, w: Tensor, r: Tensor) -> Tensor:
            return F.linear(x, w) + r

        return Work(
            "linear", LinearProblem(m, n, k, "fp16"), (x, w, y, Around(residual=r)), y,
            lambda: x.double() @ w.double().T + r.double(), {"cuBLAS": lambda: torch.addmm(r, x, w.T)},
            2.0 * m * n * k, size(x, w, r, y), compiled=plain, inputs=(x, w, r),
        )  # fmt: skip

    return make


def _normed(rows: Rows) -> Form:
    def make(s: Sizes, device: torch.device) -> Work:
        m, n, k = rows(s), s.hidden, s.hidden
        x, w, g = random(device, m, k), random(device, n, k, scale=k**-0.5), random(device, k)
        y = torch.empty(m, n, dtype=x.dtype, device=device)

        def plain(x: Tensor, w: Tensor, g: Tensor) -> Tensor:
            return F.linear(F.rms_norm(x, g.shape, g, 1e-5), w)

        around = Around(norm_weight=g, norm_eps=1e-5)
        return Work(
            "linear", LinearProblem(m, n, k, "fp16", norm="rms"), (x, w, y, around), y,
            lambda: plain(x.double(), w.double(), g.double()), {"cuBLAS + PyTorch": lambda: plain(x, w, g)},
            2.0 * m * n * k, size(x, w, g, y), compiled=plain, inputs=(x, w, g),
        )  # fmt: skip

    return make


def _gated(rows: Rows) -> Form:
    def make(s: Sizes, device: torch.device) -> Work:
        m, n, k = rows(s), s.wide, s.hidden
        x = random(device, m, k)
        gate, up = (random(device, n, k, scale=k**-0.5) for _ in range(2))
        y = torch.empty(m, n, dtype=x.dtype, device=device)

        def plain(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
            return F.silu(F.linear(x, gate)) * F.linear(x, up)

        def truth() -> Tensor:
            return F.silu(x.double() @ gate.double().T) * (x.double() @ up.double().T)

        p = LinearProblem(m, n, k, "fp16", act="silu", gated=True)
        return Work(
            "linear", p, (x, gate, y, Around()), y, truth, {"cuBLAS + PyTorch": lambda: plain(x, gate, up)},
            4.0 * m * n * k, size(x, gate, up, y), {"up": up}, plain, (x, gate, up),
        )  # fmt: skip

    return make


def _w8a8(rows: Rows) -> Form:
    def make(s: Sizes, device: torch.device) -> Work:
        m, n, k = rows(s), s.hidden, s.hidden
        x, w = random_codes(device, m, k), random_codes(device, n, k)
        x_scale, w_scale = (torch.rand(r, 1, device=device) * 1e-2 for r in (m, n))
        y = torch.empty(m, n, dtype=torch.float16, device=device)
        # torch._int_mm takes more than 16 rows on a GPU.
        peers = {"torch._int_mm": lambda: torch._int_mm(x, w.T)} if m > 16 else {}

        def truth() -> Tensor:
            return (x.double() @ w.double().T) * x_scale.double() * w_scale.double().T

        return Work(
            "linear_quantized", LinearProblem(m, n, k, "fp16", "w8a8"), (x, x_scale, w, w_scale, y, Around()), y,
            truth, peers, 2.0 * m * n * k, size(x, w, y), products="int8",
        )  # fmt: skip

    return make


def _w8a8_gated(rows: Rows) -> Form:
    def make(s: Sizes, device: torch.device) -> Work:
        m, n, k = rows(s), s.wide, s.hidden
        x, gate, up = (random_codes(device, r, k) for r in (m, n, n))
        # So small that the gate is neither open nor shut everywhere.
        x_scale, scale, up_scale = (torch.rand(r, 1, device=device) * 2e-3 for r in (m, n, n))
        y = torch.empty(m, n, dtype=torch.float16, device=device)

        def product(w: Tensor, w_scale: Tensor) -> Tensor:
            return (x.double() @ w.double().T) * x_scale.double() * w_scale.double().T

        def int_mm() -> tuple[Tensor, Tensor]:
            return torch._int_mm(x, gate.T), torch._int_mm(x, up.T)

        p = LinearProblem(m, n, k, "fp16", "w8a8", act="silu", gated=True)
        return Work(
            "linear_quantized", p, (x, x_scale, gate, scale, y, Around()), y,
            lambda: F.silu(product(gate, scale)) * product(up, up_scale), {"torch._int_mm, products alone": int_mm} if m > 16 else {},
            4.0 * m * n * k, size(x, gate, up, y), {"up": up, "up_scale": up_scale}, products="int8",
        )  # fmt: skip

    return make


def _packed(device: torch.device, n: int, k: int, bits: int) -> tuple[Tensor, Tensor]:
    """Codes of 8 or 4 bits and their scales in groups, of a weight of about unit rows."""
    low, high, dtype = (-127, 128, torch.int8) if bits == 8 else (0, 256, torch.uint8)
    codes = torch.randint(low, high, (n, k * bits // 8), device=device, dtype=dtype)
    largest = 2.0 * k**-0.5 / (127 if bits == 8 else 8)
    return codes, (1 + torch.rand(n, k // _GROUP, device=device)) * largest


def _weight_only(bits: int, rows: Rows) -> Form:
    def make(s: Sizes, device: torch.device) -> Work:
        m, n, k = rows(s), s.hidden, s.hidden
        x, w = random(device, m, k), random(device, n, k, scale=k**-0.5)
        codes, scales = _packed(device, n, k, bits)
        y = torch.empty(m, n, dtype=x.dtype, device=device)
        p = LinearProblem(m, n, k, "fp16", f"w{bits}a16", _GROUP)
        return Work(
            "linear_quantized", p, (x, codes, scales, None, y, Around()), y,
            lambda: x.double() @ dequantized(codes, scales, None, bits).double().T,
            {"cuBLAS, fp16 weights": lambda: F.linear(x, w)},
            2.0 * m * n * k, size(x, codes, scales, y),
        )  # fmt: skip

    return make


def _weight_only_gated(bits: int, rows: Rows) -> Form:
    def make(s: Sizes, device: torch.device) -> Work:
        m, n, k = rows(s), s.wide, s.hidden
        x, w = random(device, m, k), random(device, n, k, scale=k**-0.5)
        (gate, scales), (up, up_scales) = (_packed(device, n, k, bits) for _ in range(2))
        y = torch.empty(m, n, dtype=x.dtype, device=device)

        def product(codes: Tensor, scales: Tensor) -> Tensor:
            return x.double() @ dequantized(codes, scales, None, bits).double().T

        p = LinearProblem(m, n, k, "fp16", f"w{bits}a16", _GROUP, act="silu", gated=True)
        return Work(
            "linear_quantized", p, (x, gate, scales, None, y, Around()), y,
            lambda: F.silu(product(gate, scales)) * product(up, up_scales),
            {"cuBLAS + PyTorch, fp16 weights": lambda: F.silu(F.linear(x, w)) * F.linear(x, w)},
            4.0 * m * n * k, size(x, gate, up, scales, up_scales, y), {"up": up, "up_scale": up_scales},
        )  # fmt: skip

    return make


LINEARS: dict[str, Form] = {
    "linear, 1 row": _linear(lambda s: 1),
    "linear, 16 rows": _linear(lambda s: 16),
    "linear, prompt": _linear(lambda s: s.prompt),
    "RMSNorm and linear, 1 row": _normed(lambda s: 1),
    "RMSNorm and linear, 16 rows": _normed(lambda s: 16),
    "gate·up, 1 row": _gated(lambda s: 1),
    "gate·up, prompt": _gated(lambda s: s.prompt),
    "w8a8, 1 row": _w8a8(lambda s: 1),
    "w8a8, prompt": _w8a8(lambda s: s.prompt),
    "w8a8 gate·up, 1 row": _w8a8_gated(lambda s: 1),
    "w8a8 gate·up, prompt": _w8a8_gated(lambda s: s.prompt),
    "w8a16, 1 row": _weight_only(8, lambda s: 1),
    "w4a16, 1 row": _weight_only(4, lambda s: 1),
    "w4a16, prompt": _weight_only(4, lambda s: s.prompt),
    "w4a16 gate·up, 1 row": _weight_only_gated(4, lambda s: 1),
    "w4a16 gate·up, prompt": _weight_only_gated(4, lambda s: s.prompt),
}
