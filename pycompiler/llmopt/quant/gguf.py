"""Weights that are quantised already: GGUF's Q4_0, Q4_1 and Q8_0 blocks of 32 as codes, with no second rounding.

    Q4_0   d float16, 16 bytes                 value = d · (code − 8)
    Q4_1   d, m float16, 16 bytes              value = d · code + m
    Q8_0   d float16, 32 int8                  value = d · code

A byte of 4-bit codes holds inputs j and j + 16 of its block; ours holds neighbours. Scales and offsets are widened exactly.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from llmopt.quant.layers import (
    bias_of,
    linears_of,
    output_head,
    replace_modules,
    twin_of,
    untie,
    weight_of,
)
from llmopt.quant.module import QuantizedLinear
from llmopt.quant.rounding import Codes, round_weight
from llmopt.quant.schemes import Scheme, of_head, scheme_of

log = logging.getLogger("llmopt")
Model = TypeVar("Model", bound=nn.Module)

BLOCK = 32
# block type → (bits, bytes of a block, float16 numbers at its front)
TYPES = {"Q4_0": (4, 18, 1), "Q4_1": (4, 20, 2), "Q8_0": (8, 34, 1)}


class LowestCode(ValueError):
    """A Q8_0 block with a code that ours have not; llama.cpp writes none."""


def codes_of(data: np.ndarray, block_type: str, n: int, k: int) -> Codes:
    """The bytes of an [n, k] tensor of a type in TYPES → its codes in groups of 32.

    Raises ValueError for another type or size, and for scales that are NaN or infinite.
    """
    if block_type not in TYPES:
        raise ValueError(f"GGUF type {block_type} has no codes; possible: {', '.join(TYPES)}")
    bits, block_bytes, fronts = TYPES[block_type]
    raw = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
    if k % BLOCK or raw.size != n * (k // BLOCK) * block_bytes:
        raise ValueError(f"{raw.size} bytes are no {block_type} tensor of {n} × {k}")
    blocks = torch.from_numpy(raw.copy()).view(n, k // BLOCK, block_bytes)
    front = blocks[..., : 2 * fronts].contiguous().view(torch.float16).float()
    if not front.isfinite().all():
        raise ValueError("its scales are NaN or infinite")
    scales = front[..., 0].contiguous()
    offsets = front[..., 1].contiguous() if fronts == 2 else None
    body = blocks[..., 2 * fronts :]
    if bits == 8:
        codes = body.contiguous().view(torch.int8).flatten(1)
        if bool((codes == -128).any()):
            raise LowestCode("it holds the code −128, and ours are −127 … 127")
        return Codes(codes, scales, offsets)
    halves = torch.cat((body & 15, body >> 4), -1).unflatten(-1, (-1, 2))
    return Codes((halves[..., 0] | (halves[..., 1] << 4)).flatten(1), scales, offsets)


def scheme_for(block_type: str, activations: str) -> Scheme:
    """How a linear of this block type is described: its own groups of 32, activations "same" or "int8"."""
    return Scheme(TYPES[block_type][0], BLOCK, block_type != "Q4_1", activations)


def permuted(codes: Codes, rows: Tensor) -> Codes:
    """The codes of weight[rows]."""
    offsets = None if codes.offsets is None else codes.offsets[rows]
    return Codes(codes.codes[rows], codes.scales[rows], offsets)


def quantize_from_blocks(
    model: Model, blocks: Mapping[str, tuple[Codes, str]], scheme: str | Scheme = "w4a16"
) -> Model:
    """A twin of the model whose linears have the codes of a file; linears that the file holds otherwise are rounded.

    blocks: linear's name → its codes and their GGUF type. scheme: its activations hold for every linear, its bits for those
    without blocks (the output head has 8). Raises ValueError when codes and linear do not have the same size.
    """
    wanted = scheme_of(scheme)
    twin = twin_of(model)
    linears = linears_of(twin)
    head = output_head(twin)
    unknown = blocks.keys() - linears.keys()
    if unknown:
        raise ValueError(f"llmopt: the model has no linear {', '.join(sorted(unknown))}")
    for name, linear in linears.items():
        if name in blocks:
            codes, block_type = blocks[name]
            own = scheme_for(block_type, wanted.activations)
        else:
            own = of_head(wanted) if linear is head else wanted
            codes = round_weight(weight_of(linear), own)
        new = QuantizedLinear(codes, bias_of(linear), own, weight_of(linear).dtype)
        if (new.out_features, new.in_features) != tuple(weight_of(linear).shape):
            raise ValueError(
                f"llmopt: {name} is {tuple(weight_of(linear).shape)} in the model and "
                f"{(new.out_features, new.in_features)} in the file"
            )
        replace_modules(twin, {linear: new.train(linear.training)})
    untie(twin)
    return twin


def read_blocks(tensor: Any) -> tuple[Codes, str] | None:
    """A tensor of gguf.GGUFReader as codes and type; None, to be rounded from its values, when it has none of ours."""
    name = tensor.tensor_type.name
    if name not in TYPES:
        return None
    k, n = (int(size) for size in tensor.shape)
    try:
        return codes_of(tensor.data, name, n, k), name
    except LowestCode:
        log.warning(
            "%s holds the code −128, and ours are −127 … 127: it is rounded again", tensor.name
        )
        return None
