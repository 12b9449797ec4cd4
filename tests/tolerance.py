"""How far a kernel may be from its float64 reference: one place, by dtype.

Two bounds, both relative to max(|reference|, RMS(reference)): the worst element and the RMS of the error.
"""

from __future__ import annotations

import torch

BF16_PRODUCTS = (
    "bf16 products"  # of attention: scores of f32 operands move by a 256th of themselves
)

SPLIT_F16 = "f16 as two bf16 numbers"  # of attention, its output in f32

WORDS = (
    "16-bit fixed point"  # products of rows and weights that have some 12 bits, their output in f32
)

# dtype: (largest relative error, RMS of the relative error)
BOUNDS = {
    torch.float64: (1e-10, 1e-11),
    torch.float32: (1e-4, 1e-5),
    torch.float16: (2e-2, 4e-3),
    torch.bfloat16: (4e-2, 8e-3),
    BF16_PRODUCTS: (1e-1, 1.6e-2),
    SPLIT_F16: (1e-3, 1e-4),
    WORDS: (4e-3, 4e-4),
}

# RMS error of attention whose queries and keys are rounded to 8 bits, relative to the RMS of the exact result.
INT8_QK = 2e-2


def assert_close(
    got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype | str | None = None
) -> None:
    """Compares with a float64 reference; infinities and NaNs must be in the same places. Integers must be equal."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)} instead of {tuple(want.shape)}"
    if not got.dtype.is_floating_point:
        assert torch.equal(got, want.to(got.dtype)), "integer results differ"
        return
    worst, rms = BOUNDS[dtype or got.dtype]
    g, w = got.double(), want.double()
    finite = torch.isfinite(w)
    if not finite.all():
        _assert_same_special(g, w)
        g, w = g[finite], w[finite]
    if w.numel() == 0:
        return
    scale = torch.maximum(w.abs(), w.pow(2).mean().sqrt()).clamp_min(1e-30)
    error = (g - w).abs() / scale  # NaN or infinite where only `got` is, which is no small error
    assert error.max() <= worst, f"largest relative error {error.max():.3g} > {worst:.3g}"
    got_rms = error.pow(2).mean().sqrt()
    assert got_rms <= rms, f"RMS relative error {got_rms:.3g} > {rms:.3g}"


def _assert_same_special(g: torch.Tensor, w: torch.Tensor) -> None:
    assert torch.equal(torch.isnan(g), torch.isnan(w)), "NaNs in different places"
    infinite = torch.isinf(w)
    assert torch.equal(torch.isinf(g), infinite), "infinities in different places"
    assert torch.equal(g[infinite], w[infinite]), "infinities of different sign"


# Peers of the benchmark beside eager: relative error of the outputs' norm, and KL divergence of 4- and 8-bit llama.cpp.
PEER_ERROR = {"float": 1e-3, "int8": 0.1, "divergence": 0.2}
