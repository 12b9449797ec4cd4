"""The CUDA C++ kernels in the registry. Those for few tokens come before Triton's, which is predicted, until a tuner measures both.

linear_w8a8_gemm.cuda comes behind Triton's, whose tiles fit more GPUs: it is chosen where it was measured to be faster. All refuse
wherever native/cuda.py says that they cannot run. Grid and tile are chosen by the launchers in csrc/cuda.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmopt.counters import MOST_TILES, counters
from llmopt.launch import AttentionProblem, Launch, LinearProblem, RowTile
from llmopt.native import cuda
from llmopt.ops import activation
from llmopt.program import DTYPE_CODES
from llmopt.registry import Kernel, register
from llmopt.types import Target

MOST_TOKENS = 8  # of the GEMVs
_ALIGNMENT = 16  # bytes, of what is read 16 bytes at a time
_BY_THE_LAUNCHER = RowTile(0)


Address = Callable[[Tensor | None], int | None]


@dataclass(frozen=True)
class CudaFunction:
    """Stands in a Launch where a Triton function would: makes the record of a problem and launches it on the current stream.

    record: of a launch's arguments and `address`, which gives a tensor's address or None for None.
    """

    record: Callable[..., ctypes.Structure]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*, num_warps: int, num_stages: int, **arguments: Any) -> None:
            stream = torch.cuda.current_stream().cuda_stream if torch.cuda.is_available() else 0
            cuda.library().launch(self.record(**arguments, address=_address), stream)  # type: ignore[arg-type]

        return launch


def _tiles(p: object, t: Target) -> tuple[RowTile, ...]:
    return (_BY_THE_LAUNCHER,)


def _reject_everywhere(t: Target) -> str:
    return cuda.missing() if t.device == "cuda" else f"CUDA C++ for {t}: NVIDIA GPUs are possible"


def _reject_slower(t: Target) -> str:
    """Where Triton's kernel for the same was measured to be faster: on an H100."""
    return "Triton's kernel was measured to be faster on an H100" if t.tier == "sm_90" else ""


def _reject_around(p: LinearProblem) -> str:
    """Why no linear of csrc/cuda has what stands around this product, or ""."""
    if p.gated or p.norm != "none" or p.dtype not in ("fp16", "bf16"):
        return "a gate, a norm in front, or results that are not fp16 or bf16"
    return ""


def _reject_w8a8(p: LinearProblem, t: Target) -> str:
    if p.scheme != "w8a8" or p.group or p.offsets:
        return "weights that are not w8a8 with one scale a channel and no offsets"
    if p.k % 16:
        return f"{p.k} inputs: sixteens are possible"
    return _reject_around(p) or _reject_everywhere(t)


def reject_gemv(p: LinearProblem, t: Target) -> str:
    if p.m > MOST_TOKENS:
        return f"{p.m} tokens: up to {MOST_TOKENS} are possible"
    return _reject_w8a8(p, t)


def reject_gemm(p: LinearProblem, t: Target) -> str:
    if p.m <= MOST_TOKENS:
        return f"{p.m} tokens: {MOST_TOKENS + 1} and more are possible"
    return _reject_w8a8(p, t)


def _w8a8_record(
    x_ptr: Tensor, w_ptr: Tensor, x_scale_ptr: Tensor, w_scale_ptr: Tensor, bias_ptr: Tensor | None,
    residual_ptr: Tensor | None, y_ptr: Tensor, act: str, address: Address,
) -> cuda.LinearW8A8:  # fmt: skip
    tensors = (x_ptr, w_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, residual_ptr, y_ptr)
    residual_stride = 0 if residual_ptr is None else residual_ptr.stride(0)
    strides = x_ptr.stride(0), w_ptr.stride(0), residual_stride, y_ptr.stride(0)
    codes = DTYPE_CODES[y_ptr.dtype], activation.CODES[act]
    return cuda.LinearW8A8(*map(address, tensors), *strides, *y_ptr.shape, x_ptr.shape[1], *codes)


def launch_w8a8(
    p: LinearProblem, c: RowTile, t: Target, x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, y: Tensor,
    around: Any, w_offset: None = None,
) -> Launch:  # fmt: skip
    """x [M,K] and w [N,K] s8, rows at multiples of 16 bytes; x_scale [M,1] and w_scale [N,1] fp32; around as for Triton's linears."""
    arguments = {
        "x_ptr": x, "w_ptr": w, "x_scale_ptr": x_scale, "w_scale_ptr": _scaled(w_scale, around),
        "bias_ptr": _bias(y, around), "residual_ptr": around.residual, "y_ptr": y, "act": p.act,
    }  # fmt: skip
    name = "linear_w8a8.cuda" if p.m <= MOST_TOKENS else "linear_w8a8_gemm.cuda"
    return Launch(
        name, CudaFunction(_w8a8_record), (), arguments, {},
        reads=("x_ptr", "w_ptr", "x_scale_ptr", "w_scale_ptr", "bias_ptr", "residual_ptr"), writes=("y_ptr",),
    )  # fmt: skip


def reject_w4a16(p: LinearProblem, t: Target) -> str:
    if p.scheme != "w4a16" or p.group not in (32, 64, 128) or p.k % p.group:
        return "weights that are not w4a16 in groups of 32, 64 or 128 that divide K"
    if p.m > MOST_TOKENS:
        return f"{p.m} tokens: up to {MOST_TOKENS} are possible"
    return _reject_around(p) or _reject_slower(t) or _reject_everywhere(t)


def _w4a16_record(
    x_ptr: Tensor, codes_ptr: Tensor, w_scale_ptr: Tensor, w_offset_ptr: Tensor | None, bias_ptr: Tensor | None,
    residual_ptr: Tensor | None, y_ptr: Tensor, group: int, act: str, address: Address,
) -> cuda.LinearW4A16:  # fmt: skip
    tensors = (x_ptr, codes_ptr, w_scale_ptr, w_offset_ptr, bias_ptr, residual_ptr, y_ptr)
    residual_stride = 0 if residual_ptr is None else residual_ptr.stride(0)
    strides = x_ptr.stride(0), residual_stride, y_ptr.stride(0)
    codes = group, DTYPE_CODES[y_ptr.dtype], activation.CODES[act]
    return cuda.LinearW4A16(*map(address, tensors), *strides, *y_ptr.shape, x_ptr.shape[1], *codes)


def launch_w4a16(
    p: LinearProblem, c: RowTile, t: Target, x: Tensor, w: Tensor, w_scale: Tensor, w_offset: Tensor | None, y: Tensor,
    around: Any,
) -> Launch:  # fmt: skip
    """x [M,K], w [N,K/2] u8, w_scale and w_offset [N,K/group] fp32 dense; around as for Triton's linears."""
    offset = None if w_offset is None else _scaled(w_offset, around)
    arguments = {
        "x_ptr": _aligned(x), "codes_ptr": w.contiguous(), "w_scale_ptr": _scaled(w_scale, around), "w_offset_ptr": offset,
        "bias_ptr": _bias(y, around), "residual_ptr": around.residual, "y_ptr": y, "group": p.group, "act": p.act,
    }  # fmt: skip
    return Launch(
        "linear_w4a16.cuda", CudaFunction(_w4a16_record), (), arguments, {},
        reads=("x_ptr", "codes_ptr", "w_scale_ptr", "w_offset_ptr", "bias_ptr", "residual_ptr"), writes=("y_ptr",),
    )  # fmt: skip


def _scaled(factors: Tensor, around: Any) -> Tensor:
    """Factors of a product that is multiplied with alpha."""
    return factors if around.alpha == 1.0 else factors * around.alpha


def _bias(y: Tensor, around: Any) -> Tensor | None:
    return None if around.bias is None else around.bias.to(y.dtype)


def _aligned(x: Tensor) -> Tensor:
    """A matrix whose rows begin where 16 bytes can be read at a time: itself or a copy."""
    starts = x.storage_offset(), x.stride(0)
    if x.stride(1) == 1 and all(s * x.element_size() % _ALIGNMENT == 0 for s in starts):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def reject_decode(p: AttentionProblem, t: Target) -> str:
    if p.q_len != 1 or p.qk != "same" or p.window or p.special:
        return "more than one query, products of codes, a window, a mask, a softcap, or heads that do not lie densely"
    if p.dtype != "fp16" or p.kv_dtype not in ("fp16", "i8"):
        return f"queries of {p.dtype} over {p.kv_dtype}: fp16 over fp16 or i8 is possible"
    if p.head_dim != p.value_dim or p.head_dim not in (64, 128):
        return f"heads of {p.head_dim} and {p.value_dim}: 64 and 128 are possible"
    count = _sizes_record(p).num_counters()
    if count > MOST_TILES:
        return f"{p.batch} sequences of {p.kv_heads} heads: up to {MOST_TILES} groups of heads are possible"
    is_slower = p.kv_dtype == "fp16"  # over 8 bits it took 14.6 us there, Triton's 19.0
    return (is_slower and _reject_slower(t)) or _reject_everywhere(t)


def _sizes_record(p: AttentionProblem, splits: int = 1) -> cuda.AttentionDecode:
    """What the sizes of scratch memory follow from."""
    return cuda.AttentionDecode(
        batch=p.batch, heads=p.heads, kv_heads=p.kv_heads, head_dim=p.head_dim, splits=splits
    )


def _decode_record(
    q_ptr: Tensor, k_ptr: Tensor, v_ptr: Tensor, k_scale_ptr: Tensor | None, v_scale_ptr: Tensor | None, o_ptr: Tensor,
    partial_ptr: Tensor | None, counter_ptr: Tensor, scale: float, splits: int, keys: int, address: Address,
) -> cuda.AttentionDecode:  # fmt: skip
    inputs = q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr
    tensors = *inputs, None, o_ptr, partial_ptr, counter_ptr
    batch, heads, _, head_dim = q_ptr.shape
    sizes = batch, heads, k_ptr.shape[1], head_dim, splits, DTYPE_CODES[k_ptr.dtype], keys
    scale_strides = (0, 0, 0) if k_scale_ptr is None else k_scale_ptr.stride()
    strides = *k_ptr.stride()[:3], *scale_strides
    return cuda.AttentionDecode(*map(address, tensors), *strides, scale, *sizes)


def launch_decode(
    p: AttentionProblem,
    c: RowTile,
    t: Target,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    scores: Any,
) -> Launch:
    """q and o [B,H,1,D] dense fp16, k and v [B,Hkv,S,D] fp16 or s8, equal strides; of scores what a plain attention has."""
    keys = min(p.kv_len, max(scores.offset + 1, 0)) if scores.causal else p.kv_len
    splits = cuda.library().decode_splits(p.batch, p.heads, p.kv_heads, keys)
    record = _sizes_record(p, splits)
    floats = record.partial_floats()
    arguments = {
        "q_ptr": q, "k_ptr": k, "v_ptr": v, "k_scale_ptr": scores.k_scale, "v_scale_ptr": scores.v_scale,
        "o_ptr": o,
        "partial_ptr": torch.empty(floats, device=q.device) if floats else None,
        "counter_ptr": counters(q.device, record.num_counters()), "scale": scores.scale, "splits": splits,
        "keys": keys,
    }  # fmt: skip
    return Launch(
        "attention_decode.cuda", CudaFunction(_decode_record), (), arguments, {},
        reads=("q_ptr", "k_ptr", "v_ptr", "k_scale_ptr", "v_scale_ptr"), writes=("o_ptr",),
    )  # fmt: skip


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _source() -> str:
    """Of the library, while it can run; "" else, as for whatever is not timed."""
    return "" if cuda.missing() else cuda.library().digest


def _register(
    name: str, op: str, rank: int, reject: Callable[..., str], launch: Callable[..., Launch]
) -> None:
    register(Kernel(name, op, rank, reject, _tiles, launch, source=_source))


_register("linear_w8a8.cuda", "linear_quantized", 5, reject_gemv, launch_w8a8)
_register("linear_w8a8_gemm.cuda", "linear_quantized", 15, reject_gemm, launch_w8a8)
_register("linear_w4a16.cuda", "linear_quantized", 5, reject_w4a16, launch_w4a16)
_register("attention_decode.cuda", "attention", 5, reject_decode, launch_decode)
