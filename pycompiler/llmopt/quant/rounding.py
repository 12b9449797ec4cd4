"""Rounding a weight [N, K] to codes, with a scale and maybe an offset per output channel and group of inputs.

The layout is that of ops.linear_quantized. The range of a group is that of its weights; for 4 bits a few narrower ranges are
tried too, the one with the least squared error wins, and least squares then fit scale and offset to the codes, as long as that
makes the error smaller.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmopt.ops.linear_quantized import ZERO_POINT_4BIT, dequantized
from llmopt.quant.schemes import Scheme

# For 4 bits: the shares of a group's range that are tried, and the rounds of fitting.
SHARES = (0.95, 0.9, 0.85, 0.8)
FITS = 3
ROWS_AT_ONCE = 4096  # bounds the memory of the search


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


def round_weight(weight: Tensor, scheme: Scheme) -> Codes:
    """weight [N, K], any float dtype, K a multiple of the scheme's group → its codes.

    Raises ValueError when a weight is NaN or infinite, or the group does not divide K.
    """
    check(weight, scheme)
    parts = [_round_rows(w.detach().float(), scheme) for w in weight.split(ROWS_AT_ONCE)]
    offsets = None if scheme.symmetric else torch.cat([p.offsets for p in parts])  # type: ignore[misc]
    return Codes(torch.cat([p.codes for p in parts]), torch.cat([p.scales for p in parts]), offsets)


def why_not(weight: Tensor, scheme: Scheme) -> str:
    """Why this weight [N, K] cannot have this scheme; "" when it can."""
    if reason := scheme.reject(weight.shape[1]):
        return reason
    bad = weight.numel() - int(weight.detach().isfinite().sum())
    return f"{bad} of its {weight.numel()} weights are NaN or infinite" if bad else ""


def check(weight: Tensor, scheme: Scheme) -> None:
    """Raises ValueError when this weight cannot have this scheme."""
    if reason := why_not(weight, scheme):
        raise ValueError(reason)


def grid_of(values: Tensor, scheme: Scheme) -> Grid:
    """The grid for values [..., groups, group] float32: scale, offset [..., groups]."""
    best = full_grid(values, scheme, 1.0)
    if scheme.bits == 8:
        return best
    error = _error(values, best, scheme)
    for share in SHARES:
        best, error = _better(values, scheme, best, error, full_grid(values, scheme, share))
    if scheme.symmetric:
        narrow = Grid(values.abs().amax(-1) / 7, None)
        best, error = _better(values, scheme, best, error, narrow)
    for _ in range(FITS):
        best, error = _better(values, scheme, best, error, _fitted(values, scheme, best))
    return best


def _better(
    values: Tensor, scheme: Scheme, best: Grid, error: Tensor, other: Grid
) -> tuple[Grid, Tensor]:
    """Per group the grid with the smaller error, and that error."""
    new_error = _error(values, other, scheme)
    is_better = new_error < error  # never where the other's error is NaN
    offset = None
    if best.offset is not None and other.offset is not None:
        offset = torch.where(is_better, other.offset, best.offset)
    grid = Grid(torch.where(is_better, other.scale, best.scale), offset)
    return grid, torch.where(is_better, new_error, error)


def _fitted(values: Tensor, scheme: Scheme, grid: Grid) -> Grid:
    """Scale and offset of least squared error for the codes that this grid gives."""
    codes = grid.nearest(values, scheme.bits)
    if grid.offset is None:
        codes = codes - ZERO_POINT_4BIT
        return Grid((codes * values).sum(-1) / (codes * codes).sum(-1), None)
    mean_code, mean = codes.mean(-1), values.mean(-1)
    centred = codes - mean_code[..., None]
    scale = (centred * values).sum(-1) / (centred * centred).sum(-1)
    return Grid(scale, mean - scale * mean_code)


def full_grid(values: Tensor, scheme: Scheme, share: float) -> Grid:
    """The grid over `share` of each group's range."""
    if scheme.symmetric and scheme.bits == 8:
        return Grid(values.abs().amax(-1) / 127 * share, None)
    low, high = values.amin(-1), values.amax(-1)
    if (
        scheme.symmetric
    ):  # −8 is a code and 8 is not: the sign of the scale gives −8 to the longer side
        return Grid(torch.where(high > -low, high, low) / -8 * share, None)
    if scheme.bits == 8:
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


def _round_rows(weight: Tensor, scheme: Scheme) -> Codes:
    values = weight.unflatten(-1, (-1, scheme.group_of(weight.shape[1])))
    grid = grid_of(values, scheme)
    return packed(grid.nearest(values, scheme.bits), grid, scheme.bits)


def _error(values: Tensor, grid: Grid, scheme: Scheme) -> Tensor:
    rounded = grid.value(grid.nearest(values, scheme.bits), scheme.bits)
    return (rounded - values).square_().sum(-1)
