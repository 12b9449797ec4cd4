"""Random operands of every kernel in csrc/cuda: run on an emulated device, and what float64 says."""

from __future__ import annotations

import torch
from cuda_emulator.emulator import Emulator, guarded
from llmopt.native.cuda import AttentionDecode, LinearW4A16, LinearW8A8
from llmopt.ops import activation
from llmopt.ops.linear_quantized import dequantized
from llmopt.program import DTYPE_CODES


def rows(values: torch.Tensor, alignment: int, extra: int = 0) -> torch.Tensor:
    """The same matrix with rows at multiples of `alignment` elements; what lies between them must not matter."""
    width = -(-values.shape[1] // alignment) * alignment + extra
    wide = torch.full((values.shape[0], width), 127, dtype=values.dtype)
    wide[:, : values.shape[1]] = values
    return guarded(wide)[:, : values.shape[1]]


def pointer(t: torch.Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def with_padding(t: torch.Tensor) -> torch.Tensor:
    """All of every row of `rows`: kernels may read to the next row's begin."""
    return t.as_strided((t.shape[0], t.stride(0)), t.stride())


def expected(value, bias, act, residual):
    """The epilogue in float64."""
    if bias is not None:
        value = value + bias.double()
    value = activation.activate(act, value) if act != "none" else value
    return value if residual is None else value + residual.double()


class W8A8:
    """Random operands of one linear_w8a8."""

    def __init__(self, m, n, k, dtype=torch.float16, low=-128, high=128, around=True, stride=None):
        random = torch.Generator().manual_seed(m * 1000003 + n * 1009 + k)
        codes = lambda size: torch.randint(low, high, size, generator=random, dtype=torch.int8)  # noqa: E731
        self.x, self.w = rows(codes((m, k)), 16), rows(codes((n, k)), 16, 16)
        self.x_scale = guarded(torch.rand(m, generator=random) * 0.02 + 1e-3)
        self.w_scale = guarded(torch.rand(n, generator=random) * 0.02 + 1e-3)
        normal = lambda *size: guarded(torch.randn(size, generator=random).to(dtype))  # noqa: E731
        self.bias = normal(n) if around else None
        self.residual = normal(m, stride or n)[:, :n] if around else None
        self.y = guarded(torch.full((m, stride or n), float("nan"), dtype=dtype))[:, :n]

    def sums(self) -> torch.Tensor:
        return self.x.double() @ self.w.double().T

    def record(self, act: str) -> LinearW8A8:
        operands = (self.x, self.w, self.x_scale, self.w_scale, self.bias, self.residual, self.y)
        residual_stride = 0 if self.residual is None else self.residual.stride(0)
        strides = (self.x.stride(0), self.w.stride(0), residual_stride, self.y.stride(0))
        sizes = (*self.y.shape, self.x.shape[1])
        codes = DTYPE_CODES[self.y.dtype], activation.CODES[act]
        return LinearW8A8(*map(pointer, operands), *strides, *sizes, *codes)

    def run(self, emulator: Emulator, act: str = "none") -> torch.Tensor:
        read = (with_padding(self.x), with_padding(self.w), self.x_scale, self.w_scale)
        emulator.buffers((*read, self.bias, self.residual), (self.y,))
        emulator.library.launch(self.record(act))
        return self.y

    def want(self, act: str = "none") -> torch.Tensor:
        scales = self.x_scale.double()[:, None] * self.w_scale.double()
        return expected(scales * self.sums(), self.bias, act, self.residual)


class W4A16:
    """Random operands of one linear_w4a16."""

    def __init__(self, m, n, k, group, has_offset, dtype=torch.float16):
        random = torch.Generator().manual_seed(m * 1000003 + n * 1009 + k + group)
        normal = lambda *size: torch.randn(size, generator=random)  # noqa: E731
        self.x = rows(normal(m, k).to(dtype), 8, 8)
        codes = torch.randint(0, 256, (n, k // 2), generator=random, dtype=torch.uint8)
        self.codes = guarded(codes)
        self.scale = guarded(torch.rand(n, k // group, generator=random) * 0.1 + 0.01)
        self.offset = guarded(normal(n, k // group) * 0.1) if has_offset else None
        self.bias, self.residual = (guarded(t.to(dtype)) for t in (normal(n), normal(m, n)))
        self.y = guarded(torch.full((m, n), float("nan"), dtype=dtype))
        self.group = group

    def record(self, act: str) -> LinearW4A16:
        operands = (self.x, self.codes, self.scale, self.offset, self.bias, self.residual, self.y)
        strides = self.x.stride(0), self.residual.stride(0), self.y.stride(0)
        codes = self.group, DTYPE_CODES[self.y.dtype], activation.CODES[act]
        return LinearW4A16(
            *map(pointer, operands), *strides, *self.y.shape, self.x.shape[1], *codes
        )

    def run(self, emulator: Emulator, act: str = "none") -> torch.Tensor:
        read = (self.x, self.codes, self.scale, self.offset, self.bias, self.residual)
        emulator.buffers(read, (self.y,))
        emulator.library.launch(self.record(act))
        return self.y

    def want(self, act: str = "none") -> torch.Tensor:
        weight = dequantized(self.codes, self.scale, self.offset, 4).double()
        return expected(self.x.double() @ weight.T, self.bias, act, self.residual)


class Decode:
    """Random operands of one attention_decode; the cache holds `capacity` positions, NaN beyond each length."""

    def __init__(self, heads, kv_heads, head_dim, lengths, splits=1, int8=False, capacity=None):
        random = torch.Generator().manual_seed(heads * 1009 + head_dim + sum(lengths))
        batch, capacity = len(lengths), capacity or max(lengths) + 3
        normal = lambda *size: torch.randn(size, generator=random)  # noqa: E731
        self.q = normal(batch, heads, head_dim).half()
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        shape = (batch, kv_heads, capacity, head_dim)
        self.k, self.v = normal(*shape).half(), normal(*shape).half()
        self.k_scale = self.v_scale = None
        if int8:
            code = lambda: torch.randint(-127, 128, shape, generator=random, dtype=torch.int8)  # noqa: E731
            self.k, self.v = code(), code()
            self.k_scale = torch.rand(shape[:3], generator=random) * 0.03
            self.v_scale = torch.rand(shape[:3], generator=random) * 0.03
        for b, length in enumerate(lengths):
            dead = [self.k_scale, self.v_scale] if int8 else [self.k, self.v]
            for t in dead:
                t[b, :, length:] = float("nan")
        self.o = torch.empty_like(self.q)
        for name, tensor in list(vars(self).items()):
            setattr(self, name, tensor if tensor is None else guarded(tensor))
        self.splits = splits
        self.scale = head_dim**-0.5
        problem = self.record()
        self.partial = guarded(torch.full((problem.partial_floats(),), float("nan")))
        self.finished = guarded(torch.zeros(problem.num_counters(), dtype=torch.int32))

    def record(self) -> AttentionDecode:
        """Sequences of one length are told by a number, others by lengths."""
        alike = len(set(self.lengths.tolist())) == 1
        names = [
            "q",
            "k",
            "v",
            "k_scale",
            "v_scale",
            "" if alike else "lengths",
            "o",
            "partial",
            "finished",
        ]
        tensors = [getattr(self, name, None) for name in names]
        scale_strides = (0, 0, 0) if self.k_scale is None else self.k_scale.stride()
        return AttentionDecode(
            *(None if t is None else t.data_ptr() for t in tensors),
            *self.k.stride()[:3],
            *scale_strides,
            self.scale,
            *self.q.shape[:2],
            self.k.shape[1],
            self.q.shape[2],
            self.splits,
            DTYPE_CODES[self.k.dtype],
            int(self.lengths[0]) if alike else 0,
        )

    def run(self, emulator: Emulator) -> torch.Tensor:
        read = (self.q, self.k, self.v, self.k_scale, self.v_scale, self.lengths)
        self.o.fill_(float("nan"))
        emulator.buffers(read, (self.o, self.partial, self.finished))
        emulator.library.launch(self.record())
        return self.o

    def want(self) -> torch.Tensor:
        group = self.q.shape[1] // self.k.shape[1]
        out = torch.zeros(self.q.shape, dtype=torch.float64)
        for b, length in enumerate(self.lengths.tolist()):
            k, v = self.k[b, :, :length].double(), self.v[b, :, :length].double()
            if self.k_scale is not None:
                k = k * self.k_scale[b, :, :length, None].double()
                v = v * self.v_scale[b, :, :length, None].double()
            k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
            weights = torch.softmax(self.scale * (k @ self.q[b].double()[..., None])[..., 0], -1)
            out[b] = (weights[:, None] @ v)[:, 0]
        return out
