"""linear_quantized: ops.linear over weights stored as small integers, with activations as they are or rounded to int8 on the fly.

A weight element is scale · code + offset, one scale and one offset per output channel and group of `group` inputs. Codes:

    8 bits  int8  [N, K]       −127 … 127; symmetric unless offsets are given
    4 bits  uint8 [N, K / 2]   two codes 0 … 15 a byte, the even input in the low half; without offsets the zero point is 8

With activations="int8" each token's inputs are rounded symmetrically to −127 … 127 with one scale per group (the largest magnitude
divided by 127, ties to even), and integer dot products are folded into float32 once a group. With activations="same" the weights are
widened instead; a kernel may keep the inputs to 23 bits of the largest in their group, where float32 keeps 24 bits of each. Many rows
on AMX are multiplied in bf16 (docs/adr/0004): there inputs and weights keep 8 significant bits each, or 16 with "same" outside of bf16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from llmopt.ops.linear import DEFAULTS as LINEAR_DEFAULTS
from llmopt.ops.linear import NORM_ARGUMENTS, arguments_of, linear, normed
from llmopt.ops.reference import outside_autocast

ZERO_POINT_4BIT = 8


def dequantized(codes: Tensor, scale: Tensor, offset: Tensor | None, bits: int) -> Tensor:
    """codes [N, K] or [N, K/2], scale and offset [N, K/group] float32 → the weight [N, K] in float32."""
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
    values = codes.float().unflatten(-1, (scale.shape[-1], -1))
    if offset is None:
        values = values - (ZERO_POINT_4BIT if bits == 4 else 0)
        return (values * scale[..., None]).flatten(-2)
    return (values * scale[..., None] + offset[..., None]).flatten(-2)


def quantized_activations(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """x [..., K] → codes [..., groups, K/groups] and scales [..., groups], both float32. NaN and Inf give NaN codes."""
    values = x.float().unflatten(-1, (groups, -1))
    scale = values.abs().amax(-1) / 127
    # A group whose scale has no finite reciprocal counts as zero; NaN stays NaN.
    inverse = torch.where(scale >= torch.finfo(torch.float32).tiny, 1 / scale, scale * 0)
    return (values * inverse[..., None]).round(), scale


@outside_autocast
def dequantize(
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    bits: int,
    activations: str,
    dtype: torch.dtype,
) -> Tensor:
    """The weight [N, K] behind codes, in a graph: what an ops.linear reads until it becomes an ops.linear_quantized.

    activations: how the linear that reads it will treat its input; means nothing here.
    """
    return dequantized(codes, scale, offset, bits).to(dtype)


def _fake_weight(
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    bits: int,
    activations: str,
    dtype: torch.dtype,
) -> Tensor:
    k = codes.shape[1] * 8 // bits
    return torch.empty((codes.shape[0], k), dtype=dtype, device=codes.device)


dequantize.fake = _fake_weight  # type: ignore[attr-defined]


@outside_autocast
def linear_quantized(
    x: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    offsets: Sequence[Tensor | None],
    bits: int,
    activations: str,
    group: int = 0,
    symmetric: bool = True,
    **around: Any,
) -> Tensor:
    """x [..., K], codes_i as above, scales_i and offsets_i [N_i, K/group] float32 → [..., ΣN_i] (gated: [..., N]) in `dtype`, else in x's.

    bits: 8 or 4. activations: "same" or "int8". around: what else ops.linear takes; a norm comes before the rounding of activations.
    A float weight [N, K] may stand in the place of codes, with None for its scales and offsets. A kernel rounds it when it packs it,
    in groups of `group` (0: all of K), with offsets unless `symmetric`; here it stays as it is.
    """
    weights = [
        c if s is None else dequantized(c, s, o, bits)
        for c, s, o in zip(codes, scales, offsets, strict=True)
    ]
    if activations == "same":
        return linear(x, weights, **around)
    k, first = weights[0].shape[1], scales[0]
    groups = k // (group or k) if first is None else first.shape[1]
    norm = {name: around.pop(name) for name in NORM_ARGUMENTS if name in around}
    rounded, scale = quantized_activations(normed(x, **norm), groups)
    around.setdefault("dtype", x.dtype)
    return linear((rounded * scale[..., None]).flatten(-2), weights, **around)


def _fake(
    x: Tensor,
    codes: Sequence[Tensor],
    *_: Any,
    gated: bool = False,
    dtype: torch.dtype | None = None,
    **__: Any,
) -> Tensor:
    n = codes[0].shape[0] if gated else sum(c.shape[0] for c in codes)
    return torch.empty((*x.shape[:-1], n), dtype=dtype or x.dtype, device=x.device)


linear_quantized.fake = _fake  # type: ignore[attr-defined]


# The arguments after which a node may leave something out.
DEFAULTS: dict[str, Any] = {
    "x": None,
    "codes": (),
    "scales": (),
    "offsets": (),
    "bits": 8,
    "activations": "same",
    "group": 0,
    "symmetric": True,
    **{name: value for name, value in LINEAR_DEFAULTS.items() if name not in ("x", "weights")},
}


def parts(node: fx.Node) -> dict[str, Any]:
    """Every argument of an ops.linear_quantized node by name."""
    return arguments_of(node, DEFAULTS)
