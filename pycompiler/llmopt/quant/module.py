"""QuantizedLinear, a linear that holds codes instead of a weight, and QuantizedExperts, what stands in the place of the weights of a
mixture's experts. They run in eager; Dynamo keeps each as one node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llmopt.ops.linear_quantized import dequantized, linear_quantized
from llmopt.quant.rounding import Codes
from llmopt.quant.schemes import Scheme


@torch.library.custom_op("llmopt::linear_quantized_module", mutates_args=())
def linear_quantized_module(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    bias: Tensor | None,
    bits: int,
    activations: str,
) -> Tensor:
    """ops.linear_quantized of one weight: x [..., K] → [..., N] in x's dtype. Gradients flow to x only."""
    return linear_quantized(x, (codes,), (scales,), (offsets,), bits, activations, biases=(bias,))


@linear_quantized_module.register_fake
def _fake(x, codes, scales, offsets, bias, bits, activations):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, scales, offsets, _, ctx.bits, _ = inputs
    ctx.save_for_backward(codes, scales, offsets)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Rounding of activations counts as the identity (the straight-through estimator, Bengio et al. 2013)."""
    codes, scales, offsets = ctx.saved_tensors
    grad_x = (grad.float() @ dequantized(codes, scales, offsets, ctx.bits)).to(grad.dtype)
    return grad_x, None, None, None, None, None, None


linear_quantized_module.register_autograd(_backward, setup_context=_keep_for_backward)


class Quantized(nn.Module):
    """A weight stored as codes, in buffers that are the same on every machine; `dtype` is that of the weight they replace."""

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None

    def __init__(self, weight: Codes, scheme: Scheme, dtype: torch.dtype) -> None:
        super().__init__()
        self.scheme = scheme
        self.dtype = dtype
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("offsets", weight.offsets)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantized:
        """model.to(dtype) is about weights and activations: scales and offsets stay float32."""
        scales, offsets = self.scales, self.offsets
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=scales.device)).dtype
        if self.scales.dtype != torch.float32:
            self.scales = scales.to(self.scales.device)
            self.offsets = None if offsets is None else offsets.to(self.scales.device)
        return self


def empty_codes(front: tuple[int, ...], k: int, scheme: Scheme) -> Codes:
    """Codes [*front, K] of no weight, to load a state_dict into."""
    groups = k // scheme.group_of(k)
    code_type = torch.int8 if scheme.bits == 8 else torch.uint8
    codes = torch.zeros((*front, k * scheme.bits // 8), dtype=code_type)
    offsets = None if scheme.symmetric else torch.zeros((*front, groups))
    return Codes(codes, torch.zeros((*front, groups)), offsets)


class QuantizedLinear(Quantized):
    """y = x Wᵀ + bias with W stored as codes.

    Buffers: codes [N, K] int8 or [N, K/2] uint8, scales and offsets [N, K/group] float32 (offsets only when asymmetric),
    bias [N] in the model's dtype or None.
    """

    bias: Tensor | None

    def __init__(
        self,
        weight: Codes,
        bias: Tensor | None,
        scheme: Scheme,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """dtype: the one of the weight that the codes replace."""
        super().__init__(weight, scheme, dtype)
        self.out_features = weight.codes.shape[0]
        self.in_features = weight.codes.shape[1] * 8 // scheme.bits
        self.register_buffer("bias", None if bias is None else bias.detach())

    @classmethod
    def empty(
        cls,
        n: int,
        k: int,
        scheme: Scheme,
        bias_dtype: torch.dtype | None,
        dtype: torch.dtype = torch.float32,
    ) -> QuantizedLinear:
        """One without values, to load a state_dict into; bias_dtype None: without a bias."""
        bias = None if bias_dtype is None else torch.zeros(n, dtype=bias_dtype)
        return cls(empty_codes((n,), k, scheme), bias, scheme, dtype)

    @property
    def weight(self) -> Tensor:
        """The weight the codes stand for, [N, K], for code that reads it; in the dtype of the model."""
        return dequantized(self.codes, self.scales, self.offsets, self.scheme.bits).to(self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """input [..., K] float → [..., N] in its dtype."""
        return linear_quantized_module(
            input,
            self.codes,
            self.scales,
            self.offsets,
            self.bias,
            self.scheme.bits,
            self.scheme.activations,
        )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.scheme}"


@torch.library.custom_op("llmopt::expert_weights", mutates_args=())
def expert_weights(
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    bits: int,
    activations: str,
    dtype: torch.dtype,
) -> Tensor:
    """codes [E, N, K] int8 or [E, N, K/2] uint8, scales and offsets [E, N, K/group] → the weights [E, N, K] they stand for, in dtype.

    activations: how the product that reads them treats its other operand where it is ours; means nothing here.
    """
    return dequantized(codes, scales, offsets, bits).to(dtype)


@expert_weights.register_fake
def _(codes, scales, offsets, bits, activations, dtype):  # type: ignore[no-untyped-def]
    return scales.new_empty((*codes.shape[:2], codes.shape[2] * 8 // bits), dtype=dtype)


class QuantizedExperts(Quantized):
    """The weights of all experts of one projection, [E, N, K], or [E, K, N] when `transposed`, stored as codes of [E, N, K].

    Called, it gives the weights. In eager all of them are computed for every call, and inputs stay as they are whatever the scheme.
    """

    def __init__(
        self, weight: Codes, transposed: bool, scheme: Scheme, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(weight, scheme, dtype)
        self.transposed = transposed

    @classmethod
    def empty(
        cls,
        experts: int,
        n: int,
        k: int,
        transposed: bool,
        scheme: Scheme,
        dtype: torch.dtype = torch.float32,
    ) -> QuantizedExperts:
        """One without values, to load a state_dict into."""
        return cls(empty_codes((experts, n), k, scheme), transposed, scheme, dtype)

    def forward(self) -> Tensor:
        form = (self.scheme.bits, self.scheme.activations, self.dtype)
        weights = expert_weights(self.codes, self.scales, self.offsets, *form)
        return weights.transpose(1, 2) if self.transposed else weights

    def extra_repr(self) -> str:
        return f"{'x'.join(map(str, self.codes.shape))} codes, {self.scheme}"
