"""Rounding a weight [N, K] to codes, with a scale and maybe an offset per output channel and group of inputs.

The layout is that of ops.linear_quantized. The range of a group is that of its weights; for 4 bits a few narrower ranges are
tried too, the one with the least squared error wins, and least squares then fit scale and offset to the codes, as long as that
makes the error smaller. Weights on a CPU are rounded by the kernel round_weight; what is here in PyTorch is its reference, and rounds the
others.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmopt.graph import FLOATS
from llmopt.ops.linear_quantized import ZERO_POINT_4BIT, dequantized
from llmopt.program import run_op
from llmopt.quant.schemes import CodeForm

# For 4 bits: the shares of a group's range that are tried, and the rounds of fitting.
SHARES = (0.95, 0.9, 0.85, 0.8)
FITS = 3
MOST_ROUNDED = 1 << 14  # weights of a group: kMaxRoundedGroup in csrc/runtime/contracts_linear.cpp
_WORTH_WAKING = 2**16  # weights, other threads
# Of a channel's largest: f16 holds 11 bits of such a factor where the largest has 2^14, as the packed form puts it.
_LEAST_FACTOR = 2.0**-27
_LEAST_LARGEST = 2.0**-100
WEIGHTS_AT_ONCE = 2**18  # so that the many passes of the search find them in L2


class Codes(NamedTuple):
    """A rounded weight: codes [N, K] int8 or [N, K/2] uint8; scales, offsets [N, K/group] float32."""

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None

    def weight(self, bits: int) -> Tensor:
        """The weight these codes stand for, [N, K] float32."""
        return dequantized(self.codes, self.scales, self.offsets, bits)


class Grid(NamedTuple):
    """Representable values: scale · code + offset; scale and offset [..., groups], offset maybe None."""

    scale: Tensor
    offset: Tensor | None

    def nearest(self, values: Tensor, bits: int) -> Tensor:
        """values [..., groups, group] → their codes, float32."""
        low, high = (-127, 127) if bits == 8 else (0, 15)
        shifted = values if self.offset is None else values - self.offset[..., None]
        scale = self.scale[..., None]
        codes = torch.where(scale == 0, torch.zeros_like(shifted), shifted / scale).round()
        zero = ZERO_POINT_4BIT if bits == 4 and self.offset is None else 0
        return (codes + zero).clamp(low, high)

    def value(self, codes: Tensor, bits: int) -> Tensor:
        zero = ZERO_POINT_4BIT if bits == 4 and self.offset is None else 0
        scaled = (codes - zero) * self.scale[..., None]
        return scaled if self.offset is None else scaled + self.offset[..., None]


def round_weight(weight: Tensor, form: CodeForm) -> Codes:
    """weight [..., N, K], any float dtype, K a multiple of the form's group → its codes, with the same dimensions in front.

    Raises ValueError when a weight is NaN or infinite, or the group does not divide K.
    """
    if weight.dim() > 2:
        parts = round_weight(weight.flatten(0, -2), form)
        front = weight.shape[:-1]
        offsets = None if parts.offsets is None else parts.offsets.unflatten(0, front)
        return Codes(parts.codes.unflatten(0, front), parts.scales.unflatten(0, front), offsets)
    check(weight, form)
    weight = weight.detach()
    if _can_be_read(weight) and form.group_of(weight.shape[1]) <= MOST_ROUNDED:
        return _by_kernel(weight, form)
    return by_reference(weight, form)


def exact_codes(weight: Tensor, form: CodeForm) -> Codes | None:
    """Codes that stand for every element of weight [N, K] as it is, also once they are packed; None where there are none.

    Each group's range must be that of its codes, as where a file's codes became floats.
    """
    weight = weight.detach()
    if form.reject(weight.shape[1]) or not _can_be_read(weight) or not weight.numel():
        return None
    exact = torch.ones(1, dtype=torch.uint8, device="cpu")
    codes = _by_kernel(weight, form, exact)
    return codes if exact and (form.bits == 8 or _packs_exactly(codes)) else None


def _packs_exactly(codes: Codes) -> bool:
    """Whether the factors of each channel are near enough to each other for f16 beside a power of two, which packing makes of them."""
    factors = torch.cat([f for f in codes[1:] if f is not None], 1).abs()
    most = factors.amax(1, keepdim=True)
    fits = (most >= _LEAST_LARGEST) & (factors >= most * _LEAST_FACTOR)
    return bool(((factors == 0) | fits).all())


def _can_be_read(weight: Tensor) -> bool:
    """Whether its elements are floats that lie in memory as they are."""
    if type(weight) not in (Tensor, torch.nn.Parameter) or weight.device.type != "cpu":
        return False
    if weight.layout is not torch.strided:
        return False
    has_memory = weight.data_ptr() != 0 or weight.numel() == 0
    return has_memory and weight.dtype in FLOATS and not weight.is_neg()


def _by_kernel(weight: Tensor, form: CodeForm, exact: Tensor | None = None) -> Codes:
    """exact: becomes 0 unless the codes stand for the weight as it is."""
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    n, k = weight.shape
    group = form.group_of(k)
    code_type = torch.int8 if form.bits == 8 else torch.uint8
    codes = torch.empty((n, k * form.bits // 8), dtype=code_type, device="cpu")
    scales = torch.empty((n, k // group), dtype=torch.float32, device="cpu")
    offsets = None if form.symmetric else torch.empty_like(scales)
    threads = 1 if weight.numel() < _WORTH_WAKING else None
    operands = [weight, codes, scales, offsets, exact]
    run_op("round_weight", operands, [form.bits, group], threads=threads)
    return Codes(codes, scales, offsets)


def by_reference(weight: Tensor, form: CodeForm) -> Codes:
    """The same in PyTorch, for a weight that can have this form."""
    rows = max(1, WEIGHTS_AT_ONCE // max(1, weight.shape[1]))
    parts = [_round_rows(w.float(), form) for w in weight.split(rows)]
    offsets = None if form.symmetric else torch.cat([p.offsets for p in parts])  # type: ignore[misc]
    return Codes(torch.cat([p.codes for p in parts]), torch.cat([p.scales for p in parts]), offsets)


def why_not(weight: Tensor, form: CodeForm) -> str:
    """Why this weight [..., N, K] cannot have this form; "" when it can."""
    if reason := form.reject(weight.shape[-1]):
        return reason
    if weight.layout is not torch.strided:
        return f"its weight is {str(weight.layout).removeprefix('torch.')}, and only strided ones are rounded"
    if weight.is_meta:
        return "its weight is on the meta device, and has no values"
    weight = weight.detach()
    if weight.sum(dtype=torch.float32).isfinite():
        return ""
    bad = weight.numel() - int(weight.float().isfinite().sum())
    where = " in float32" if weight.dtype == torch.float64 else ""
    return f"{bad} of its {weight.numel()} weights are NaN or infinite{where}" if bad else ""


def check(weight: Tensor, form: CodeForm) -> None:
    """Raises ValueError when this weight cannot have this form."""
    if reason := why_not(weight, form):
        raise ValueError(reason)


def grid_of(values: Tensor, form: CodeForm) -> Grid:
    """The grid for values [..., groups, group] float32: scale, offset [..., groups], as exact as kernels keep them."""
    best = full_grid(values, form, 1.0)
    if form.bits == 8:
        return best
    error = _error(values, best, form)
    for share in SHARES:
        best, error = _better(values, form, best, error, full_grid(values, form, share))
    if form.symmetric:
        narrow = Grid(values.abs().amax(-1) / 7, None)
        best, error = _better(values, form, best, error, narrow)
    for _ in range(FITS):
        best, error = _better(values, form, best, error, _fitted(values, form, best))
    offset = None if best.offset is None else _as_kept(best.offset)
    return Grid(_as_kept(best.scale), offset)


def _as_kept(factors: Tensor) -> Tensor:
    """Scales or offsets with the 11 bits that the packed form beside 4-bit codes keeps of them."""
    mantissa, exponent = torch.frexp(factors)
    return torch.ldexp((mantissa * 2**11).round(), exponent - 11)


def _better(
    values: Tensor, form: CodeForm, best: Grid, error: Tensor, other: Grid
) -> tuple[Grid, Tensor]:
    """Per group the grid with the smaller error, and that error."""
    new_error = _error(values, other, form)
    is_better = new_error < error  # never where the other's error is NaN
    offset = None
    if best.offset is not None and other.offset is not None:
        offset = torch.where(is_better, other.offset, best.offset)
    grid = Grid(torch.where(is_better, other.scale, best.scale), offset)
    return grid, torch.where(is_better, new_error, error)


def _fitted(values: Tensor, form: CodeForm, grid: Grid) -> Grid:
    """Scale and offset of least squared error for the codes that this grid gives."""
    codes = grid.nearest(values, form.bits)
    if grid.offset is None:
        codes = codes - ZERO_POINT_4BIT
        return Grid((codes * values).sum(-1) / (codes * codes).sum(-1), None)
    mean_code, mean = codes.mean(-1), values.mean(-1)
    centred = codes - mean_code[..., None]
    scale = (centred * values).sum(-1) / (centred * centred).sum(-1)
    return Grid(scale, mean - scale * mean_code)


def full_grid(values: Tensor, form: CodeForm, share: float) -> Grid:
    """The grid over `share` of each group's range."""
    if form.symmetric and form.bits == 8:
        return Grid(values.abs().amax(-1) / 127 * share, None)
    low, high = values.amin(-1), values.amax(-1)
    if (
        form.symmetric
    ):  # −8 is a code and 8 is not: the sign of the scale gives −8 to the longer side
        return Grid(torch.where(high > -low, high, low) / -8 * share, None)
    if form.bits == 8:
        return Grid((high / 254 - low / 254) * share, high / 2 + low / 2)
    middle = high / 2 + low / 2
    return Grid((high / 15 - low / 15) * share, low * share + middle * (1 - share))


def packed(codes: Tensor, grid: Grid, bits: int) -> Codes:
    """Codes [N, groups, group] as float32 → the form that is stored."""
    flat = codes.flatten(-2)
    if bits == 8:
        return Codes(flat.to(torch.int8), grid.scale, grid.offset)
    pairs = flat.to(torch.uint8).unflatten(-1, (-1, 2))
    return Codes(pairs[..., 0] | (pairs[..., 1] << 4), grid.scale, grid.offset)


def _round_rows(weight: Tensor, form: CodeForm) -> Codes:
    values = weight.unflatten(-1, (-1, form.group_of(weight.shape[1])))
    grid = grid_of(values, form)
    return packed(grid.nearest(values, form.bits), grid, form.bits)


def _error(values: Tensor, grid: Grid, form: CodeForm) -> Tensor:
    rounded = grid.value(grid.nearest(values, form.bits), form.bits)
    return (rounded - values).square_().sum(-1)
