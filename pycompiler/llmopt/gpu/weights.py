"""Weights as GPU kernels read them: as they are where one will do, side by side or rounded to codes otherwise.

A prepared copy is made again when a source is another tensor, has moved or was edited in place.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt.native.segment import PackedSpec, WeightView
from llmopt.quant.rounding import Codes, round_weight
from llmopt.weights import state_of


@dataclass(frozen=True)
class Prepared:
    """weight [N, K] (codes: [N, K] s8 or [N, K/2] u8), with scales and offsets [N, K/group] fp32; up: the second of a gated pair."""

    weight: Tensor
    bias: Tensor | None = None
    scales: Tensor | None = None
    offsets: Tensor | None = None
    up: Prepared | None = None

    def tensors(self) -> list[Tensor]:
        own = [t for t in (self.weight, self.bias, self.scales, self.offsets) if t is not None]
        return own if self.up is None else own + self.up.tensors()


class WeightCache:
    """The prepared weights of one segment, of every set of tensors it is called with that is still alive.

    A graph that is shared by layers is called with the weights of each in turn.
    """

    def __init__(self, specs: Sequence[PackedSpec]) -> None:
        self._arguments = [[v.argument for v in spec.views()] for spec in specs]
        self._specs = specs
        self._made: dict[tuple, _Made] = {}  # by the number of a spec and the ids of its tensors

    def get(self, arguments: Sequence[Tensor]) -> list[Prepared]:
        """Every weight over a segment's arguments."""
        result = []
        for number, indices in enumerate(self._arguments):
            tensors = [arguments[i] for i in indices]
            state = state_of(tensors)
            key = (number, *(entry[0] for entry in state))
            known = self._made.get(key)
            if known is None or known.state != state:
                forget = functools.partial(self._forget, key)
                alive = tuple(weakref.ref(t, forget) for t in tensors)
                known = self._made[key] = _Made(
                    state, prepare(self._specs[number], arguments), alive
                )
            result.append(known.prepared)
        return result

    def forget(self) -> None:
        """Prepares every weight anew when it is asked for."""
        self._made.clear()

    def _forget(self, key: tuple, _: object) -> None:
        """One of its tensors is gone, whose id another may get."""
        self._made.pop(key, None)


@dataclass(frozen=True)
class _Made:
    state: tuple
    prepared: Prepared
    alive: tuple[weakref.ref, ...]


def prepare(spec: PackedSpec, arguments: Sequence[Tensor]) -> Prepared:
    """The prepared form of a spec; works on meta tensors as well. Raises ValueError for NaN or Inf that would be rounded."""

    def cut(view: WeightView) -> Tensor:
        base = arguments[view.argument].detach()
        return base.as_strided(view.size, view.stride, base.storage_offset() + view.offset)

    weights = [cut(v) for v in spec.sources]
    biases = [None if b is None else cut(b) for b in spec.biases]
    scales, offsets = [cut(v) for v in spec.scales], [cut(v) for v in spec.offsets]
    pieces = [
        _codes(spec, w, scales[i] if scales else None, offsets[i] if offsets else None, biases[i])
        for i, w in enumerate(weights)
    ]
    if spec.interleave:
        gate, up = pieces
        return Prepared(gate.weight, gate.bias, gate.scales, gate.offsets, up)
    if len(pieces) == 1:
        return pieces[0]
    return Prepared(
        torch.cat([p.weight for p in pieces]),
        _side_by_side([p.bias for p in pieces], weights),
        _joined([p.scales for p in pieces]),
        _joined([p.offsets for p in pieces]),
    )


def _codes(
    spec: PackedSpec, weight: Tensor, scale: Tensor | None, offset: Tensor | None, bias: Tensor | None
) -> Prepared:  # fmt: skip
    form = spec.form
    if form is None:
        return Prepared(_dense_rows(weight), bias)
    if scale is not None:
        return Prepared(
            _dense_rows(weight),
            bias,
            scale.contiguous(),
            None if offset is None else offset.contiguous(),
        )
    if weight.is_meta:
        n, k = weight.shape
        width, dtype = (k // 2, torch.uint8) if form.bits == 4 else (k, torch.int8)
        factors = weight.new_empty((n, k // form.group), dtype=torch.float32)
        codes = Codes(
            weight.new_empty((n, width), dtype=dtype), factors, None if form.symmetric else factors
        )
    else:
        codes = round_weight(weight, form)
    return Prepared(codes.codes, bias, codes.scales, codes.offsets)


def _dense_rows(weight: Tensor) -> Tensor:
    """The weight itself where its rows are dense and start at multiples of 16 bytes, else a copy."""
    aligned = weight.stride(0) * weight.element_size() % 16 == 0
    start = weight.storage_offset() * weight.element_size() % 16 == 0
    return weight if weight.stride(1) == 1 and aligned and start else weight.contiguous()


def _joined(pieces: Sequence[Tensor | None]) -> Tensor | None:
    given = [p for p in pieces if p is not None]
    return torch.cat(given) if given else None


def _side_by_side(biases: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Tensor | None:
    like = next((b for b in biases if b is not None), None)
    if like is None:
        return None
    return torch.cat(
        [
            like.new_zeros(w.shape[0]) if b is None else b
            for b, w in zip(biases, weights, strict=True)
        ]
    )
